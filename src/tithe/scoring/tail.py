"""What a Hugging Face model does after its trunk, for some rows of hidden states at a time.

    hidden = trunk(batch)        logits = tail(hidden)        loss = F.cross_entropy(logits, labels) and what it adds

A model's forward runs as it is, through every wrapper around the model, with two changes. Its trunk gives a few rows of
hidden states to what follows, so that no more than a few rows of logits are made; and the loss that it would take of
these is computed from all rows, in blocks. For a block the forward runs again with the trunk's answer at hand: heads
and biases, scaled and capped logits are the model's own, whatever they are. So are the shift of the labels, what it
divides by, and what it adds to the loss.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Generator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn

from tithe.errors import TitheError

_STOCK = "take the model's own loss: model(**batch).loss"


def parts(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The Hugging Face model inside of wrappers, and what may be its trunk: the outermost of these that it calls.

    Raises:
        TitheError: there is none, it has an encoder besides, or it is a trunk without a head.
    """
    inner = next(filter(_pretrained, model.modules()), None)
    if inner is None:
        raise TitheError(
            type(model).__name__,
            found="no model of the transformers package in it",
            expected="a causal model of Hugging Face, wrapped or not",
            remedy="compute the loss by F.cross_entropy",
        )
    known: Any = inner
    if known.config.is_encoder_decoder:
        raise TitheError(
            type(inner).__name__,
            found="an encoder besides the decoder",
            expected="a causal model, whose labels are its inputs shifted by one",
            remedy=_STOCK,
        )
    trunks = [part for part in (known.base_model, known.get_decoder()) if isinstance(part, nn.Module)]
    trunks = [part for part in dict.fromkeys(trunks) if part is not inner] or list(
        filter(_pretrained, inner.children())
    )
    if not trunks:
        raise TitheError(
            type(inner).__name__,
            found="no trunk apart from the head",
            expected="a model with a language-modelling head, as AutoModelForCausalLM builds it",
            remedy=_STOCK,
        )
    return inner, trunks


_captured: weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule"


def _compiled(model: nn.Module, around: Sequence[nn.Module]) -> bool:
    """Whether calls of a model, or of what is around it, are captured."""
    return any(_is_compiled(module) or module._compiled_call_impl is not None for module in (*around, model))


def _pretrained(module: nn.Module) -> bool:
    return any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__)


@contextmanager
def calling(module: nn.Module, function: Callable[..., Any]) -> Generator[None]:
    """Let calls of a module go to a function, hooks left out: by the door that `nn.Module.compile` uses."""
    with _shadowing(module, "_compiled_call_impl", function):
        yield


@contextmanager
def running(module: nn.Module, function: Callable[..., Any]) -> Generator[None]:
    """Let a module's forward be a function: some wrappers call `forward` itself."""
    with _shadowing(module, "forward", function):
        yield


@contextmanager
def _shadowing(module: nn.Module, key: str, value: Any) -> Generator[None]:
    own = vars(module)
    before = {key: own[key]} if key in own else {}
    own[key] = value
    try:
        yield
    finally:
        del own[key]
        own.update(before)


