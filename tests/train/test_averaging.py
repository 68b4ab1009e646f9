"""Runs that record a history and end with its average: it is the mean, it learns, it resumes as if never stopped."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tithe
from tithe import TitheError, TitheWarning
from tithe.app.train import read_recipe
from tithe.app.train.checkpoints import Checkpoints
from tithe.app.train.course import AverageCourse
from tithe.app.train.data import Batches, even_chunks, read_examples
from tithe.app.train.loop import NotFiniteError, Run
from tithe.app.train.models import build
from tithe.app.train.progress import read_log
from tithe.app.train.report import show
from tithe.app.train.signals import Interrupted
from workplace import assert_equal, editor, quiet, run, shown

Edit = Callable[..., Path]

NET = """
from torch import nn

def make(num_labels):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1),
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 8), nn.GELU(), nn.Linear(8, num_labels),
    )
"""
FULL = 'name = "full"'
RECIPE = """
[model]
callable = "averaged_net:make"
head = ["8.*"]

[data]
task = "image-classification"
npz = "{images}"

[method]
name = "full"

[optimizer]
name = "sgd"
lr = 0.05
momentum = 0.9

[run]
epochs = 4
batch_size = 18
log_every = 1
output = "out"
device = "cpu"

[history]

[average]
epochs = 2
lr = 0.5
""".lstrip()
METHODS: dict[str, tuple[tuple[str, str], ...]] = {
    "coded": (
        (FULL, f"{FULL}\nlean = true"),
        ("[history]", "[history]\nevery = 2\nbits = 8"),
        ("lr = 0.5", 'lr = 0.05\ngranularity = "tensor"'),
    ),
    "deltas": (
        (FULL, 'name = "fish"\ndensity = 0.4\nsamples = 9\nwarmup = 1\nreselect = {every = 5, unit = "steps"}'),
    ),
    "averages": (
        ("[history]", "[history]\nevery = 2\nema = [0.05, 0.10]"),
        ("epochs = 2", 'epochs = 2\nstart = "ema:0.08"'),
    ),
    "narrow": (
        (FULL, 'name = "vrpge"\nkeep = 0.6\nstructure_lr = 0.3\nheld_out = 0.1\nfinetune = 0.5\nfinetune_lr = 0.01'),
        ("[history]", "[history]\nevery = 2"),
        ("epochs = 2", 'epochs = 5\non = "held_out"'),  # one step each
    ),
}


TRAINED = "epochs = 2\nlr = 0.5\n"
LATE = ("[history]", "[history]\nevery = 2\nstart = 0.5")
AVERAGES = ("[history]", "[history]\nevery = 2\nema = [0.05, 0.10]")
ENDS = {
    "linear": (LATE, (TRAINED, 'like = "linear"\n')),
    "cosine": (LATE, (TRAINED, 'like = "cosine"\n')),
    "coded": (LATE, ("every = 2", "every = 2\nbits = 8"), (TRAINED, 'like = "sqrt"\n')),
    "averages": (AVERAGES, (TRAINED, 'like = "ema:0.08"\n')),
    "deltas": (*METHODS["deltas"], LATE, (TRAINED, 'like = "cosine"\n')),
    "narrow": (*METHODS["narrow"][:1], AVERAGES, (TRAINED, 'like = "ema:0.08"\n')),
}


@pytest.fixture
def write(images: Path, tmp_path: Path) -> Edit:
    """Write the recipe with some of its text replaced; return its path."""
    (tmp_path / "averaged_net.py").write_text(NET, encoding="utf-8")
    return editor(RECIPE, images, tmp_path)


def _fresh(path: Path) -> nn.Module:
    recipe = read_recipe(path)
    torch.manual_seed(7)
    return build(recipe, read_examples(recipe)).model


def test_a_run_records_averages_learns_and_says_what_that_gave(write: Edit, tmp_path: Path) -> None:
    path, console = write(), quiet()
    result = run(path, console=console)
    average, out = result["average"], tmp_path / "out"
    assert result["history"] == [0, 3, 6, 9, 12] == tithe.History(out / "history").steps
    assert result["bytes"]["history"] == sum(file.stat().st_size for file in (out / "history").iterdir())
    assert (average["step"], average["checkpoints"], average["coefficients"]) == (12, 5, 5)
    assert result["steps"] == 18
    assert 12 <= result["best_step"] <= 18
    assert average["last"]["validation"] == {"accuracy": result["evaluations"][3]["accuracy"]}
    assert [entry["step"] for entry in result["evaluations"]] == [3, 6, 9, 12, 15, 18]
    losses = [entry["loss"] for entry in read_log(out, "train")]
    assert sum(losses[15:]) < sum(losses[12:15])  # the average learns
    assert result["metrics"]["test"]["accuracy"] > average["mean"]["test"]["accuracy"]
    assert result["trainable"]["total"] == result["trainable"]["model"]
    assert 0 < average["seconds"] < result["seconds"]["training"]
    assert "step 12/18  mean of 5 checkpoints: accuracy" in shown(console)
    table = quiet()
    show(result, table)
    for word in ("5 checkpoints", "after step 12", "last weights", "their mean"):
        assert word in shown(table)
    assert max(map(len, shown(table).replace(str(tmp_path), "").splitlines())) <= 80

    made = Run(read_recipe(path, ["run.output=other"]), resume=False, console=quiet())
    made.trainee.release()
    made.model = tithe.apply(_fresh(path), result["files"]["delta"])
    assert made.evaluate("test") == result["metrics"]["test"]


def test_the_mean_is_that_of_the_history_with_statistics_of_its_own(write: Edit, tmp_path: Path) -> None:
    path = write(("epochs = 2\nlr = 0.5\n", 'method = "mean"\n'))
    result = run(path)
    assert (result["steps"], result["best_step"], result["average"]["checkpoints"]) == (12, 12, 5)
    assert result["metrics"] == result["average"]["mean"]
    history = tithe.History(tmp_path / "out" / "history")
    model = tithe.apply(_fresh(path), result["files"]["delta"])
    for name, value in history.mean().items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-6)

    made = Run(read_recipe(path, ["run.output=other"]), resume=False, console=quiet())
    batches = Batches(made.samples["train"], even_chunks(range(54), 18), torch.device("cpu"))
    outputs = torch.cat([model[0](batch["inputs"]).detach() for batch in batches]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean, outputs.mean(1), rtol=1e-4, atol=1e-5)
    assert (model[1].running_mean - history[-1]["1.running_mean"]).abs().max() > 1e-2
    assert run(path, resume=True)["metrics"] == result["metrics"]


@pytest.mark.parametrize("end", ENDS)
def test_a_constant_rate_ends_with_an_average_that_nothing_trains(end: str, write: Edit, tmp_path: Path) -> None:
    path, console = write(*ENDS[end], ("momentum = 0.9", 'momentum = 0.9\nschedule = "constant"')), quiet()
    result = run(path, console=console)
    history = tithe.History(tmp_path / "out" / "history")
    assert result["steps"] == result["best_step"] == 12
    assert result["history"] == list(range(2 if end == "averages" else 6, 13, 2))
    assert history.partial or result["history"] == sorted(set(history.steps))
    assert result["average"]["checkpoints"] == len(result["history"])
    assert result["metrics"] == result["average"]["mean"]
    name = result["average"]["name"]
    made = Run(read_recipe(path, ["run.output=other"]), resume=False, console=quiet())
    made.trainee.release()
    rows = history.on({name: value.clone() for name, value in made.model.state_dict().items()})
    made.model = model = tithe.apply(made.model, result["files"]["delta"])
    weights = rows.weights(name)
    for key, parameter in model.named_parameters():
        if end == "narrow" or key in rows.rows.places:
            continue  # of other shapes than in the model
        torch.testing.assert_close(parameter.detach(), rows.average_tensor(key, weights), rtol=0, atol=1e-5)
    assert f"average like {name} of {len(result['history'])} checkpoints" in shown(console)
    table = quiet()
    show(result, table)
    assert f"like {name}" in shown(table)
    assert max(map(len, shown(table).replace(str(tmp_path), "").splitlines())) <= 80
    assert made.evaluate("test") == result["metrics"]["test"]
    assert run(path, resume=True)["metrics"] == result["metrics"]


@pytest.mark.parametrize("end", ["cosine", "averages", "narrow"])
@pytest.mark.parametrize("crashes", [False, True])
def test_such_a_run_resumes_as_if_never_stopped(end: str, crashes: bool, write: Edit, tmp_path: Path) -> None:
    path = write(*ENDS[end], ("epochs = 4", "steps = 10\ncheckpoint_every = 3"))
    whole = run(path, "run.output=whole")
    made = Run(read_recipe(path, ["run.output=parts"]), resume=False, console=quiet())

    def asked() -> signal.Signals | None:
        if made.position.step != 8:
            return None
        if crashes:  # what was recorded at steps 7 and 8 is not in the checkpoint of step 6
            raise KeyboardInterrupt
        return signal.SIGTERM

    made._asked_to_stop = asked
    with pytest.raises(KeyboardInterrupt if crashes else Interrupted):
        made.fit()
    _check_same(whole, run(path, "run.output=parts", resume=True), tmp_path)


def test_a_run_that_was_stopped_while_it_averaged_averages_again(write: Edit, tmp_path: Path) -> None:
    path = write(*ENDS["averages"])
    whole = run(path, "run.output=whole")
    made = Run(read_recipe(path, ["run.output=parts"]), resume=False, console=quiet())

    def stopped(state: object) -> None:
        raise KeyboardInterrupt

    made._attach = stopped
    with pytest.raises(KeyboardInterrupt):
        made.fit()
    _check_same(whole, run(path, "run.output=parts", resume=True), tmp_path)


def test_ends_that_do_not_fit_together_are_refused(write: Edit) -> None:
    for edits, said in (
        (((TRAINED, 'like = "cosine"\nlr = 0.5\n'),), "like alone"),
        (((TRAINED, 'like = "best"\n'),), "'ema:0.08'"),
        (((TRAINED, 'like = "cosin"\n'),), "'cosine'"),
        (((TRAINED, "like = 3\n"),), "like"),
        (((TRAINED, 'like = "ema:0.08"\n'),), r"add \[history\] ema"),
        ((AVERAGES, (TRAINED, 'like = "cosine"\n')), "remove ema"),
        ((AVERAGES,), "remove ema"),
        ((("[history]", "[history]\nema = [0.9]"), (TRAINED, 'like = "ema:0.08"\n')), "0.28"),
        ((("[history]", "[history]\nema = 0.1"), (TRAINED, 'like = "ema:0.08"\n')), "ema"),
        ((("[history]", "[history]\nema = [0.1]\nbits = 8"), (TRAINED, 'like = "ema:0.1"\n')), "remove bits"),
        ((*METHODS["deltas"], AVERAGES, (TRAINED, 'like = "ema:0.08"\n')), "fish"),
        ((("[history]", "[history]\nstart = 1.5"),), "start = 0.8"),
        ((("[history]", "[history]\nstart = -1"),), "start = 0.8"),
    ):
        with pytest.raises(TitheError, match=said):
            read_recipe(write(*edits))


@pytest.mark.parametrize("stop", [5, 8, 10, 11])
@pytest.mark.parametrize("method", METHODS)
def test_resuming_equals_never_stopping(method: str, stop: int, write: Edit, tmp_path: Path) -> None:
    """Between two checkpoints, at the end of the run's own steps, and twice while the average is trained."""
    path = write(*METHODS[method], ("epochs = 4", "steps = 8\ncheckpoint_every = 5"))
    whole = run(path, "run.output=whole")
    made = Run(read_recipe(path, ["run.output=parts"]), resume=False, console=quiet())

    def asked() -> signal.Signals | None:
        return signal.SIGINT if made.position.step == stop else None

    made._asked_to_stop = asked
    with pytest.raises(Interrupted, match=f"SIGINT at step {stop} of {whole['steps']}"):
        made.fit()
    parts = run(path, "run.output=parts", resume=True)
    _check_same(whole, parts, tmp_path)


