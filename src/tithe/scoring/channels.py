"""Measure input channels by passes: their cost (on shapes alone) and the size of their gradients."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from tithe import distributed, ledger
from tithe.batch import num_samples
from tithe.errors import TitheError, TitheWarning
from tithe.rules import Binding
from tithe.rules.sparse.channel_probes import ChannelProbe, Meter
from tithe.rules.sparse.probes import deaf
from tithe.scoring.loss import (
    Loss,
    adds_up,
    all_zero_error,
    check_depends,
    check_loss,
    compute_loss,
    evaluation,
    is_reentrant_cut,
    quiet_loss,
    reentrant_error,
)
from tithe.select.channel_costs import Layer
from tithe.select.topk import check_finite

_P = TypeVar("_P", Meter, ChannelProbe)


def price_channels(model: nn.Module, bindings: Sequence[Binding], loss: Loss, batch: Any) -> dict[str, Layer]:
    """Price an input channel of each weight that has some, in one pass, on shapes alone if possible.

    Args:
        model: with carriers in place.
        bindings: the weights to price.
        loss: `loss(model, batch)`.
        batch: its shapes are those the price is made for.

    Returns:
        Name → layer, in the model's order; weights that are used in another way too are left out. On several ranks it
        is the dearest price list of all: of the largest batch.

    Warns:
        TitheWarning: naming matrices that an operation without a rule for channels uses: they cannot be drawn from.
    """
    with _listening(bindings, {b.name: Meter(b.weight) for b in bindings}) as meters:
        try:
            ledger.predict(model, lambda fakes: check_loss(quiet_loss(loss, model, fakes), finite=False), batch)
        except TitheError:  # a forward pass that needs values, as routing to experts does
            for meter in meters.values():
                meter.usages.clear()
            with evaluation(model):
                with deaf(meters.values()):
                    found = check_loss(compute_loss(loss, model, batch))
                found.backward()
    unheard = [b.name for b in bindings if b.weight.dim() > 1 and not meters[b.name].heard]
    if unheard and is_reentrant_cut(model, loss, batch):
        raise reentrant_error(unheard[0])
    unruled = [b.name for b in bindings if _only_unruled(b, meters[b.name])]
    if unruled:
        named = ", ".join(unruled[:4]) + (" …" if len(unruled) > 4 else "")
        warnings.warn(
            f"{named}: used by an operation that has no rule for input channels "
            "(nn.MultiheadAttention, an LSTM, experts in one tensor); they stay frozen. Leave them out of where= to "
            "say so.",
            TitheWarning,
            stacklevel=2,
        )
    size = num_samples(batch)
    layers: dict[str, Layer] = {}
    for binding in bindings:
        usages, uses = meters[binding.name].usages, meters[binding.name].num_uses
        if not uses:
            continue
        first, shape = usages[0], tuple(binding.weight.shape)
        num_channels = shape[0] if first.transposed else shape[1] * first.groups
        weights = binding.weight.numel() // num_channels
        positions = sum(usage.positions for usage in usages)
        layers[binding.name] = Layer(
            name=binding.name,
            shape=shape,
            groups=first.groups,
            transposed=first.transposed,
            num_channels=num_channels,
            num_uses=uses,
            weights=weights,
            positions=positions,
            per_sample=positions / size,
            flops=2.0 * weights * sum(usage.out_positions for usage in usages),
            theta_bytes=binding.dtype.itemsize,
            value_bytes=first.itemsize,
        )
    return _dearest(layers)


def _dearest(layers: dict[str, Layer]) -> dict[str, Layer]:
    """The same price list on every rank: each has seen a batch of its own, and all have to afford the choice."""
    if distributed.world_size() == 1:
        return layers
    distributed.compare("the prices of channels", {name: f"{v.num_channels} channels" for name, v in layers.items()})
    own = [(layer.positions, layer.per_sample, layer.flops) for layer in layers.values()]
    lists = [json.loads(note) for note in distributed.exchange("the sizes of inputs", json.dumps(own))]
    dearest: list[tuple[int, float, float]] = max(lists, key=lambda each: sum(positions for positions, *_ in each))
    return {
        name: dataclasses.replace(layer, positions=positions, per_sample=per_sample, flops=flops)
        for (name, layer), (positions, per_sample, flops) in zip(layers.items(), dearest, strict=True)
    }


def channel_norms(
    model: nn.Module,
    bindings: Sequence[Binding],
    layers: dict[str, Layer],
    loss: Loss,
    batches: Iterable[Any],
    samples: int,
    or_else: str = "",
) -> dict[str, Tensor]:
    """Sum ‖∂L/∂W_c‖₂ over batches for every input channel c; only one layer's gradient exists at a time.

    Args:
        model: with carriers in place.
        bindings: weights, of which those in `layers` are scored.
        layers: their price list.
        loss: the mean loss over the samples of a batch.
        batches: the data; whole batches are read until they hold `samples` samples, over all ranks.
        samples: how many.
        or_else: what could be done without norms, as the error for norms that are all zero ends.

    Returns:
        Name → (channels,), float32 or float64 as the weight.

    Raises:
        TitheError: when there is no sample, the loss is not a finite scalar with a gradient, a norm is not finite, or
            all of them are zero.
    """
    scored = [b for b in bindings if b.name in layers]
    probes = {b.name: _probe(b, layers[b.name]) for b in scored}
    share = -(-samples // distributed.world_size())
    seen, summed, batch = 0, None, None
    with _listening(scored, probes), evaluation(model):
        for batch in batches:
            size = num_samples(batch)
            if summed is None:
                summed = adds_up(model, loss, [batch])
            for probe in probes.values():
                probe.begin(size)
            with deaf(probes.values()):
                value = compute_loss(loss, model, batch)
            if value.requires_grad:
                (value / size if summed and size else value).backward()
            for probe in probes.values():
                probe.end()
            seen += size
            if seen >= share:
                break
    if not seen:
        raise TitheError("data", found="no samples", expected="at least one batch", remedy="pass data= an iterable")
    distributed.meet("the gradient norms of channels")
    norms = {name: check_finite(name, distributed.sum_(probe.norms)) for name, probe in probes.items()}
    if not any(bool(norm.any()) for norm in norms.values()):
        check_depends(model, loss, batch)
        raise all_zero_error(model, next(iter(norms)), or_else)
    return norms


def _only_unruled(binding: Binding, meter: Meter) -> bool:
    """Whether a matrix has no rule for its channels; a leading axis of one marks embeddings of positions or classes."""
    return meter.unruled and not meter.usages and binding.weight.dim() > 1 and binding.weight.shape[0] > 1


def _probe(binding: Binding, layer: Layer) -> ChannelProbe:
    return ChannelProbe(binding.weight, layer.groups, layer.num_uses, transposed=layer.transposed)


@contextmanager
def _listening(bindings: Sequence[Binding], probes: dict[str, _P]) -> Generator[dict[str, _P]]:
    for binding in bindings:
        binding.probe = probes[binding.name]
    try:
        yield probes
    finally:
        for binding in bindings:
            binding.probe = None
