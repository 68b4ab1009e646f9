"""SpIEL: a selection that evolves: what moves least is dropped, and as much is grown where gradients are large.

Ansell, Vulić, Sterz, Korhonen, Ponti. *Scaling Sparse Fine-Tuning to Large Language Models.* arXiv 2401.16405, 2024,
section 3 (SpIEL-AG).

Deviations from the paper: the first selection is grown by gradient too, where the paper's is random; gradients are
those of `samples` samples when it is chosen, not accumulated over the last steps; the part that is replaced stays the
same, where the paper's falls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tithe.errors import TitheError
from tithe.method import SelectionContext, SparseMethod
from tithe.methods.fish import FISH
from tithe.schedule import Schedule, every
from tithe.select.topk import top_k
from tithe.selection import Coordinates

_EACH_EPOCH = every(1, "epochs")


@dataclass(frozen=True)
class SpIEL(SparseMethod):
    """Train single weights; now and then drop those that moved least, and grow as many where gradients are largest.

        drop: the `replaced` · k with the smallest |w − w when selected|        grow: as many with the largest |∂L/∂w|

    Args:
        density: fraction of all parameters that is trained, head included, in (0, 1].
        replaced: part of the selected weights that each choice drops, in [0, 1].
        samples: how many samples gradients are taken over, all ranks together.
        reselect: when to choose again.

    Raises:
        TitheError: when a value is out of range.

    Example:
        >>> SpIEL(density=0.01).reselect
        Schedule(period=1, unit='epochs')
    """

    density: float
    replaced: float = 0.2
    samples: int = 256
    reselect: Schedule | None = _EACH_EPOCH

    def __post_init__(self) -> None:
        FISH(density=self.density, samples=self.samples, reselect=self.reselect)  # refuses what is out of range
        if not 0 <= self.replaced <= 1:
            raise TitheError(
                "SpIEL", found=f"replaced={self.replaced}", expected="a fraction in [0, 1]", remedy="try 0.2"
            )

    @property
    def needs_data(self) -> bool:
        """Gradients are taken over data."""
        return True

    def num_selected(self, context: SelectionContext) -> int:
        """Say how many weights the density leaves beside the head.

        Raises:
            TitheError: when nothing is left after the head.
        """
        return FISH(density=self.density).num_selected(context)

    def choose(self, context: SelectionContext) -> dict[str, Coordinates]:
        """Keep what moved most, and grow the rest anew."""
        k, stays = self.num_selected(context), self._staying(context)
        scores = context.scores("gradient", samples=self.samples)
        others = ((name, _without(score, stays[name][0])) for name, score in scores)
        grown = top_k(others, k - sum(places.numel() for places, _ in stays.values()), context.sizes)
        chosen: dict[str, Coordinates] = {}
        for name, (places, start) in stays.items():
            new = grown[name].to(places)
            places, order = torch.cat([places, new]).sort()
            now = context.weight(name).reshape(-1)[new].to(start)
            context.note(f"start of {name}", torch.cat([start, now])[order])
            chosen[name] = Coordinates(context.shapes[name], places.cpu())
        return chosen

    def _staying(self, context: SelectionContext) -> dict[str, tuple[Tensor, Tensor]]:
        """Name → indices of what stays selected, and their values when they were selected."""
        present: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name in context.sizes:
            now = context.trained(name)
            places = context.selected(name).to(now.device)
            start = context.noted(f"start of {name}")
            start = now if start is None else start.to(now)
            present[name] = places, start, (now - start).abs()
        counts = {name: places.numel() for name, (places, _, _) in present.items()}
        num_dropped = round(self.replaced * sum(counts.values()))
        moved = ((name, change) for name, (_, _, change) in present.items())
        kept = top_k(moved, sum(counts.values()) - num_dropped, counts)
        return {name: (places[kept[name]], start[kept[name]]) for name, (places, start, _) in present.items()}


def _without(score: Tensor, places: Tensor) -> Tensor:
    """A copy of a score in which these places come last."""
    flat = score.reshape(-1).clone()
    flat[places.to(flat.device)] = -1.0
    return flat
