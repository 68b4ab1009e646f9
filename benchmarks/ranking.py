"""The ranking of layers that TraDy draws from, and how much it depends on the task it is measured on.

Full fine-tuning on each task, with two seeds; the RGN of every layer is added up over the start and the end of each of
four epochs. The sum over both seeds on Fashion-MNIST, which is no target of `benchmarks.transfer`, is written to
results/ranking_<network>.json; the others are for the rank correlations.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import torch

import tithe
from benchmarks import vision
from benchmarks.images import RANKED, TASKS, Task, load, training_batches
from benchmarks.records import Store, parse
from benchmarks.transfer import ranking_file
from benchmarks.transfer_methods import loss_of
from benchmarks.vision import HEAD, NETWORKS, Network

SEEDS = (0, 1)
RATE, HEAD_RATE = 1e-3, 0.1
NUM_EPOCHS = 4
NUM_TRAIN = 640
SAMPLES = 256


def measured(network: Network, task: Task, seed: int, data: Path) -> tithe.Ranking:
    """The sum of the rankings before training and after each epoch of it."""
    images = load(task, data).train
    model = vision.load(network, data, num_classes=task.num_classes, seed=seed).to(memory_format=torch.channels_last)
    groups = [
        {"params": [p for n, p in model.named_parameters() if n.startswith("classifier") == head], "lr": rate}
        for head, rate in ((True, HEAD_RATE), (False, RATE))
    ]
    optimizer = torch.optim.SGD(groups)
    total: tithe.Ranking | None = None
    for epoch in range(NUM_EPOCHS + 1):
        scored = training_batches(images, seed=seed, epoch=NUM_EPOCHS + epoch)
        point = tithe.Ranking.compute(model, loss=loss_of, data=scored, head=[HEAD], samples=SAMPLES)
        total = point if total is None else total + point
        if epoch < NUM_EPOCHS:
            for batch in training_batches(images, seed=seed, epoch=epoch):
                loss_of(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert total is not None
    return total


def ship(network: Network, store: Store, results: Path, data: Path) -> None:
    """Write the sum over the seeds on the task that is no target."""
    found = [store.find(network=network.name, task=RANKED.name, seed=seed) for seed in SEEDS]
    rgns = [record["rgn"] for record in found if record is not None]
    shapes = {n: tuple(p.shape) for n, p in vision.load(network, data).named_parameters() if n in rgns[0]}
    tithe.Ranking({n: sum(rgn[n] for rgn in rgns) for n in shapes}, shapes).save(ranking_file(results, network))


def main() -> None:
    """Measure what is missing, and write the rankings that are shipped."""
    args = parse(__doc__ or "")
    torch.set_num_threads(args.threads)
    store = Store(args.results / "ranking.jsonl", key=("network", "task", "seed"))
    tasks = [replace(task, num_train=NUM_TRAIN) for task in (RANKED, *TASKS.values())]
    for seed, task, network in itertools.product(SEEDS, tasks, NETWORKS.values()):
        fields = {"network": network.name, "task": task.name, "seed": seed}
        if store.find(**fields) is None:
            ranking = measured(network, task, seed, args.data)
            store.add({**fields, "rgn": dict(ranking.rgn), "layers": len(ranking.layers(0.97))})
    for network in NETWORKS.values():
        ship(network, store, args.results, args.data)


if __name__ == "__main__":
    main()