def _check_same(whole: dict[str, Any], parts: dict[str, Any], folder: Path) -> None:
    one, two = folder / "whole", folder / "parts"
    first, second = (Checkpoints(at / "checkpoints").load(whole["steps"]) for at in (one, two))
    for key in ("trainee", "optimizer", "random"):
        assert_equal(first[key], second[key])
    assert read_log(one, "train") == read_log(two, "train")
    assert len(read_log(two, "train")) == whole["steps"]
    file = Path(whole["files"]["delta"]).name
    assert_equal(*(load_file(at / file) for at in (one, two)))
    histories = [sorted((at / "history").iterdir()) for at in (one, two)]
    for own, other in zip(*histories, strict=True):
        assert own.name == other.name
        assert_equal(load_file(own), load_file(other))
    for key in ("metrics", "best_step", "evaluations", "trainable", "history", "widths"):
        assert whole[key] == parts[key]
    for key in ("last", "mean", "checkpoints", "step"):
        assert whole["average"][key] == parts["average"][key]


@pytest.mark.parametrize("method", ["coded", "deltas"])
def test_what_was_recorded_after_the_last_checkpoint_of_a_crash_is_recorded_again(
    method: str, write: Edit, tmp_path: Path
) -> None:
    path = write(*METHODS[method], ("epochs = 4", "steps = 8\ncheckpoint_every = 3"))
    whole = run(path, "run.output=whole")
    made = Run(read_recipe(path, ["run.output=parts"]), resume=False, console=quiet())
    inner = made._pause

    def crash(reporter: Any, ended: bool) -> None:
        if made.position.step == 5 + (method == "deltas"):
            raise KeyboardInterrupt
        inner(reporter, ended)

    made._pause = crash
    with pytest.raises(KeyboardInterrupt):
        made.fit()
    assert Checkpoints(tmp_path / "parts" / "checkpoints").steps() == [3]
    with pytest.raises(TitheError, match="step 3 in"):
        run(path, "run.output=parts")
    assert len(list((tmp_path / "parts" / "history").iterdir())) == 3
    _check_same(whole, run(path, "run.output=parts", resume=True), tmp_path)


