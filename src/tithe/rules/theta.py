"""What a module's parameter is bound to while a plan is attached: its θ, its selection, its probe.

    its own θ  (K_w,)     one θ for all (m,), or a row each (W, m)     parts of one flat θ (K,), K = Σ K_w and unused
    `Binding.theta`       `SharedTheta`                                `FlatTheta`

θ of a weight in half precision is float32: the master copy of the selected values, which the weight holds rounded.
What an update adds below the weight's last bit is kept there until it counts. The two agree where θ rounds to the
weight.

Shapes: W weights, K_w selected entries of one, m coefficients of a span.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from tithe.errors import TitheError
from tithe.rules.sparse.probes import Probe
from tithe.rules.sparse.sparse_gradient import Touch
from tithe.selection import Channels, Coordinates, Grid, Selection, carried

_SUFFIX = "@theta"


def theta_key(parameter: str) -> str:
    """The name under which θ of a module's parameter is registered on that module."""
    return parameter + _SUFFIX


def theta_dtype(weight: torch.dtype, given: torch.dtype | None = None) -> torch.dtype:
    """The dtype of θ: float32 for a weight in half precision, else the weight's own, unless one is given.

    Args:
        weight: the weight's.
        given: for all weights, or None.

    Example:
        >>> theta_dtype(torch.bfloat16), theta_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return given or (torch.float32 if weight in (torch.float16, torch.bfloat16) else weight)


class CommonTheta(ABC):
    """One parameter that stands for θ of several weights."""

    parameter: nn.Parameter

    @abstractmethod
    def view(self, binding: Binding) -> Tensor:
        """What stands for θ of this weight in autograd."""

    @abstractmethod
    def values(self, binding: Binding) -> Tensor | None:
        """The values that are this weight's alone, apart from autograd; None where weights share all of them."""


