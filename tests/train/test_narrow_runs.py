"""Runs of a network that gets narrower: they learn, say how narrow it is, ship it whole, resume as if never stopped."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tithe
from narrow_runs import NET, RECIPE
from tithe import TitheError
from tithe.app.train import read_recipe
from tithe.app.train.checkpoints import Checkpoints
from tithe.app.train.course import OwnCourse
from tithe.app.train.data import read_examples
from tithe.app.train.loop import Run
from tithe.app.train.models import build
from tithe.app.train.progress import read_log
from tithe.app.train.report import show
from tithe.app.train.signals import Interrupted
from workplace import assert_equal, editor, quiet, run, shown

Edit = Callable[..., Path]


@pytest.fixture
def write(images: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write the recipe with some of its text replaced; return its path."""
    (tmp_path / "narrow_net.py").write_text(NET, encoding="utf-8")
    return editor(RECIPE, images, tmp_path)


def test_a_run_learns_gets_narrower_and_says_so(write: Edit, tmp_path: Path) -> None:
    console = quiet()
    adamw = ("lr = 0.05", 'lr = 0.01\nname = "adamw"')
    result = run(write(adamw), "run.epochs=12", "method.gradual=[0.1, 0.6]", console=console)
    assert result["metrics"]["test"]["accuracy"] > 0.8
    widths = result["widths"]
    assert [entry["step"] for entry in widths] == [*range(0, 48, 5), 48]
    assert widths[0]["spent"] == 1.0
    assert all(entry["spent"] <= 0.4 + 1e-6 for entry in widths if 0.6 * 48 <= entry["step"] < 48)
    sizes = [entry["weights"] for entry in widths]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == result["trainable"]["total"] < 0.7 * result["trainable"]["model"] == 0.7 * sizes[0]
    assert [e["spent"] for e in read_log(tmp_path / "out", "widths")] == [entry["spent"] for entry in widths]
    progress = shown(console)
    assert "step 5/60  network: 1.000 of the channels  56 units" in progress
    assert f"step 48/60  fixed: {widths[-1]['spent']:.3f} of the channels" in progress
    table = quiet()
    show(result, table)
    for word in ("network.safetensors", f"{widths[-1]['units']} of 56", "of the channels"):
        assert word in shown(table).replace("\n", "")
    assert max(map(len, shown(table).replace(str(tmp_path), "").splitlines())) <= 80


def test_a_frozen_network_is_searched_and_then_fine_tuned(write: Edit) -> None:
    """One run: until the widths are fixed the probabilities and the head are trained, and then everything."""
    frozen = ("structure_lr = 0.2", 'structure_lr = 0.1\nweights = "frozen"\ninit = "taylor"\nhold = 2')
    result = run(write(frozen))
    assert result["trainable"]["total"] < result["trainable"]["model"]
    assert result["widths"][0]["spent"] <= 0.4 + 1e-6
    settled = next(entry["step"] for entry in result["widths"] if entry["weights"] == result["trainable"]["total"])
    assert 0 < settled < result["steps"]


def test_what_is_saved_makes_a_freshly_built_model_the_network(write: Edit, tmp_path: Path) -> None:
    path = write()
    result = run(path)
    recipe = read_recipe(path, ["run.output=other"])
    torch.manual_seed(7)
    fresh = build(recipe, read_examples(recipe)).model
    tithe.apply(fresh, result["files"]["delta"])
    assert sum(p.numel() for p in fresh.parameters()) == result["trainable"]["total"]
    made = Run(recipe, resume=False, console=quiet())
    made.trainee.release()
    made.model = fresh
    assert made.evaluate("test") == result["metrics"]["test"]
    info = tithe.inspect(result["files"]["delta"])
    assert info.metadata["num_labels"] == str(len(result["labels"]))


@pytest.mark.parametrize("stop", [3, 10, 19, 20, 22])
@pytest.mark.parametrize(
    "changes",
    [
        (),
        (
            ("held_out", 'cost = "flops"\ngradual = [0.1, 0.5]\nlean = true\nheld_out'),
            ("lr = 0.05", 'lr = 0.01\nname = "adamw"\nwarmup_steps = 3\nclip = 1.0'),
            ("batch_size = 10", "batch_size = 5\naccumulate = 2\ncheckpoint_every = 4\nevaluate_every = 6"),
        ),
    ],
    ids=["paper", "adamw under a share of flops, lean"],
)
def test_resuming_equals_never_stopping(changes: Any, stop: int, write: Edit, tmp_path: Path) -> None:
    """Within an epoch, where channels were dropped, before the widths are fixed at step 20, there, and after."""
    path = write(*changes)
    whole = run(path, "run.output=whole")
    made = Run(read_recipe(path, ["run.output=parts"]), resume=False, console=quiet())
    inner = made.trainee.step

    def step() -> bool:
        changed = inner()
        if made.position.step == stop:
            made._signals.received = signal.SIGINT
        return changed

    made.trainee.step = step  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(Interrupted, match=f"step {stop} of 25"):
        made.fit()
    parts = run(path, "run.output=parts", resume=True)
    first, second = (Checkpoints(tmp_path / name / "checkpoints").load(25) for name in ("whole", "parts"))
    for key in ("trainee", "optimizer", "random"):
        assert_equal(first[key], second[key])
    for split in ("train", "widths"):
        assert read_log(tmp_path / "whole", split) == read_log(tmp_path / "parts", split)
    assert_equal(*(load_file(tmp_path / name / "network.safetensors") for name in ("whole", "parts")))
    for key in ("metrics", "best_step", "evaluations", "trainable", "widths"):
        assert whole[key] == parts[key]
    sizes = [entry["weights"] for entry in whole["widths"]]
    assert len(set(sizes)) > 2  # some channels were dropped before the widths were fixed