def test_a_history_without_a_checkpoint_is_not_overwritten_and_a_changed_one_is_refused(
    write: Edit, tmp_path: Path
) -> None:
    path = write(("epochs = 4", "steps = 5"))
    made = Run(read_recipe(path), resume=False, console=quiet())
    made.loss = lambda model, batch: nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"]) / 0
    with pytest.raises(NotFiniteError):
        made.fit()
    with pytest.raises(TitheError, match=r"\[run\] output: found a history of 1 checkpoints"):
        run(path)
    result = run(path, resume=True)
    assert result["history"] == [0, 3]
    (tmp_path / "out" / "history" / "000001.safetensors").unlink()
    with pytest.raises(TitheError, match=r"found checkpoints of steps 0; expected .* 0, 3"):
        run(path, resume=True)


def test_a_finished_run_may_be_given_an_average(write: Edit) -> None:
    path = write(("[average]\nepochs = 2\nlr = 0.5\n", ""))
    plain = run(path)
    assert (plain["average"], plain["history"]) == (None, [0, 3, 6, 9, 12])
    assert not {"average"} & set(plain["recipe"])
    ended = run(path, "average.epochs=1", resume=True)
    assert (ended["steps"], ended["average"]["step"]) == (15, 12)
    assert ended["evaluations"][:4] == plain["evaluations"]
    with pytest.raises(TitheError, match=r"\[average\] epochs: 1 then, 2 now"):
        run(path, "average.epochs=2", resume=True)
    with pytest.raises(TitheError, match=r"\[average\] lr: 2.0 then, None now"):
        run(path, resume=True)


