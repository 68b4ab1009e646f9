"""Score weights by passes over data: a whole batch at once if a rule can, else one sample at a time.

The sums of all scored weights at once would be a second model, so weights are scored in groups whose sums fit with
a training step; each group is one pass over the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tithe import distributed
from tithe.batch import leaves, map_batch, num_samples, slice_batch
from tithe.errors import TitheError
from tithe.ledger import measure
from tithe.rules import Binding, Probe, SquareProbe, SumProbe
from tithe.rules.sparse.probes import Listener, SampleProbe
from tithe.scoring.likelihood import Likelihood

Loss = Callable[[Any, Any], Tensor]
Statistic = Literal["square", "sum"]

_MICRO = 8
"""Most samples of the largest batch to a backward pass: enough for dense products; of shorter ones more fit."""
_STEP = 0.7
"""What a step that trains part of a network keeps for backward, against what a pass that scores all of it keeps
(measured on BERT-like encoders and ResNets)."""
_AGREE = 1e-3
"""Relative difference at which a weight scored by batch is taken to mix samples, and is scored one by one instead."""
_HEAPS = 0.75
"""How the number of distinct rows of a table grows with samples (Heaps' law has 0.4 to 0.7 for words)."""
_NOISE = 1e-9
"""Squares below this part of the largest are rounding (a key's bias has no gradient but that), and never picked."""


def check_loss(value: Any, *, finite: bool = True) -> Tensor:
    """Return `value` if it is a scalar that backward can start from; with `finite`, refuse NaN and infinity.

    Raises:
        TitheError: when it is not a tensor, not a scalar, detached, or not finite.
    """
    if not isinstance(value, Tensor):
        found = f"a {type(value).__name__}"
    elif value.dim() != 0 and value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}"
    elif not value.requires_grad:
        found = "a tensor that no gradient flows through"
    elif finite and not bool(torch.isfinite(value.detach()).all()):
        found = f"a loss of {float(value.detach())}"
    else:
        return value
    raise TitheError(
        "loss",
        found=found,
        expected="a finite scalar computed from the model's output with gradients enabled",
        remedy="return the mean loss itself: no .item(), no .detach(), no torch.no_grad(), no reduction='none'",
    )


