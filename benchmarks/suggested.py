"""Suggested learning rates against the best of a grid, for pairs of a task and a mask.

`plan.suggest_lr` of the first four training batches, at the start of training. The grids: of SST-2 those that
`which_mask` (pooler) and `masks` (mean pooling) climbed, of the image tasks climbed here: MobileNetV2-w0.35 (ImageNet)
with 5 % of its weights, 512 images at 64², 4 epochs, Adam, linear decay to zero, one seed. A climb goes by factors of
about three from the mask's usual rate to one whose two neighbours are no better on validation data (ties: the lower
loss). On the image tasks the suggested rate is trained with as well. No test set is read.

Whether the head belongs to the sum was decided on the pairs of SST-2 with the pooler; of which gradient slope and
curvature are taken, on all of SST-2 and CIFAR-10.
`--tasks` does a part: a task of images, `sst2` (pooler) or `sst2-1600` (mean pooling).
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import avg_pool2d

import tithe
from benchmarks import encoder, masks, masks_methods, methods, text, vision
from benchmarks.finetune import RATES
from benchmarks.images import BATCH, Batch, Images, Task, load, training_batches
from benchmarks.records import Record, Store, parse
from benchmarks.transfer import evaluate
from benchmarks.transfer_methods import loss_of
from benchmarks.which_mask import SCOPES, SCORES

KEY = ("task", "method", "rate")
DENSITY = 0.05
NUM_BATCHES = 4
STARTS = {"fisher": 3e-3, "gradient": 3e-3, "magnitude": 1e-2, "random": 1e-2}
IMAGES = {
    task.name: task
    for task in (
        Task("cifar10", 10, 512, 1000, 2000, 4),
        Task("clothing10", 10, 512, 341, 372, 4),
        Task("cifar100", 100, 800, 500, 2000, 4),
    )
}
MASKS = (("fisher", "global"), ("gradient", "tensor"), ("magnitude", "tensor"), ("random", "tensor"))
POOLER_MASKS = (
    *(methods.Mask(score, scope) for score, scope in itertools.product(SCORES, SCOPES)),
    *(methods.Mask(score, "tensor", embeddings=False) for score in ("random", "fisher")),
)


@dataclass(frozen=True)
class Grid:
    """Runs of another benchmark at several rates.

    Args:
        title: of the task.
        file: of the runs.
        fields: what all of them have, besides the method.
    """

    title: str
    file: str
    fields: Record

    def holds(self, record: Record, method: str) -> bool:
        """Whether a run belongs to the grid of a method."""
        return record["method"] == method and all(record.get(key) == value for key, value in self.fields.items())


GRIDS = {
    "sst2-1600": Grid("SST-2, mean pooling", "masks.jsonl", {"task": "sst2-1600", "pooling": "mean", "seed": 0}),
    "sst2": Grid("SST-2, pooler", "which_mask.jsonl", {"task": "sst2", "seed": 0}),
}
APART = ("clothing10", "cifar100")
"""Tasks on which nothing of the suggestion was decided."""


@dataclass(frozen=True)
class ImagePair:
    """A mask on an image task.

    Args:
        task: of IMAGES.
        score: of the mask.
        scope: of the mask.
        data: folder of the data.
    """

    task: str
    score: str
    scope: str
    data: Path

    @property
    def method(self) -> str:
        """For example "fisher global"."""
        return f"{self.score} {self.scope}"

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The training batches of an epoch, at half of the benchmark's usual side."""
        images = load(IMAGES[self.task], self.data).train
        return ((avg_pool2d(x, 2), y) for x, y in training_batches(images, seed=0, epoch=epoch))

    def attach(self) -> tithe.Plan:
        """A plan on a fresh network."""
        task = IMAGES[self.task]
        model: Any = vision.load(vision.NETWORKS["mbv2-w0.35"], self.data, num_classes=task.num_classes)
        model = model.to(memory_format=torch.channels_last).train()
        batches = list(itertools.islice(self.batches(0), 8))
        method = tithe.FISH(density=DENSITY, samples=256, score=self.score, scope=self.scope)  # pyright: ignore
        return tithe.attach(model, method, loss=loss_of, data=batches, head=[vision.HEAD])

    def suggest(self) -> Record:
        """The suggested rate, and what it cost."""
        return suggestion(self.attach(), itertools.islice(self.batches(0), NUM_BATCHES))

    def train(self, rate: float) -> Record:
        """Train at a rate, and score the validation images."""
        start, plan, task = time.process_time(), self.attach(), IMAGES[self.task]
        optimizer = torch.optim.Adam(plan.parameters(), lr=rate)
        num_steps, losses = task.num_epochs * math.ceil(task.num_train / BATCH), list[float]()
        for epoch in range(task.num_epochs):
            for batch in self.batches(epoch):
                for group in optimizer.param_groups:
                    group["lr"] = rate * (1 - len(losses) / num_steps)
                loss = plan.backward(lambda batch=batch: loss_of(plan.model, batch))
                losses.append(float(loss.detach()))
                optimizer.step()
                optimizer.zero_grad()
        accuracy, loss = evaluate(plan.model.eval(), halved(load(task, self.data).validation))
        seconds = time.process_time() - start
        return {"validation": accuracy, "validation_loss": loss, "steps": num_steps, "seconds": seconds}


