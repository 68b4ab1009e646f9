"""A soup of eight fine-tunings of all-MiniLM-L6-v2 on MRPC and on CoLA.

The base is all-MiniLM-L6-v2 trained on the task for two epochs, AdamW, 1e-4 falling to zero. Eight fine-tunings go on
from it, each for a quarter of an epoch; they differ in learning rate (2e-5, 5e-5, 1e-4, 2e-4), in the examples and in
their order, and in whether a tenth of the words is masked. They are then averaged:

best single   the highest validation score          uniform   all alike
greedy        from the best on, each that does not make the validation score worse (Wortsman et al., ICML 2022)
TWA-v         eight coefficients a tensor, trained on the validation examples (AdamW, cosine, a fifth of warm-up,
              3 epochs), from the uniform mean; its rate is the one that, trained on one half of the validation
              examples, scores best on the other half, with the first seed
TWA-t         the same for as many steps on training examples; its rate is chosen on the validation examples
4, 1 bits     TWA-v on coded differences, with the first seed

All see the same training and validation examples; the test examples choose nothing. A seed draws the head, the orders
and the masks of all nine trainings anew.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import cos, pi
from pathlib import Path

import torch
from torch import nn

import tithe
from benchmarks.encoder import encoder, loss_of
from benchmarks.finetune import CLIP, evaluate
from benchmarks.records import Record, Store, parse
from benchmarks.text import TASKS, Batch, Example, Split, Task, load, training_batches

SIZES = {"mrpc": 3_000, "cola": 6_000}  # examples for training
SEEDS = (0, 1, 2)
FIRST, FIRST_EPOCHS = 1e-4, 2
RATES = (2e-5, 5e-5, 1e-4, 2e-4)
PART = 0.25  # of an epoch, for each fine-tuning
COEFFICIENT_RATES = (1e-3, 3e-3, 1e-2)
EPOCHS = 3
MASKED, MASK = 0.1, 103
BITS = (4, 1)
KEY = ("task", "seed", "method", "rate")


@dataclass
class Soup:
    """One task and one seed.

    Args:
        task: the task.
        seed: of the head, the orders and the masks.
        data: folder of the texts.
        store: of the records.
        history: the eight fine-tunings.

    Attributes:
        base: what they start from.
    """

    task: Task
    seed: int
    data: Path
    store: Store
    history: tithe.History
    base: nn.Module = field(init=False)

    @property
    def split(self) -> Split:
        """The examples."""
        return load(self.task, self.data)

    def fields(self, method: str, rate: float = 0.0) -> Record:
        """What tells a run apart."""
        return {"task": self.task.name, "seed": self.seed, "method": method, "rate": rate}

    def cook(self) -> None:
        """Train the base, then fine-tune it eight times."""
        self.base = encoder(seed=self.seed)
        self.train(self.base, FIRST, self.epochs(self.split.train, FIRST_EPOCHS, seed=self.seed))
        self.score("base", self.base)
        for number in range(2 * len(RATES)):
            model, rate, masked = copy.deepcopy(self.base), RATES[number // 2], number % 2 == 1
            batches = self.epochs(self.split.train, 1, seed=100 + 10 * self.seed + number)
            batches = batches[: round(PART * len(batches))]
            generator = torch.Generator().manual_seed(100 * self.seed + number)
            self.train(model, rate, [masking(batch, generator) if masked else batch for batch in batches])
            validation, _ = evaluate(model, self.task, self.split.validation)
            self.history.record(model, number, score=validation)

    def train(self, model: nn.Module, rate: float, batches: Sequence[Batch]) -> None:
        """All weights, at a rate that falls to zero."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / len(batches))
            loss_of(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()

    def score(self, method: str, model: nn.Module, rate: float = 0.0, **told: object) -> Record:
        """The record of a model: found, or made now."""
        found = self.store.find(**self.fields(method, rate))
        if found is not None:
            return found
        validation, loss = evaluate(model, self.task, self.split.validation)
        test, _ = evaluate(model, self.task, self.split.test)
        return self.store.add(
            {**self.fields(method, rate), "validation": validation, "validation_loss": loss, "test": test, **told}
        )

    def fixed(self, weights: Sequence[float]) -> nn.Module:
        """An average."""
        model = copy.deepcopy(self.base)
        model.load_state_dict(self.history.average(weights), strict=False)
        return model

    def greedy(self) -> list[float]:
        """The weights of the greedy soup."""
        scores = [score or 0.0 for score in self.history.scores]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        kept, best = [order[0]], scores[order[0]]
        for candidate in order[1:]:
            model = self.fixed(uniform([*kept, candidate], len(scores)))
            tried, _ = evaluate(model, self.task, self.split.validation)
            if tried >= best:
                kept, best = [*kept, candidate], tried
        return uniform(kept, len(scores))

    def trained(self, rate: float, batches: Sequence[Batch], bits: int | None = None) -> tuple[nn.Module, Record]:
        """The model of trained coefficients."""
        model, start = copy.deepcopy(self.base), time.process_time()
        plan = tithe.attach(model, tithe.TWA(self.history, bits=bits, granularity="tensor"), loss=loss_of)
        optimizer = torch.optim.AdamW(plan.parameters(), lr=rate, weight_decay=0.0)
        plan.bind(optimizer)
        for step, batch in enumerate(batches):
            part = step / len(batches)
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (part + 1 / len(batches)) / 0.2) * 0.5 * (1 + cos(pi * part))
            plan.backward(lambda batch=batch: loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()
            plan.step()
        plan.release()
        return model, {"seconds": time.process_time() - start}

    def add(self, method: str, rate: float, batches: Sequence[Batch], bits: int | None = None) -> Record:
        """The record of trained coefficients: found, or made now."""
        found = self.store.find(**self.fields(method, rate))
        if found is not None:
            return found
        model, told = self.trained(rate, batches, bits)
        return self.score(method, model, rate, **told)

    def epochs(self, examples: Sequence[Example], count: int, *, seed: int) -> list[Batch]:
        """Batches of some epochs."""
        return [
            batch
            for epoch in range(count)
            for batch in training_batches(examples, self.task.batch, seed=seed, epoch=epoch)
        ]

    def halves(self, rate: float) -> float:
        """The score on one half of the validation examples, trained on the other: what chooses TWA-v's rate."""
        found = self.store.find(**self.fields("half", rate))
        if found is None:
            half = len(self.split.validation) // 2
            model, told = self.trained(rate, self.epochs(self.split.validation[:half], EPOCHS, seed=self.seed))
            score, loss = evaluate(model, self.task, self.split.validation[half:])
            found = self.store.add({**self.fields("half", rate), "validation": score, "validation_loss": loss, **told})
        return -found["validation_loss"]


def uniform(kept: Sequence[int], n: int) -> list[float]:
    """Equal weights of those that are kept."""
    return [float(i in kept) / len(kept) for i in range(n)]


def masking(batch: Batch, generator: torch.Generator) -> Batch:
    """The batch with a tenth of its words masked."""
    ids = batch["input_ids"]
    hit = torch.rand(ids.shape, generator=generator) < MASKED
    return {**batch, "input_ids": torch.where(hit & (ids > 999), MASK, ids)}  # below 999 are marks, not words


def soups(names: Sequence[str], data: Path, store: Store) -> Iterator[Soup]:
    """Task by task and seed by seed, with the fine-tunings done; a soup that is complete is passed over."""
    for name in names:
        for seed in SEEDS:
            with tempfile.TemporaryDirectory(dir=store.path.parent) as folder:
                task = replace(TASKS[name], num_train=SIZES[name])
                soup = Soup(task, seed, data, store, tithe.History(Path(folder) / "history"))
                if store.find(**soup.fields("done")) is None:
                    soup.cook()
                    yield soup
                    store.add(soup.fields("done"))


def main() -> None:
    """Run what is missing."""
    options = parse(__doc__ or "", tasks=True)
    torch.set_num_threads(options.threads)
    store = Store(options.results / "average_soup.jsonl", key=KEY)
    chosen: dict[str, tuple[float, float]] = {}
    for soup in soups(options.tasks or tuple(SIZES), options.data, store):
        n, name = len(soup.history), soup.task.name
        scores = [score or 0.0 for score in soup.history.scores]
        averages = {
            "best single": uniform([scores.index(max(scores))], n),
            "uniform": uniform(range(n), n),
            "greedy": soup.greedy(),
        }
        for method, weights in averages.items():
            soup.score(method, soup.fixed(weights), weights=weights, scores=scores)
        held = soup.epochs(soup.split.validation, EPOCHS, seed=1000 + soup.seed)
        training = soup.epochs(soup.split.train, 1, seed=1000 + soup.seed)[: len(held)]
        if soup.seed == SEEDS[0]:
            by_half = {rate: soup.halves(rate) for rate in COEFFICIENT_RATES}
            by_all = {rate: -soup.add("TWA-t", rate, training)["validation_loss"] for rate in COEFFICIENT_RATES}
            chosen[name] = max(by_half, key=by_half.__getitem__), max(by_all, key=by_all.__getitem__)
        elif name not in chosen:
            chosen[name] = first_choice(store, name)
        for_v, for_t = chosen[name]
        soup.add("TWA-v", for_v, held)
        soup.add("TWA-t", for_t, training)
        for bits in BITS if soup.seed == SEEDS[0] else ():
            soup.add(f"TWA-v, {bits} bits", for_v, held, bits)


def first_choice(store: Store, name: str) -> tuple[float, float]:
    """The rates that the first seed chose, of TWA-v and of TWA-t."""

    def best(method: str) -> float:
        found = {r: store.find(task=name, seed=SEEDS[0], method=method, rate=r) or {} for r in COEFFICIENT_RATES}
        return min(found, key=lambda rate: found[rate]["validation_loss"])

    return best("half"), best("TWA-t")


if __name__ == "__main__":
    main()
