"""Pricing: each offer is set up on shapes alone, predicted for a batch, and taken off again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

import tithe
from tithe.app.price.offers import OFFERS, USUAL, Offer, Setup
from tithe.app.price.quote import Fit, Quote, Quotes
from tithe.app.price.subject import Subject
from tithe.app.price.terms import OPTIMIZERS, Site, Terms, model_bytes, unique_bytes
from tithe.errors import TitheError
from tithe.ledger import Blank, Ledger, predict
from tithe.ledger.flops import FlopCounter, Flops

_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)

_PACKED = 8
"""How many times less four bits a weight take, at most: a first look, before anything is priced."""

Progress = Callable[[str, int, int], None]


def price(
    subject: Subject,
    *,
    batch: int = 8,
    methods: Sequence[str] = USUAL,
    terms: Terms | None = None,
    memory: int | None = None,
    progress: Progress = lambda label, done, total: None,
) -> Quotes:
    """Predict what training `subject` takes by each method, without allocating or computing anything of its size.

    A method that the model, the budget or the machine does not allow is left out, and the quotes say why.

    Args:
        subject: the network, its batches and its loss.
        batch: samples in a step.
        methods: keys of `OFFERS`.
        terms: budget, rank, optimizer and checkpoints.
        memory: bytes to fit into; asks for the largest micro-batch, up to the whole batch, and the largest selection
            that do.
        progress: called with what is being priced, how many steps are done, and how many there are.

    Raises:
        TitheError: when the network cannot be built without data or run on shapes, the budget leaves nothing to any
            method, `memory` is less than the weights, or a name or number is out of range.
    """
    terms = terms or Terms()
    _check(batch, methods)
    blank = Blank()
    model = subject.make(blank)
    weights = model_bytes(model)
    _check_memory(memory, weights // _PACKED if "qlora" in methods else weights)
    rows: list[Quote] = []
    left_out: dict[str, TitheError] = {}
    shared: dict[str, Any] = {}
    looks = 3 if memory is not None else 1
    for place, method in enumerate(methods):
        offer = OFFERS[method]
        site = Site(subject=subject, terms=terms, blank=blank, model=model, num_samples=batch, shared=shared)
        stall = _Stall(offer, site, weights)
        try:
            alike = next(
                (row for row in rows if offer.like is not None and row.method == OFFERS[offer.like].name), None
            )
            if alike is not None:
                rows.append(dataclasses.replace(alike, method=offer.name))
                continue
            progress(offer.name, place * looks, len(methods) * looks)
            row = stall.quote()
            if memory is not None:
                progress(f"{offer.name}: micro-batch", place * looks + 1, len(methods) * looks)
                fit = stall.fit(memory, row)
                if offer.budgeted and fit.micro_batch:
                    progress(f"{offer.name}: selection", place * looks + 2, len(methods) * looks)
                    fit = dataclasses.replace(fit, fraction=stall.fraction(memory, row, fit))
                row = dataclasses.replace(row, fit=fit)
            rows.append(row)
        except TitheError as error:
            left_out[offer.name] = error
    _check_rows(rows, left_out, [OFFERS[method] for method in methods])
    _check_memory(memory, min(row.weights for row in rows))
    return Quotes(
        subject=subject.name,
        dtype=str(subject.dtype).removeprefix("torch."),
        batch=batch,
        budget=terms.budget,
        optimizer=terms.optimizer,
        checkpoints=terms.checkpoints,
        bits=terms.bits,
        memory=memory,
        rows=tuple(rows),
        left_out={name: str(error) for name, error in left_out.items()},
    )


def largest(cost: Callable[[int], int], limit: int, most: int, guess: int = 1) -> int:
    """Find the largest n in [0, most] with cost(n) ≤ limit, where costs grow with n; n = 0 costs nothing.

    What is found was looked at, and so was the next; a guess that is right takes no other look.

    Example:
        >>> largest(lambda n: 100 + 7 * n, 1000, most=10**6)
        128
    """
    fits, fails, stride = 0, most + 1, 1
    at = min(max(guess, 1), most)
    while fails - fits > 1:
        if cost(at) <= limit:
            fits, at = at, min(at + stride, fails - 1)
        else:
            fails, at = at, max(at - stride, fits + 1)
        stride *= 2
        if fits and fails <= most:  # it is between the two
            at = (fits + fails) // 2
    return fits


def _check(batch: int, methods: Sequence[str]) -> None:
    if batch < 1:
        raise TitheError("batch", found=str(batch), expected="at least 1", remedy="for example --batch 8")
    unknown = [method for method in methods if method not in OFFERS]
    if unknown or not methods:
        raise TitheError(
            "method",
            found=repr(unknown[0]) if unknown else "none",
            expected="some of " + ", ".join(OFFERS),
            remedy="correct the name",
        )


def _check_memory(memory: int | None, weights: int) -> None:
    if memory is not None and memory <= weights:
        raise TitheError(
            "memory",
            found=f"{memory:,} bytes",
            expected=f"more than the weights alone, {weights:,} bytes",
            remedy="give more, use a smaller model, or --dtype bfloat16",
        )


def _check_rows(rows: Sequence[Quote], left_out: dict[str, TitheError], offers: Sequence[Offer]) -> None:
    """Refuse when nothing was priced, or nothing that the budget is for."""
    budgeted = [offer.name for offer in offers if offer.budgeted]
    if not rows or (budgeted and all(name in left_out for name in budgeted)):
        raise next(left_out[offer.name] for offer in offers if offer.name in left_out and (not rows or offer.budgeted))


class _Stall:
    """One offer, priced for batches of any size."""

    def __init__(self, offer: Offer, site: Site, weights: int) -> None:
        self.offer, self.site, self.weights = offer, site, weights
        self.optimizer = OPTIMIZERS[site.terms.optimizer]

    def quote(self) -> Quote:
        """The figures of one step of the whole batch."""
        with self._prepared(self.site) as setup:
            counter = FlopCounter(setup.model.parameters())
            return self._quote(setup, self.site.num_samples, counter)

    def fit(self, memory: int, whole: Quote) -> Fit:
        """The whole batch, or the largest micro-batch within `memory`, gradients of earlier ones kept besides."""
        batch, peaks = self.site.num_samples, dict[int, int]()
        if whole.peak <= memory or batch == 1:
            fits = whole.peak <= memory
            return Fit(micro_batch=batch * fits, steps=int(fits), peak=whole.peak)

        def look(site: Site, setup: Setup) -> int:
            quote = self._quote(setup, site.num_samples, None, accumulate=True)
            peaks[site.num_samples] = quote.peak
            return quote.peak

        # What is kept and what an operation needs grow with the batch, about; the rest stays.
        fixed = whole.weights + whole.theta + whole.index + whole.optimizer + whole.gradients
        guess = int(batch * (memory - fixed) / max(whole.peak - fixed, 1))
        if self.offer.per_batch and self.site.terms.budget.bytes is not None:

            def cost(n: int) -> int:
                site = dataclasses.replace(self.site, num_samples=n)
                with self._prepared(site) as setup:
                    return look(site, setup)

            best = largest(cost, memory, batch - 1, guess)
        else:
            with self._prepared(self.site) as setup:
                best = largest(
                    lambda n: look(dataclasses.replace(self.site, num_samples=n), setup), memory, batch - 1, guess
                )
        steps = -(-batch // best) if best else 0
        return Fit(micro_batch=best, steps=steps, peak=peaks[max(best, 1)])

    def fraction(self, memory: int, whole: Quote, fit: Fit) -> float | None:
        """The largest of a few round fractions that fits with the micro-batch that was found to fit."""
        num_samples = min(self.site.num_samples, fit.micro_batch)
        total = sum(p.numel() for p in self.site.model.parameters())
        each = (2 + self.optimizer.states) * tithe.rules.theta_dtype(self.site.subject.dtype).itemsize + 8

        def cost(place: int) -> int:
            fraction = _FRACTIONS[place - 1]
            if fraction == self.site.terms.budget.fraction:
                return fit.peak
            least = self.weights + int(fraction * total * each)
            if self.offer.per_batch or least <= memory:
                terms = dataclasses.replace(self.site.terms, budget=tithe.Budget(fraction=fraction))
                site = dataclasses.replace(self.site, terms=terms, num_samples=num_samples)
                try:
                    with self._prepared(site) as setup:
                        parts = num_samples < self.site.num_samples
                        return self._quote(setup, num_samples, None, accumulate=parts).peak
                except TitheError:
                    return 0  # it leaves nothing beside the head
            return least

        more = [fit.peak + (fraction * total - whole.trained) * each for fraction in _FRACTIONS]
        best = largest(cost, memory, len(_FRACTIONS), sum(size <= memory for size in more))
        return _FRACTIONS[best - 1] if best else None

    @contextmanager
    def _prepared(self, site: Site) -> Generator[Setup]:
        with _excused(self.offer):
            setup = self.offer.prepare(site)
            try:
                yield setup
            finally:
                setup.undo()

    def _quote(self, setup: Setup, n: int, counter: FlopCounter | None, *, accumulate: bool = False) -> Quote:
        subject, batch = self.site.subject, self.site.subject.draw(self.site.blank, n)
        needed = [p for p in setup.model.parameters() if p.requires_grad]

        def closure(shapes: Any) -> Tensor:
            if accumulate:
                for parameter in needed:
                    parameter.grad = torch.empty_like(parameter)
                setup.link()
            with _answering(subject.name, own=self.offer.foreign is None):
                return subject.loss(setup.model, shapes)

        if setup.predict is None:
            ledger = predict(setup.model, closure, batch, inside=counter)
            setup.link()
            gradients, earlier, copies = sum(_size(parameter) for parameter in needed), 0, 0
        else:
            with counter or nullcontext():
                ledger = setup.predict(batch)
            # Copies of what the optimizer updates, and of its state, are made for its step.
            gradients, copies = ledger.gradients, ledger.theta * (1 + self.optimizer.states)
            earlier = gradients if accumulate else 0
        states = self.optimizer.states * sum(map(_size, setup.trained))
        weights = self.weights if setup.weights is None else setup.weights
        theta = model_bytes(setup.model) - weights
        standing = weights + _leaf_bytes(batch) + theta + setup.index + states
        temporaries = max(copies + self.optimizer.temporaries * max(map(_size, setup.trained)), setup.write)
        at_peak, moment = _moment(ledger, gradients, temporaries, earlier)
        return Quote(
            method=self.offer.name,
            trained=sum(parameter.numel() for parameter in setup.trained),
            weights=weights,
            batch=_leaf_bytes(batch),
            theta=theta,
            index=setup.index,
            optimizer=states,
            gradients=gradients,
            sent=gradients if setup.sent is None else setup.sent,
            kept=ledger.kept,
            peak=standing + sum(at_peak.values()),
            at_peak=at_peak,
            moment=moment,
            flops=None if counter is None else _with(counter.counted, setup.operations),
            file=setup.file,
            basis=setup.basis,
            layers=dict(ledger.kept_by_module),
        )


@contextmanager
def _excused(offer: Offer) -> Generator[None]:
    """What goes wrong in a model that another package changed is no fault of the model."""
    try:
        yield
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        if offer.foreign is None:
            raise
        raise TitheError(
            offer.foreign,
            found=f"layers that the model cannot run with ({error})",
            expected="layers in place of the model's own",
            remedy="leave this row out",
        ) from error


@contextmanager
def _answering(name: str, *, own: bool) -> Generator[None]:
    """A forward pass that fails in the model's own layers was given inputs that it does not take."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if not own or "tensor subclasses" in str(error):  # `predict` has more to say of this one
            raise
        raise TitheError(
            name,
            found=f"a forward pass that fails ({str(error).strip().splitlines()[0]})",
            expected="inputs that the model takes",
            remedy="give their shape: --image 3x224x224 or --tokens 128",
        ) from error


def _moment(ledger: Ledger, gradients: int, temporaries: int, earlier: int) -> tuple[dict[str, int], str]:
    """What lives at the highest moment besides what always does, and when that is.

    Args:
        ledger: of forward and backward.
        gradients: as they stand when backward ends.
        temporaries: of the optimizer's step.
        earlier: gradients of earlier micro-batches, where the ledger does not know of them; at most as much more.
    """
    if gradients + temporaries > ledger.peak + earlier:
        return {"gradients": gradients, "kept": 0, "transient": temporaries}, "optimizer step"
    kinds = ledger.by_kind
    parts = {"gradients": kinds["gradients"] + earlier, "kept": kinds["kept"], "transient": kinds["other"]}
    return parts, "forward and backward"


def _with(flops: Flops, operations: int) -> Flops:
    return dataclasses.replace(flops, weight_gradient=flops.weight_gradient + operations)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _leaf_bytes(batch: Any) -> int:
    from torch.utils._pytree import tree_leaves

    return unique_bytes(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
