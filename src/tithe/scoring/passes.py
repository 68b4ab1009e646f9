"""Score weights by passes over data: several samples at once where a rule can, else one sample at a time.

A pass over one sample is exact for any use of a weight. Passes over several are taken where that is cheaper, once two
samples of the data have been scored together and one by one with the same result; a weight that turns out to mix
samples later is scored again, one by one. The sums of all scored weights at once are a second model. Where memory or
the saving of batches allows, weights are scored in groups whose sums are smaller; each group passes over the data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tithe import distributed
from tithe.batch import leaves, num_samples, slice_batch, take_samples
from tithe.errors import TitheError
from tithe.ledger import TransformError, measure
from tithe.rules import Binding, MomentProbe, Probe, SquareProbe, SumProbe
from tithe.rules.sparse.probes import FoldProbe, Listener, PeakProbe, deaf
from tithe.scoring.likelihood import Likelihood
from tithe.scoring.loss import (
    Loss,
    adds_up,
    all_zero_error,
    check_depends,
    check_loss,
    compute_loss,
    evaluation,
    is_reentrant_cut,
    is_sum,
    reentrant_error,
    say_sum,
)
from tithe.scoring.unlike import unlike
from tithe.select import importance

_MICRO, _LEAST = 8, 4
"""Most samples of the largest batch to a pass: enough for dense products; of shorter ones more fit. Fewer than the
least are scored one by one, by torch's own operations."""
_FEW = 16
"""Up to so many samples are scored one by one: to find out whether a batch may be scored at once costs as much."""
_STEP = 0.7
"""What a step that trains part of a network keeps for backward, against what a pass that scores all of it keeps
(measured on BERT-like encoders and ResNets)."""
_PASS, _DENSE, _CALL = 64.0, 96.0, 2.5e6
"""Positions that take as long as reading a weight in a pass, and as writing, squaring and adding its gradient in a loop
over single samples; and multiplications that take as long as the calls for a weight in a pass, half of which the loop
makes too (BERT-like encoders and ResNets, one thread)."""
_SURE = 0.6
"""Part of that loop's time that an estimate may take."""
_AGREE = 1e-3
"""Relative difference at which a weight scored by batch is taken to mix samples, and is scored one by one instead."""
_HEAPS = 0.75
"""How the number of distinct rows of a table grows with samples (Heaps' law has 0.4 to 0.7 for words)."""
_NOISE = 1e-9
"""Squares below this part of the largest are rounding (a key's bias has no gradient but that), and never picked."""
_ROUNDING, _GLANCE = 0.1, 4
"""Gradients below this part of a unit in the last place of the largest are rounding where a ratio of two means would
hide how small both are (keys' biases of MiniLM have 0.01 of it, all its other weights 300 and more); and samples with a
gradient among which the largest is looked for."""


class Statistic(NamedTuple):
    """What is added up over samples, and the score that is made of it.

    Args:
        probe: adds up.
        formula: weight, and the means of the probe's sums → score.
    """

    probe: type[SquareProbe] | type[SumProbe]
    formula: Callable[..., Tensor]


STATISTICS = {
    "fisher": Statistic(SquareProbe, importance.fisher),
    "gradient": Statistic(SumProbe, importance.gradient),
    "snr": Statistic(MomentProbe, importance.snr),
    "saliency": Statistic(SumProbe, importance.saliency),
}
"""The scores that are taken over data, by name."""