class Binding:
    """One weight (however many modules share it), the selection in it, what was ever trained (`moved`), and its θ.

    Args:
        name: the parameter's name in the model.
        weight: the real parameter; it keeps its key in `state_dict` and gets no gradient of its own.
        dtype: of θ; None is `theta_dtype` of the weight's.

    Attributes:
        home: the module and the key where θ is registered, and `functional_call` may put another tensor.
    """

    def __init__(self, name: str, weight: nn.Parameter, dtype: torch.dtype | None = None) -> None:
        self.name = name
        self.weight = weight
        self.required = weight.requires_grad
        self._given, self._weight_dtype = dtype, weight.dtype
        self.theta = nn.Parameter(weight.detach().new_empty(0, dtype=self.dtype))
        self.selection: Selection = Coordinates.nothing(tuple(weight.shape))
        self.moved = self.selection
        self.max_positions: int | None = None
        self.seen_positions = 0
        self.counted = False
        self.probe: Probe | None = None
        self.common: CommonTheta | None = None
        self.home: tuple[nn.Module, str] | None = None
        self.touch: Touch | None = None
        self.outlived: dict[torch.Size, bool] = {}
        self._rest = digest(weight.detach())  # of the entries that are not selected
        self._agreed(None)

    @property
    def indices(self) -> Tensor:
        """Sorted flat indices of the selected entries."""
        return self.selection.indices

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that θ of this weight is to have."""
        return theta_dtype(self.weight.dtype, self._given)

    @property
    def active(self) -> bool:
        """Whether a gradient is asked of this weight: some of it is selected, or it is being scored."""
        return self.probe is not None or self.selection.size > 0

    def fits(self, groups: int, *, transposed: bool) -> bool:
        """Whether the selection has a rule for such a use of the weight; selected channels mean one layout alone."""
        selection = self.selection
        if self.probe is not None:
            return True
        if isinstance(selection, Channels):
            return (selection.groups, selection.transposed) == (groups, transposed)
        return isinstance(selection, Coordinates)

    def note_positions(self, positions: int) -> None:
        """Note an input larger than the one that the selection's price was made for; the plan says so after the step.

        Args:
            positions: the values of one input channel.
        """
        if self.max_positions is None or self.probe is not None:
            return
        if positions > max(self.max_positions, self.seen_positions):
            self.seen_positions = positions

    def saw(self, shape: torch.Size, outlived: bool) -> None:
        """Note in backward whether an input of this shape was alive without the rule, as a batch is that is held."""
        self.outlived[shape] = outlived

    @property
    def asked(self) -> Tensor | None:
        """The tensor that stands for θ in autograd, or None when the weight is frozen."""
        if self.probe is not None:
            return self.probe.anchor
        if not self.selection.size:
            return None
        return self.theta if self.common is None else self.common.view(self)

    @property
    def values(self) -> Tensor | None:
        """θ's values apart from autograd; None where nothing is selected, or weights share all values."""
        if not self.selection.size:
            return None
        return self.theta.detach() if self.common is None else self.common.values(self)

    def part(self, whole: Tensor) -> Tensor:
        """What belongs to this weight's own θ of a tensor in the shape of `parameter`."""
        return self.common.part(whole, self) if isinstance(self.common, FlatTheta) else whole

    @property
    def version(self) -> int:
        """Rises with every change of θ that torch counts; not with one through `.data` or by a fused kernel."""
        return self.parameter._version

    @property
    def parameter(self) -> nn.Parameter:
        """What the optimizer holds: θ, or the parameter that it is a part of."""
        return self.theta if self.common is None else self.common.parameter

    def select(self, selection: Selection) -> None:
        """Take over `selection`: θ keeps its identity and gets the weight's values there, stayers their own."""
        before, values = self.selection, self.theta.detach()
        self._rest += self._digest_selected()
        self.selection = selection.to(self.weight.device)
        self.touch = self._touch()
        self.counted = False
        self._rest -= self._digest_selected()
        if self.common is not None:  # it fetches the values of all its parts
            return
        self.theta.grad = None
        if self.theta.shape != selection.theta_shape:
            # A loss of an earlier step keeps autograd's accumulator for θ alive, which remembers the old size; torch
            # drops it when the dtype changes. A wrapper that holds it (DDP) is told at the next step to wrap again.
            self.theta.data = self.theta.data.to(torch.float32 if self.theta.dtype == torch.float64 else torch.float64)
        self.theta.data = self.start(before, values, self.dtype)
        self.agree()

    def start(self, before: Selection, values: Tensor | None, dtype: torch.dtype) -> Tensor:
        """θ for what is selected now: the weight's values, and the masters of what was selected before.

        Args:
            before: what was.
            values: θ of it; None where there was none.
            dtype: of θ.
        """
        if isinstance(self.weight, FakeTensor):
            return self.weight.new_empty(self.selection.theta_shape, dtype=dtype)
        there = self.selection.gather(self.weight.detach())
        start = there.to(dtype)
        if values is None or dtype == there.dtype:
            return start
        return _masters(carried(before, self.selection, values, start), there)

    def follow(self) -> None:
        """Follow the weight to other memory, perhaps on another device or in another dtype."""
        if self.weight.dtype != self._weight_dtype:
            self._follow_dtype()
        device = self.weight.device
        if self.selection.items.device != device:
            self.selection = self.selection.to(device)
            self.touch = self._touch()
        if self._rest.device != device:
            self._rest = self._rest.to(device)
            self._digest, self._selected = self._digest.to(device), self._selected.to(device)

    def _follow_dtype(self) -> None:
        """Have θ in the dtype that it would have had for such a weight; the conversion itself has moved nothing.

        Raises:
            TitheError: when the dtype that was given for θ cannot hold the weight's values.
        """
        check_holds(self.name, self.weight.dtype, self._given)
        self._weight_dtype = self.weight.dtype
        if isinstance(self.common, SharedTheta):
            return
        if isinstance(self.common, FlatTheta):
            self.common.convert()
        else:
            self.theta.data = self.theta.data.to(self.dtype)
        written = self.weight._version != self._written
        self._rest = digest(self.weight.detach()) - self._digest_selected()
        if written or not self.commit(force=True):
            self.refresh()

    def _touch(self) -> Touch | None:
        selection = self.selection
        if not isinstance(selection, Coordinates) or not selection.size or len(selection.shape) < 2:
            return None
        return Touch.of(selection.indices, selection.shape, self.weight)

    @property
    def index_bytes(self) -> int:
        """Bytes of the tensors that say where θ belongs."""
        tensors = [self.selection.items]
        if self.touch is not None:
            tensors += [self.touch.rows, self.touch.columns, self.touch.row, self.touch.column]
            tensors += [] if self.touch.inner is None else [self.touch.inner]
        return sum(t.numel() * t.element_size() for t in tensors)

    def commit(self, *, force: bool = False) -> bool:
        """Write θ into the weight in place, w ← S θ; entries outside the selection keep their bits.

        Args:
            force: also when θ's version did not change, as after an update through `.data` or a foreign kernel.

        Returns:
            Whether it was written.
        """
        if not force and self.version == self._committed:
            return False
        values = self.values
        if values is None:
            return False
        self.selection.scatter_(self.weight, values)
        self._agreed(values)
        self.count()
        return True

    def count(self) -> None:
        """Count what is selected among what has moved."""
        if not self.counted:
            self.moved = self.selection.union(self.moved)
            self.counted = True

    def refresh(self) -> None:
        """θ ← Sᵀ w, after the weight itself was loaded or changed; a θ that weights share follows none of them.

        A master that rounds to what is there stays as it is.
        """
        values = self.values
        if values is not None:
            values.copy_(_masters(values, self._there()))
        self._agreed(values)

    def restore(self, masters: Tensor | None) -> None:
        """θ as it was saved with the weight.

        Args:
            masters: in θ's shape; None where the weight's own values are all there was.
        """
        values = self.values
        if values is not None:
            there = self._there()
            values.copy_(there if masters is None else _masters(masters.to(values), there))
        self._agreed(values)

    def check_masters(self, masters: Tensor | None) -> None:
        """Check that θ can hold what was saved.

        Args:
            masters: as `restore`.

        Raises:
            TitheError: when they are of another dtype than θ, or θ is to hold no more than the weight.
        """
        if masters is not None and (masters.dtype != self.dtype or self.dtype == self.weight.dtype):
            raise TitheError(
                self.name,
                found=f"a saved θ of {masters.dtype} for a weight of half precision",
                expected=f"one of {self.dtype} for a weight of {self.weight.dtype}",
                remedy="load the model in the dtype of the saved run, and attach with its dtype=",
            )

    @property
    def masters(self) -> Tensor | None:
        """A copy of θ where it holds more than the weight does; None where the weight tells all of it."""
        values = self.values
        return None if values is None or values.dtype == self.weight.dtype else values.clone()

    def settle(self) -> None:
        """Bring θ and the weight together again, whichever of the two was changed since they last agreed.

        Where torch counted no change, the values tell: one of k numbers is compared. A weight that was written from
        outside has moved as a whole, which is saved with it.

        Raises:
            TitheError: when both were changed, and differ.
        """
        if isinstance(self.common, SharedTheta):
            return
        if self.weight.is_meta or isinstance(self.weight, FakeTensor):  # there are no values to compare
            self.commit()
            return
        values = self.values
        weight_changed = self.weight._version != self._written
        if values is None:
            if weight_changed:
                self._note_written()
            return
        # The version of a flat θ rises with a change of any part.
        theta_changed = self.version != self._committed and not torch.equal(digest(values), self._digest)
        if theta_changed and not weight_changed:
            self.commit()
            return
        there = self._there()
        if not torch.equal(_bits(there), _bits(values.to(there.dtype))):
            if not theta_changed and not weight_changed:  # through `.data`
                theta_changed = not torch.equal(digest(values), self._digest)
                weight_changed = not theta_changed or not torch.equal(digest(there), self._selected)
            if theta_changed and weight_changed:
                raise TitheError(
                    self.name,
                    found="a weight and its θ that were both written since the last step, with other values",
                    expected="either of them to be written",
                    remedy="write the weight and leave the plan's parameter, which follows it, alone, or call"
                    " plan.take_weights() after an average wrote both; on several ranks,"
                    " call init_process_group() before tithe.attach() and give every rank the same seed and data",
                )
            if theta_changed:
                self.commit(force=True)
                return
            self.refresh()
            self.moved = self.selection.union(self.moved)
        if theta_changed or weight_changed:
            self._note_written()

    def take_weight(self) -> None:
        """Let θ follow the weight where that was written, whatever was written into θ as well."""
        values = self.values
        if values is None or self.weight.is_meta or isinstance(self.weight, FakeTensor):
            return
        there = self.selection.gather(self.weight.detach())
        same = torch.equal(_bits(there), _bits(values.to(there.dtype)))
        if not same and not torch.equal(digest(there), self._selected):
            self.refresh()
            self.moved = self.selection.union(self.moved)
            self._note_written()

    def replace(self, weight: nn.Parameter) -> None:
        """Take another parameter of the same shape for the weight: what differs has moved, and θ follows."""
        old, self.weight = self.weight, weight
        self.note_changes(old.detach().to(weight.device, weight.dtype))
        self.follow()

    def note_changes(self, before: Tensor | None) -> None:
        """Take over what was loaded into the weight: θ ← Sᵀ w, and what differs has moved.

        Args:
            before: the weight as it was; None where it is not known any more, and nothing else need be written.
        """
        if before is not None:
            changed = (_bits(self.weight.detach()) != _bits(before)).flatten().nonzero().flatten()
            self.moved = Coordinates(tuple(self.weight.shape), changed).union(self.moved)
            self._rest = digest(self.weight.detach()) - self._digest_selected()
        elif self.weight._version != self._written:
            self.moved = self.selection.union(self.moved)
            self._note_written()
        self.refresh()

    def _note_written(self) -> None:
        """Note that torch counted writes into the weight: where they left other values, all of it has moved."""
        rest = digest(self.weight.detach()) - self._digest_selected()
        if not torch.equal(rest, self._rest):
            self.moved, self._rest = Coordinates.everything(tuple(self.weight.shape)).to(self.weight.device), rest
        self.agree()

    def _digest_selected(self) -> Tensor:
        if not self.selection.size:
            return torch.zeros((), dtype=torch.int64, device=self.weight.device)
        return digest(self.weight if isinstance(self.weight, FakeTensor) else self._there())

    def _there(self) -> Tensor:
        """The weight's values where θ's are, to be read: of a weight that is selected whole they are no copy."""
        selection, weight = self.selection, self.weight.detach()
        if selection.full and isinstance(selection, (Coordinates, Grid)):
            return weight.reshape(selection.theta_shape)
        return selection.gather(weight)

    def agree(self) -> None:
        """Note that θ and the weight hold the same values now."""
        self._agreed(None if isinstance(self.weight, FakeTensor) else self.values)

    def _agreed(self, values: Tensor | None) -> None:
        self._committed, self._written = self.version, self.weight._version
        self._digest = torch.zeros((), dtype=torch.int64) if values is None else digest(values)
        rounds = values is not None and values.dtype != self.weight.dtype
        self._selected = digest(values.to(self.weight.dtype)) if values is not None and rounds else self._digest


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(values: Tensor) -> Tensor:
    """The bits of values as integers, so that nan equals itself and 0.0 is not -0.0."""
    return values.view(_INTEGERS[values.element_size()])


