"""Runs: they learn, report, resume as if never stopped, and stop before a bad number reaches the weights."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import tithe
from tithe import TitheError
from tithe.app.train import read_recipe, train
from tithe.app.train.checkpoints import Checkpoints
from tithe.app.train.loop import NotFiniteError, Run
from tithe.app.train.progress import read_log
from tithe.app.train.signals import Interrupted
from workplace import assert_equal, write_tsv

Edit = Callable[..., Path]
RESELECT = ("samples = 32", 'samples = 32\nwarmup = 2\nreselect = {every = 5, unit = "steps"}')
WARM = ("samples = 32", "samples = 32\nwarmup = 2")
EVERY = ("log_every = 1", "log_every = 1\ncheckpoint_every = 4\nevaluate_every = 6\naccumulate = 2")


def quiet() -> Console:
    return Console(file=io.StringIO())


def run(path: Path, *settings: str, resume: bool = False) -> dict[str, Any]:
    return train(read_recipe(path, settings), resume=resume, console=quiet())


def test_a_run_leaves_a_delta_a_result_and_a_figure(edit: Edit, workplace: Path) -> None:
    result = run(edit())
    out = workplace / "out"
    assert json.loads((out / "result.json").read_text()) == result
    assert result["steps"] == 18
    assert result["trainable"]["total"] == int(0.2 * result["trainable"]["model"])
    assert result["trainable"]["head"] == 2 * 16 + 2
    assert result["bytes"]["delta"] == (out / "delta.safetensors").stat().st_size
    assert result["bytes"]["peak"] > result["bytes"]["kept_for_backward"] > 0
    assert result["bytes"]["optimizer"] == 8 * result["trainable"]["total"] + 4 * _tensors_with_state(result, out)
    assert set(result["metrics"]) == {"validation", "test"}
    assert result["versions"]["torch"] == torch.__version__
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((out / "tensorboard").iterdir())
    assert [entry["step"] for entry in read_log(out, "train")] == list(range(1, 19))


def _tensors_with_state(result: dict[str, Any], out: Path) -> int:
    return len(tithe.inspect(out / "delta.safetensors").tensors)


def test_images_are_learned_by_a_network_of_the_users_own(images: Path, workplace: Path) -> None:
    (workplace / "corner_net.py").write_text(
        "from torch import nn\n"
        "def make(num_labels):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(4),\n"
        "                         nn.Flatten(), nn.Linear(32, num_labels))\n"
    )
    text = f"""
    [model]
    callable = "corner_net:make"
    head = ["5.*"]
    [data]
    task = "image-classification"
    npz = "{images}"
    [method]
    name = "fish"
    density = 0.8
    samples = 16
    [optimizer]
    lr = 0.02
    schedule = "cosine"
    warmup_steps = 3
    [run]
    steps = 40
    batch_size = 10
    output = "images"
    metrics = ["accuracy", "f1", "matthews"]
    """
    path = workplace / "images.toml"
    path.write_text(text)
    result = run(path)
    assert result["metrics"]["test"]["accuracy"] >= 0.9
    assert result["metrics"]["test"]["matthews"] > 0.8
    assert result["steps"] == 40
    for name in ("full", "head"):
        plain = path.with_name(f"{name}.toml")
        plain.write_text(text.replace('"fish"', f'"{name}"').replace("density = 0.8\n    samples = 16\n", ""))
        baseline = run(plain, f"run.output={name}", "run.steps=10")
        counts = baseline["trainable"]
        assert counts["total"] == (counts["model"] if name == "full" else counts["head"])


@pytest.mark.filterwarnings("ignore:FISH. of 5081 weights")  # so few rows give few scores
def test_regression_is_scored_by_correlation(edit: Edit, workplace: Path) -> None:
    words = ["bad", "dull", "fine", "good"]
    rows = [(f"the film was {words[i % 4]} {words[(i // 4) % 4]}", (i % 4) + (i // 4) % 4) for i in range(64)]
    write_tsv(workplace / "train.tsv", rows)
    write_tsv(workplace / "test.tsv", rows[:20])
    result = run(
        edit(("classification", "regression"), ("epochs = 2", "epochs = 6"), ("0.2", "0.9"), ("0.01", "0.003"))
    )
    assert set(result["metrics"]["test"]) == {"pearson", "spearman"}
    assert result["metrics"]["test"]["pearson"] > 0.5
    assert result["labels"] == []


def test_the_delta_makes_the_base_the_best_model(edit: Edit, workplace: Path) -> None:
    settings = RESELECT, EVERY
    recipe = read_recipe(edit(*settings))
    made = Run(recipe, resume=False, console=quiet())
    made.fit()
    best = made.position.best_step
    assert best is not None
    assert best < made.position.step
    state = made.checkpoints.load(best)["trainee"]
    for name, value in state["head"].items():
        assert torch.equal(made.model.get_parameter(name), value)
    made.trainee.save(workplace / "delta.safetensors", metadata={})
    torch.manual_seed(5)
    fresh = Run(read_recipe(edit(*settings), ["run.output=other"]), resume=False, console=quiet())
    fresh.trainee.release()
    tithe.apply(fresh.model, workplace / "delta.safetensors")
    made.trainee.release()
    assert_equal(fresh.model.state_dict(), made.model.state_dict())
    assert fresh.evaluate("test") == made.evaluate("test")


def _count(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    return sum(map(_count, value.values())) if isinstance(value, Mapping) else 0


class _StopAfter:
    """Sends a signal at a given step, as Ctrl-C or a scheduler would."""

    def __init__(self, made: Run, step: int, number: signal.Signals) -> None:
        self.made, self.at, self.number, self.inner = made, step, number, made.trainee.backward
        made.trainee.backward = self  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, closure: Callable[[], Tensor]) -> Tensor:
        if self.made.position.step + 1 == self.at:
            signal.raise_signal(self.number)
            self.at = -1
        return self.inner(closure)


METHODS = {
    "fish": (RESELECT,),
    "full": (('name = "fish"\ndensity = 0.2\nsamples = 32', 'name = "full"'),),
    "suggested": (RESELECT, ("lr = 0.01\n", "")),
}


@pytest.mark.parametrize(
    ("method", "stop"), [("fish", 1), ("fish", 4), ("fish", 7), ("full", 4), ("suggested", 1), ("suggested", 4)]
)
def test_resuming_equals_never_stopping_bit_for_bit(method: str, stop: int, edit: Edit, workplace: Path) -> None:
    """With dropout on, gradients accumulated, the choice made after a warm-up and made again at step 5."""
    path = edit(*METHODS[method], EVERY, ("epochs = 2", "steps = 11"))
    whole = run(path, "run.output=whole")
    made = Run(read_recipe(path, ["run.output=parts"]), resume=False, console=quiet())
    number = signal.SIGTERM if stop == 4 else signal.SIGINT
    _StopAfter(made, stop, number)
    with pytest.raises(Interrupted, match=f"{number.name} at step {stop} of 11"):
        made.fit()
    parts = run(path, "run.output=parts", resume=True)

    one, two = (Checkpoints(workplace / name / "checkpoints") for name in ("whole", "parts"))
    assert one.steps()[-1] == two.steps()[-1] == 11
    first, second = one.load(11), two.load(11)
    for key in ("trainee", "optimizer", "random"):
        assert_equal(first[key], second[key])
    assert read_log(workplace / "whole", "train") == read_log(workplace / "parts", "train")
    assert len(read_log(workplace / "parts", "train")) == 11
    assert_equal(*(load_file(workplace / name / "delta.safetensors") for name in ("whole", "parts")))
    for key in ("metrics", "best_step", "evaluations", "trainable", "learning_rate"):
        assert whole[key] == parts[key]
    assert whole["bytes"]["peak"] == parts["bytes"]["peak"]


def test_a_rate_that_the_recipe_does_not_name_is_suggested(edit: Edit, workplace: Path) -> None:
    """Of what a warm-up trains first, and again of the choice; it is told, logged, in the result, the same again."""
    path, console = edit(WARM, ("lr = 0.01\n", 'schedule = "constant"\n'), ("epochs = 2", "steps = 4")), quiet()
    result = train(read_recipe(path), resume=False, console=console)
    assert isinstance(console.file, io.StringIO)
    told = [line for line in console.file.getvalue().splitlines() if "suggested for" in line]
    assert len(told) == 2
    assert "the head alone" in told[0]
    assert "step 2/4" in told[1]
    rates = [entry["lr"] for entry in read_log(workplace / "out", "train")]
    assert len(set(rates[:2])) == len(set(rates[2:])) == 1
    assert rates[0] != rates[2]
    assert result["learning_rate"] == {"highest": rates[2], "suggested": True}
    again = run(path, "run.output=again")
    assert again["learning_rate"] == result["learning_rate"]
    named = run(path, "run.output=named", "optimizer.lr=0.5")
    assert named["learning_rate"] == {"highest": 0.5, "suggested": False}


@pytest.mark.parametrize(("accumulate", "count"), [(1, 4), (2, 8), (3, 9)])
def test_a_rate_is_suggested_by_the_first_four_steps(
    accumulate: int, count: int, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an epoch of 80 rows, the fourth step of three batches of eight has one: it is left out."""
    asked: list[Any] = []

    def suggest(plan: tithe.Plan, *batches: Any, accumulate: int = 1) -> float:
        asked.extend([*batches, accumulate])
        return 0.125

    monkeypatch.setattr(tithe.Plan, "suggest_lr", suggest)
    length = f"steps = 3\naccumulate = {accumulate}"
    path = edit(("[optimizer]\nlr = 0.01\nclip = 1.0\n\n", ""), ("epochs = 2", length))
    made = Run(read_recipe(path), resume=False, console=quiet())
    steps = made.samples["train"].steps(made.course.parts(0), 0)
    first = [batch for step in steps for batch, _ in step][:count]
    assert_equal(asked, [*first, accumulate])
    assert made.optimizer.param_groups[0]["initial_lr"] == 0.125