def test_the_average_is_trained_on_rows_that_the_run_did_not_see(write: Edit) -> None:
    held = read_recipe(write(("epochs = 2", 'epochs = 2\non = "held_out"\nheld_out = 0.25')))
    apart, together = read_examples(held), read_examples(read_recipe(write()))
    count = {name: len(rows.label) for name, rows in apart.splits.items()}
    assert count == {"train": 40, "average": 14, "validation": 6, "test": 30}
    assert len(together.splits["train"].label) == 54
    made = Run(held, resume=False, console=quiet())
    sizes: list[int] = []
    inner = made.loss

    def counted(model: nn.Module, batch: Any) -> torch.Tensor:
        sizes.append(len(batch["labels"]))
        return inner(model, batch)

    made.loss = counted
    made.fit()
    assert made.position.step == 12 + 2
    assert sum(sizes[:12]) == 4 * 40
    # Statistics see all training rows before the mean and each epoch's average are evaluated.
    assert sizes[12:] == [14, 13, 13, 14, 14, 13, 13, 14, 14, 13, 13]


def test_the_learning_rate_of_an_average_follows_the_papers(write: Edit) -> None:
    def rates(*settings: str) -> tuple[AverageCourse, list[float]]:
        recipe = read_recipe(write(("epochs = 2\nlr = 0.5\n", "")), settings)
        assert recipe.average is not None
        course = AverageCourse(recipe, 54, (0, 1), recipe.average, 12)
        return course, [course.rate(step) for step in range(12, course.total_steps)]

    course, found = rates()
    assert (course.optimizer.name, course.optimizer.momentum, course.optimizer.weight_decay) == ("sgd", 0.9, 1e-5)
    assert found == pytest.approx([2.0] * 15 + [0.2] * 9 + [0.02] * 6)
    course, found = rates("average.granularity=tensor")
    assert (course.optimizer.name, course.optimizer.momentum, course.optimizer.weight_decay) == ("adamw", 0.0, 0.0)
    assert found[:6] == pytest.approx([1e-3 * (step + 1) / 6 for step in range(6)])
    assert found[6:] == sorted(found[6:], reverse=True)
    assert found[-1] < 1e-5
    assert set(rates("average.schedule=constant", "average.optimizer=adam", "average.lr=0.1")[1]) == {0.1}


