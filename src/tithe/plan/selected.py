"""What a plan has chosen: new selections are taken over, optimizer state goes with them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tithe import distributed
from tithe.plan.mount import Mount
from tithe.plan.optimizer_state import carry_state
from tithe.rules import Binding, FlatTheta
from tithe.selection import Coordinates, Grid, Selection


class SelectedWeights:
    """The selections of the weights to choose from, and the flat θ under them where they will change.

    Args:
        mount: of the model.
        bindings: the weights to choose from, in the model's order.
        optimizers: those that are bound, whose state goes with a new choice.
        whole: weights of the head of which θ is the master, all selected always.
        changes: whether the choice will be made again.
    """

    def __init__(
        self,
        mount: Mount,
        bindings: Sequence[Binding],
        optimizers: Sequence[Optimizer],
        whole: Sequence[Binding],
        *,
        changes: bool,
    ) -> None:
        self.bindings, self.whole, self.changes = bindings, whole, changes
        for binding in whole:
            binding.select(Grid(tuple(binding.weight.shape), {}))  # every entry, without a list of them
            mount.show(binding)
        self._mount = mount
        self._optimizers = optimizers
        self._flat: FlatTheta | None = None
        self._resized = self._emptied = False
        self._shown: set[str] = set()

    @property
    def capacity(self) -> int | None:
        """Return how many values the flat θ holds, or None where every choice is made to measure."""
        return None if self._flat is None else self._flat.parameter.numel()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over θ: one flat parameter where the choice will change, else one for each tensor chosen."""
        if self._flat is not None:
            yield "theta", self._flat.parameter
        elif not self.changes:
            yield from ((b.name, b.theta) for b in self.bindings if b.selection.size or b.name in self._shown)

    def set_capacity(self, size: int) -> None:
        """Make one flat θ of `size` values where the choice will change."""
        if self._flat is not None:
            self._emptied = self._flat.resize(size)
        elif self.changes:
            self._flat = self._mount.join(self.bindings, size)

    def take(self, chosen: Mapping[str, Selection], max_positions: Tensor | None, *, carry: bool = True) -> bool:
        """Take over a choice; returns whether anything changed.

        Args:
            chosen: name → selection; what is not named is frozen.
            carry: whether the optimizers' state follows it; not where theirs is loaded too.
            max_positions: int64, for each weight the values of an input channel that the choice was priced for, or
                -1 for any.

        Raises:
            TitheError: on every rank, when ranks chose differently.
        """
        new = {b.name: chosen.get(b.name, Coordinates.nothing(b.selection.shape)) for b in self.bindings}
        if distributed.world_size() > 1:
            items = [selection.items for selection in new.values()]
            digest = torch.stack([torch.stack([i.sum(), (i * i % 1_000_003).sum()]) for i in items])
            distributed.check_same("selection", digest)
        old = {b.name: b.selection for b in self.bindings}
        changed = [b for b in self.bindings if not _same(old[b.name], new[b.name])]
        if self._flat is not None and (changed or self._emptied):
            self._flat.take(new)
            self._emptied = False
            if carry:
                self._carry_flat(self._flat, old)
        elif self._flat is None:
            for binding in changed:
                self._resized = self._resized or old[binding.name].size != new[binding.name].size
                binding.select(new[binding.name])
                self._mount.show(binding)
                self._shown.add(binding.name)
                if carry:
                    self._carry(binding, old[binding.name])
        self.limit(max_positions)
        self._mount.still()
        return bool(changed)

    def outgrown(self, limits: Tensor) -> Tensor:
        """Return the limits of inputs, raised to what any rank has seen since; the same object where they hold.

        Args:
            limits: int64, as `take` was given them.
        """
        seen = [b.seen_positions / b.max_positions for b in self.bindings if b.max_positions]
        for binding in self.bindings:
            binding.seen_positions = 0
        factor = torch.tensor([max(seen, default=1.0)], dtype=torch.float64)
        if distributed.world_size() > 1:
            distributed.meet("the sizes of inputs")
            factor = distributed.gather(factor.to(self.bindings[0].weight.device)).max().cpu()
        if float(factor) <= 1:
            return limits
        return torch.where(limits > 0, (limits * factor - 1e-6).ceil().to(limits.dtype), limits)

    @property
    def larger(self) -> bool:
        """Return whether an input was larger than the choice was priced for."""
        return any(binding.seen_positions for binding in self.bindings)

    def limit(self, max_positions: Tensor | None) -> None:
        """Set the largest inputs that the choice is priced for, as `take` does."""
        limits = [-1] * len(self.bindings) if max_positions is None else max_positions.tolist()
        for binding, limit in zip(self.bindings, limits, strict=True):
            binding.max_positions = None if limit < 0 else limit

    def _carry(self, binding: Binding, old: Selection) -> None:
        for optimizer in self._optimizers:
            if binding.theta in optimizer.state:
                carry_state(optimizer.state[binding.theta], old, binding.selection)
            elif not any(binding.theta is p for group in optimizer.param_groups for p in group["params"]):
                optimizer.param_groups[0]["params"].append(binding.theta)

    def _carry_flat(self, flat: FlatTheta, old: Mapping[str, Selection]) -> None:
        """Rearrange the state of the flat θ part by part; the unused end starts at zero."""
        for optimizer in self._optimizers:
            state = optimizer.state.get(flat.parameter, {})
            for key, value in state.items():
                if not isinstance(value, Tensor) or value.shape != flat.parameter.shape:
                    continue
                before = value.split([*(old[b.name].size for b in self.bindings), value.numel() - _total(old)])
                after = torch.zeros_like(value)
                start = 0
                for binding, part in zip(self.bindings, before, strict=False):
                    was, size = old[binding.name], binding.selection.size
                    if size:
                        carried = {key: part.view(was.theta_shape)}
                        carry_state(carried, was, binding.selection)
                        after[start : start + size] = carried[key].reshape(-1)
                    start += size
                state[key] = after

    def count(self) -> None:
        """Count what is selected now among what has moved, trained or not: a file holds it."""
        for binding in self.bindings:
            binding.count()

    def commit(self, held: Container[int] = ()) -> bool:
        """Write every θ that changed into its weight; returns whether any had.

        Args:
            held: ids of parameters that are written also where their version did not change, as after a fused kernel.
        """
        written = [b.commit(force=id(b.parameter) in held) for b in (*self.bindings, *self.whole)]
        return any(written)

    @property
    def resized(self) -> bool:
        """Return whether θ changed its size since the last step, which an earlier wrapper does not follow."""
        return self._resized

    def check_ranks(self) -> None:
        """Check after a step that θ which changed its size is the same on every rank.

        Raises:
            TitheError: on every rank, when it is not: a wrapper that fixed its buckets before did not follow.
        """
        if self._resized and distributed.world_size() > 1:
            values = [b.theta.detach() if b.values is None else b.values for b in self.bindings]
            sums = torch.stack([value.double().sum() for value in values])
            distributed.check_same("theta", sums.view(torch.int64), distributed.fixed_sizes_error())
        self._resized = False


def _total(selections: Mapping[str, Selection]) -> int:
    return sum(selection.size for selection in selections.values())


def _same(old: Selection, new: Selection) -> bool:
    both_empty = not old.size and not new.size
    return both_empty or (old.alike(new) and torch.equal(old.items.cpu(), new.items.cpu()))
