"""How long a run goes on and what it tells of itself: early ends, blocks that run again, trackers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tithe import TitheError
from tithe.app.train import read_recipe
from tithe.app.train.loop import Run
from tithe.app.train.models import checkpoint_gradients
from tithe.app.train.progress import read_log
from tithe.app.train.signals import Interrupted
from workplace import assert_equal, quiet, run, shown

Edit = Callable[..., Path]
SHORT = ("run.steps=12", "run.evaluate_every=1")


@pytest.fixture
def path(edit: Edit) -> Path:
    """A recipe without a number of epochs; a learning rate of nearly nothing never gets better."""
    return edit(("epochs = 2\n", ""), ("lr = 0.01", "lr = 1e-12"), ("samples = 32", 'score = "magnitude"'))


def test_a_run_that_gets_no_better_ends_early(path: Path, workplace: Path) -> None:
    console = quiet()
    result = run(path, *SHORT, "run.patience=3", console=console)
    assert (result["best_step"], result["stopped"], result["steps"]) == (1, 4, 4)
    assert "step 4/12  ends here: 3 evaluations without a better one" in shown(console)
    assert len(result["evaluations"]) == 4
    again = run(path, *SHORT, "run.patience=3", resume=True)
    assert (again["steps"], again["metrics"]) == (4, result["metrics"])


def test_without_patience_it_goes_on_to_the_end(path: Path) -> None:
    result = run(path, *SHORT)
    assert (result["best_step"], result["stopped"], result["steps"]) == (1, None, 12)


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_ends_where_one_that_never_stopped_does(
    stop: int, path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*SHORT, "run.patience=4", "run.checkpoint_every=2", "optimizer.lr=0.003", "optimizer.schedule=constant")
    whole = run(path, *settings, "run.output=whole")
    assert whole["stopped"] is not None
    parts = Run(read_recipe(path, [*settings, "run.output=parts"]), resume=False, console=quiet())
    inner = parts._asked_to_stop
    monkeypatch.setattr(
        parts, "_asked_to_stop", lambda: __import__("signal").SIGINT if parts.position.step == stop else inner()
    )
    with pytest.raises(Interrupted):
        parts.fit()
    resumed = run(path, *settings, "run.output=parts", resume=True)
    for key in ("stopped", "best_step", "evaluations", "metrics"):
        assert whole[key] == resumed[key]
    assert_equal(*(load_file(workplace / name / "delta.safetensors") for name in ("whole", "parts")))


def test_patience_does_not_go_with_an_average(path: Path) -> None:
    text = path.read_text() + '[history]\nevery = 1\n[average]\nmethod = "mean"\n'
    path.write_text(text)
    with pytest.raises(TitheError, match="patience beside"):
        read_recipe(path, [*SHORT, "run.patience=1"])


def test_blocks_that_run_again_keep_less_and_train_the_same(edit: Edit, workplace: Path) -> None:
    """With dropout on: what is drawn is drawn again."""
    path = edit(("epochs = 2", "steps = 3"))
    kept: dict[str, int] = {}
    for name in ("false", "true"):
        result = run(path, f"run.gradient_checkpointing={name}", f"run.output=out-{name}")
        kept[name] = result["bytes"]["kept_for_backward"]
    assert kept["true"] < 0.6 * kept["false"]
    one, two = (load_file(workplace / name / "delta.safetensors") for name in ("out-false", "out-true"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value)
    config = json.loads((workplace / "out-true" / "model" / "config.json").read_text())
    assert config.get("use_cache", True)


def test_a_model_that_cannot_run_its_blocks_again_is_refused(edit: Edit) -> None:
    with pytest.raises(TitheError, match="which cannot run its blocks again") as error:
        checkpoint_gradients(read_recipe(edit()), nn.Linear(2, 2))
    assert "[run]" in error.value.place


# ---------------------------------------------------------------------------------------------------------- trackers


def _refused(path: Path, trackers: str) -> TitheError:
    with pytest.raises(TitheError) as error:
        run(path, f"log.trackers={trackers}")
    return error.value


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_at_once(edit: Edit, workplace: Path) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    error = _refused(edit(), '["wanddb"]')
    assert "[log] trackers" in error.place
    assert error.remedy == 'write "wandb"'
    assert _refused(edit(), '["comet"]').remedy == 'write "comet_ml"'
    missing = sorted(set(LOGGER_TYPE_TO_CLASS) - {str(name) for name in get_available_trackers()})
    for name in missing:
        error = _refused(edit(), f'["tensorboard", "{name}"]')
        assert f"pip install {name.replace('_', '-')}" in error.remedy
    assert not (workplace / "out").exists()


def test_without_trackers_only_the_runs_own_log_is_written(edit: Edit, workplace: Path) -> None:
    path = edit(("epochs = 2", "steps = 2"))
    run(path, "log.trackers=[]")
    assert not (workplace / "out" / "tensorboard").exists()
    assert len(read_log(workplace / "out", "train")) == 2
    run(path, 'log.trackers=["tensorboard", "tensorboard"]', "run.output=other")
    assert len(list((workplace / "other" / "tensorboard").iterdir())) == 1


def test_every_tracker_of_accelerate_is_told_the_numbers_and_the_recipe(edit: Edit, workplace: Path) -> None:
    from accelerate import tracking

    told: list[object] = []

    class Written(tracking.GeneralTracker):
        name = "written"
        requires_logging_directory = True

        def __init__(self, run_name: str, logging_dir: str) -> None:
            super().__init__()
            told.append((run_name, Path(logging_dir).name))

        @property
        def tracker(self) -> object:
            return told

        def store_init_configuration(self, values: dict[str, object]) -> None:
            told.append(values)

        def log(self, values: dict[str, object], step: int | None = None, **kwargs: object) -> None:
            told.append((step, values))

        def finish(self) -> None:
            told.append("finished")

    tracking.register_tracker_class(Written)
    tracking._available_trackers.append("written")  # pyright: ignore
    try:
        run(edit(("epochs = 2", "steps = 2")), 'log.trackers=["written"]', 'log.project="films"')
    finally:
        del tracking.LOGGER_TYPE_TO_CLASS["written"]
        tracking._available_trackers.remove("written")  # pyright: ignore
    assert told[0] == ("films", "out")
    assert told[1]["method.density"] == 0.2  # pyright: ignore
    steps = [(entry[0], sorted(entry[1])) for entry in told[2:-1]]  # pyright: ignore
    numbers = ["train/gradient_norm", "train/loss", "train/lr"]
    assert steps == [(1, numbers), (2, numbers), (2, ["validation/accuracy"])]
    assert told[-1] == "finished"
