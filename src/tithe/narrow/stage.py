"""Run a narrow network in the model's own forward, whose modules read smaller tensors meanwhile.

    module.__dict__["weight"] = the live part        found before module._parameters["weight"], which stays whole
    module.__dict__["groups"] = as many as there are

Classes, forwards and `state_dict` stay untouched. Kernels are the ordinary ones, on smaller dense tensors.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

from tithe.coupling import Coupling, Group
from tithe.forward import untouched
from tithe.narrow.fit import Fit
from tithe.narrow.shrinking import norm_ratio, smaller
from tithe.narrow.widths import Count, find_counts
from tithe.selection import Grid

_MISSING = object()
_WIDE = 16
"""Units of a group from which on its widths are rounded."""


class Stage:
    """The tensors of a model that may be narrow, and the modules that read them.

    Args:
        model: the model; nothing is changed until `run`.
        coupling: which positions may be absent.
        counts: the numbers of its modules that follow a width, or None to find them, in a model of full width.
        written: frozen parameters that a forward pass of the model writes.
    """

    def __init__(
        self,
        model: nn.Module,
        coupling: Coupling,
        counts: Sequence[Count] | None = None,
        written: Sequence[nn.Parameter] = (),
    ) -> None:
        self.model, self.coupling, self.written = model, coupling, tuple(written)
        self.counts = tuple(find_counts(model, coupling) if counts is None else counts)
        self.running = False
        self._tensors: dict[str, Tensor] = {}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        known = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        for module in model.modules():
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and known[id(tensor)] in coupling.places:
                    self._tensors[known[id(tensor)]] = tensor
                    self._places.setdefault(known[id(tensor)], []).append((module, key))
        self._alike: dict[tuple[tuple[int, ...], tuple[tuple[int, int], ...]], list[str]] = {}
        for name, tensor in self._tensors.items():  # one grid for a norm's weight, bias and statistics
            cut = tuple(sorted(coupling.places[name].items()))
            self._alike.setdefault((tuple(tensor.shape), cut), []).append(name)
        self._counts = [(model.get_submodule(count.path), count) for count in self.counts]
        rows = [(group.start, group.num_units, self._multiple(group)) for group in coupling.groups]
        self._starts, sizes, multiples = torch.tensor(rows, dtype=torch.int64).view(-1, 3).unbind(1)
        self._rounding = torch.arange(len(rows)).repeat_interleave(sizes), multiples
        self._statistics = [
            (module, key)
            for module in model.modules()
            if isinstance(module, _NormBase) and module.track_running_stats
            for key in module._buffers
        ]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return the whole tensors that may be narrow; `Module.to` replaces buffers, while it keeps parameters."""
        for name, [(module, key), *_] in self._places.items():
            buffer = module._buffers.get(key)
            if buffer is not None:
                self._tensors[name] = buffer
        return self._tensors

    def _multiple(self, group: Group) -> int:
        """What the number of a group's live units is rounded up to a multiple of.

        Coarser where a group is wide, so that few widths occur, and in channels-last order, whose kernels want
        multiples of 8: a step of ResNet-20 at 36 % takes 253 ms with 8 and 343 ms with 4, one of VGG-16 at 10 % 91 ms
        and 98 ms.
        """
        tensors = [self.tensors[name] for name, _ in group.members if name in self.tensors]
        kernels = [tensor for tensor in tensors if tensor.dim() > 2]
        if not kernels or group.num_units < _WIDE:
            return 1
        last = any(kernel.is_cuda or not kernel.is_contiguous() for kernel in kernels)
        return 16 if group.num_units >= 16 * _WIDE else 8 if last or group.num_units >= 8 * _WIDE else 4

    def grids(self, mask: Tensor) -> dict[str, Grid]:
        """Return the part of each tensor that exists when the units of `mask`, bool (n,), do."""
        return self._grids(self.coupling.kept(mask.cpu()))

    def _grids(self, kept: Sequence[Tensor]) -> dict[str, Grid]:
        """The part of each tensor that is at some positions of each axis; those that are cut alike share one grid."""
        found: dict[str, Grid] = {}
        for (shape, cut), names in self._alike.items():
            found |= dict.fromkeys(names, Grid.trusted(shape, {axis: kept[at] for axis, at in cut}))
        return found

    def fit(self, mask: Tensor) -> Fit:
        """Return the layout of the network of `mask`, bool (n,); widths are rounded up if kernels need compiling."""
        mask = mask.cpu()
        read = mask | self._filling(mask)
        if torch.equal(mask, read):
            grids = self.grids(mask)
            return Fit(grids, grids, {}, {})
        kept, existing, within, added = self.coupling.nested(mask, read)
        grids, wide = self._grids(kept), self._grids(existing)
        inner: dict[str, Grid] = {}
        zeros: dict[str, dict[int, Tensor]] = {}
        for (_, cut), names in self._alike.items():
            blank = {axis: added[at] for axis, at in cut if added[at].numel()}
            if blank:
                shape = wide[names[0]].theta_shape
                inner |= dict.fromkeys(names, Grid.trusted(shape, {axis: within[at] for axis, at in cut}))
                zeros |= dict.fromkeys(names, blank)
        return Fit(grids, wide, inner, zeros)

    def _filling(self, mask: Tensor) -> Tensor:
        """The first absent units of each group, as many as make its number a multiple, bool (n,)."""
        group, multiple = self._rounding
        count = torch.zeros_like(multiple).index_add_(0, group, mask.long())
        lacking = (-count).remainder(multiple)
        absent = (~mask).long()
        rank = absent.cumsum(0) - absent
        first = rank[self._starts]
        return ~mask & (rank - first[group] < lacking[group])

    @torch.no_grad()
    def live(self, grids: Mapping[str, Grid]) -> dict[str, Tensor]:
        """Return the smaller tensors as copies without gradient."""
        return self.filled(Fit(grids, grids, {}, {}))

    @torch.no_grad()
    def filled(self, fit: Fit) -> dict[str, Tensor]:
        """Return the smaller tensors padded for that layout."""
        return fit.take(self.tensors)

    def untouched(self) -> AbstractContextManager[None]:
        """Put back what further forward passes inside the block write."""
        return untouched(self.model, also=self.written)

    @contextmanager
    def run(self, grids: Mapping[str, Grid], live: Mapping[str, Tensor], *, spare: bool = False) -> Generator[None]:
        """Run the model as the narrow network of `grids` inside the block.

        Args:
            grids: of every tensor that may be narrow.
            live: name → the smaller tensor that modules read instead.
            spare: leave the running statistics of the norms that are whole as they are, too.
        """
        before: list[tuple[dict[str, Any], str, Any]] = []

        def show(module: nn.Module, key: str, value: Any) -> None:
            own = vars(module)
            before.append((own, key, own.get(key, _MISSING)))
            own[key] = value

        try:
            self.running = True
            if spare:
                for module, key in self._statistics:
                    buffer = module._buffers[key]
                    if buffer is not None:
                        show(module, key, buffer.clone())
            for name, tensor in live.items():
                for module, key in self._places[name]:
                    show(module, key, tensor)
            lengths = self._lengths(grids)
            for module, count in self._counts:
                show(module, count.attribute, count.at(lengths[count.axis]))
            yield
        finally:
            self.running = False
            for own, key, value in reversed(before):
                if value is _MISSING:
                    own.pop(key, None)
                else:
                    own[key] = value

    def settle(self, alive: Tensor, *, rescale: bool = False) -> Stage:
        """Make the model itself a narrow network, for good: its tensors become their live part.

        Args:
            alive: bool (n,), the units that stay.
            rescale: multiply trained weights that lose inputs, so that they keep the norm with which they read.

        Returns:
            The stage of the model as it is then.
        """
        grids = self.grids(alive)
        lengths = self._lengths(grids)
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                part = smaller(tensor.data, grids[name])
                if rescale and tensor.requires_grad:
                    inputs = [axis for axis in grids[name].axes if (name, axis) in self.coupling.reads]
                    part.mul_(norm_ratio(tensor.data, part, grids[name], inputs))
                tensor.data = part
        left: list[Count] = []
        for module, count in self._counts:
            length = lengths[count.axis]
            setattr(module, count.attribute, count.at(length))
            left.append(replace(count, full=count.at(length), length=length))
        return Stage(self.model, self.coupling.shrink(alive), left, self.written)

    def numbers(self, model: nn.Module) -> dict[str, dict[str, int]]:
        """Return the widths that modules of `model`, a copy at any width, state: path → attribute → number."""
        found: dict[str, dict[str, int]] = {}
        for count in self.counts:
            module = model.get_submodule(count.path)
            found.setdefault(count.path, {})[count.attribute] = getattr(module, count.attribute)
        return found

    def _lengths(self, grids: Mapping[str, Grid]) -> Sequence[int]:
        """The live positions of each axis."""
        lengths = [len(axis) for axis in self.coupling.axes]
        for name, grid in grids.items():
            for axis, at in self.coupling.places[name].items():
                lengths[at] = grid.axes[axis].numel()
        return lengths