def test_the_best_checkpoint_is_one_of_fixed_widths(write: Edit) -> None:
    made = Run(read_recipe(write()), resume=False, console=quiet())
    scores = iter([0.9, 0.8, 0.7, 0.5, 0.6, 0.1, 0.2])
    made.evaluate = lambda split: {"accuracy": next(scores)}  # pyright: ignore[reportAttributeAccessIssue]
    made.fit()
    assert [entry["step"] for entry in made.position.evaluations] == [5, 10, 15, 20, 25]
    assert (made.position.best_step, made.position.best_value) == (25, 0.6)


def test_the_rows_that_fix_the_widths_are_used_for_nothing_else(write: Edit) -> None:
    recipe = read_recipe(write())
    plain = read_recipe(
        write(('name = "vrpge"\nkeep = 0.4\nstructure_lr = 0.2\nheld_out = 0.1\nfinetune = 0.2', 'name = "full"'))
    )
    apart, together = read_examples(recipe), read_examples(plain)
    assert set(apart.splits) == {"train", "validation", "test", "held_out"}
    count = {name: len(rows.label) for name, rows in apart.splits.items()}
    assert count["held_out"] == round(0.1 * len(together.splits["train"].label))
    assert count["train"] + count["held_out"] == len(together.splits["train"].label)
    for name in ("validation", "test"):
        assert_equal(apart.targets[name], together.targets[name])
    made = Run(recipe, resume=False, console=quiet())
    assert len(made.samples["train"]) == count["train"]
    assert sum(len(rows) for step in made.course.parts(0) for rows, _ in step) == count["train"]


def test_the_learning_rate_falls_once_while_widths_are_learned_and_once_after(write: Edit) -> None:
    course = OwnCourse(read_recipe(write()), 49, (0, 1))
    assert (course.total_steps, course.fixed_from) == (25, 20)
    rates = [course.rate(step) for step in range(25)]
    assert (rates[0], rates[20]) == (0.05, 0.05 / 100)
    assert rates[:20] == sorted(rates[:20], reverse=True)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    told = OwnCourse(read_recipe(write(), ["method.finetune_lr=0.3", "optimizer.schedule=constant"]), 49, (0, 1))
    assert [told.rate(step) for step in (0, 19, 20, 24)] == [0.05, 0.05, 0.3, 0.3]
    never = OwnCourse(read_recipe(write(), ["method.finetune=0.0"]), 49, (0, 1))
    assert (never.fixed_from, never.rate(24) > 0) == (25, True)


def test_a_run_may_end_where_the_widths_are_fixed(write: Edit) -> None:
    result = run(write(), "method.finetune=0.0", "run.epochs=2")
    assert result["best_step"] == result["widths"][-1]["step"] == 10


def test_heads_and_hidden_units_of_an_encoder_are_learned(edit: Edit) -> None:
    fish = 'name = "fish"\ndensity = 0.2\nsamples = 32'
    path = edit(
        (fish, 'name = "vrpge"\nkeep = 0.6\nstructure_lr = 0.1\ncost = "params"\nlean = true\nwhere = ["*encoder*"]'),
        ("lr = 0.01", 'lr = 0.003\nname = "adamw"'),
        ("epochs = 2", "epochs = 3"),
    )
    result = run(path)
    assert result["recipe"]["optimizer"]["momentum"] == 0
    assert result["trainable"]["total"] < result["trainable"]["model"]
    assert result["widths"][-1]["cost"] == "params"


WRONG = {
    "a share that one unit a group is more than": (("keep = 0.4", "keep = 0.01"), "[method]: keep", "at least"),
    "nothing to hold out": (("held_out = 0.1", "held_out = 0.001"), "[method] held_out", "change held_out"),
    "where that matches nothing": (("keep = 0.4", 'keep = 0.4\nwhere = ["spam"]'), "[method]", "spam"),
    "nothing that may be absent": (("keep = 0.4", 'keep = 0.4\nwhere = ["13.*"]'), "[method]", "where"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_before_training(name: str, write: Edit, tmp_path: Path) -> None:
    change, place, word = WRONG[name]
    with pytest.raises(TitheError) as error:
        run(write(change))
    assert place in error.value.place
    assert word in str(error.value)
    assert not (tmp_path / "out").exists()