def test_norms_that_the_run_froze_keep_their_statistics(write: Edit, tmp_path: Path) -> None:
    result = run(write((FULL, 'name = "head"')))
    assert result["average"]["coefficients"] == 5
    with_norms = load_file(result["files"]["delta"])
    assert torch.equal(with_norms["1.running_mean#dense"], torch.zeros(8))
    first, last = (tithe.History(tmp_path / "out" / "history")[index] for index in (0, -1))
    assert {name for name in first if not torch.equal(first[name], last[name])} == {"8.weight", "8.bias"}


def test_bf16_averages(write: Edit) -> None:
    result = run(write(("epochs = 4", 'steps = 4\nprecision = "bf16"')), "history.every=2")
    assert (result["steps"], result["average"]["checkpoints"]) == (10, 3)


def test_a_narrow_average_ships_a_narrow_network(write: Edit) -> None:
    path = write(*METHODS["narrow"])
    result = run(path)
    assert result["widths"][-1]["step"] == result["history"][0] == 6
    assert Path(result["files"]["delta"]).name == "network.safetensors"
    model = tithe.apply(_fresh(path), result["files"]["delta"])
    assert sum(p.numel() for p in model.parameters()) == result["trainable"]["total"] < result["trainable"]["model"]
    made = Run(read_recipe(path, ["run.output=other"]), resume=False, console=quiet())
    made.trainee.release()
    made.model = model
    assert made.evaluate("test") == result["metrics"]["test"]


@pytest.mark.parametrize("method", [(FULL, FULL), METHODS["deltas"][0]], ids=["whole", "deltas"])
def test_a_full_disk_only_warns(method: tuple[str, str], write: Edit, tmp_path: Path) -> None:
    made = Run(read_recipe(write(method)), resume=False, console=quiet())
    recording, limits = made._recording, resource.getrlimit(resource.RLIMIT_FSIZE)
    assert recording is not None
    assert recording.record(made.trainee, made.model, 0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
        with pytest.warns(TitheWarning, match="no room for the .* of step 3"):
            assert not recording.record(made.trainee, made.model, 3)
        assert not recording.record(made.trainee, made.model, 6)  # said once
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert recording.record(made.trainee, made.model, 9)
    assert len(tithe.History(tmp_path / "out" / "history")) == 2


def test_too_little_to_average_is_refused_before_training(write: Edit, tmp_path: Path) -> None:
    for settings in (("history.start=12", "history.every=5"), ("run.epochs=1", "history.start=1")):
        with pytest.raises(TitheError, match=r"\[history\]: found \d checkpoints? in a run of .* at least 2"):
            run(write(), *settings)
    with pytest.raises(TitheError, match=r"\[average\] held_out: found 0 of 54"):
        run(write(("epochs = 2", 'epochs = 2\non = "held_out"\nheld_out = 0.001')))
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_names_the_rate_of_the_average(write: Edit) -> None:
    path = write(("lr = 0.5", "lr = 1e30"))
    with pytest.raises(TitheError, match=r"\[average\] lr") as error:
        run(path)
    assert isinstance(error.value, NotFiniteError)
