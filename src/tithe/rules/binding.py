"""What a module's parameter is bound to while a plan is attached: its θ, its selection, its probe."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tithe.rules.matrix import Touch
from tithe.selection import Coordinates

if TYPE_CHECKING:
    from tithe.rules.pool import Pool
    from tithe.rules.probe import Probe

_SUFFIX = "@theta"


def theta_key(parameter: str) -> str:
    """The name under which θ of a module's parameter is registered on that module."""
    return parameter + _SUFFIX


class Binding:
    """One weight (however many modules share it), the selection in it, what was ever trained (`moved`), and its θ.

    Args:
        name: the parameter's name in the model.
        weight: the real parameter; it keeps its key in `state_dict` and gets no gradient of its own.
    """

    def __init__(self, name: str, weight: nn.Parameter) -> None:
        self.name = name
        self.weight = weight
        self.theta = nn.Parameter(weight.detach().new_empty(0), requires_grad=False)
        self.selection = Coordinates.nothing(tuple(weight.shape))
        self.indices = self.selection.indices
        self.moved = self.selection
        self.counted = False
        self.probe: Probe | None = None
        self.pool: Pool | None = None
        self.touch: Touch | None = None
        self.committed = self.theta._version

    @property
    def active(self) -> bool:
        """Whether a gradient is asked of this weight: some of it is selected, or it is being scored."""
        return self.probe is not None or self.selection.size > 0

    @property
    def asked(self) -> Tensor | None:
        """The tensor that stands for θ in autograd, or None when the weight is frozen."""
        if self.probe is not None:
            return self.probe.anchor
        if not self.selection.size:
            return None
        return self.theta if self.pool is None else self.pool.view(self)

    def select(self, selection: Coordinates) -> None:
        """Take over `selection`: θ keeps its identity and gets the weight's values there."""
        self.selection = selection.to(self.weight.device)
        self.indices = self.selection.indices
        self.touch = Touch.of(self.indices, selection.shape) if selection.size and len(selection.shape) > 1 else None
        self.counted = False
        self.theta.grad = None
        self.theta.requires_grad_(False)
        if self.theta.numel() != selection.size:
            # A loss of an earlier step keeps autograd's accumulator for θ alive, which remembers the old size; torch
            # drops it when the dtype changes. A wrapper that holds it (DDP) is told at the next step to wrap again.
            self.theta.data = self.theta.data.to(torch.float32 if self.theta.dtype == torch.float64 else torch.float64)
        self.theta.data = self.selection.gather(self.weight.detach())
        if self.selection.size:
            self.theta.requires_grad_(True)
        self.committed = self.theta._version

    def follow(self) -> None:
        """Follow the weight to other memory, perhaps on another device."""
        if self.indices.device == self.weight.device:
            return
        self.selection = self.selection.to(self.weight.device)
        self.indices = self.selection.indices
        if self.touch is not None:
            self.touch = Touch.of(self.indices, self.selection.shape)

    @property
    def index_bytes(self) -> int:
        """Bytes of the tensors that say where θ belongs."""
        tensors = [self.indices]
        if self.touch is not None:
            tensors += [self.touch.rows, self.touch.columns, self.touch.row, self.touch.column]
            tensors += [] if self.touch.inner is None else [self.touch.inner]
        return sum(t.numel() * t.element_size() for t in tensors)

    def commit(self, *, force: bool = False) -> None:
        """Write θ into the weight in place, w ← S θ; entries outside the selection keep their bits.

        Args:
            force: also when θ's version did not change, as after an update through `.data` or a foreign kernel.
        """
        if self.theta.numel() and (force or self.theta._version != self.committed):
            self.selection.scatter_(self.weight, self.theta.detach())
            self.committed = self.theta._version
            if not self.counted:
                earlier = self.moved.indices.to(self.indices.device)
                self.moved = Coordinates(self.selection.shape, torch.cat([earlier, self.indices]).unique())
                self.counted = True

    def refresh(self) -> None:
        """θ ← Sᵀ w, after the weight itself was loaded or changed."""
        with torch.no_grad():
            self.theta.copy_(self.selection.gather(self.weight))
        self.committed = self.theta._version
