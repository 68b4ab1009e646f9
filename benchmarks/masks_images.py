"""Which mask on images: MobileNetV2-w0.35, pretrained on ImageNet, on CIFAR-100, each mask at its own rate.

The setting of `transfer`: 800 images of 128², 8 epochs of SGD without momentum; the head's rate is the best of training
the head alone. Every mask trains 2 % of the convolutions' weights and biases, the head beside them. The body's rate is
climbed for each method with one seed (lowest cross-entropy on validation images); then three seeds are scored on the
test images.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tithe
from benchmarks import transfer_methods
from benchmarks.images import TASKS
from benchmarks.records import Store, parse
from benchmarks.transfer import KEY, SEEDS, Run, climb, do
from benchmarks.transfer_methods import Method, Prepared, Setting, attached
from benchmarks.vision import NETWORKS

NETWORK, TASK = NETWORKS["mbv2-w0.35"], TASKS["cifar100"]
DENSITY = 0.02
SAMPLES = 128
HEAD_ONLY, FULL = transfer_methods.METHODS["head only"], transfer_methods.METHODS["full"]


def masked(score: str, scope: str, unit: str = "entry") -> Method:
    """A mask of that score, scope and unit."""

    def prepare(model: nn.Module, setting: Setting) -> Prepared:
        body = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("classifier"))
        options: dict[str, Any] = {"score": score, "scope": scope, "unit": unit}
        return attached(model, tithe.FISH(k=int(DENSITY * body), samples=SAMPLES, **options), setting)

    columns = " columns" if unit == "column" else ""
    return Method(f"{score}{columns} {scope}", 0.1 if score in ("random", "magnitude") else 0.03, prepare)


METHODS = {
    m.name: m
    for m in (
        masked("fisher", "global"),
        masked("random", "tensor"),
        masked("fisher", "global", "column"),
        FULL,
        masked("snr", "global"),
        masked("saliency", "tensor"),
        masked("magnitude", "global"),
        masked("principal", "tensor"),
        masked("random", "tensor", "column"),
    )
}


def rates(method: Method, store: Store, data: Path) -> tuple[float, float]:
    """The head's rate (of training it alone) and the body's, with the lowest loss on validation images."""

    def quality(method: Method, head_rate: float, rate: float) -> float:
        loss = do(Run(NETWORK, TASK, method, head_rate, rate, SEEDS[0]), store, data)["validation_loss"]
        return -loss if math.isfinite(loss) else -math.inf

    head_rate = climb(0.1, partial(quality, HEAD_ONLY, rate=0.0))
    if method.start is None:
        return head_rate, 0.0
    return head_rate, climb(method.start, partial(quality, method, head_rate))


def main(args: argparse.Namespace) -> None:
    """Run what is missing: the first seed of everything, then the second, then the third."""
    torch.set_num_threads(args.threads)
    store = Store(args.results / "masks_images.jsonl", key=KEY)
    for seed in SEEDS:
        for method in (HEAD_ONLY, *METHODS.values()):
            head_rate, rate = rates(method, store, args.data)
            do(Run(NETWORK, TASK, method, head_rate, rate, seed, test=True), store, args.data)


if __name__ == "__main__":
    main(parse(__doc__ or ""))
