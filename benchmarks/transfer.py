"""Test accuracy of two small networks on three image tasks, trained under the TraDy paper's tight memory budget.

Every method: the same images, batches, epochs and seeds; SGD without momentum or weight decay, linear warm-up over the
first tenth of the steps, cosine to zero. Two learning rates for each network: the head's is the best of training the
head alone, the body's is climbed for each method; best means the lowest cross-entropy on validation images of CIFAR-10,
with one seed and in full length, and serves the other tasks too. Then three seeds are scored on the test images of each
task. `--networks` and `--methods` do a part, so that processes can share the work.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import vision
from benchmarks.images import TASKS, Batch, Images, Task, evaluation_batches, load, training_batches
from benchmarks.records import DATA, RESULTS, Record, Store
from benchmarks.transfer_methods import METHODS, Method, Prepared, Setting, loss_of
from benchmarks.vision import NETWORKS, Network

SEEDS = (0, 1, 2)
KEY = ("network", "task", "method", "head_rate", "rate", "seed", "tested")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
WARM_UP = 0.1  # of the steps
CHOICE = "cifar10"  # the task that rates are chosen on


@dataclass(frozen=True)
class Run:
    """What a run is told; `rate` is the body's; `test`: score the test images too."""

    network: Network
    task: Task
    method: Method
    head_rate: float
    rate: float
    seed: int
    test: bool = False

    @property
    def fields(self) -> Record:
        """What tells this run apart."""
        return {
            "network": self.network.name,
            "task": self.task.name,
            "method": self.method.name,
            "head_rate": self.head_rate,
            "rate": self.rate,
            "seed": self.seed,
            "tested": self.test,
        }

    @property
    def weights(self) -> Path:
        """Where the trained weights wait for the test images, until the machine clears its temporary files."""
        name = "-".join(str(value).replace(" ", "_") for key, value in self.fields.items() if key != "tested")
        return Path(tempfile.gettempdir(), "tithe-benchmarks", f"{name}.safetensors")


def do(run: Run, store: Store, data: Path) -> Record:
    """The record of the run: found in the store, or trained now and added to it."""
    found = store.find(**run.fields) or (None if run.test else store.find(**{**run.fields, "tested": True}))
    if found is not None:
        return found
    earlier = store.find(**{**run.fields, "tested": False})
    if earlier is not None and run.weights.exists():
        model = vision.load(run.network, data, num_classes=run.task.num_classes, seed=run.seed)
        model.load_state_dict(load_file(run.weights))
        return store.add({**earlier, **run.fields, **tested(model, load(run.task, data).test)})
    return store.add({**run.fields, **train(run, store.path.parent, data)})


def train(run: Run, results: Path, data: Path) -> Record:
    """Fine-tune a fresh model and score it on the validation images (and on the test images when told)."""
    split = load(run.task, data)
    start = time.process_time()
    model = vision.load(run.network, data, num_classes=run.task.num_classes, seed=run.seed)
    model = model.to(memory_format=torch.channels_last)
    scored = list(itertools.islice(training_batches(split.train, seed=run.seed, epoch=0), 4))
    prepared = run.method.prepare(model, Setting(run.network, scored, ranking_file(results, run.network), run.seed))
    trained = epochs(run, prepared, split.train)
    seconds = time.process_time() - start
    accuracy, loss = evaluate(model, split.validation)
    result: Record = {"validation": accuracy, "validation_loss": loss, **trained, "seconds": seconds}
    run.weights.parent.mkdir(exist_ok=True)
    if prepared.plan is not None:
        prepared.plan.release()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, run.weights)
    if run.test:
        result |= tested(model, split.test)
    return result


def ranking_file(results: Path, network: Network) -> Path:
    """File of the network's ranking of layers."""
    return results / f"ranking_{network.name}.json"


