"""What a module's parameter is bound to while a plan is attached: its θ, its selection, its probe."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tithe.errors import TitheError
from tithe.rules.sparse.sparse_gradient import Touch
from tithe.selection import Channels, Coordinates, Selection

if TYPE_CHECKING:
    from tithe.rules.pool import Pool
    from tithe.rules.shared import Shared
    from tithe.rules.sparse.probes import Probe

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
        self.selection: Selection = Coordinates.nothing(tuple(weight.shape))
        self.moved = self.selection
        self.max_positions: int | None = None
        self.counted = False
        self.probe: Probe | None = None
        self.pool: Pool | Shared | None = None
        self.touch: Touch | None = None
        self.committed = self.theta._version

    @property
    def indices(self) -> Tensor:
        """Sorted flat indices of the selected entries."""
        return self.selection.indices

    @property
    def active(self) -> bool:
        """Whether a gradient is asked of this weight: some of it is selected, or it is being scored."""
        return self.probe is not None or self.selection.size > 0

    def fits(self, groups: int, *, transposed: bool) -> bool:
        """Whether the selection has a rule for such a use of the weight; selected channels mean one layout alone."""
        selection = self.selection
        if self.probe is not None or not isinstance(selection, Channels):
            return True
        return (selection.groups, selection.transposed) == (groups, transposed)

    def check_positions(self, positions: int) -> None:
        """Refuse an input larger than the one that the selection's price was made for.

        Raises:
            TitheError: when `positions`, the values of one input channel, pass the limit.
        """
        if self.max_positions is not None and positions > self.max_positions:
            raise TitheError(
                self.name,
                found=f"{positions} values of each input channel",
                expected=f"at most {self.max_positions}, for which the budget was priced",
                remedy="put the largest batch first in data=, or run what needs no gradient under torch.no_grad()",
            )

    @property
    def asked(self) -> Tensor | None:
        """The tensor that stands for θ in autograd, or None when the weight is frozen."""
        if self.probe is not None:
            return self.probe.anchor
        if not self.selection.size:
            return None
        return self.theta if self.pool is None else self.pool.view(self)

    def select(self, selection: Selection) -> None:
        """Take over `selection`: θ keeps its identity and gets the weight's values there."""
        self.selection = selection.to(self.weight.device)
        self.touch = self._touch()
        self.counted = False
        self.theta.grad = None
        self.theta.requires_grad_(False)
        if self.theta.shape != selection.theta_shape:
            # A loss of an earlier step keeps autograd's accumulator for θ alive, which remembers the old size; torch
            # drops it when the dtype changes. A wrapper that holds it (DDP) is told at the next step to wrap again.
            self.theta.data = self.theta.data.to(torch.float32 if self.theta.dtype == torch.float64 else torch.float64)
        self.theta.data = self.selection.gather(self.weight.detach())
        if self.selection.size:
            self.theta.requires_grad_(True)
        self.committed = self.theta._version

    def follow(self) -> None:
        """Follow the weight to other memory, perhaps on another device."""
        if self.selection.items.device != self.weight.device:
            self.selection = self.selection.to(self.weight.device)
            self.touch = self._touch()

    def _touch(self) -> Touch | None:
        selection = self.selection
        if not isinstance(selection, Coordinates) or not selection.size or len(selection.shape) < 2:
            return None
        return Touch.of(selection.indices, selection.shape)

    @property
    def index_bytes(self) -> int:
        """Bytes of the tensors that say where θ belongs."""
        tensors = [self.selection.items]
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
                self.moved = self.selection.union(self.moved)
                self.counted = True

    def refresh(self) -> None:
        """θ ← Sᵀ w, after the weight itself was loaded or changed; a θ that weights share follows none of them."""
        if not self.theta.numel():
            return
        with torch.no_grad():
            self.theta.copy_(self.selection.gather(self.weight))
        self.committed = self.theta._version