@dataclass(frozen=True)
class TextPair:
    """A mask on SST-2.

    Args:
        mask: which.
        task: as the benchmark trains it whose grid is compared with.
        pooling: what the head sees.
        data: folder of the data.
    """

    mask: methods.Mask | masks_methods.Mask
    task: text.Task
    pooling: encoder.Pooling
    data: Path

    def suggest(self) -> Record:
        """The suggested rate, and what it cost."""
        examples = text.load(self.task, self.data).train
        batches = list(text.training_batches(examples, self.task.batch, seed=0, epoch=0))
        plan = self.mask.prepare(encoder.encoder(seed=0, pooling=self.pooling), batches, 0, 0).plan
        assert plan is not None
        return suggestion(plan, batches[:NUM_BATCHES])


def halved(images: Images) -> Images:
    """The same images at half of their side."""
    return Images(avg_pool2d(images.x.float(), 2).round().to(torch.uint8), images.y)


def suggestion(plan: tithe.Plan, batches: Iterable[Any]) -> Record:
    """The suggested rate, of all batches and of the first alone."""
    batches, start = list(batches), time.process_time()
    rate = plan.suggest_lr(*batches)
    return {"suggested": rate, "seconds": time.process_time() - start, "of_one_batch": plan.suggest_lr(batches[0])}


def quality(record: Record) -> tuple[float, float]:
    """What the best rate is best by: the metric on validation data, then the lower loss."""
    loss = record["validation_loss"]
    return record["validation"], -loss if math.isfinite(loss) else -math.inf


def climb(start: float, run: Callable[[float], Record], grid: Sequence[float] = RATES) -> float:
    """The rate of a grid whose neighbours are no better, from `start` on."""
    rate = start
    while True:
        at = grid.index(rate)
        near = [grid[other] for other in (at - 1, at + 1) if 0 <= other < len(grid)]
        best = max(near, key=lambda other: quality(run(other)))
        if quality(run(best)) <= quality(run(rate)):
            return rate
        rate = best


def do(store: Store, fields: Record, work: Callable[[], Record]) -> Record:
    """The record of a run: found in the store, or made now and added to it."""
    return store.find(**fields) or store.add({**fields, **work()})


def images(task: str, store: Store, data: Path) -> None:
    """The masks on a task of images, and the grid of each."""
    for score, scope in MASKS:
        pair = ImagePair(task, score, scope, data)

        def run(rate: float, pair: ImagePair = pair) -> Record:
            return do(store, {"task": pair.task, "method": pair.method, "rate": rate}, lambda: pair.train(rate))

        suggested = do(store, {"task": task, "method": pair.method, "rate": None}, pair.suggest)["suggested"]
        climb(STARTS[score], run)
        run(suggested)


def texts(task: str, store: Store, data: Path) -> None:
    """The masks on SST-2, whose grids are those of another benchmark."""
    pooler = [TextPair(mask, text.TASKS["sst2"], "pooler", data) for mask in POOLER_MASKS]
    mean = [TextPair(mask, masks.SCREEN, "mean", data) for mask in masks_methods.MASKS]
    for pair in pooler if task == "sst2" else mean:
        do(store, {"task": task, "method": pair.mask.name, "rate": None}, pair.suggest)


def main(args: argparse.Namespace) -> None:
    """Run what is missing."""
    torch.set_num_threads(args.threads)
    store = Store(args.results / "suggested.jsonl", key=KEY)
    for task in args.tasks or (*GRIDS, *IMAGES):
        (images if task in IMAGES else texts)(task, store, args.data)


if __name__ == "__main__":
    main(parse(__doc__ or "", tasks=True))
