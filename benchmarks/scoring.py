"""Scoring 1024 real samples: the batched scores against one backward a sample, and what choosing holds at its peak.

The loop is written as the FISH authors do: for each sample alone zero_grad, forward, backward, then square every
gradient and add it to a dense sum. Same model, samples and weights; CPU seconds; the largest difference of the scores
relative to the largest score of the tensor; the peak of live storages beyond what was there before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import tithe
from benchmarks.encoder import HEAD, encoder, loss_of
from benchmarks.methods import DENSITY, Prepared, full
from benchmarks.records import Store, parse
from benchmarks.text import TASKS, Batch, Example, batch_of, load
from benchmarks.timing import Contestant

SAMPLES, BATCH = 1024, 16


class Watching(tithe.SparseMethod):
    """FISH, keeping the scores it chose by."""

    needs_data = True

    def __init__(self, fish: tithe.FISH) -> None:
        self.fish = fish
        self.samples = fish.samples
        self.seen: dict[str, Tensor] = {}

    def choose(self, context: tithe.SelectionContext) -> dict[str, tithe.Coordinates]:
        """Keep the scores, then let FISH choose from what it would have seen."""
        watching = self

        class Heard:
            def __getattr__(self, name: str) -> object:
                return getattr(context, name)

            def scores(self, *args: object, **kwargs: object) -> Iterator[tuple[str, Tensor]]:
                for name, score in context.scores(*args, **kwargs):
                    watching.seen[name] = score.clone()
                    yield name, score

        return self.fish.choose(Heard())  # pyright: ignore[reportArgumentType]


def loop(model: nn.Module, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Mean squared per-sample gradients, one backward a sample."""
    model.eval()
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example in examples:
        model.zero_grad()
        loss_of(model, batch_of([example])).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                sums[name] += p.grad.square()
    return {name: total / len(examples) for name, total in sums.items()}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference relative to the tensor's largest score; tensors of which all is rounding are left out."""
    largest = max(float(expected[name].max()) for name in found)
    return max(
        float((found[name] - expected[name]).abs().max() / expected[name].max())
        for name in found
        if float(expected[name].max()) > 1e-9 * largest
    )


def batched(batches: list[Batch], method: object) -> tuple[float, nn.Module]:
    """CPU seconds of attaching, and the attached model."""
    model = encoder(seed=0)
    start = time.process_time()
    tithe.attach(model, method, loss=loss_of, data=batches, head=[HEAD], seed=0)  # pyright: ignore[reportArgumentType]
    return time.process_time() - start, model


def main(args: argparse.Namespace) -> None:
    """Batched, loop, batched again (the faster of the two counts, so that a busy machine does not decide), peaks."""
    torch.set_num_threads(args.threads)
    store = Store(args.results / "scoring.jsonl", key=("samples",))
    if store.find(samples=SAMPLES) is not None:
        return
    split = load(TASKS["sst2"], args.data)
    examples = sorted((split.train + split.validation)[:SAMPLES], key=lambda example: len(example[0]))
    batches = [batch_of(examples[i : i + BATCH]) for i in range(0, SAMPLES, BATCH)]
    fish = tithe.FISH(density=DENSITY, samples=SAMPLES)
    first, _ = batched(batches, fish)
    model = encoder(seed=0)
    start = time.process_time()
    expected = loop(model, examples)
    loop_seconds = time.process_time() - start
    second, _ = batched(batches, fish)
    watching = Watching(fish)
    batched(batches, watching)
    whole = Contestant(full(encoder(seed=0)))
    whole.step(batches[-1])
    fresh = encoder(seed=0)
    attached: list[tithe.Plan] = []
    choosing = tithe.measure(
        lambda: attached.append(tithe.attach(fresh, fish, loss=loss_of, data=batches, head=[HEAD], seed=0))
    )
    chosen = Contestant(Prepared(fresh, list(attached[0].parameters()), attached[0]))
    chosen.step(batches[-1])
    store.add(
        {
            "samples": SAMPLES,
            "loop_seconds": loop_seconds,
            "batched_seconds": min(first, second),
            "batched_seconds_all": [first, second],
            "relative_difference": difference(watching.seen, expected),
            "choosing_peak_bytes": choosing.peak,
            "step_peak_bytes": tithe.measure(lambda: chosen.step(batches[-1])).peak,
            "full_step_peak_bytes": tithe.measure(lambda: whole.step(batches[-1])).peak,
        }
    )


if __name__ == "__main__":
    main(parse(__doc__ or ""))
