"""The next-token loss of a causal model in blocks of rows: the logits never stand whole.

    loss = Σ_n ℓ(tail(h_n), y_n) / N         gh_n = ∂ℓ/∂h_n, computed with the loss and kept in its place

A block's logits and their gradient live while the block is worked on. What is kept for backward is the gradient of the
hidden states, and of each trained tensor of the tail its own: of a head of which a part is selected, of that part.
Where rules hand on what arrives in backward (to scores, to a span's coefficients), the hidden states are kept instead,
and backward computes the blocks again.

Shapes: N rows (positions of all sequences), H wide; V logits to each.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from tithe.errors import TitheError
from tithe.forward import graph_leaves
from tithe.rules import Carrier, SharedTheta
from tithe.rules.base import saved_tensors
from tithe.rules.blocks import blocks
from tithe.rules.double_backward import differentiated, missing, refusal, stand_in
from tithe.rules.lean.cross_entropy import Terms, precise, sum_and_gradient
from tithe.rules.transforms import each_row, transformed
from tithe.scoring.tail import Tail, first, parts, refused

__all__ = ["causal_loss"]

_checked: weakref.WeakKeyDictionary[nn.Module, dict[bool, int]] = weakref.WeakKeyDictionary()
"""Models whose tail has been compared with their own logits, in training and evaluation mode: with which loss."""
_NEAR = {torch.float64: 1e-6, torch.float32: 1e-4}
"""How far those may be apart, against the largest logit; half precision has 0.05."""
_FEW = 64
"""Rows that are no fewer in a block than asked for: a product of fewer reads the head more often than it pays."""


def causal_loss(model: nn.Module, batch: Mapping[str, Any], *, rows: int = 1024) -> Tensor:
    """Return the loss of a Hugging Face causal model, `model(**batch).loss`, without all logits in memory at once.

    The model's own forward runs, through wrappers and hooks, up to its hidden states; its head, what it does to logits
    and the cross-entropy run for a block of rows at a time. Rows whose label is ignored are left out. What the model
    adds to its loss (that of a mixture's router) and divides by (`num_items_in_batch`) is its own too.

    Args:
        model: a causal model of transformers with a head, or a wrapper around one: a plan, PEFT and
            DistributedDataParallel are fine.
        batch: what the model is called with, by name. Without `labels` they are `input_ids`, as they are.
        rows: at most so many positions of all sequences together are in one block, and at most an eighth of them all,
            unless the gradients of the head are larger than a block's logits.

    Returns:
        The loss, a scalar: in float32, or in float64 for a model in it. If every label is ignored, NaN with gradients
        of zero, as the model's own.

    Raises:
        TitheError: the model is none of transformers', has an encoder or no head, its loss is not the cross-entropy of
            logits that depend on the hidden state at their position alone, or somebody differentiates twice.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> ids = torch.arange(24).view(2, 12)
        >>> loss = causal_loss(model, {"input_ids": ids}, rows=8)
        >>> torch.allclose(loss, model(input_ids=ids, labels=ids).loss)
        True
    """
    if rows < 1:
        raise TitheError(
            "causal_loss", found=f"rows={rows!r}", expected="a positive integer", remedy="leave rows at its default"
        )
    if not isinstance(cast(Any, batch), Mapping):
        raise TitheError(
            "causal_loss",
            found=f"a batch of type {type(batch).__name__}",
            expected="a mapping from names to what the model is called with",
            remedy='pass {"input_ids": …, "labels": …}',
        )
    return _uncaptured(model, batch, rows)


def _causal_loss(model: nn.Module, batch: Mapping[str, Any], rows: int) -> Tensor:
    inner, trunks = parts(model)
    if transformed():
        raise refused(inner, "a transform of torch.func, or forward-mode differentiation, around it")
    given = dict(batch)
    if given.get("labels") is None:
        if given.get("input_ids") is None:
            raise TitheError(
                "batch", found="neither labels nor input_ids", expected="labels", remedy='pass batch["labels"]'
            )
        given["labels"] = given["input_ids"]
    call = _Call(Tail(inner, trunks, model), rows)
    with call.tail.watching(call):
        loss = first(model(**given))
    call.check()
    if not isinstance(loss, Tensor):
        raise refused(inner, "a wrapper that does not return what the model does")
    return loss


# What `torch.compiler.disable` does, without importing the compiler (a second) before the first call.
_uncaptured = cast(
    "Callable[[nn.Module, Mapping[str, Any], int], Tensor]",
    torch._disable_dynamo(_causal_loss),  # pyright: ignore[reportPrivateImportUsage]
)


class _Call(TorchFunctionMode):
    """One call of the model, in which the cross-entropy of a few rows' logits is replaced by that of all rows.

    Args:
        tail: the model after its trunk.
        rows: at most so many positions make a block.
    """

    def __init__(self, tail: Tail, rows: int) -> None:
        super().__init__()
        self.tail, self.rows = tail, rows
        self.done = self.first = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The loss of all rows, where that of the probe's is asked for."""
        kwargs = kwargs or {}
        if func is F.cross_entropy and self.tail.probe is not None:
            return self.loss(*args, **kwargs)
        return func(*args, **kwargs)

    def loss(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """The cross-entropy of all rows, from the hidden states that the probe's rows were taken from."""
        if input.shape[:1] == target.shape[:1]:  # of something else
            settings: Any = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
            return F.cross_entropy(input, target, reduction=reduction, **settings)
        hidden, probe = cast(Tensor, self.tail.hidden), cast(Tensor, self.tail.probe)
        if self.done:
            raise refused(self.tail.model, "a second cross-entropy")
        if reduction not in ("mean", "sum") or size_average is not None or reduce is not None:
            raise refused(self.tail.model, f"a cross-entropy of reduction={reduction!r}")
        size, length = hidden.shape[:2]
        shift = probe.shape[1] - input.shape[0]
        fits = input.dim() == 2 and target.dtype == torch.int64 and shift in (0, 1)
        if not fits or target.numel() != size * (length - shift):
            kind = "" if target.dtype == torch.int64 else f"{target.dtype} "
            raise refused(
                self.tail.model,
                f"a cross-entropy of {target.numel()} {kind}labels for hidden states of {size} × {length} positions",
            )
        self.check_labels(target, ignore_index, input.shape[1])
        if shift:
            target = F.pad(target.view(size, length - 1), (0, 1), value=ignore_index).view(-1)
        self.done = True
        self.compare(input)
        leaves = [leaf for leaf in graph_leaves(input) if leaf is not probe] if torch.is_grad_enabled() else []
        late = _listened(self.tail.model, leaves)
        ask = torch.is_grad_enabled() and (hidden.requires_grad or bool(leaves))
        terms = Terms(weight, ignore_index, label_smoothing)
        small = not late and sum(leaf.numel() for leaf in leaves) <= self.rows * input.shape[1] // 8
        job = _Job(self.tail, target, terms, self.rows, small, reduction == "mean", input.dtype)
        rows_NH = hidden.reshape(-1, hidden.shape[-1])
        function: Any = _Late if late else _Early
        return function.apply(job, ask, rows_NH, *leaves)

    def check_labels(self, target: Tensor, ignored: int, num_words: int) -> None:
        """Check that labels are words: a GPU would fail somewhere later, in a kernel.

        Raises:
            TitheError: one of them is not, and is not ignored either.
        """
        if isinstance(target, FakeTensor):
            return
        wrong = target[((target < 0) | (target >= num_words)) & (target != ignored)]
        if wrong.numel():
            raise TitheError(
                "batch",
                found=f"a label of {int(wrong[0])}",
                expected=f"labels from 0 to {num_words - 1}, or {ignored} where there is none",
                remedy=f"write {ignored} for what is not to be learned, and call model.resize_token_embeddings(…) for"
                " words that were added to the tokenizer",
            )

    def compare(self, logits: Tensor) -> None:
        """Compare the tail with the model's own logits at the probe's rows, in another order; once for each loss.

        Raises:
            TitheError: they differ.
        """
        probe, training = cast(Tensor, self.tail.probe), self.tail.model.training
        known, loss = _checked.setdefault(self.tail.model, {}), id(cast(Any, self.tail.model).loss_function)
        if known.get(training) == loss or isinstance(logits, FakeTensor) or isinstance(probe, FakeTensor):
            return
        with torch.no_grad():
            again = self.tail(probe.detach().flip(1))
            found = again.flip(1)[0, : logits.shape[0]] if again.dim() == 3 else again
            far = found.shape != logits.shape
            if not far and bool(logits.isfinite().all()):
                off = (found.to(logits.dtype) - logits).abs().max()
                far = bool(off > _NEAR.get(again.dtype, 0.05) * logits.abs().max())
        if far:
            raise refused(self.tail.model, "logits that its head does not give for these hidden states alone")
        known[training] = loss
        self.first = True

    def check(self) -> None:
        """Check that the model has computed its loss from the cross-entropy; at the first call also: from nothing else.

        Raises:
            TitheError: it was computed in another way, or from the probe's logits besides.
        """
        loss, probe = self.tail.result, self.tail.probe
        if not self.done or not isinstance(loss, Tensor):
            raise refused(self.tail.model, "a loss that is computed without F.cross_entropy of the logits")
        if self.first and loss.requires_grad and any(leaf is probe for leaf in graph_leaves(loss)):
            raise refused(self.tail.model, "a loss of the logits besides their cross-entropy")


def _listened(model: nn.Module, leaves: Sequence[Tensor]) -> bool:
    """Whether rules hand what arrives in backward on to others than these leaves: to a probe, or to a span's buffer."""
    known = {id(leaf) for leaf in leaves}
    for module in model.modules() if known else ():
        for weight in vars(module).values():
            if isinstance(weight, Carrier):
                binding = weight.binding
                listens = binding.probe is not None or isinstance(binding.common, SharedTheta)
                if listens and (id(binding.asked) in known or id(binding.parameter) in known):
                    return True
    return False


@dataclass(frozen=True)
class _Job:
    """What a loss of all rows is computed from besides hidden states and leaves.

    Args:
        tail: hidden states (1, n, H) → logits (1, n, V).
        target: labels of all rows, int64 (N,).
        terms: of the cross-entropy.
        rows: at most so many rows make a block.
        eighths: at most an eighth of the rows do, however few they are.
        mean: whether the loss is the mean over rows that count.
        dtype: that the model's own loss has.
    """

    tail: Tail
    target: Tensor
    terms: Terms
    rows: int
    eighths: bool
    mean: bool
    dtype: torch.dtype

    def counting(self) -> Tensor | None:
        """The rows that are not ignored; None for all."""
        counts = self.target != self.terms.ignored
        at = counts.nonzero()[:, 0]
        return None if at.numel() == counts.numel() else at

    def divisor(self, like: Tensor) -> Tensor:
        """What the sum is divided by."""
        if not self.mean:
            return torch.ones((), dtype=like.dtype, device=like.device)
        counts = self.target != self.terms.ignored
        if self.terms.weight is None:
            return counts.sum().to(like.dtype)
        return (self.terms.weight.to(like.dtype)[self.target.masked_fill(~counts, 0)] * counts).sum()

    def value(self, total: Tensor) -> Tensor:
        """The loss, in the dtype of the model's own, or float64 where it was computed in that."""
        dtype = torch.float64 if total.dtype == torch.float64 else self.dtype
        return (total / self.divisor(total)).to(dtype)

    def scale(self, gy: Tensor) -> Tensor:
        """The gradient of the sum; zero where no row counts."""
        divisor = self.divisor(gy)
        return torch.where(divisor == 0, divisor, gy / divisor)

    def run(
        self, rows_NH: Tensor, leaves: Sequence[Tensor], at: Tensor | None, ask: bool, scale: Tensor | None = None
    ) -> _Sums:
        """Work on the blocks, each a function's frame, so that nothing of one is left while the next runs."""
        num_rows = rows_NH.shape[0] if at is None else at.numel()
        step = min(self.rows, max(_FEW, -(-num_rows // 8))) if self.eighths else self.rows
        starts = range(0, num_rows, step)
        sums = _Sums(rows_NH, leaves, ask and rows_NH.requires_grad, at is not None, len(starts) > 1)
        for start in blocks(starts, lambda start: min(step, num_rows - start), rows_NH):
            place = slice(start, start + step) if at is None else at[start : start + step]
            self._block(rows_NH.detach(), place, leaves, sums, ask, scale)
        return sums

    def _block(
        self,
        rows_NH: Tensor,
        place: Any,
        leaves: Sequence[Tensor],
        sums: _Sums,
        ask: bool,
        scale: Tensor | None,
    ) -> None:
        h = rows_NH[place][None].requires_grad_(sums.rows is not None)
        with torch.set_grad_enabled(ask), _apart():
            z = self.tail(h)
            z = z.reshape(-1, z.shape[-1])
        loss, g = sum_and_gradient(z.detach(), self.target[place], self.terms, ask=ask and z.requires_grad)
        sums.loss = sums.loss + loss
        if g is None:
            return
        g = g if scale is None else g.mul_(scale)
        asked = ([] if sums.rows is None else [h]) + list(leaves)
        with _silent(leaves):
            found: list[Tensor | None] = list(torch.autograd.grad(z, asked, g, allow_unused=True))
        del z, g
        if sums.rows is not None:
            gh = found.pop(0)
            sums.rows[place] = torch.zeros_like(h[0]) if gh is None else gh[0]
        sums.add(found)


class _Sums:
    """What blocks add up to.

    Args:
        rows_NH: the hidden states.
        leaves: the trained tensors of the tail.
        ask: whether the hidden states get a gradient.
        gaps: whether some rows are in no block.
        several: whether there is more than one block.

    Attributes:
        loss: the sum of losses.
        rows: the gradient of the hidden states, (N, H), or None.
        of_leaves: the gradients of the leaves so far.
    """

    def __init__(self, rows_NH: Tensor, leaves: Sequence[Tensor], ask: bool, gaps: bool, several: bool) -> None:
        self.loss = rows_NH.new_zeros((), dtype=precise(rows_NH.dtype))
        self.rows = (torch.zeros_like if gaps else torch.empty_like)(rows_NH) if ask else None
        self.leaves, self.several = leaves, several
        self.of_leaves: list[Tensor | None] = [None] * len(leaves)

    def add(self, found: Sequence[Tensor | None]) -> None:
        """Add a block's gradients of leaves; of several blocks in float32, where they are in half precision."""
        for n, grad in enumerate(found):
            total = self.of_leaves[n]
            if grad is None:
                continue
            if total is not None:
                total.add_(grad)
            elif self.several:  # a copy, because autograd may have given the same memory to another leaf
                self.of_leaves[n] = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
            else:
                self.of_leaves[n] = grad

    def made(self, scale: Tensor | None = None) -> list[Tensor]:
        """The gradients of leaves in their dtype, times a number; of one that no block has used, zeros."""
        made: list[Tensor] = []
        for n, leaf in enumerate(self.leaves):
            total, self.of_leaves[n] = self.of_leaves[n], None
            if total is None:
                made.append(torch.zeros_like(leaf))
                continue
            if scale is not None:
                total = total.mul_(scale) if self.several else total * scale
            made.append(total.to(leaf.dtype))
        return made


@contextmanager
def _apart() -> Generator[None]:
    """Keep what a block saves from whoever looks at saved tensors: it is gone before anybody keeps it for backward."""
    with saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
        yield


@contextmanager
def _silent(leaves: Sequence[Tensor]) -> Generator[None]:
    """Let hooks on leaves wait until the whole of their gradient is there."""
    waiting = [(hooks, dict(hooks)) for leaf in leaves if (hooks := leaf._backward_hooks)]
    for hooks, _ in waiting:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, saved in waiting:
            hooks.update(saved)


def _twice() -> TitheError:
    return refusal(
        "causal_loss",
        "gradients in place of logits",
        "take the model's own loss for this: model(**batch).loss",
    )


@each_row
class _Early(torch.autograd.Function):
    """The loss, with gradients computed beside it: `apply(job, ask, rows, *leaves)`."""

    @staticmethod
    def forward(ctx: Any, job: _Job, ask: bool, rows_NH: Tensor, *leaves: Tensor) -> Tensor:
        """Keep the gradients of the sum of losses: that of hidden states as it is, those of leaves for the mean."""
        sums = job.run(rows_NH, leaves, job.counting(), ask)
        if ask:
            one = job.scale(torch.ones_like(sums.loss))
            ctx.one, ctx.leaves = one, leaves
            ctx.x = stand_in(rows_NH) if sums.rows is not None else None
            ctx.save_for_backward(sums.rows, *sums.made(one))
        return job.value(sums.loss)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients, times that of the loss."""
        gh_NH, *made = ctx.saved_tensors
        gy = grads[0]
        scale = gy * ctx.one.to(gy)  # of no dimension, so that it keeps its own precision and changes no dtype
        found = [None if gh_NH is None else gh_NH * scale]
        found += [g * gy for g in made]
        if differentiated():
            found = missing(found, (ctx.x, *ctx.leaves), _twice)
        return None, None, *found


@each_row
class _Late(torch.autograd.Function):
    """The loss, whose backward computes the blocks again: `apply(job, ask, rows, *leaves)`."""

    @staticmethod
    def forward(ctx: Any, job: _Job, ask: bool, rows_NH: Tensor, *leaves: Tensor) -> Tensor:
        """Keep the hidden states."""
        sums = job.run(rows_NH, (), None, ask=False)
        ctx.job = job
        kind = rows_NH.device.type
        on = torch.is_autocast_enabled(kind)
        ctx.autocast = partial(torch.autocast, kind, torch.get_autocast_dtype(kind), on)
        ctx.save_for_backward(rows_NH, *leaves)
        return job.value(sums.loss)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients, block by block."""
        rows_NH, *leaves = saved_tensors(ctx)
        twice = differentiated()
        with torch.no_grad(), ctx.autocast():
            scale = ctx.job.scale(grads[0])
            sums = ctx.job.run(rows_NH, leaves, None, True, scale)
        if any(leaf.dim() and found is None for leaf, found in zip(leaves, sums.of_leaves, strict=True)):
            raise TitheError(
                "causal_loss",
                found="a weight of the head that is not in its place any more, as after functional_call",
                expected="the same weights in backward as in forward",
                remedy="call backward inside, or release the plan that watches it",
            )
        made = [sums.rows, *sums.made()]
        if twice:
            made = missing(made, (grads[0], rows_NH, *leaves), _twice)
        return None, None, *made
