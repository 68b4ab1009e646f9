"""Derive the model's own predictive distribution from its loss, for the true Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tithe.errors import TitheError

_LOSSES = {
    F.cross_entropy: "cross_entropy",
    F.mse_loss: "mse_loss",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
}


class Likelihood(TorchFunctionMode):
    """A recorder of the predictions that reach a known loss function while a loss is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOSSES:
            self.seen.append((_LOSSES[func], args[0] if args else kwargs["input"]))
        return func(*args, **kwargs)

    def roots(self, num_samples: int) -> Iterator[Tensor]:
        """Return scalars whose per-sample squared gradients add up to E_{y ~ p(y|x)} (∂ log p(y|x))².

        Cross-entropy: Σ_c p_c (∂ log p_c)². Squared error, as −log of a normal density of variance ½: Σ_o 2 (∂f_o)².
        Binary cross-entropy with independent labels: Σ_o σ_o (1 − σ_o) (∂f_o)².

        Args:
            num_samples: B; the predictions must have one row for each.

        Raises:
            TitheError: when not exactly one known loss was seen, or its predictions do not have B rows.
        """
        if len(self.seen) != 1:
            found = ", ".join(name for name, _ in self.seen) or "none"
            raise TitheError(
                "loss",
                found=f"{len(self.seen)} calls of a loss with a known likelihood ({found})",
                expected="exactly one of F." + ", F.".join(_LOSSES.values()),
                remedy='use one of them in the loss, or fisher="empirical"',
            )
        name, predicted = self.seen[0]
        rows = predicted.shape[0] if predicted.dim() else 0
        if rows != num_samples or (name == "cross_entropy" and predicted.dim() != 2):
            raise TitheError(
                "loss",
                found=f"predictions of shape {tuple(predicted.shape)} for {num_samples} samples",
                expected="one row of predictions a sample",
                remedy='use fisher="empirical" for losses over several positions of a sample',
            )
        outputs = predicted.reshape(num_samples, -1)
        outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
        if name == "cross_entropy":
            logs = torch.log_softmax(outputs, 1)
            weights = logs.detach().exp().sqrt()
        elif name == "mse_loss":
            logs, weights = outputs, torch.full_like(outputs, 2.0).sqrt()
        else:
            chance = outputs.detach().sigmoid()
            logs, weights = outputs, (chance * (1 - chance)).sqrt()
        for c in range(outputs.shape[1]):
            yield (weights[:, c] * logs[:, c]).sum()
