"""Runs as processes of their own: Ctrl-C from outside, and two ranks that equal one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tithe.app.train.checkpoints import Checkpoints

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(edit: Callable[..., Path], workplace: Path) -> None:
    path = edit(("epochs = 2", "steps = 100000\nevaluate_every = 100000"))
    command = [sys.executable, "-m", "tithe", "train", str(path), "--set", "data.split_seed=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step 3/"):
            break
    process.send_signal(signal.SIGINT)
    try:
        out, rest = process.communicate(timeout=300)
    finally:
        process.kill()  # one that went on would be taken for a fault of the tests after this one
    assert process.returncode == 130, "".join(lines) + rest
    (step,) = Checkpoints(workplace / "out" / "checkpoints").steps()
    assert step >= 3
    assert f"SIGINT at step {step} of 100000: saved" in rest
    assert f"tithe train {path} --resume --set data.split_seed=0" in rest
    assert "Traceback" not in rest
    assert out == ""


def without_dropout(workplace: Path, tiny: Path) -> Path:
    """A copy of the tiny encoder whose forward pass draws nothing: ranks draw on their own."""
    plain = workplace / "plain"
    plain.mkdir()
    for file in tiny.iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    config = json.loads((plain / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (plain / "config.json").write_text(json.dumps(config))
    return plain


def on_two_ranks(path: Path) -> dict[str, Any]:
    """Run a recipe on two processes, on whatever device there is, with its output in `two`."""
    # By address: the name of a machine need not lead to it.
    alone = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    launch = ["-m", "torch.distributed.run", *alone, "-m", "tithe"]
    command = [
        sys.executable,
        *launch,
        "train",
        str(path),
        "--set",
        "run.output=two",
        "--set",
        "run.device=auto",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["processes"] == 2
    return result


FISH = 'name = "fish"\ndensity = 0.2\nsamples = 32'
CHOSEN_AGAIN = {
    "fish": FISH + "\nwarmup = 1\nreselect = {every = 4, unit = 'steps'}",
    "trady": 'name = "trady"\nbudget = {fraction = 0.1}\nlayers = "all"',  # counted for one sample, whatever the batch
}


@pytest.mark.parametrize("method", ["fish", pytest.param("trady", marks=pytest.mark.slow)])
def test_two_ranks_equal_one_with_the_doubled_batch(
    method: str, edit: Callable[..., Path], workplace: Path, tiny: Path
) -> None:
    """Uneven parts, accumulation, a choice after a warm-up, and one made again that changes sizes."""
    plain = without_dropout(workplace, tiny)
    path = edit(
        ('"tiny"', f'"{plain.name}"'),
        (FISH, CHOSEN_AGAIN[method]),
        ("batch_size = 8", "batch_size = 4\naccumulate = 2"),
        ("epochs = 2", "steps = 7"),
        # Not Adam: its first step is the gradient's sign, which rounding decides where the gradient is next to nothing.
        ("lr = 0.01", 'name = "sgd"\nlr = 0.1\nmomentum = 0.9'),
    )
    two = on_two_ranks(path)

    from tithe.app.train import read_recipe, train

    one = train(read_recipe(path, ["run.output=one", "run.batch_size=8"]))
    assert one["metrics"] == two["metrics"]
    draws = [[{**draw, "peak": 0} for draw in result["draws"]] for result in (one, two)]  # a peak is of one batch
    assert draws[0] == draws[1]
    assert len(draws[0]) == (2 if method == "trady" else 0)
    states = [Checkpoints(workplace / name / "checkpoints").load(7)["trainee"] for name in ("one", "two")]
    for name, selected in states[0]["selected"].items():
        for key, value in selected.items():
            assert torch.equal(value, states[1]["selected"][name][key])
    for name, values in states[0]["values"].items():
        torch.testing.assert_close(values, states[1]["values"][name], rtol=1e-4, atol=1e-5)


def test_two_ranks_draw_the_same_networks_and_equal_one(edit: Callable[..., Path], workplace: Path, tiny: Path) -> None:
    """Uneven parts, accumulation, channels that are dropped, and widths that are fixed."""
    plain = without_dropout(workplace, tiny)
    path = edit(
        ('"tiny"', f'"{plain.name}"'),
        (FISH, 'name = "vrpge"\nkeep = 0.5\nstructure_lr = 0.1\nwhere = ["*encoder*"]'),
        ("batch_size = 8", "batch_size = 4\naccumulate = 2"),
        ("epochs = 2", "steps = 11"),
        ("lr = 0.01", 'name = "sgd"\nlr = 0.05\nmomentum = 0.9'),
    )
    two = on_two_ranks(path)

    from tithe.app.train import read_recipe, train

    one = train(read_recipe(path, ["run.output=one", "run.batch_size=8"]))
    assert one["metrics"] == two["metrics"]
    for first, second in zip(one["widths"], two["widths"], strict=True):
        assert (first["step"], first["units"], first["weights"]) == (second["step"], second["units"], second["weights"])
    assert one["trainable"] == two["trainable"]
    states = [Checkpoints(workplace / name / "checkpoints").load(11)["trainee"] for name in ("one", "two")]
    assert torch.equal(states[0]["alive"], states[1]["alive"])
    for name, values in states[0]["tensors"].items():
        torch.testing.assert_close(values, states[1]["tensors"][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method", [pytest.param('name = "full"', marks=pytest.mark.slow, id="full"), pytest.param(FISH, id="fish")]
)
def test_two_ranks_record_one_history_and_share_out_its_average(
    method: str, edit: Callable[..., Path], workplace: Path, tiny: Path
) -> None:
    """Each rank holds half of the columns; uneven parts, and accumulation."""
    plain = without_dropout(workplace, tiny)
    path = edit(
        ('"tiny"', f'"{plain.name}"'),
        (FISH, method),
        ("batch_size = 8", "batch_size = 4\naccumulate = 2"),
        ("epochs = 2", "steps = 7"),
        ("lr = 0.01", 'name = "sgd"\nlr = 0.1\nmomentum = 0.9'),
        ("[run]", "[history]\nevery = 2\n\n[average]\nepochs = 1\nlr = 0.3\n\n[run]"),
    )
    two = on_two_ranks(path)

    from tithe.app.train import read_recipe, train

    one = train(read_recipe(path, ["run.output=one", "run.batch_size=8"]))
    assert one["history"] == two["history"] == [0, 2, 4, 6]
    assert one["metrics"] == two["metrics"]
    assert [one["average"][key] for key in ("last", "mean")] == [two["average"][key] for key in ("last", "mean")]
    states = [Checkpoints(workplace / name / "checkpoints").load(one["steps"])["trainee"] for name in ("one", "two")]
    assert states[0]["span"].shape == (4,)
    torch.testing.assert_close(states[0]["span"], states[1]["span"], rtol=1e-3, atol=1e-4)
    deltas = [load_file(result["files"]["delta"]) for result in (one, two)]
    assert set(deltas[0]) == set(deltas[1])
    for name, values in deltas[0].items():
        torch.testing.assert_close(values, deltas[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "end",
    [
        '[history]\nevery = 2\nstart = 0.5\n\n[average]\nlike = "cosine"\n',
        '[history]\nevery = 2\nema = [0.05, 0.10]\n\n[average]\nlike = "ema:0.08"\n',
    ],
    ids=["decay", "moving average"],
)
def test_two_ranks_end_with_the_same_average_as_one(
    end: str, edit: Callable[..., Path], workplace: Path, tiny: Path
) -> None:
    plain = without_dropout(workplace, tiny)
    path = edit(
        ('"tiny"', f'"{plain.name}"'),
        (FISH, 'name = "full"'),
        ("batch_size = 8", "batch_size = 4\naccumulate = 2"),
        ("epochs = 2", "steps = 8"),
        ("lr = 0.01", 'name = "sgd"\nlr = 0.1\nmomentum = 0.9\nschedule = "constant"'),
        ("[run]", f"{end}\n[run]"),
    )
    two = on_two_ranks(path)

    from tithe.app.train import read_recipe, train

    one = train(read_recipe(path, ["run.output=one", "run.batch_size=8"]))
    assert one["history"] == two["history"]
    assert one["metrics"] == two["metrics"]
    deltas = [load_file(result["files"]["delta"]) for result in (one, two)]
    assert set(deltas[0]) == set(deltas[1])
    for name, values in deltas[0].items():
        torch.testing.assert_close(values, deltas[1][name], rtol=1e-3, atol=1e-4)
