"""How a rule reaches an operation: the weight carries it.

While a plan is attached, `module.weight` is a `Carrier`: a tensor subclass over the same storage whose
`__torch_function__` sends `F.linear`, convolutions, embeddings and norms to the rule registered for them, and every
other use of the weight to *graft*, which is exact for any operation:

    forward: the weight itself        backward: ∇θ = Sᵀ ∇w

Module classes and forwards stay untouched, and whatever calls the operation, module or function, is caught. The real
parameter stays in `module._parameters` under its own key; the carrier only shadows the attribute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.masked import MaskedTensor

from tithe.errors import TitheError
from tithe.rules.base import Rule, Ruled
from tithe.rules.checkpoints import current_frame, hand_over
from tithe.rules.double_backward import differentiated, missing, refusal
from tithe.rules.functional import lifted, spread, swapped
from tithe.rules.sparse.probes import Probe, SquareProbe
from tithe.rules.table import CHANNELS, ENTRIES, SPARSE, WINGS, Handler, state
from tithe.rules.theta import Binding
from tithe.rules.transforms import each_row, transformed
from tithe.selection import Channels, Selection

_RULES = WINGS[SPARSE]
_VIEWS = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")}
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
_KEEP_OUTPUT = frozenset(
    f"{name}Backward0" for name in ("Relu", "Tanh", "Sigmoid", "Softmax", "LogSoftmax", "Exp", "Sqrt", "Rsqrt")
)
_READS_NO_VALUES = frozenset(
    [
        *("_is_view", "requires_grad_", "register_hook", "__repr__", "__format__", "__len__", "get_device"),
        *("dim", "ndimension", "size", "stride", "numel", "nelement", "element_size", "storage_offset", "data_ptr"),
        *("is_contiguous", "is_floating_point", "is_complex", "untyped_storage", "new_empty", "new_zeros", "new_ones"),
        *("new_full", "new_tensor", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    ]
)


class Call(NamedTuple):
    """One call of an operation with a weight, as a handler reads it off the arguments.

    Args:
        rule: builds the rule from x as it will be computed with, and the bindings of weight and bias, each None where
            no gradient is asked of it.
        x: the input.
        weight: the weight, carried or not.
        bias: the bias, or None.
        groups: of a convolution.
        transposed: the weight's input channels are its axis 0.
        axis: of x, along which its channels lie.
        finish: what is left to do to the output.
    """

    rule: Callable[[Tensor, Any, Any], Rule]
    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    groups: int = 1
    transposed: bool = False
    axis: int = -1
    finish: Callable[[Tensor], Tensor] | None = None


class Served(NamedTuple):
    """Which calls the rules of one family serve; the others go through graft, or run as stock does.

    Args:
        channels: those with whole input channels selected.
        probes: those that score the weight.
        frozen: those that ask nothing of weight and bias, because stock keeps more than the rule.
        cast: what autocast does to the operation: "lower", "float32", or "" for nothing.
    """

    channels: bool = False
    probes: bool = False
    frozen: bool = False
    cast: str = "lower"

    def run(self, call: Call) -> Tensor:
        """The operation by the rule of this call; NotImplemented where none serves it.

        A rule is passed by where graft does as well (the weight is ordinary or selected whole), where x has another
        dtype than the operation computes in, where nothing is asked that stock does not do as leanly, and where the
        selection, a convolution's groups or a probe is none of the family's.
        """
        x, weight, bias = call.x, call.weight, call.bias
        if isinstance(weight, Carrier) and isinstance(weight.binding.selection, Channels):
            _note_positions(call, weight.binding)
        if needs_no_rule(weight, bias) or not fits(x, weight, cast=self.cast != ""):
            return NotImplemented
        of_weight, of_bias = asking(weight), asking(bias)
        if of_weight is None and of_bias is None and not self.frozen:
            return NotImplemented
        if not self.probes and any(b is not None and b.probe is not None for b in (of_weight, of_bias)):
            return NotImplemented
        by_channels = of_weight is not None and of_weight.probe is None and isinstance(of_weight.selection, Channels)
        if of_weight is not None and not of_weight.fits(call.groups, transposed=call.transposed):
            return NotImplemented
        if by_channels and not self.channels:
            return NotImplemented
        if self.cast:
            x = autocast(x, to_float32=self.cast == "float32")
        rule = call.rule(x, of_weight, of_bias)
        if of_weight is not None and of_weight.probe is None and x is call.x and not torch.compiler.is_compiling():
            rule.held = outlives(x, of_weight)
            if not (rule.held or x.requires_grad or isinstance(x, FakeTensor)):
                rule.watch = partial(of_weight.saw, x.shape)
        y = apply_rule(rule, x, weight, bias)
        return y if call.finish is None else call.finish(y)


def _note_positions(call: Call, binding: Binding) -> None:
    """Note how large an input is, also where stock's operation serves it, as a weight does that is selected whole."""
    x = call.x
    if plain(x) and x.dim() and not (torch.compiler.is_compiling() or isinstance(x, FakeTensor)):
        binding.note_positions(x.numel() // max(x.shape[call.axis], 1))


_SERVED: dict[Handler, Served] = {}


def register(
    *operations: Callable[..., Any],
    keeps: str = "",
    channels: str = "",
    stock: str = "",
    family: str = "",
    note: str = "",
    like: Handler | None = None,
    probes: bool = False,
    frozen: bool = False,
    cast: str = "lower",
) -> Callable[[Handler], Handler]:
    """Send `operations` to a handler of the same signature, and say in the table what its rule keeps.

    The handler returns a `Call`, which goes by rule where `Served.run` finds that one is needed, fits and is asked
    for; or NotImplemented, to leave the call to graft; or the result itself. The table is open: register a rule for an
    operation of yours, or replace one of ours.

    Args:
        operations: torch functions and methods.
        keeps: what the rule keeps of single entries, besides the weight.
        channels: what it keeps of whole input channels; "" leaves those to graft.
        stock: what PyTorch keeps without the rule.
        family: the name of the row; by default the handler's.
        note: what the page says besides.
        like: a handler registered before: these operations join its row and take over all that it says and serves.
        probes: the rule answers probes; otherwise graft does.
        frozen: the rule serves a frozen weight too.
        cast: what autocast does to the operation: "lower", "float32", or "" for nothing.

    Raises:
        TitheError: `like` is no handler that was registered.

    Example:
        >>> @register(torch.nn.functional.bilinear, keeps="nothing", stock="both inputs")
        ... def bilinear(*args, **kwargs):
        ...     return NotImplemented
        >>> from tithe.rules import table
        >>> [(row.keeps, row.stock) for row in table() if row.family == "bilinear"]
        [('nothing', 'both inputs')]
        >>> _ = _RULES.pop(torch.nn.functional.bilinear)
    """

    def enter(handler: Handler) -> Handler:
        said = {ENTRIES: keeps} | ({CHANNELS: channels} if channels else {})
        state(SPARSE, operations, handler, family=family, keeps=said, stock=stock, note=note, like=like)
        served = Served(channels != "", probes, frozen, cast) if like is None else _SERVED[like]

        def serve(*args: Any, **kwargs: Any) -> Any:
            found = handler(*args, **kwargs)
            return served.run(found) if isinstance(found, Call) else found

        _SERVED[handler] = served
        _RULES.update(dict.fromkeys(operations, serve))
        return handler

    return enter


_FIRST: dict[Callable[..., Any], Callable[..., Any]] = {}


def asked_first(*operations: Callable[..., Any]) -> Callable[[Handler], Handler]:
    """Send `operations` to a handler whether or not a gradient is recorded: those that write into the weight.

    It returns the result, or NotImplemented to let the call go on.
    """

    def enter(handler: Handler) -> Handler:
        _FIRST.update(dict.fromkeys(operations, handler))
        return handler

    return enter


@each_row
class Graft(torch.autograd.Function):
    """The weight itself, with Sᵀ as its backward: `apply(weight, theta, selection)`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, theta: Tensor, selection: Selection) -> Tensor:
        """An alias of the weight, of the same strides to the last: no copy."""
        ctx.selection = selection
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """The gradient of θ: ∇θ = Sᵀ ∇w."""
        grad = ctx.selection.gather(dense(grads[0]))
        if differentiated() and grads[0].requires_grad and not grad.requires_grad:
            (grad,) = missing((grad,), grads, partial(_unrecorded, ctx.selection))
        return None, grad, None


def _unrecorded(selection: Selection) -> TitheError:
    return refusal(
        type(selection).__name__,
        "θ's gradient out of the graph",
        "call plan.release(), and differentiate by the model's own weights; a penalty on a derivative by inputs is"
        " right as it is",
    )


class ProbeGraft(torch.autograd.Function):
    """Graft for a probe: `apply(weight, anchor, probe, expand)`.

    A parameter of leading size 1 (a class token, position embeddings) is handed out once per sample, because its
    gradient then arrives sample by sample. Any other use mixes samples, and the probe is told so.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, anchor: Tensor, probe: Probe, expand: bool) -> Tensor:
        """The weight, expanded over samples where that may be and separates them."""
        ctx.probe = probe
        ctx.stacked = isinstance(probe, SquareProbe) and probe.num_samples > 1
        if ctx.stacked and not (weight.dim() > 1 and weight.shape[0] == 1 and expand):
            probe.separable = False
            ctx.stacked = False
        return weight.expand(probe.num_samples, *weight.shape[1:]) if ctx.stacked else weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Hands the gradient to the probe."""
        if ctx.probe.hears:
            ctx.probe.stacked(grads[0]) if ctx.stacked else ctx.probe.whole(dense(grads[0]))
        return None, None, None, None


class Carrier(Tensor):
    """A weight that carries its rule; see the module's docstring."""

    binding: Binding
    owner: nn.Module
    key: str
    memory: int

    @staticmethod
    def __new__(cls: type[Carrier], binding: Binding, owner: nn.Module, key: str) -> Carrier:  # noqa: D102
        weight = binding.weight.detach()
        if isinstance(weight, FakeTensor):  # it cannot become another subclass; `raw` answers for it
            weight = torch.empty_strided(weight.size(), weight.stride(), dtype=weight.dtype, device="meta")
        carrier = torch.Tensor._make_subclass(cls, weight, True)
        with torch._C.DisableTorchFunctionSubclass():
            carrier.register_post_accumulate_grad_hook(_passed_by)
        if not isinstance(binding.weight, FakeTensor):
            vars(carrier).update(vars(binding.weight))  # the scale of codes, a mark for an optimizer
        carrier.binding, carrier.owner, carrier.key = binding, owner, key
        carrier.memory = binding.weight.untyped_storage()._cdata
        carrier._is_param = True  # isinstance(module.weight, nn.Parameter) stays true
        return carrier

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if (name == "__get__" and func not in _VIEWS) or name == "__set__" or name in _READS_NO_VALUES:
            if torch.compiler.is_compiling():
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func == _REQUIRES_GRAD:  # checkpointing asks it of weights that are handed over as arguments
                return asking(args[0]) is not None or raw(args[0]).requires_grad
            return func(*_each(raw, args), **_each(raw, kwargs))
        first = _FIRST.get(func)
        if first is not None:
            out = first(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if not torch.is_grad_enabled():
            return func(*_each(graft, args), **_each(graft, kwargs))
        if not torch.compiler.is_compiling() and current_frame() is not None:
            _each(_hand_over, (args, kwargs))
        handler = _RULES.get(func)
        if handler is not None and not transformed():
            out = handler(*args, **kwargs)
            if out is not NotImplemented:
                return out
        return func(*_each(graft, args), **_each(graft, kwargs))

    @property
    def _local_tensor(self) -> Tensor:
        """What fully_shard reads off a weight that it has sharded, before any hook of a plan can see the forward pass.

        Raises:
            TitheError: always, where the weight is sharded.
        """
        if hasattr(raw(self), "_local_tensor"):
            raise TitheError(
                self.binding.name,
                found="a DTensor: the weight was sharded after a plan was attached",
                expected="whole weights on every rank",
                remedy="build the model anew, attach to it, and wrap it in DistributedDataParallel instead",
            )
        raise AttributeError("_local_tensor")

    def __deepcopy__(self, memo: dict[int, Any]) -> Carrier:
        from copy import deepcopy

        return Carrier(deepcopy(self.binding, memo), deepcopy(self.owner, memo), self.key)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Carrier, (self.binding, self.owner, self.key)


def _passed_by(carrier: Carrier) -> None:
    """Hand on a gradient that reached the carrier itself: θ gets it by graft.

    A nested tensor, or another subclass that is asked first, may run an operation on the carrier's memory without
    asking it. Where something else stood in the weight's or in θ's place, that was left out.

    Raises:
        TitheError: when it was.
    """
    with torch._C.DisableTorchFunctionSubclass():
        grad, carrier.grad = carrier.grad, None
    if another(carrier) is not None or raw(carrier) is not carrier.binding.weight:
        raise TitheError(
            carrier.binding.name,
            found="an operation of a tensor subclass, which passes by what functional_call put in the weight's place",
            expected="operations on plain tensors",
            remedy="hand plain tensors to functional_call: padded, instead of nested",
        )
    probe, create_graph = carrier.binding.probe, torch.is_grad_enabled()
    if grad is None or not carrier.binding.active:
        return
    if probe is not None:
        probe.alone(grad)
        return
    with torch.enable_grad():
        weight = graft(carrier)
    torch.autograd.backward(weight, grad, create_graph=create_graph)


def raw(weight: Tensor) -> Tensor:
    """The parameter under a carrier, as its module holds it now; any other tensor as it is."""
    if not isinstance(weight, Carrier):
        return weight
    if not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        weight.binding.commit()  # a block may be called apart from the model, whose hook commits otherwise
    return cast(Tensor, weight.owner._parameters.get(weight.key, weight.binding.weight))


def graft(weight: Tensor) -> Tensor:
    """The parameter under a carrier with Sᵀ as its backward; any other tensor as it is."""
    if not isinstance(weight, Carrier):
        return weight
    given = another(weight)
    if given is not None:
        return spread(raw(weight), given, weight.binding)
    binding = asking(weight) if torch.is_grad_enabled() else None
    if binding is None:
        return raw(weight)
    probe = binding.probe
    if torch._C._are_functorch_transforms_active():
        return lifted(raw(weight), binding, partial(_gathered, binding.selection) if probe is None else probe.alone)
    if probe is not None:
        return cast(Tensor, ProbeGraft.apply(raw(weight), probe.anchor, probe, probe.expand))
    return cast(Tensor, Graft.apply(raw(weight), binding.asked, binding.selection))


def another(weight: Any) -> Tensor | None:
    """What `torch.func.functional_call` put in the place of a carrier's θ; None where nothing was."""
    if not isinstance(weight, Carrier) or weight.binding.probe is not None or not weight.binding.selection.size:
        return None
    return swapped(weight.binding)


def dense(grad: Tensor) -> Tensor:
    """A gradient as the strided tensor that selections read.

    That of a table looked up with `sparse=True` is sparse; that of a masked tensor is masked, and none where it is.
    """
    if isinstance(grad, MaskedTensor):
        return cast(Tensor, grad.to_tensor(0.0))
    return grad if grad.layout == torch.strided else grad.to_dense()


def _gathered(selection: Selection, grad: Tensor) -> Tensor:
    return selection.gather(dense(grad))


def asking(weight: Any) -> Binding | None:
    """The binding of a carrier that a gradient is asked of; None for a frozen weight or an ordinary tensor.

    A module whose parameter was swapped from outside (`torch.func.functional_call`) computes with what was swapped in.
    """
    if not isinstance(weight, Carrier) or not weight.binding.active or _runs_stock(weight):
        return None
    return weight.binding if raw(weight) is weight.binding.weight else None


def _hand_over(carrier: Tensor) -> Tensor:
    hand_over(carrier)
    return carrier


def _runs_stock(weight: Carrier) -> bool:
    """Whether the weight is scored by the gradients of torch's own operations."""
    return weight.binding.probe is not None and weight.binding.probe.stock


def _each(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`function` over the carriers in nested lists, tuples and dicts."""
    if isinstance(tree, Carrier):
        return function(tree)
    if type(tree) in (list, tuple):
        return type(tree)([_each(function, item) for item in tree])
    if type(tree) is dict:
        return {key: _each(function, item) for key, item in tree.items()}
    return tree


def apply_rule(rule: Rule, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run `rule` on the parameters under the carriers."""
    of_weight, of_bias = asking(weight), asking(bias)
    theta_weight = None if of_weight is None else of_weight.asked
    theta_bias = None if of_bias is None else of_bias.asked
    if of_weight is not None and theta_weight is not None:
        rule.place = of_weight.name
        rule.carried = partial(_carried, of_weight.probe, theta_weight, of_weight.selection)
    return cast(
        Tensor, Ruled.apply(rule, x, raw(weight), None if bias is None else raw(bias), theta_weight, theta_bias)
    )


def _carried(probe: Probe | None, theta: Tensor, selection: Selection, weight: Tensor) -> Tensor:
    """A weight as the function of its θ that it was in forward."""
    if probe is not None:
        return cast(Tensor, ProbeGraft.apply(weight, theta, probe, False))
    return cast(Tensor, Graft.apply(weight, theta, selection))


def needs_no_rule(weight: Any, bias: Any) -> bool:
    """Whether graft does as well: every entry of the gradient is needed, or the weight is ordinary.

    Then the stock operation runs; where everything is selected, training is stock training bit for bit.
    """
    if not isinstance(weight, Carrier) or raw(weight) is not weight.binding.weight or _runs_stock(weight):
        return True
    if another(weight) is not None or another(bias) is not None:
        return True
    if weight.binding.probe is not None or not weight.binding.selection.whole:
        return False
    return not isinstance(bias, Carrier) or (bias.binding.probe is None and bias.binding.selection.whole)


def outlives(x: Tensor, weight: Binding) -> bool:
    """Whether x is alive in backward whatever a rule keeps of it.

    That is so where backward of what made x keeps x, or what x is a view of. Of an input that nothing recorded has
    made, such as the batch, it is known once a rule of this weight has seen one of its shape alive: `Rule.watch`.
    """
    if not x.requires_grad:
        return weight.outlived.get(x.shape, False)
    node = (x if x._base is None else x._base).grad_fn
    return node is not None and (node.name() in _KEEP_OUTPUT or getattr(node, "keeps_output", False))


def autocast(x: Tensor, *, to_float32: bool = False) -> Tensor:
    """The input as autocast would hand it to an operation of its lower-precision list, or of its float32 list."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return x
    return x.to(torch.float32 if to_float32 else torch.get_autocast_dtype(kind))


_PLAIN = (Tensor, nn.Parameter, FakeTensor)


def plain(x: Any) -> bool:
    """Whether x is a dense tensor of torch's own kind, whose entries are what its memory holds.

    No carrier or other subclass, which may mean something else by an operation; not nested, sparse or quantised; no
    view that negates when it is read.
    """
    if type(x) not in _PLAIN or x.layout != torch.strided or x.is_nested or x.is_quantized:
        return False
    return torch.compiler.is_compiling() or not x.is_neg()


def fits(x: Any, weight: Tensor, *, cast: bool = True) -> bool:
    """Whether x is an ordinary tensor of the dtype that the operation will compute in.

    Args:
        x: the input.
        weight: the weight.
        cast: autocast reaches the operation; where it does not, ids and other numbers that are not real fit too.
    """
    if not plain(x):
        return False
    if not cast:
        return x.dtype == weight.dtype or not (x.is_floating_point() or x.is_complex())
    return x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