class Passes:
    """A scorer of weights by passes over data.

    Args:
        model: the model, with carriers in place.
        bindings: the weights to score, in the model's order.
        loss: `loss(model, batch)`, the mean over the samples of the batch.
        batches: the data.
        samples: how many samples to use, over all ranks.
        fisher: "empirical" (the given labels) or "true" (the model's own distribution).
        head: parameters trained whole; they are not scored, but have to get a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        bindings: Sequence[Binding],
        loss: Loss,
        batches: Iterable[Any],
        samples: int,
        fisher: str = "empirical",
        head: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self.model, self.bindings, self.loss, self.fisher = model, bindings, loss, fisher
        self.head = head or {}
        share = -(-samples // distributed.world_size())
        self.batches: list[Any] = []
        for batch in batches:
            size = num_samples(batch)
            have = sum(num_samples(b) for b in self.batches)
            if size:
                self.batches.append(batch if have + size <= share else slice_batch(batch, 0, share - have))
            if have + size >= share:
                break
        self.num_samples = sum(num_samples(b) for b in self.batches)
        self._elements = 1.0
        if not self.num_samples:
            raise TitheError(
                "data", found="no samples", expected="at least one batch", remedy="pass data= an iterable of batches"
            )

    def scores(self, statistic: Statistic) -> Iterator[tuple[str, Tensor]]:
        """Yield name and score of each weight: mean squared per-sample gradient, or absolute mean gradient.

        Raises:
            TitheError: when a weight gets no gradient from any sample.
        """
        distributed.meet("the number of samples to score")
        total = distributed.sum_number(self.num_samples, self.bindings[0].weight.device)
        with self._evaluation():
            for group in self._groups():
                probes = self._squares(group) if statistic == "square" else self._sums(group)
                for binding in _tables_last(group, probes):
                    binding.probe = None
                    distributed.meet(f"the score of {binding.name}")  # not of the group: ranks may group otherwise
                    score = distributed.sum_(probes.pop(binding.name).total()).div_(total)
                    yield binding.name, score.abs_() if statistic == "sum" else score

    def _groups(self) -> list[list[Binding]]:
        """Return groups whose sums and a pass together need no more than a training step on the same batch.

        Two samples are run with probes that only listen: what they save for backward, scaled to the batch, tells what
        a training step keeps. The room is never less than an eighth of the weights, which bounds the number of passes.

        Raises:
            TitheError: when a weight gets no gradient.
        """
        batch = max(self.batches, key=_num_elements)
        size = num_samples(batch)
        few = slice_batch(batch, 0, min(2, size))
        listeners = {b.name: Listener(b.weight) for b in self.bindings}
        for binding in self.bindings:
            binding.probe = listeners[binding.name]
        with _listening(self.head) as missed:
            saved = measure(lambda: self._backward(self.bindings, few)).kept / num_samples(few)
        _check_reached([name for name, listener in listeners.items() if not listener.reached], "where")
        _check_reached(missed, "head")
        micro = max(1, min(_MICRO, size // 5))
        self._elements = micro * _num_elements(batch) / size
        limit = max(sum(b.weight.numel() * 4 for b in self.bindings) / 8, saved * (_STEP * size - micro))
        scale = self.num_samples / num_samples(few)
        groups: list[list[Binding]] = [[]]
        held = 0.0
        for binding in self.bindings:
            listener = listeners[binding.name]
            binding.probe = None
            whole = binding.weight.numel() * listener.dtype.itemsize
            need = min(listener.held * scale**_HEAPS, whole) if listener.held < whole else whole
            if groups[-1] and held + need > limit:
                groups.append([])
                held = 0.0
            groups[-1].append(binding)
            held += need
        return groups

    def _sums(self, group: list[Binding]) -> dict[str, Probe]:
        for binding in group:
            binding.probe = SumProbe(binding.weight)
        for batch in self.batches:
            self._backward(group, batch)
        return {b.name: _probe(b) for b in group}

    def _squares(self, group: list[Binding]) -> dict[str, Probe]:
        for binding in group:
            binding.probe = SquareProbe(binding.weight)
        alone = self._mixing(group)
        together = [b for b in group if b not in alone]
        for binding in alone:
            binding.probe = None
        if together:
            for batch in self.batches:
                size = num_samples(batch)
                micro = max(1, int(self._elements * size / max(_num_elements(batch), 1)))
                for start in range(0, size, micro):
                    self._backward(together, slice_batch(batch, start, min(start + micro, size)))
        alone += [b for b in together if not _probe(b).separable]
        probes = {b.name: _probe(b) for b in together}
        for binding in together:
            binding.probe = None
        for binding in alone:
            binding.probe = probes[binding.name] = SampleProbe(binding.weight)
        if alone:
            for batch in self.batches:
                for n in range(num_samples(batch)):
                    self._backward(alone, slice_batch(batch, n, n + 1))
        return probes

    def _mixing(self, group: list[Binding]) -> list[Binding]:
        """The weights whose batched scores of two samples differ from the same two scored one by one.

        It finds whatever makes samples inseparable: another axis than the first, a weight used twice, an operation
        without a rule, a loss that is not a mean over samples. A weight that neither sample reached is not proven.
        """
        batch = max(self.batches, key=num_samples)
        if num_samples(batch) < 2:
            self._backward(group, batch)
            for binding in group:
                _probe(binding).clear()
            return [b for b in group if not _probe(b).separable]
        pair = _unlike(batch)
        try:
            self._backward(group, pair)
        except (RuntimeError, ValueError, IndexError):
            for binding in group:  # an expanded parameter did not fit where it is used
                _probe(binding).expand = False
            self._backward(group, pair)
        both = {b.name: _probe(b).fold() for b in group}
        separable = {b.name: _probe(b).separable for b in group}
        for n in range(2):
            self._backward(group, slice_batch(pair, n, n + 1))
        apart = {b.name: _probe(b).fold() for b in group}
        noise = _NOISE * max(float(sums.max()) for sums in apart.values())
        mixing: list[Binding] = []
        for binding in group:
            one, two = apart[binding.name], both[binding.name]
            agree = float((one - two).abs().max()) <= _AGREE * float(one.max()) + noise
            if not separable[binding.name] or not agree or not one.any():
                mixing.append(binding)
        return mixing

    def _backward(self, group: Sequence[Binding], batch: Any) -> None:
        size = num_samples(batch)
        if self.fisher == "true":
            self._true_backward(group, batch, size)
            return
        for binding in group:
            _probe(binding).begin(size)
        (check_loss(self.loss(self.model, batch)) * size).backward()
        for binding in group:
            _probe(binding).end()

    def _true_backward(self, group: Sequence[Binding], batch: Any, size: int) -> None:
        for binding in group:
            _probe(binding).begin(size)
        with Likelihood() as likelihood:
            check_loss(self.loss(self.model, batch))
        for root in likelihood.roots(size):
            for binding in group:
                _probe(binding).begin(size)
            root.backward(retain_graph=True)
            for binding in group:
                _probe(binding).end()

    @contextmanager
    def _evaluation(self) -> Generator[None]:
        """Evaluation mode, gradients enabled, and every flag and every .grad as it was afterwards."""
        training = [module for module in self.model.modules() if module.training]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            with torch.enable_grad():
                yield
        finally:
            for binding in self.bindings:
                binding.probe = None
            for parameter in trained:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True


def _probe(binding: Binding) -> Probe:
    assert binding.probe is not None, "a pass sets the probe of every weight it scores"
    return binding.probe


def _tables_last(group: list[Binding], probes: dict[str, Probe]) -> list[Binding]:
    """Tables hold only touched rows until asked for; asked last, they never stand beside the other sums.

    Ranks keep the model's order: what each has touched differs, and they add up their sums one by one.
    """
    if distributed.world_size() > 1:
        return group
    return sorted(group, key=lambda b: probes[b.name].num_bytes < b.weight.numel())


@contextmanager
def _listening(head: Mapping[str, nn.Parameter]) -> Generator[list[str]]:
    """Names of the head's parameters that no gradient reached in the meantime; their own `.grad` stays as it was."""
    missed: list[str] = []
    before = {name: parameter.grad for name, parameter in head.items()}
    for parameter in head.values():
        parameter.requires_grad_(True).grad = None
    try:
        yield missed
        missed += [name for name, parameter in head.items() if parameter.grad is None]
    finally:
        for name, parameter in head.items():
            parameter.requires_grad_(False).grad = before[name]


def _check_reached(missed: list[str], setting: str) -> None:
    if missed:
        more = f" (nor for {len(missed) - 1} more tensors)" if len(missed) > 1 else ""
        raise TitheError(
            missed[0],
            found=f"no gradient for it from the loss{more}",
            expected="a weight that the loss depends on",
            remedy=f"leave it out: {setting}=[…, {', '.join(repr('!' + name) for name in missed[:4])}]",
        )


def _unlike(batch: Any) -> Any:
    """Two samples of a batch, those with the fewest and the most non-zero entries: the shortest and the longest."""
    size = num_samples(batch)
    counts = sum((leaf.reshape(size, -1) != 0).sum(1).cpu() for leaf in leaves(batch))
    assert isinstance(counts, Tensor), "a batch has at least one tensor"
    low, high = int(counts.argmin()), int(counts.argmax())
    return map_batch(lambda leaf: leaf[[low, high if high != low else (low + 1) % size]], batch)


def _num_elements(batch: Any) -> int:
    return sum(leaf.numel() for leaf in leaves(batch))