def digest(values: Tensor) -> Tensor:
    """One number that another set of values is unlikely to share; 0 of a tensor that has no values."""
    if isinstance(values, FakeTensor):
        return values.new_zeros((), dtype=torch.int64)
    return _bits(values).sum(dtype=torch.int64)


def _masters(values: Tensor, there: Tensor) -> Tensor:
    """Those of `values` that round to what is there, and what is there in place of the others."""
    if values.dtype == there.dtype:
        return there
    return torch.where(_bits(values.to(there.dtype)) == _bits(there), values, there.to(values.dtype))


def check_holds(name: str, weight: torch.dtype, given: torch.dtype | None) -> None:
    """Check that a dtype that is given for θ holds all values of a weight.

    Raises:
        TitheError: naming the weight, when it does not.
    """
    if given is not None and torch.promote_types(weight, given) != given:
        raise TitheError(
            name,
            found=f"a weight of {weight}, and dtype={given} for θ",
            expected="a dtype of θ that holds every value of the weight",
            remedy="leave dtype= out: θ is float32 for weights in half precision, and has the weight's dtype otherwise",
        )


class FlatTheta(CommonTheta):
    """One parameter for all θ of a plan that chooses again: its size stays while its parts follow the choice.

        parameter (K,) ──split──> a view for each tensor ──> its rule

    The optimizer, autograd and DistributedDataParallel see `parameter` alone: state, buckets, compiled graphs and
    wrappers made before a new choice stay valid after it.

    Args:
        bindings: the weights whose θ are parts, in the model's order.
        size: room for the values of every choice; a choice that needs fewer leaves the end unused.
    """

    def __init__(self, bindings: Sequence[Binding], size: int) -> None:
        self.bindings = list(bindings)
        self.parameter = nn.Parameter(bindings[0].weight.detach().new_zeros(size, dtype=self._dtype))
        self._starts: dict[str, int] = {}
        self._views: dict[str, Tensor] = {}
        self._version = -1
        for binding in self.bindings:
            binding.common = self

    @property
    def _dtype(self) -> torch.dtype:
        """One that holds every part."""
        return functools.reduce(torch.promote_types, (binding.dtype for binding in self.bindings))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": {}}

    def take(self, selections: dict[str, Selection]) -> None:
        """Take over a new choice for every part.

        Args:
            selections: name → selection, one for each binding.

        Raises:
            TitheError: when the choice has more values than there is room for.
        """
        size = sum(selection.size for selection in selections.values())
        if size > self.parameter.numel():
            raise TitheError(
                "num_selected",
                found=f"a choice of {size} values",
                expected=f"at most {self.parameter.numel()}, for which the method had asked room",
                remedy="let the method's num_selected return the size of its largest choice",
            )
        before = [(b.selection, self.values(b) if b.name in self._starts else None) for b in self.bindings]
        chosen: list[Tensor] = []
        start = 0
        for binding, (old, values) in zip(self.bindings, before, strict=True):
            binding.select(selections[binding.name])
            if binding.selection.size:
                chosen.append(binding.start(old, values, self.parameter.dtype).reshape(-1))
        for binding in self.bindings:
            self._starts[binding.name] = start
            start += binding.selection.size
        with torch.no_grad():
            self.parameter.zero_()
            if size:
                self.parameter[:size].copy_(torch.cat(chosen))
        self.parameter.grad = None
        self._views = {}
        for binding in self.bindings:
            binding.agree()

    def resize(self, size: int) -> bool:
        """Make room for `size` values; returns whether it is empty now, until a choice is taken over.

        A wrapper made before has to be made again.
        """
        if size == self.parameter.numel():
            return False
        self.parameter.data = self.parameter.data.new_zeros(size)
        self.parameter.grad, self._views, self._starts = None, {}, {}
        return True

    def convert(self) -> None:
        """Have the dtype of θ for weights that were converted."""
        if self.parameter.dtype != self._dtype:
            self.parameter.data, self._views = self.parameter.data.to(self._dtype), {}

    def values(self, binding: Binding) -> Tensor:
        """The part of this weight, sharing memory with the parameter."""
        return self.part(self.parameter.detach(), binding)

    def view(self, binding: Binding) -> Tensor:
        """The part's view of the flat parameter; the plain values while the parameter asks for no gradient."""
        if not self.parameter.requires_grad:  # while scores are taken: a view kept from then would never be trained
            return self.values(binding)
        if torch.compiler.is_compiling():
            return self.part(self.parameter, binding)
        if not self._views or self._version != self.parameter._version:
            # One backward node joins the gradients of all parts. An update in place makes views of several outputs
            # invalid, so that every step has its own.
            used = [b for b in self.bindings if b.selection.size]
            sizes = [b.selection.size for b in used]
            with _disable_current_modes(), torch.enable_grad():  # also when first asked for in a run on shapes alone
                *parts, _ = self.parameter.split([*sizes, self.parameter.numel() - sum(sizes)])
                views = [part.view(b.selection.theta_shape) for b, part in zip(used, parts, strict=True)]
            self._views = {b.name: view for b, view in zip(used, views, strict=True)}
            self._version = self.parameter._version
        return self._views[binding.name]

    def part(self, flat: Tensor, binding: Binding) -> Tensor:
        """The part of this weight in a tensor of the parameter's shape, sharing memory with it."""
        start = self._starts[binding.name]
        return flat[start : start + binding.selection.size].view(binding.selection.theta_shape)


class SharedTheta(CommonTheta):
    """One θ that weights share: a vector for all of them, or a row for each.

    Args:
        parameter: (m,), or (weights, m) with one row for each.
        names: of the weights, in the order of the rows.
    """

    def __init__(self, parameter: nn.Parameter, names: Sequence[str]) -> None:
        self.parameter = parameter
        self._rows = {name: row for row, name in enumerate(names)}

    def view(self, binding: Binding) -> Tensor:
        """The vector itself, or the weight's row of it."""
        return self.parameter if self.parameter.dim() == 1 else self.parameter[self._rows[binding.name]]

    def values(self, binding: Binding) -> None:
        """None: the coefficients are those of all weights."""
        return None

    def row(self, name: str) -> Tensor:
        """The values that a weight's θ has now, apart from autograd."""
        values = self.parameter.detach()
        return values if values.dim() == 1 else values[self._rows[name]]
