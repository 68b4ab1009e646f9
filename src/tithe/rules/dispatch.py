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

from tithe.errors import TitheError
from tithe.rules.base import Rule, Ruled
from tithe.rules.sparse.probes import Probe, SquareProbe
from tithe.rules.table import CHANNELS, ENTRIES, SPARSE, WINGS, Handler, state
from tithe.rules.theta import Binding
from tithe.selection import Channels, Selection

_RULES = WINGS[SPARSE]
_VIEWS = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")}
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
        if of_weight is not None and by_channels:
            of_weight.check_positions(x.numel() // max(x.shape[call.axis], 1))
        rule = call.rule(x, of_weight, of_bias)
        if of_weight is not None and of_weight.probe is None and x is call.x and not torch.compiler.is_compiling():
            rule.held = outlives(x, of_weight)
            if not (rule.held or x.requires_grad or isinstance(x, FakeTensor)):
                rule.watch = partial(of_weight.saw, x.shape)
        y = apply_rule(rule, x, weight, bias)
        return y if call.finish is None else call.finish(y)


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
        return None, ctx.selection.gather(grads[0]), None


class ProbeGraft(torch.autograd.Function):
    """Graft for a probe: `apply(weight, anchor, probe)`.

    A parameter of leading size 1 (a class token, position embeddings) is handed out once per sample, because its
    gradient then arrives sample by sample. Any other use mixes samples, and the probe is told so.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, anchor: Tensor, probe: Probe) -> Tensor:
        """The weight, expanded over samples where that separates them."""
        ctx.probe = probe
        ctx.stacked = isinstance(probe, SquareProbe) and probe.num_samples > 1
        if ctx.stacked and not (weight.dim() > 1 and weight.shape[0] == 1 and probe.expand):
            probe.separable = False
            ctx.stacked = False
        return weight.expand(probe.num_samples, *weight.shape[1:]) if ctx.stacked else weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Hands the gradient to the probe."""
        ctx.probe.stacked(grads[0]) if ctx.stacked else ctx.probe.whole(grads[0])
        return None, None, None


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
        carrier = torch.Tensor._make_subclass(cls, weight, False)
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
            return func(*_each(raw, args), **_each(raw, kwargs))
        if not torch.is_grad_enabled():
            return func(*_each(raw, args), **_each(raw, kwargs))
        handler = _RULES.get(func)
        if handler is not None:
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


def raw(weight: Tensor) -> Tensor:
    """The parameter under a carrier, as its module holds it now; any other tensor as it is."""
    if not isinstance(weight, Carrier):
        return weight
    return cast(Tensor, weight.owner._parameters.get(weight.key, weight.binding.weight))


def graft(weight: Tensor) -> Tensor:
    """The parameter under a carrier with Sᵀ as its backward; any other tensor as it is."""
    if not isinstance(weight, Carrier):
        return weight
    binding = asking(weight)
    if binding is None:
        return raw(weight)
    if binding.probe is not None:
        return cast(Tensor, ProbeGraft.apply(raw(weight), binding.probe.anchor, binding.probe))
    return cast(Tensor, Graft.apply(raw(weight), binding.asked, binding.selection))


def asking(weight: Any) -> Binding | None:
    """The binding of a carrier that a gradient is asked of; None for a frozen weight or an ordinary tensor.

    A module whose parameter was swapped from outside (`torch.func.functional_call`) computes with what was swapped in.
    """
    if not isinstance(weight, Carrier) or not weight.binding.active:
        return None
    return weight.binding if raw(weight) is weight.binding.weight else None


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
    asked_weight, asked_bias = asking(weight), asking(bias)
    return cast(
        Tensor,
        Ruled.apply(
            rule,
            x,
            raw(weight),
            None if bias is None else raw(bias),
            None if asked_weight is None else asked_weight.asked,
            None if asked_bias is None else asked_bias.asked,
        ),
    )


def needs_no_rule(weight: Any, bias: Any) -> bool:
    """Whether graft does as well: every entry of the gradient is needed, or the weight is ordinary.

    Then the stock operation runs; where everything is selected, training is stock training bit for bit.
    """
    if not isinstance(weight, Carrier) or raw(weight) is not weight.binding.weight:
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


def fits(x: Any, weight: Tensor, *, cast: bool = True) -> bool:
    """Whether x is an ordinary tensor of the dtype that the operation will compute in.

    Args:
        x: the input.
        weight: the weight.
        cast: autocast reaches the operation; where it does not, ids and other numbers that are not real fit too.
    """
    if not isinstance(x, Tensor) or isinstance(x, Carrier):
        return False
    if not cast:
        return x.dtype == weight.dtype or not x.is_floating_point()
    return x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