def first(output: Any) -> Any:
    """The first thing that a model returns: of a trunk the hidden states, of a model with labels the loss."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return next(iter(cast("Mapping[str, Any]", output).values()), None)
    return output[0] if isinstance(output, (tuple, list)) and output else None


def logits(output: Any) -> Any:
    """The logits that a model returns, where it has no labels."""
    return output["logits"] if isinstance(output, Mapping) and "logits" in output else first(output)


def _with_first(output: Any, value: Tensor) -> Any:
    """What a trunk returned, with other hidden states."""
    if isinstance(output, MutableMapping):
        made: Any = copy.copy(cast("MutableMapping[str, Any]", output))
        made[next(iter(made))] = value
        return made
    return value if isinstance(output, Tensor) else (value, *output[1:])


class Tail:
    """A model's forward after its trunk, as a function of hidden states.

    Args:
        model: the Hugging Face model.
        trunks: what may make the hidden states.
        within: the model with what is around it.

    Attributes:
        hidden: the hidden states of the call that runs, (B, T, H); None before the trunk has run.
        probe: a few rows of them, (1, k, H), a leaf, which the model's forward goes on with.
        result: what the model's forward returned first: the loss.
    """

    def __init__(self, model: nn.Module, trunks: Sequence[nn.Module], within: nn.Module) -> None:
        self.model, self._trunks = model, trunks
        self._within: list[Any] = list(takewhile(lambda module: module is not model, within.modules()))
        self.result: Any = None
        self._forward: Callable[..., Any] = model.forward
        self.hidden: Tensor | None = None
        self.probe: Tensor | None = None
        self._trunk: nn.Module | None = None
        self._given: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        self._output: Any = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """The logits (1, n, V) of hidden states (1, n, H)."""
        args, kwargs = self._given
        answer = _with_first(self._output, hidden)
        with calling(cast(nn.Module, self._trunk), lambda *_, **__: answer):
            return logits(self._forward(*args, **kwargs))

    @contextmanager
    def watching(self, inside: AbstractContextManager[Any]) -> Generator[None]:
        """While the model runs, cut the trunk's hidden states down to the probe, and note what it was called with.

        Args:
            inside: what surrounds the model's forward after its trunk.
        """
        with ExitStack() as stack:
            if _compiled(self.model, self._within):  # of what surrounds the trunk nothing is captured
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(running(self.model, partial(self._noted, inside)))
            yield

    def _noted(self, inside: AbstractContextManager[Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward, without a cache of keys and values, which would be a copy of them all."""
        if "use_cache" in inspect.signature(self._forward).parameters:
            kwargs = {"use_cache": False, **kwargs}
        self._given = args, {name: value for name, value in kwargs.items() if name != "labels"}
        with ExitStack() as stack:
            for trunk in self._trunks:
                stack.enter_context(calling(trunk, partial(self._cut, stack, inside, trunk, self._call(trunk))))
            output = self._forward(*args, **kwargs)
        self.result = first(output)
        return output

    def _cut(
        self,
        stack: ExitStack,
        inside: AbstractContextManager[Any],
        trunk: nn.Module,
        call: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run the trunk, and return the probe in place of its hidden states."""
        if self._trunk is not None and self.hidden is None:  # it runs within another, the whole of which counts
            return call(*args, **kwargs)
        twice, self._trunk = self._trunk is not None, trunk
        output = call(*args, **kwargs)
        hidden = first(output)
        if twice or not isinstance(hidden, Tensor) or hidden.dim() != 3:
            raise refused(self.model, "a trunk that runs twice, or returns no hidden states of three axes")
        self.hidden, self._output = hidden, output
        self.probe = _some_rows(hidden.detach()).requires_grad_(torch.is_grad_enabled())
        stack.enter_context(inside)
        return _with_first(output, self.probe)

    def _call(self, trunk: nn.Module) -> Callable[..., Any]:
        """The trunk's own call, compiled where the model was: what its compiler is to capture is the trunk alone."""
        own = trunk._compiled_call_impl or trunk._call_impl
        context = next((module.dynamo_ctx for module in self._within if _is_compiled(module)), None)
        if context is None:
            return own
        known = _captured.get(trunk)
        if known is None:
            known = _captured[trunk] = context(trunk._call_impl)

        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.compiler.set_stance("default"):
                return known(*args, **kwargs)

        return call


def _some_rows(hidden: Tensor) -> Tensor:
    """A few rows, a number of them from which all rows can be told apart, shifted by one or not."""
    num_rows, shifted = hidden.shape[0] * hidden.shape[1], hidden.shape[0] * (hidden.shape[1] - 1)
    count = next(k for k in range(2, 6) if k != num_rows and k - 1 != shifted)
    at = torch.arange(count, device=hidden.device) % max(num_rows, 1)
    return hidden.reshape(num_rows, -1).index_select(0, at)[None]


def refused(model: nn.Module, found: str) -> TitheError:
    """Make the error for a model whose loss cannot be taken in blocks."""
    return TitheError(
        f"causal_loss of {type(model).__name__}",
        found=found,
        expected="logits that are a function of the hidden state at their own position, and F.cross_entropy of them",
        remedy=_STOCK,
    )