def test_a_step_of_micro_batches_has_the_rate_of_a_step_of_one_batch(edit: Edit, workplace: Path) -> None:
    """Without dropout, whose draws are others for a batch of another size."""
    config = workplace / "tiny" / "config.json"
    config.write_text(re.sub(r'(dropout_prob": )[0-9.]+', r"\g<1>0.0", config.read_text()))
    edits = (("lr = 0.01\n", ""), ("epochs = 2", "steps = 1"))
    rates = [
        run(edit(*edits, ("batch_size = 8", batches)), f"run.output=out{number}")["learning_rate"]["highest"]
        for number, batches in enumerate(("batch_size = 16", "batch_size = 4\naccumulate = 4"))
    ]
    assert rates[1] == pytest.approx(rates[0], rel=0.05)


def test_a_rate_that_cannot_be_suggested_names_the_section(edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(plan: tithe.Plan, *batches: Any, accumulate: int) -> float:
        raise TitheError("suggest_lr", found="a gradient of zero", expected="another", remedy="name a rate")

    monkeypatch.setattr(tithe.Plan, "suggest_lr", refuse)
    with pytest.raises(TitheError, match=r"line 15: \[optimizer\]: suggest_lr: found a gradient of zero"):
        run(edit(("lr = 0.01\n", "")))


def test_resuming_scores_nothing_again(edit: Edit, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = edit(("epochs = 2", "steps = 3"))
    run(path)
    from tithe.method import SelectionContext

    def refuse(*args: object, **settings: object) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(SelectionContext, "scores", refuse)
    again = run(path, resume=True)
    assert again["steps"] == 3


def test_the_last_two_checkpoints_and_the_best_are_kept_and_are_compact(edit: Edit, workplace: Path) -> None:
    path = edit(("log_every = 1", "checkpoint_every = 1\nevaluate_every = 2"), ("0.2", "0.05"))
    result = run(path)
    folder = workplace / "out" / "checkpoints"
    steps = Checkpoints(folder).steps()
    assert steps == sorted({result["best_step"], 17, 18})
    assert not list(folder.glob("partial*"))
    state = Checkpoints(folder).load(18)
    # Values, the indices now and ever, two moments and their step count: nothing of the model's own size.
    numbers = _count(state["trainee"]) + _count(state["optimizer"])
    assert numbers < 5.5 * result["trainable"]["total"] < 0.3 * result["trainable"]["model"]
    files = {
        file.suffix for file in (workplace / "out").rglob("*") if file.is_file() and "tensorboard" not in str(file)
    }
    assert files == {".safetensors", ".json", ".jsonl", ".md", ".png"}


def test_an_earlier_run_is_not_overwritten(edit: Edit) -> None:
    path = edit(("epochs = 2", "steps = 1"))
    run(path)
    with pytest.raises(TitheError, match=r"line 23: \[run\] output.*step 1 .*--resume"):
        run(path)


def test_resuming_a_changed_recipe_names_every_key(edit: Edit, workplace: Path) -> None:
    path = edit(("epochs = 2", "steps = 2"))
    run(path)
    with pytest.raises(TitheError) as error:
        run(path, "run.seed=3", "optimizer.lr=0.5", resume=True)
    assert "[optimizer] lr: 0.01 then, 0.5 now" in error.value.found
    assert "[run] seed: 0 then, 3 now" in error.value.found
    assert "line 16: [optimizer] lr" in error.value.place or "--set optimizer.lr" in error.value.place
    run(path, "run.log_every=7", resume=True)
    with (workplace / "train.tsv").open("a") as file:
        file.write("one more\t1\n")
    with pytest.raises(TitheError, match="other data"):
        run(path, resume=True)


def test_resuming_a_damaged_checkpoint_says_so(edit: Edit, workplace: Path) -> None:
    path = edit(("epochs = 2", "steps = 2\ncheckpoint_every = 1"))
    run(path)
    folder = workplace / "out" / "checkpoints"
    tensors = folder / "step-00000002" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    with pytest.raises(TitheError, match="step-00000002"):
        run(path, resume=True)
    shutil.rmtree(tensors.parent)
    assert run(path, resume=True)["steps"] == 2


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(
    bad: str, edit: Edit, workplace: Path
) -> None:
    made = Run(read_recipe(edit(("log_every = 1", "checkpoint_every = 2"))), resume=False, console=quiet())
    inner = made.loss

    def spoiled(model: nn.Module, batch: Any) -> Tensor:
        loss = inner(model, batch)
        if made.position.step != 4:
            return loss
        return loss / 0 if bad == "loss" else loss + (loss - loss.detach()).sqrt()

    made.loss = spoiled
    with pytest.raises(NotFiniteError) as error:
        made.fit()
    assert error.value.place == "step 5"
    for word in (bad, "line 16: [optimizer] lr", "step-00000004"):
        assert word in str(error.value)
    assert made.checkpoints.steps() == [2, 4]
    state = made.checkpoints.load(4)["trainee"]
    made.model.zero_grad()
    assert_equal(state, made.trainee.state_dict())


def test_bf16_trains(edit: Edit) -> None:
    result = run(edit(("epochs = 2", 'steps = 3\nprecision = "bf16"')))
    assert result["steps"] == 3


def test_fp16_without_a_gpu_is_refused(edit: Edit) -> None:
    with pytest.raises(TitheError, match=r"\[run\] precision.*bf16"):
        run(edit(("epochs = 2", 'steps = 3\nprecision = "fp16"')))


MODELS = {
    "no such folder": (('"tiny"', '"./big"'), "[model] pretrained", "big"),
    "no such package": (('"tiny"', '"package:spam_eggs/model"'), "[model] pretrained", "pip install"),
    "no such folder in a package": (('"tiny"', '"package:tithe/spam"'), "[model] pretrained", "inside the package"),
    "no such id, offline": (('"tiny"', '"spam/eggs"'), "[model] pretrained", "text-classification"),
    "no such module": (('pretrained = "tiny"', 'callable = "spam:eggs"'), "[model] callable", "spam"),
    "no such callable": (('pretrained = "tiny"', 'callable = "json:eggs"'), "[model] callable", "eggs"),
    "no tokenizer": (('pretrained = "tiny"', 'callable = "json:dumps"'), "[model]", "tokenizer"),
    "head that matches nothing": (('"tiny"', '"tiny"\nhead = ["spam.*"]'), "[model] head", "classifier.bias"),
    "nothing left after the head": (("0.2", "0.001"), "[method]", "head"),
    "where that matches nothing": (("samples = 32", 'where = ["spam"]'), "[method]", "spam"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_model_is_one_message(name: str, edit: Edit) -> None:
    change, place, word = MODELS[name]
    with pytest.raises(TitheError) as error:
        run(edit(change))
    assert place in error.value.place
    assert word in str(error.value)
