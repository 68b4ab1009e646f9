"""Runs of a network that is cut early: one schedule of the rate, no held-out rows, resumed as if never stopped."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tithe
from narrow_runs import METHOD, NET, RECIPE
from tithe.app.train import read_recipe
from tithe.app.train.checkpoints import Checkpoints
from tithe.app.train.data import read_examples
from tithe.app.train.loop import Run
from tithe.app.train.models import build
from tithe.app.train.progress import read_log
from tithe.app.train.signals import Interrupted
from workplace import assert_equal, editor, quiet, run, shown

CUTS = 'name = "taylor"\nkeep = 0.4\nstop = 0.5\ncuts = 3'


@pytest.fixture
def write(images: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write the recipe with some of its text replaced; return its path."""
    (tmp_path / "narrow_net.py").write_text(NET, encoding="utf-8")
    return editor(RECIPE.replace(METHOD, CUTS), images, tmp_path)


def test_a_run_is_cut_in_its_first_part_and_its_rate_falls_over_the_whole(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    console = quiet()
    path = write(("lr = 0.05", 'lr = 0.01\nname = "adamw"\nschedule = "cosine"'))
    result = run(path, "run.epochs=10", console=console)
    widths = result["widths"]
    assert [entry["step"] for entry in widths] == [0, 6, 12, 18, 24, 30]
    assert widths[-1]["spent"] <= 0.4
    assert "step 30/60  fixed: " in shown(console)
    rates = [entry["lr"] for entry in read_log(tmp_path / "out", "train")]
    assert rates == sorted(rates, reverse=True)
    fresh = build(read_recipe(path), read_examples(read_recipe(path))).model
    tithe.apply(fresh, result["files"]["delta"])
    assert sum(p.numel() for p in fresh.parameters()) == result["trainable"]["total"] == widths[-1]["weights"]


@pytest.mark.parametrize("stop", [3, 15, 17])
def test_resuming_equals_never_stopping(stop: int, write: Callable[..., Path], tmp_path: Path) -> None:
    """Before a cut, right after the last one, which comes at step 15 of 30, and later."""
    path = write(("cuts = 3", "cuts = 3\nfresh = true"))
    whole = run(path, "run.output=whole")
    made = Run(read_recipe(path, ["run.output=parts"]), resume=False, console=quiet())
    inner = made.trainee.step

    def step() -> bool:
        changed = inner()
        if made.position.step == stop:
            made._signals.received = signal.SIGINT
        return changed

    made.trainee.step = step  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(Interrupted, match=f"step {stop} of 30"):
        made.fit()
    parts = run(path, "run.output=parts", resume=True)
    first, second = (Checkpoints(tmp_path / name / "checkpoints").load(30) for name in ("whole", "parts"))
    for key in ("trainee", "optimizer", "random"):
        assert_equal(first[key], second[key])
    assert_equal(*(load_file(tmp_path / name / "network.safetensors") for name in ("whole", "parts")))
    assert whole["widths"] == parts["widths"]
    torch.testing.assert_close(whole["metrics"], parts["metrics"])


def test_a_start_behind_the_stop_is_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(tithe.TitheError, match=r"start = 0\.6, stop = 0\.5"):
        read_recipe(write(("stop = 0.5", "start = 0.6\nstop = 0.5")))