def epochs(run: Run, prepared: Prepared, images: Images) -> Record:
    """All epochs, and how many tensors and weights were selected in each; it ends early when the loss is no number."""
    groups = [{"params": prepared.head, "lr": run.head_rate}, {"params": prepared.body, "lr": run.rate}]
    optimizer = torch.optim.SGD([group for group in groups if group["params"]])
    plan = prepared.plan
    if plan is not None:
        plan.bind(optimizer)
    num_steps = run.task.num_epochs * math.ceil(len(images.y) / 32)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    losses: list[float] = []
    selected: list[tuple[int, int]] = []
    for epoch in range(run.task.num_epochs):
        if plan is not None:
            sizes = [s.size for s in plan.selections.values() if s.size]
            selected.append((len(sizes), sum(sizes)))
        for batch in training_batches(images, seed=run.seed, epoch=epoch):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor(len(losses), num_steps)
            losses.append(step(prepared, optimizer, batch))
            if not math.isfinite(losses[-1]):
                return {"training_loss": losses[-1], "steps": len(losses)}
        if plan is not None and epoch + 1 < run.task.num_epochs:
            plan.end_epoch()
    result: Record = {"training_loss": sum(losses[-10:]) / 10, "steps": len(losses)}
    if plan is not None:
        result["selected"] = selected
    return result


def factor(step: int, num_steps: int) -> float:
    """Of the learning rate: up linearly, then down along a cosine."""
    warm = max(1, round(WARM_UP * num_steps))
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / (num_steps - warm))))


def step(prepared: Prepared, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """One training step, as a user writes it."""

    def closure() -> Tensor:
        return loss_of(prepared.model, batch)

    if prepared.plan is None:
        loss = closure()
        loss.backward()
    else:
        loss = prepared.plan.backward(closure)
    optimizer.step()
    optimizer.zero_grad()
    if prepared.plan is not None:
        prepared.plan.step()
    return float(loss.detach())


@torch.no_grad()
def evaluate(model: nn.Module, images: Images) -> tuple[float, float]:
    """Accuracy in percent and the mean cross-entropy."""
    pairs = [(model(x), y) for x, y in evaluation_batches(images)]
    logits, labels = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    accuracy = 100 * float((logits.argmax(-1) == labels).double().mean())
    return accuracy, float(nn.functional.cross_entropy(logits, labels))


def tested(model: nn.Module, images: Images) -> Record:
    """The test images' part of a record."""
    accuracy, loss = evaluate(model, images)
    return {"test": accuracy, "test_loss": loss}


def best_rates(network: Network, method: Method, store: Store, data: Path) -> tuple[float, float]:
    """The head's rate (of training it alone) and the body's, with the lowest loss on validation images."""

    def quality(method: Method, head_rate: float, rate: float) -> float:
        record = do(Run(network, TASKS[CHOICE], method, head_rate, rate, SEEDS[0]), store, data)
        loss = record["validation_loss"]
        return -loss if math.isfinite(loss) else -math.inf

    head_rate = climb(0.1, partial(quality, METHODS["head only"], rate=0.0))
    if method.start is None:
        return head_rate, 0.0
    return head_rate, climb(method.start, partial(quality, method, head_rate))


def climb(start: float, quality: Callable[[float], float]) -> float:
    """From the start by factors of about three to a rate whose two neighbours are no better, or to an end of RATES."""
    seen: dict[float, float] = {}

    def value(rate: float) -> float:
        if rate not in seen:
            seen[rate] = quality(rate)
        return seen[rate]

    rate = start
    while True:
        i = RATES.index(rate)
        best = max((RATES[j] for j in (i - 1, i + 1) if 0 <= j < len(RATES)), key=value)
        if value(best) <= value(rate):
            return rate
        rate = best


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing: the first seed of everything, then the second, then the third."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds weights/, cifar10/, cifar100/ …")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON lines")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="only these methods")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), help="only these networks")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    store = Store(args.results / "transfer.jsonl", key=KEY)
    networks = [NETWORKS[name] for name in args.networks]
    methods = [METHODS[name] for name in args.methods]
    for seed in SEEDS:
        for task, network, method in itertools.product(TASKS.values(), networks, methods):
            head_rate, rate = best_rates(network, method, store, args.data)
            do(Run(network, task, method, head_rate, rate, seed, test=True), store, args.data)


if __name__ == "__main__":
    main()
