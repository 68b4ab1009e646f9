"""Ways to make a trained network narrow, down to a share of its FLOPs; fine-tuning takes the seconds that are left."""

from __future__ import annotations

import fnmatch
import time
from bisect import bisect_right
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tithe
from benchmarks import finetune, pruning_scores
from benchmarks.pruning_networks import Trained
from tithe.coupling import Coupling
from tithe.narrow import make_stage

CUT = 15  # steps of fine-tuning after which the last of five cuts is made
STRUCTURE_RATE = 0.02  # of VR-PGE's Adam
WARM_UP = 0.05  # of fine-tuning, over which the rate rises; then it falls linearly to zero


@dataclass
class Run:
    """One run: what it is told, and the clock of the thread that trains.

    The clock counts finding the units, scoring, searching, cutting, fine-tuning; not reading data nor evaluation.

    Args:
        trained: the network.
        keep: share of the FLOPs that is kept.
        setting: what the method may choose besides a rate.
        rate: highest learning rate of fine-tuning.
        seed: of the order of the examples and of every draw.
        data: folder.
        seconds: CPU seconds so far.
        pruned: CPU seconds before fine-tuning.
        steps: of fine-tuning.
    """

    trained: Trained
    keep: float
    setting: Any
    rate: float
    seed: int
    data: Path
    seconds: float = field(default=0.0, init=False)
    pruned: float = field(default=0.0, init=False)
    steps: int = field(default=0, init=False)

    @contextmanager
    def clock(self) -> Generator[None]:
        """Count what is done within."""
        start = time.process_time()
        yield
        self.seconds += time.process_time() - start

    def finetune(self, model: nn.Module) -> None:
        """Train all weights in the ordinary way until the seconds are spent."""
        self.pruned = began = self.seconds
        limit = self.trained.seconds
        optimizer = self.trained.optimizer(model.requires_grad_(True).parameters(), self.rate)
        for batch in self.trained.batches(self.data, self.seed):
            progress = (self.seconds - began) / (limit - began)
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = self.rate * min(1.0, max(progress, 0.01) / WARM_UP) * (1 - progress)
            with self.clock():
                self.trained.loss(model, batch).backward()
                nn.utils.clip_grad_norm_(model.parameters(), finetune.CLIP)
                optimizer.step()
                optimizer.zero_grad()
            self.steps += 1


Train = Callable[[Run, nn.Module], nn.Module]  # from the whole network to the narrow one, fine-tuned


def whole(run: Run, model: nn.Module) -> nn.Module:
    """Nothing is left out."""
    run.finetune(model)
    return model


def by(score: pruning_scores.Score) -> Train:
    """Prune once, before fine-tuning, what is worth least by that score.

    The setting says how scores are compared. "each group": the same share of every layer's channels, of its heads, of
    its hidden units. "per FLOP": score over the unit's own FLOPs, in all groups together.
    """

    def train(run: Run, model: nn.Module) -> nn.Module:
        batches = run.trained.scored(run.data, run.seed)
        with run.clock():
            names = [name for name, _ in model.named_parameters() if not matches(name, run.trained.head)]
            stage, _ = make_stage(model, run.trained.loss, batches[0], names)
            worth = score(model, stage.coupling, run.trained.loss, batches)
            stage.settle(best(worth, stage.coupling, run.keep, run.setting))
        run.finetune(model)
        return model

    return train


def best(worth: Tensor, coupling: Coupling, keep: float, spread: str) -> Tensor:
    """The units of most worth that cost no more than `keep` of the FLOPs, one of each group among them, bool (n,)."""
    whole = torch.ones(coupling.num_units, dtype=torch.float64)
    if spread == GROUPS:
        place = torch.cat([(_ranks(worth[g.start : g.stop]) + 0.5) / g.num_units for g in coupling.groups])
    else:
        place = _ranks(worth / coupling.shares(coupling.flops, whole))
    for group in coupling.groups:
        place[group.start + int(place[group.start : group.stop].argmax())] = torch.inf
    order = place.argsort(descending=True, stable=True)

    def first(count: int) -> Tensor:
        return torch.zeros_like(whole).index_fill_(0, order[:count], 1.0)

    limit = keep * float(coupling.cost(coupling.flops, whole)) * (1 + 1e-9)
    above = bisect_right(
        range(coupling.num_units + 1), limit, key=lambda count: float(coupling.cost(coupling.flops, first(count)))
    )
    return first(above - 1).bool()


def _ranks(values: Tensor) -> Tensor:
    """0 for the smallest."""
    return values.argsort(stable=True).argsort().double()


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the globs fits."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def frozen(run: Run, model: nn.Module) -> nn.Module:
    """Tithe: VR-PGE from Taylor scores, forward passes alone; the likeliest network is then fine-tuned.

    The setting is the number of steps of the search; after none the structure is that of the scores.
    """
    batches = run.trained.scored(run.data, run.seed)
    with run.clock():
        structure = tithe.VRPGE(
            run.keep, structure_lr=STRUCTURE_RATE, cost="flops", weights="frozen", init="taylor+wanda"
        )
        plan = tithe.attach(model, structure, loss=run.trained.loss, data=batches, head=run.trained.head, seed=run.seed)
    for batch in islice(run.trained.batches(run.data, run.seed), run.setting):
        with run.clock():
            plan.backward(lambda batch=batch: run.trained.loss(model, batch))
            plan.step()
    with run.clock():
        plan.settle(batches, draws=0)
        narrow = plan.export()
    run.finetune(narrow)
    return narrow


def cuts(run: Run, model: nn.Module) -> nn.Module:
    """Tithe: what is worth least by Taylor scores goes in five cuts, in the first steps of fine-tuning itself.

    The setting is the floor of a group's width, as a part of the uniform one.
    """
    batches = run.trained.scored(run.data, run.seed)
    with run.clock():
        structure = tithe.TaylorPruning(run.keep, stop=CUT, floor=run.setting)
        plan = tithe.attach(model, structure, loss=run.trained.loss, data=batches, head=run.trained.head, seed=run.seed)
    run.finetune(model)
    return plan.export()


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        name: for people.
        train: from a run and the whole network to the narrow one, fine-tuned.
        settings: what it chooses from on validation examples.
    """

    name: str
    train: Train
    settings: tuple[Any, ...]


GROUPS, FLOPS = "each group", "per FLOP"
WHOLE = Method("whole network", whole, (None,))
METHODS = {
    m.name: m
    for m in (
        WHOLE,
        Method("L1", by(pruning_scores.l1), (GROUPS,)),
        Method("magnitude", by(pruning_scores.magnitude), (GROUPS,)),
        Method("Taylor", by(pruning_scores.taylor), (FLOPS, GROUPS)),
        Method("Wanda-sp", by(pruning_scores.wanda), (GROUPS,)),
        Method("Taylor between, Wanda-sp within", by(pruning_scores.taylor_by_wanda), (FLOPS,)),
        Method("Tithe: VR-PGE, frozen weights", frozen, (0, 10)),
        Method("Tithe: cuts", cuts, (0.8, 0.4)),
    )
}
