"""A constant learning rate and an average in the place of a decay: ResNet-20 on CIFAR-10 and CIFAR-100 at 16².

*Decay*: 20 epochs of SGD, the rate up over 5 % of them and down to zero along a cosine (the runs of `average_head`).
*Constant*: as many steps, the rate up over 5 % of them and then constant. Every quarter of an epoch a checkpoint is
recorded, and after every step two moving averages of relative widths 0.05 and 0.10 follow, with a snapshot an epoch.
From these: the *last* weights; *linear*, *cosine* and *sqrt*, the last n checkpoints with the weights of such a decay;
*EMA*, a moving average of any width from the snapshots. Each but the last has its running statistics estimated over the
same 50 training batches.

Both choose their rate by validation accuracy with the first seed, the constant rate together with n, or with the width.
Test accuracy is looked at for what was chosen only.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import tithe
from benchmarks import average_head, cells
from benchmarks.average_head import WARM_UP
from benchmarks.averaging import Stretch, constant
from benchmarks.course import evaluate
from benchmarks.records import Record, Store

COURSE = average_head.COURSES[0]
EACH = 0.25  # epochs between checkpoints
SEEDS = (0, 1, 2)
DECAYED = (0.1, 0.2, 0.3)
RATES = (0.05, 0.1)
WINDOWS = (4, 8, 16, 24, 40)  # checkpoints
WIDTHS = (0.03, 0.05, 0.08, 0.10, 0.15)
TRACKS = (0.05, 0.10)
GRIDS: dict[str, tuple[float, ...]] = {
    "last": (0,),
    "linear": WINDOWS,
    "cosine": WINDOWS,
    "sqrt": WINDOWS,
    "EMA": WIDTHS,
}
KEY = ("set", "rate", "seed", "method", "setting", "stage")
KEPT = Path(tempfile.gettempdir()) / "tithe-average-decay"  # runs that were trained already, 300 MB each


@dataclass(frozen=True)
class Trunk:
    """A run at a constant rate, and what it has recorded.

    Args:
        run: at its end.
        history: of its weights.
        tracks: of their moving averages.
    """

    run: Stretch
    history: tithe.History
    tracks: tithe.History

    def end(self, method: str, setting: float) -> Stretch:
        """What the run ends with; its clock counts what this end needs."""
        run, averaged = self.run, method == "EMA"
        end = Stretch(run.data, run.name, run.seed, run.parts["steps"], run.epochs)
        if method == "last":
            end.model.load_state_dict(self.history[-1])
            return end
        recorded = self.tracks if averaged else self.history
        end.seconds += run.parts["following" if averaged else "recording"]
        with end.clock():
            weights = recorded.weights(
                f"ema:{setting}" if averaged else method, last=None if averaged else int(setting)
            )
        end.average(recorded, weights)
        return end


@dataclass(frozen=True)
class Cell:
    """All runs on one set of images.

    Args:
        name: of the set.
        rates: constant rates that are tried.
        seeds: of the runs at the best of them.
        data: folder of the images.
        results: folder of the records.
    """

    name: str
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    data: Path
    results: Path

    def work(self) -> None:
        """Run what is missing."""
        torch.set_num_threads(1)
        every = [(method, setting) for method, grid in GRIDS.items() for setting in grid]
        for rate in self.rates:
            self.ends(rate, SEEDS[0], every, stage="choice")
        rate = max(self.rates, key=lambda rate: max(self.validation(rate, *end) for end in every))
        best = [max(((m, s) for s in grid), key=lambda end: self.validation(rate, *end)) for m, grid in GRIDS.items()]
        for seed in self.seeds:
            self.ends(rate, seed, best, stage="chosen")
        decays = average_head.Cell(self.name, COURSE, self.data, self.results)
        tried = DECAYED if self.rates == RATES else average_head.RATES
        highest = max(tried, key=lambda rate: decays.sgd(rate, SEEDS[0])["validation"])
        for seed in self.seeds[1:]:
            decays.sgd(highest, seed)

    def store(self) -> Store:
        """The records so far."""
        return Store(self.results / "average_decay.jsonl", key=KEY)

    def fields(self, rate: float, seed: int, method: str, setting: float, stage: str) -> Record:
        """What tells a run apart."""
        return {"set": self.name, "rate": rate, "seed": seed, "method": method, "setting": setting, "stage": stage}

    def validation(self, rate: float, method: str, setting: float) -> float:
        """Validation accuracy of an end with the first seed."""
        found = self.store().find(**self.fields(rate, SEEDS[0], method, setting, "choice"))
        assert found is not None
        return found["validation"]

    def ends(self, rate: float, seed: int, wanted: Sequence[tuple[str, float]], *, stage: str) -> None:
        """Of one run at a constant rate the ends that are wanted and missing.

        Args:
            rate: of the run.
            seed: of everything.
            wanted: method, its setting.
            stage: "choice", by validation images alone, or "chosen", with test accuracy.
        """
        store = self.store()
        missing = [end for end in wanted if store.find(**self.fields(rate, seed, *end, stage)) is None]
        if not missing:
            return
        trunk = self.trunk(rate, seed)
        for method, setting in missing:
            end = trunk.end(method, setting)
            chosen = stage == "chosen"
            found = end.record() if chosen else {"validation": evaluate(end.model, end.split.validation)[0]}
            steps = trunk.run.parts["steps"]
            extra = {"steps s": steps, "beyond s": end.seconds - steps, "n": len(trunk.history)}
            store.add({**self.fields(rate, seed, method, setting, stage), **found, **extra})

    def trunk(self, rate: float, seed: int) -> Trunk:
        """A run at a constant rate, trained or, where it was before, read again."""
        folder = KEPT / f"{self.name}-{rate}-{seed}"
        run = Stretch(self.data, self.name, seed)
        history, tracks = folder / "history", folder / "tracks"
        if not (folder / "parts.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            run.train(
                COURSE.epochs,
                constant(rate, WARM_UP),
                history=tithe.History(history),
                each=EACH,
                tracks=tithe.History(tracks, ema=TRACKS),
            )
            (folder / "parts.json").write_text(json.dumps(run.parts))
        run.parts, run.epochs = json.loads((folder / "parts.json").read_text()), COURSE.epochs
        return Trunk(run, tithe.History(history), tithe.History(tracks))


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, a process for each set of images."""
    args = cells.options(__doc__ or "").parse_args(argv)
    # What decides most comes first: a seed after the other on both sets, then whether other rates are better.
    for rates, num_seeds in ((RATES[:1], 1), (RATES[:1], 2), (RATES[:1], 3), (RATES, 3)):
        todo = (Cell(name, rates, SEEDS[:num_seeds], args.data, args.results) for name in average_head.SETS)
        cells.run(todo, args.workers)


if __name__ == "__main__":
    main()
