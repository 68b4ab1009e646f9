"""What a θ that weights share is to them: how it is written into them, and how its gradient comes together.

large weight   ──backward──> its gradient is projected as soon as it is there, and goes
small weights  ──backward──> gradients are kept side by side; when backward is done, they are projected together
several ranks  ──backward──> so are all gradients; the ranks share the columns out
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode  # pyright: ignore[reportPrivateUsage]

from tithe import distributed
from tithe.averages import BLOCK, Basis
from tithe.errors import TitheError
from tithe.plan.gradient_buffer import GradientBuffer, ShardedGradientBuffer
from tithe.rules import Binding, SharedTheta, digest
from tithe.selection import Span, without_values

SMALL = 1 << 16
"""Entries up to which a weight is small: its products take less time than the calls that they are made of."""


def in_order(sizes: Mapping[str, int]) -> list[str]:
    """Return names in the order of a basis: large weights first, so that the small ones lie together."""
    return sorted(sizes, key=lambda name: sizes[name] <= SMALL)


class ThetaSharing:
    """A shared θ over the weights of a model.

    Args:
        shared: θ.
        bindings: the weights, in the order of the basis.
        spans: their selections.
        basis: what they move in.
    """

    def __init__(self, shared: SharedTheta, bindings: Sequence[Binding], spans: Sequence[Span], basis: Basis) -> None:
        self.shared, self.bindings, self.spans, self.basis = shared, list(bindings), list(spans), basis
        ranks = distributed.world_size() > 1
        self.num_large = 0 if ranks else sum(strip.numel > SMALL for strip in basis.columns)
        strips = basis.columns[self.num_large :]
        self.kept: GradientBuffer | None = None
        if strips:
            self.kept = (ShardedGradientBuffer if ranks else GradientBuffer)(basis, strips, bindings[0].weight.device)
        for binding, span in zip(bindings, spans, strict=True):
            binding.selection = span
        for binding, span, strip in zip(bindings[self.num_large :], spans[self.num_large :], strips, strict=True):
            assert self.kept is not None
            binding.selection = Span(span.shape, self.kept.columns(strip), span.mix, span.origin, span.places)
        self._committed: int | None = None
        self._values = shared.parameter.detach().clone()
        self._versions = [binding.weight._version for binding in self.bindings]
        self._listening: int | None = None
        self._listen()

    def _listen(self) -> None:
        """Have θ's gradient come by when all of backward is done.

        A deep copy of the model has another θ without a hook: which one has it is told by a number, which is copied.
        """
        if self._listening != id(self.shared.parameter):
            self.shared.parameter.register_hook(self._collect)
            self._listening = id(self.shared.parameter)

    def __call__(self, module: Any, args: Any) -> None:
        """Before the root's forward pass: what an optimizer moved is in the weights, and θ listens for its gradient."""
        if torch.compiler.is_compiling():
            return
        self._listen()
        if self.kept is not None:
            self.kept.forget()
        if _get_current_dispatch_mode() is None:  # not on shapes alone, nor while bytes are counted
            self.follow()
        self.commit()

    def follow(self) -> None:
        """Write the weights anew where θ or they were written from outside.

        Raises:
            TitheError: when other values were in the weights than those of θ: nothing can follow them.
        """
        theta = self.shared.parameter.detach()
        if not torch.equal(theta, self._values.to(theta.device)):  # the model may have moved
            self.commit(force=True)  # also through `.data`
        written = [b for b, version in zip(self.bindings, self._versions, strict=True) if b.weight._version != version]
        before = [digest(binding.weight.detach()) for binding in written]
        if written:
            self.commit(force=True)
        for binding, value in zip(written, before, strict=True):
            if not torch.equal(digest(binding.weight.detach()), value):
                raise TitheError(
                    binding.name,
                    found="values written into it from outside, which are undone now",
                    expected="weights that move in the span of the checkpoints alone",
                    remedy="call plan.release() first, or record what was loaded and attach to a history with it",
                )

    @property
    def is_due(self) -> bool:
        """Return whether θ moved since it was written."""
        return self._committed != self.shared.parameter._version

    def commit(self, *, force: bool = False) -> bool:
        """Write the weights anew where θ changed; returns whether they were.

        Args:
            force: also when its version did not change, as after an update through `.data`.
        """
        if not force and not self.is_due:
            return False
        for binding, span in zip(self.bindings[: self.num_large], self.spans, strict=False):
            span.scatter_(binding.weight, self.shared.row(binding.name))
        if self.kept is not None:
            self._write_kept(self.kept)
        self._committed = self.shared.parameter._version
        self._values = self.shared.parameter.detach().clone()
        self._versions = [binding.weight._version for binding in self.bindings]
        return True

    def _write_kept(self, kept: GradientBuffer) -> None:
        bindings, spans = self.bindings[self.num_large :], self.spans[self.num_large :]
        if self.shared.parameter.dim() == 1:  # one row of numbers for all
            weights = spans[0].weights(self.shared.row(bindings[0].name))
        else:
            weights = torch.stack([s.weights(self.shared.row(b.name)) for b, s in zip(bindings, spans, strict=True)])
        entries = kept.entries(weights)
        for binding, span, strip in zip(bindings, spans, kept.strips, strict=True):
            start = (strip.first - kept.first) * BLOCK
            span.write_(binding.weight, entries[start : start + strip.numel])

    def _collect(self, grad: Tensor) -> Tensor:
        """θ's gradient when all of backward is done, with that of what was kept."""
        if self.kept is None or without_values(grad):
            return grad
        products = self.kept.products()
        mixes = [span.mix for span in self.spans[self.num_large :]]
        if grad.dim() == 1:
            return grad + (mixes[0].T @ products.sum(0)).to(grad)
        rows = torch.einsum("lnm,ln->lm", torch.stack(mixes), products)
        return torch.cat([grad[: self.num_large], grad[self.num_large :] + rows.to(grad)])