class _Piece(NamedTuple):
    """Samples of a batch that passes run together or one by one."""

    batch: Any
    samples: list[int]

    def take(self) -> Any:
        """These samples as a batch."""
        return take_samples(self.batch, self.samples)


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
        self._head, self._unheard = dict(head or {}), dict(head or {})
        self._weights = {b.name: b.weight for b in bindings}
        self._unreached = set(self._weights)
        tables = {module._parameters["weight"] for module in model.modules() if isinstance(module, nn.Embedding)}
        self._tables = {b.name for b in bindings if b.weight in tables}
        share = -(-samples // distributed.world_size())
        self.batches: list[Any] = []
        have = 0
        for batch in batches:
            size = num_samples(batch)
            if size:
                self.batches.append(batch if have + size <= share else slice_batch(batch, 0, share - have))
            have += size
            if have >= share:
                break
        self.num_samples = sum(num_samples(b) for b in self.batches)
        self._summed = self._whole_checked = False
        if not self.num_samples:
            raise TitheError(
                "data", found="no samples", expected="at least one batch", remedy="pass data= an iterable of batches"
            )
        self._largest = max(self.batches, key=_num_elements)
        self._mixed, self._pair = unlike(self.batches, self._largest)
        micro = min(_MICRO, num_samples(self._largest))
        opaque = any(next(leaves(batch), None) is None for batch in self.batches)  # how unlike they are nobody can tell
        self._micro = micro if self.num_samples > _FEW and micro >= _LEAST and not opaque else 1

    def scores(self, kind: str, or_else: str = "") -> Iterator[tuple[str, Tensor]]:
        """Yield name and score of each weight.

        Args:
            kind: a name of `STATISTICS`.
            or_else: what could be done without these scores, as the error for scores that are all zero ends.

        Raises:
            TitheError: when a weight gets no gradient from any of the data, no weight gets one that is not zero, or a
                ratio of two means is asked for over one sample, where it is 1 whatever the gradient.
        """
        distributed.meet("the number of samples to score")
        total = distributed.sum_number(self.num_samples, self.bindings[0].weight.device)
        made, formula = STATISTICS[kind]
        ratio = issubclass(made, MomentProbe)
        if ratio and total < 2:
            raise TitheError(
                "samples",
                found="one sample",
                expected=f"at least two, over which the score {kind!r} is a ratio of two means",
                remedy="pass more data, and samples= of some hundreds",
            )
        nothing = True
        with evaluation(self.model), self._listening():
            if not issubclass(made, SquareProbe):
                self._summed = adds_up(self.model, self.loss, self.batches)
            peak = self._peak() if ratio else 0.0
            for group in self._groups(made):
                probes = self._squares(group, made) if issubclass(made, SquareProbe) else self._sums(group, made)
                for name, probe in probes.items():
                    if probe.reached:
                        self._unreached.discard(name)
                for binding in _tables_last(group, probes):
                    distributed.meet(f"the score of {binding.name}")  # not of the group: ranks may group otherwise
                    means = [distributed.sum_(t).div_(total) for t in probes.pop(binding.name).totals()]
                    nothing = nothing and not any(bool(mean.any()) for mean in means)
                    if ratio:
                        unit = torch.finfo(binding.weight.dtype).eps
                        means[-1].masked_fill_(means[-1] <= min((_ROUNDING * unit) ** 2, _NOISE) * peak, 0.0)
                    yield binding.name, formula(binding.weight, *means)
            self._check_reached()
            if nothing:
                raise self._all_zero(made, or_else)

    def _peak(self) -> float:
        """The largest squared gradient of a few samples of every rank, against which rounding is told.

        It does not depend on how weights are grouped, which free memory decides: so scores do not either.
        """
        probes = {b.name: PeakProbe(b.weight) for b in self.bindings}
        seen, found = 0, 0.0
        places = ((batch, n) for batch in self.batches for n in range(num_samples(batch)))
        for whole, n in places:
            if seen == _GLANCE:
                break
            self._backward(probes, slice_batch(whole, n, n + 1), whole)
            found = max(probe.peak for probe in probes.values())
            seen += found > 0
        if distributed.world_size() > 1:
            distributed.meet("the size of gradients")
            largest = torch.tensor([found], dtype=torch.float64, device=self.bindings[0].weight.device)
            found = float(distributed.gather(largest).max())
        return found

    def _groups(self, made: type[Probe]) -> list[list[Binding]]:
        """Return groups of weights whose sums fit into memory together, and need no more than they have to.

        All weights are one group where passes over single samples, or over few, are no cheaper than a loop that scores
        all of them at once. Where batches are, weights are dealt to as many groups as make up for it, if the sums would
        otherwise not fit beside a pass in what a training step on the same batch needs.
        """
        num_sums = 2 if issubclass(made, MomentProbe) else 1
        need = {b.name: float(num_sums * b.weight.numel() * _itemsize(b)) for b in self.bindings}
        total = limit = sum(need.values())
        if issubclass(made, SquareProbe) and self._micro > 1 and self._num_affordable(0.0) > 1:
            listeners = {b.name: Listener(b.weight) for b in self.bindings}
            one = slice_batch(self._largest, 0, 1)
            try:
                saved = measure(lambda: self._backward(listeners, one, self._largest)).kept
            except TransformError:  # more passes than need be, then
                self._backward(listeners, one, self._largest)
                saved = 0
            for name, listener in listeners.items():
                need[name] = min(num_sums * listener.held * self.num_samples**_HEAPS, need[name]) or need[name]
            size, total = num_samples(self._largest), sum(need.values())
            limit = max(saved * (_STEP * size - self._micro), total / 8)
            sizes = {name: self._weights[name].numel() for name in listeners}
            met = sum(sizes[name] * listener.positions for name, listener in listeners.items()) / sum(sizes.values())
            most = self._num_affordable(met)
            while len(self._dealt(need, limit)) > most:
                limit *= 1.05
        return self._dealt(need, min(limit, max(_free_bytes(self.bindings[0].weight.device), total / 8)))

    def _dealt(self, need: Mapping[str, float], limit: float) -> list[list[Binding]]:
        """Weights in the model's order, as many to a group as stay within the limit."""
        groups: list[list[Binding]] = [[]]
        held = 0.0
        for binding in self.bindings:
            if groups[-1] and held + need[binding.name] > limit * (1 + 1e-9):
                groups.append([])
                held = 0.0
            groups[-1].append(binding)
            held += need[binding.name]
        return groups

    def _num_affordable(self, positions: float) -> int:
        """In how many groups weights can be scored in the time of a loop over single samples.

        Each group runs forward and the input gradient, 2 T positions a sample, and reads each weight in each pass; two
        samples are run twice. The loop reads, writes, squares and adds a dense gradient for each sample besides.

        Args:
            positions: T, by which a weight is multiplied, the mean over weights; with 0 the most groups come out.
        """
        calls = _CALL * len(self._weights) / max(sum(weight.numel() for weight in self._weights.values()), 1)
        num_passes = 3 + -(-self.num_samples // self._micro)
        group = (self.num_samples + 2) * 2 * positions + num_passes * (_PASS + calls)
        return max(1, int(_SURE * self.num_samples * (2 * positions + _DENSE + calls / 2) / group))

    def _sums(self, group: list[Binding], made: type[SumProbe]) -> dict[str, Probe]:
        probes: dict[str, Probe] = {b.name: made(b.weight) for b in group}
        for batch in self.batches:
            self._backward(probes, batch)
        return probes

    def _squares(self, group: list[Binding], made: type[SquareProbe]) -> dict[str, Probe]:
        probes = {b.name: made(b.weight) for b in group}
        first = self._pair if self._micro > 1 else []
        done = [_Piece(self._mixed, [n]) for n in first]
        losses = [self._backward(probes, piece.take(), self._mixed) for piece in done]
        together = bool(first) and self._agree(probes, first, losses)
        rest = list(self._pieces(first, together))
        while together and rest:
            done.append(rest.pop(0))
            self._backward(probes, done[-1].take(), done[-1].batch)
            together = not any(probe.wrong for probe in probes.values())
        probes |= self._anew(probes, done)
        self._one_by_one(probes, rest)
        probes |= self._anew(probes, [*done, *rest], by_rule=True)
        return dict(probes)

    def _anew(
        self, probes: Mapping[str, SquareProbe], done: Sequence[_Piece], *, by_rule: bool = False
    ) -> dict[str, SquareProbe]:
        """New probes for weights of which what was added up is wrong, with the same samples scored one by one."""
        anew: dict[str, SquareProbe] = {}
        for name, probe in probes.items():
            if probe.wrong:
                anew[name] = type(probe)(self._weights[name])
                anew[name].reached, anew[name].by_rule = probe.reached, by_rule
        if anew:
            # A reentrant checkpoint gives nothing to a weight inside unless one below asks for a gradient too.
            others = {name: Listener(weight) for name, weight in self._weights.items() if name not in anew}
            self._one_by_one(anew, done, others if by_rule else {})
        return anew

    def _one_by_one(
        self,
        probes: Mapping[str, SquareProbe],
        pieces: Iterable[_Piece],
        others: Mapping[str, Listener] | None = None,
    ) -> None:
        """Score single samples, by torch's own operations where they do as well: tables hold touched rows alone."""
        leaves = {name: p for name, p in probes.items() if not p.by_rule and name not in self._tables}
        with _leaves(self._weights, leaves):
            for piece in pieces:
                for n in piece.samples:
                    self._backward({**probes, **(others or {})}, slice_batch(piece.batch, n, n + 1), piece.batch)

    def _pieces(self, scored: list[int], together: bool) -> Iterator[_Piece]:
        """All samples but those that are scored already, as many at once as a pass runs."""
        each = self._micro * _num_elements(self._largest) / num_samples(self._largest)
        for batch in self.batches:
            size = num_samples(batch)
            left = [n for n in range(size) if batch is not self._mixed or n not in scored]
            micro = max(1, int(each * size / max(_num_elements(batch), 1))) if together else size
            for start in range(0, len(left), micro):
                yield _Piece(batch, left[start : start + micro])

    def _agree(self, probes: Mapping[str, SquareProbe], pair: list[int], losses: list[float]) -> bool:
        """Whether the scores of two samples at once are those of the same two one by one, which `probes` hold.

        It finds whatever makes samples inseparable: another axis than the first, a weight used twice, an operation
        without a rule, a loss that is not a mean over samples. A weight that neither sample reached is not proven.
        """
        if not all(probe.separable and probe.reached for probe in probes.values()):
            return False
        both = take_samples(self._mixed, pair)
        folds: dict[str, FoldProbe] = {}
        for expand in (True, False):  # an expanded parameter may not fit where it is used
            for name, probe in probes.items():
                folds[name] = FoldProbe(self._weights[name])
                folds[name].expand = probe.expand = expand
            try:
                self._backward(folds, both, None, losses)
            except (RuntimeError, ValueError, IndexError):
                continue
            break
        else:
            return False
        apart = {name: probe.fold() for name, probe in probes.items()}
        noise = _NOISE * max(float(sums.max()) for sums in apart.values())
        for name, one in apart.items():
            two = folds[name].folded
            if two is None or not folds[name].separable or not one.any():
                return False
            if float((one - two).abs().max()) > _AGREE * float(one.max()) + noise:
                return False
        return True

    def _backward(
        self, probes: Mapping[str, Probe], batch: Any, whole: Any = None, apart: Sequence[float] = ()
    ) -> float:
        """Run forward and backward on a batch while probes observe; returns the loss.

        Args:
            probes: name → probe, of the weights that are scored.
            batch: the batch.
            whole: the batch that it is a part of, or None.
            apart: the losses of the batch's two samples, to find out whether the loss is their sum.
        """
        size, shapes = num_samples(batch), _shapes(batch)
        for binding in self.bindings:
            binding.probe = probes.get(binding.name)
        for probe in probes.values():
            probe.begin(size, shapes)
        try:
            if self.fisher == "true":
                return self._true_backward(probes, batch, size, shapes, whole)
            with deaf(probes.values()):
                loss = compute_loss(self.loss, self.model, batch, whole)
            value = float(loss.detach())
            if apart and not self._summed and is_sum(apart[0], apart[1], value):
                self._summed = True
                say_sum()
            if loss.dim() and whole is not None and not self._whole_checked:  # of one sample alone, a vector of one
                check_loss(self.loss(self.model, whole))
                self._whole_checked = True
            if loss.requires_grad:
                (loss if self._summed else loss * size).backward()
            self._end(probes)
            return value
        finally:
            for binding in self.bindings:
                binding.probe = None

    def _end(self, probes: Mapping[str, Probe]) -> None:
        with torch.no_grad():
            for probe in probes.values():
                probe.end()
        for name in [name for name, parameter in self._unheard.items() if parameter.grad is not None]:
            self._unheard.pop(name).requires_grad_(False).grad = None

    def _true_backward(self, probes: Mapping[str, Probe], batch: Any, size: int, shapes: Hashable, whole: Any) -> float:
        with Likelihood() as likelihood, deaf(probes.values()):
            loss = compute_loss(self.loss, self.model, batch, whole)
        for root in likelihood.roots(size):
            for probe in probes.values():
                probe.begin(size, shapes)
            if root.requires_grad:
                root.backward(retain_graph=True)
            self._end(probes)
        return float(loss.detach())

    @contextmanager
    def _listening(self) -> Generator[None]:
        """Hear which parameters of the head gradients reach; their own `.grad` stays as it was."""
        head = self._head
        before = {name: parameter.grad for name, parameter in head.items()}
        for parameter in head.values():
            parameter.requires_grad_(True).grad = None
        try:
            yield
        finally:
            for name, parameter in head.items():
                parameter.requires_grad_(False).grad = before[name]

    def _check_reached(self) -> None:
        """Refuse weights, and parameters of the head, that nothing in any rank's data reaches.

        What no sample alone reaches may be reached by whole batches; it has a score of zero then.
        """
        for batch in self.batches:
            if not self._unreached and not self._unheard:
                break
            listeners = {name: Listener(weight) for name, weight in self._weights.items()}
            self._backward(listeners, batch)
            self._unreached -= {name for name, listener in listeners.items() if listener.reached}
        device = self.bindings[0].weight.device
        for setting, names, missed in (
            ("where", list(self._weights), self._unreached),
            ("head", list(self._head), set(self._unheard)),
        ):
            self._refuse(_everywhere(names, missed, device), names, setting)

    def _refuse(self, missed: list[str], names: list[str], setting: str) -> None:
        if not missed:
            return
        if is_reentrant_cut(self.model, self.loss, self.batches[0]):
            raise reentrant_error(missed[0])
        check_depends(self.model, self.loss, self.batches[0])
        more = f" (nor for {len(missed) - 1} more tensors)" if len(missed) > 1 else ""
        out = ", ".join(repr("!" + glob) for glob in _globs(missed, names))
        also = f" and where=[…, {out}]" if setting == "head" else ""
        raise TitheError(
            missed[0],
            found=f"no gradient for it from the loss of any of {self.num_samples} samples{more}",
            expected="a weight that the loss depends on",
            remedy=f"leave it out: {setting}=[…, {out}]{also}; or, where samples are routed, score more of them",
        )

    def _all_zero(self, made: type[Probe], or_else: str) -> TitheError:
        """Make the error for scores of which none is above zero, which would be picked by their order alone."""
        if issubclass(made, SquareProbe) and self._compares():
            return TitheError(
                "loss",
                found="no gradient of any sample alone, though there is one of a whole batch",
                expected="a loss that is a mean over the samples of a batch; this one compares them",
                remedy='use a score that takes whole batches, as score="gradient" does',
            )
        return all_zero_error(self.model, self.bindings[0].name, or_else)

    def _compares(self) -> bool:
        batch = self._largest
        if num_samples(batch) < 2:
            return False
        probes = {b.name: SumProbe(b.weight) for b in self.bindings}
        self._backward(probes, batch)
        return any(bool(probe.total().any()) for probe in probes.values())


@contextmanager
def _leaves(weights: Mapping[str, Tensor], probes: Mapping[str, SquareProbe]) -> Generator[None]:
    """Hand probes the gradients of their weights, each as it arrives and one at a time."""

    def hear(probe: SquareProbe) -> Callable[[Tensor], None]:
        def heard(weight: Tensor) -> None:
            if weight.grad is not None:
                with torch.no_grad():
                    probe.gradient(weight.grad)
                weight.grad = None

        return heard

    handles: list[Any] = []
    try:
        for name, probe in probes.items():
            probe.stock = True
            handles.append(weights[name].requires_grad_(True).register_post_accumulate_grad_hook(hear(probe)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, probe in probes.items():
            weights[name].requires_grad_(False)
            probe.stock = False


def _tables_last(group: list[Binding], probes: Mapping[str, Probe]) -> list[Binding]:
    """Tables hold only touched rows until asked for; asked last, they never stand beside the other sums.

    Ranks keep the model's order: what each has touched differs, and they add up their sums one by one.
    """
    if distributed.world_size() > 1:
        return group
    return sorted(group, key=lambda b: probes[b.name].num_bytes < b.weight.numel())


def _free_bytes(device: torch.device) -> float:
    """Memory that is free on a device; infinite where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return float("inf")


def _everywhere(names: list[str], missed: set[str], device: torch.device) -> list[str]:
    """Those of `names` that are missed on every rank."""
    if not names:
        return []
    distributed.meet("what gradients reach")
    reached = distributed.sum_(torch.tensor([name not in missed for name in names], device=device).int())
    return [name for name, ranks in zip(names, reached.tolist(), strict=True) if not ranks]


def _globs(missed: list[str], names: list[str]) -> list[str]:
    """Globs that match all of `missed` and no other of `names`: of whole modules where nothing else is in them."""
    globs: list[str] = []
    for name in missed:
        path = name.split(".")
        for depth in range(1, len(path)):
            inside = [other for other in names if other.startswith(".".join(path[:depth]) + ".")]
            if len(inside) > 1 and set(inside) <= set(missed):
                name = ".".join(path[:depth]) + ".*"
                break
        if name not in globs:
            globs.append(name)
    return globs


def _itemsize(binding: Binding) -> int:
    return 8 if binding.weight.dtype == torch.float64 else 4


def _shapes(batch: Any) -> Hashable:
    """The shapes of a batch's samples; samples of one shape bring a layer that sees all of them as many rows."""
    size = num_samples(batch)
    return tuple(tuple(leaf.shape[1:] if leaf.shape[:1] == (size,) else leaf.shape) for leaf in leaves(batch))


def _num_elements(batch: Any) -> int:
    return max(sum(leaf.numel() for leaf in leaves(batch)), 1)
