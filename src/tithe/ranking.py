"""Rank the layers that are worth a budget: reweighted gradient norms, measured once for an architecture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tithe.errors import TitheError
from tithe.files import replacing
from tithe.method import first_batches
from tithe.plan.mount import Mount
from tithe.plan.parameters import split_parameters
from tithe.scoring import channel_norms, price_channels
from tithe.select.channel_costs import Layer, cover

_FORMAT = 1


@dataclass(frozen=True)
class Ranking:
    """A ranking holds the reweighted gradient norm (RGN) of each layer of an architecture.

        RGN_layer = Σ_c ‖∂L/∂W_{:,c}‖₂ / (C'·D² + H·W)

    summed over the input channels c of the layer and over batches. It is a property of the architecture far more than
    of the task, so it is measured once, saved, and shipped with a model.

    Args:
        rgn: parameter name → RGN, in the model's order.
        shapes: parameter name → shape; a model of other names or shapes is refused.

    References:
        Quélennec et al., Study of Training Dynamics for Memory-Constrained Fine-Tuning, arXiv 2510.19675, 2025.

    Example:
        >>> Ranking({"a": 9.0, "b": 1.0}, {"a": (4, 4), "b": (4, 4)}).layers(0.9)
        ['a']
    """

    rgn: Mapping[str, float]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, layers: Mapping[str, Layer], norms: Mapping[str, Tensor]) -> Ranking:
        """Make a ranking from a price list and the norms of each layer's channels."""
        rgn = {name: float(norms[name].double().sum()) / layer.elements for name, layer in layers.items()}
        return cls(rgn, {name: layer.shape for name, layer in layers.items()})

    @classmethod
    def compute(
        cls,
        model: nn.Module,
        *,
        loss: Callable[[Any, Any], Tensor],
        data: Iterable[Any],
        where: str | Sequence[str] = "*",
        head: str | Sequence[str] = (),
        samples: int = 1024,
    ) -> Ranking:
        """Measure the ranking of a model as it is now; only one layer's gradient is in memory at a time.

        The paper adds up over a few epochs of ordinary fine-tuning: measure at several points and add (`+`).

        Args:
            model: without a plan; it is left as it was.
            loss: `loss(model, batch)`, the mean over the samples of the batch.
            data: batches; whole ones are read until they hold `samples` samples.
            where: globs over the parameters to rank.
            head: globs over the parameters that will be trained whole, and are not ranked.
            samples: how many samples.

        Raises:
            TitheError: as `tithe.attach`, or when no weight has input channels.
        """
        split = split_parameters(model, where=where, head=head)
        batches = first_batches(iter(data), samples)
        if not batches:
            raise TitheError("data", found="no batch", expected="at least one", remedy="pass data= some batches")
        grads = [(p, p.grad) for p in model.parameters()]
        mount = Mount(model, {name: p for name, p in split.floats.items() if name not in split.head})
        try:
            bindings = [mount.bindings[name] for name in split.candidates]
            layers = price_channels(model, bindings, loss, batches[0])
            if not layers:
                raise TitheError(
                    "where", found="no input channels", expected="linear layers or convolutions", remedy="widen where="
                )
            norms = channel_norms(model, bindings, layers, loss, batches, samples)
        finally:
            mount.release()
            for parameter, grad in grads:
                parameter.grad = grad
        return cls.of(layers, norms)

    def layers(self, coverage: float = 0.97) -> list[str]:
        """Return the fewest layers that hold `coverage` of the total RGN, largest first."""
        return cover(self.rgn, coverage)

    def __add__(self, other: Ranking) -> Ranking:
        """The sum of two rankings of one architecture."""
        self.check(other.shapes)
        other.check(self.shapes)
        return Ranking({name: value + other.rgn[name] for name, value in self.rgn.items()}, self.shapes)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the ranking with the layers to choose from, which may be fewer.

        Raises:
            TitheError: naming the first layer that the ranking does not know, or knows in another shape.
        """
        for name, there in shapes.items():
            here = self.shapes.get(name)
            if here != there:
                raise TitheError(
                    name,
                    found=f"a layer of shape {there}",
                    expected=f"shape {here}, as it was ranked" if here else "a layer that the ranking knows",
                    remedy="use the ranking of this architecture, or tithe.Ranking.compute(model, …) a new one",
                )

    def save(self, path: str | Path) -> None:
        """Write the ranking as JSON, atomically.

        Raises:
            TitheError: when the file cannot be written.
        """
        layers = [{"name": n, "shape": list(self.shapes[n]), "rgn": value} for n, value in self.rgn.items()]
        text = json.dumps({"tithe": "ranking", "format": _FORMAT, "layers": layers}, indent=1)
        with replacing(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Ranking:
        """Read a ranking that `save` wrote.

        Raises:
            TitheError: when there is no such file, or it is no ranking of this format.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if found["tithe"] != "ranking" or found["format"] != _FORMAT:
                raise ValueError(f"format {found['format']}")
            layers = found["layers"]
            rgn = {str(layer["name"]): float(layer["rgn"]) for layer in layers}
            if not all(0 <= value < math.inf for value in rgn.values()):
                raise ValueError("an RGN that is negative or not finite")
            return cls(rgn, {str(layer["name"]): tuple(int(n) for n in layer["shape"]) for layer in layers})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TitheError(
                str(path),
                found=f"no ranking ({type(error).__name__}: {error})",
                expected=f"a JSON file of format {_FORMAT}, written by Ranking.save",
                remedy="check the path, or measure it with tithe.Ranking.compute",
            ) from error
