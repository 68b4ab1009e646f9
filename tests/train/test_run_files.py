"""A run's files while things go wrong: kills, full disks, two runs in one folder, edited state, Ctrl-C twice."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tithe import TitheError
from tithe.app.train import read_recipe, train
from tithe.app.train.checkpoints import Checkpoints
from tithe.app.train.lock import RunLock
from tithe.app.train.signals import Interrupted
from workplace import assert_equal, quiet, run

Edit = Callable[..., Path]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SHORT = ("epochs = 2", "steps = 6\ncheckpoint_every = 2\nevaluate_every = 3")


def _lines(out: Path) -> list[str]:
    return (out / "log.jsonl").read_text().splitlines()


def _assert_same(one: Path, two: Path) -> None:
    """Two runs ended in the same bits and said the same."""
    first, second = (Checkpoints(out / "checkpoints") for out in (one, two))
    assert first.steps() == second.steps()
    for key in ("trainee", "optimizer", "random"):
        assert_equal(*(found.load(found.steps()[-1])[key] for found in (first, second)))
    assert_equal(*(load_file(out / "delta.safetensors") for out in (one, two)))
    assert _lines(one) == _lines(two)


# --- checkpoints


def _state(value: float) -> dict[str, Any]:
    return {"weights": torch.full((3,), value), "position": {"step": int(value), "best": float("-inf")}}


def test_a_checkpoint_that_lacks_a_file_is_skipped(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, _state(step), None)
    for name in ("tensors.safetensors", "state.json"):
        shutil.copytree(tmp_path / "step-00000002", tmp_path / "step-00000003")
        (tmp_path / "step-00000003" / name).unlink()
        assert checkpoints.steps() == [1, 2]
        shutil.rmtree(tmp_path / "step-00000003")
    (tmp_path / "step-00000003").mkdir()
    assert checkpoints.steps() == [1, 2]
    checkpoints.save(3, _state(3), None)
    assert checkpoints.steps() == [2, 3]
    assert_equal(checkpoints.load(3), _state(3))


@pytest.mark.parametrize("half", ["gone", "half deleted", "empty"])
@pytest.mark.parametrize("name", ["partial-00000002", ".step-00000002.01234567.tmp/step-00000002"])
def test_what_a_killed_run_had_written_takes_its_place(name: str, half: str, tmp_path: Path) -> None:
    """Killed between moving the old one aside, or deleting it, and moving the new one there."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, _state(1), None)
    path = checkpoints.save(2, _state(2), None)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copytree(path, tmp_path / name)
    shutil.rmtree(path) if half == "gone" else [file.unlink() for file in list(path.iterdir())[half != "empty" :]]
    assert checkpoints.steps() == [1]
    checkpoints.recover()
    assert checkpoints.steps() == [1, 2]
    assert_equal(checkpoints.load(2), _state(2))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_what_a_killed_run_had_half_written_is_removed(name: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, _state(1), None)
    for partial in ("partial-00000002", ".step-00000002.01234567.tmp/step-00000002", ".old-step-00000003"):
        shutil.copytree(path, tmp_path / partial)
        file = tmp_path / partial / name
        file.write_bytes(file.read_bytes()[:-20])
    checkpoints.recover()
    assert [found.name for found in tmp_path.iterdir()] == ["step-00000001"]


def test_every_changed_byte_of_a_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, _state(1), None)
    path = checkpoints.save(2, _state(2), None)
    for name in ("tensors.safetensors", "state.json"):
        whole = (path / name).read_bytes()
        for at in range(0, len(whole), 3):
            changed = bytearray(whole)
            changed[at] ^= 1 << at % 8
            (path / name).write_bytes(changed)
            with pytest.raises(TitheError, match="step-00000002") as error:
                checkpoints.load(2)
            assert "resume from step 1" in error.value.remedy or "version" in error.value.expected
        for size in range(0, len(whole), 7):
            (path / name).write_bytes(whole[:size])
            with pytest.raises(TitheError, match="step-00000002"):
                checkpoints.load(2)
        (path / name).write_bytes(whole)
    shutil.rmtree(path)  # as the remedy says
    assert_equal(checkpoints.load(1), _state(1))


def test_a_checkpoint_has_the_umasks_modes(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = Checkpoints(tmp_path).save(1, _state(1), None)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


# --- one run a folder


HOLD = """
import sys, time
from pathlib import Path
from tithe.app.train.lock import RunLock
lock = RunLock(Path(sys.argv[1]), "here")
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_does_not_block(edit: Edit, workplace: Path) -> None:
    path = edit(SHORT)
    command = [sys.executable, "-c", HOLD, str(workplace / "out")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(TitheError, match=rf"\[run\] output: found a run that is .*process {holder.pid} on"):
                run(path, resume=resume)
        assert [file.name for file in (workplace / "out").iterdir()] == ["run.lock"]
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert (workplace / "out" / "run.lock").exists()
    assert run(path)["steps"] == 6
    assert not (workplace / "out" / "run.lock").exists()


def test_a_forked_worker_does_not_hold_the_folder(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "out", "here")
    ready, done = os.pipe()
    worker = os.fork()
    if not worker:
        os.write(done, b"x")
        time.sleep(600)
    try:
        assert os.read(ready, 1) == b"x"
        lock.let_go()  # what the system does when the run is killed
        RunLock(tmp_path / "out", "here").release()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        os.close(ready)
        os.close(done)


def test_a_run_that_is_refused_leaves_no_folder(edit: Edit, workplace: Path) -> None:
    path = edit(('pretrained = "tiny"', 'pretrained = "tiny"\nnum_labels = 7'))
    with pytest.raises(TitheError):
        run(path, "model.pretrained=nowhere")
    assert not (workplace / "out").exists()


# --- no room


@pytest.mark.parametrize("room", [40, 3_000, 12_000])
def test_a_full_disk_stops_a_run_with_words_and_it_can_be_resumed(room: int, edit: Edit, workplace: Path) -> None:
    """Hit at the board, a checkpoint's state, its tensors: a limit on the size of files stands for a full disk."""
    path = edit(SHORT)
    run(path, "run.output=whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(TitheError, match=r"no room left.*ulimit -f"):
            run(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((workplace / "out" / "checkpoints").glob(".*"))
    run(path, resume=True)
    _assert_same(workplace / "whole", workplace / "out")


def test_a_disk_that_fills_up_later_says_where_to_go_on(edit: Edit, workplace: Path) -> None:
    path = edit(SHORT)
    run(path, "run.output=whole")
    out = workplace / "out"
    shutil.copytree(workplace / "whole", out)
    for name in ("delta.safetensors", "result.json", "loss.png"):
        (out / name).unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_200, hard))
    try:
        with pytest.raises(TitheError, match=r"delta.safetensors: found no room.*then go on from step 6 with --resume"):
            run(path, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (out / "delta.safetensors").exists()
    run(path, resume=True)
    _assert_same(workplace / "whole", out)


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300])
def test_an_output_that_cannot_be_a_folder(place: str, edit: Edit, workplace: Path) -> None:
    (workplace / "file").write_text("mine")
    with pytest.raises(TitheError, match=r"cannot be written|expected a folder"):
        run(edit(SHORT), f"run.output={place}")
    assert (workplace / "file").read_text() == "mine"


# --- killed, interrupted


def test_what_was_logged_after_the_last_checkpoint_is_logged_once(edit: Edit, workplace: Path) -> None:
    """Killed after the log's lines of step 6, before its checkpoint; and before the first checkpoint."""
    path = edit(SHORT)
    run(path, "run.output=whole")
    shutil.copytree(workplace / "whole", workplace / "out")
    shutil.rmtree(workplace / "out" / "checkpoints" / "step-00000006")
    run(path, resume=True)
    _assert_same(workplace / "whole", workplace / "out")
    shutil.rmtree(workplace / "out" / "checkpoints")
    with (workplace / "out" / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "spl')
    run(path, resume=True)
    _assert_same(workplace / "whole", workplace / "out")


def test_ctrl_c_twice_says_what_was_saved(edit: Edit, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tithe.app.train import loop

    path, inner = edit(SHORT), loop.Run._step
    recipe = read_recipe(path, [])

    def stopped_at(step: int) -> None:
        def step_and_stop(self: loop.Run, batches: Any) -> Any:
            if self.position.step == step:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return inner(self, batches)

        monkeypatch.setattr(loop.Run, "_step", step_and_stop)

    stopped_at(1)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, console=quiet())
    stopped_at(5)
    with pytest.raises(Interrupted, match="stopped at once: step 4 is saved"):
        train(recipe, console=quiet())
    monkeypatch.undo()
    run(path, resume=True)
    run(path, "run.output=whole")
    _assert_same(workplace / "whole", workplace / "out")


KILLED = """
import os, random, signal, sys
from io import StringIO
from rich.console import Console
from tithe.app.train import read_recipe, train
import tithe.app.train.loop, tithe.app.train.report

def forked(seed):
    process = os.fork()
    if not process:
        if seed is not None:
            signal.setitimer(signal.ITIMER_REAL, random.Random(seed).uniform(0.01, float(sys.argv[3])))
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        train(read_recipe(sys.argv[1], ["run.output=out"]), resume=True, console=Console(file=StringIO()))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

print(*[forked(seed) for seed in range(int(sys.argv[2]))], forked(None))
"""


@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.slow)], ids=["a few", "many"])
def test_killed_at_any_moment_a_run_goes_on_to_the_same_bits(kills: int, edit: Edit, workplace: Path) -> None:
    path = edit(SHORT, ("[run]", "[history]\nevery = 2\n[average]\nepochs = 1\nlr = 0.1\n[run]"))
    started = time.monotonic()
    run(path, "run.output=whole")
    most = 1.2 * (time.monotonic() - started)
    command = [sys.executable, "-c", KILLED, str(path), str(kills), str(most)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    *codes, last = map(int, done.stdout.split())
    assert last == 0, done.stderr
    assert set(codes) <= {0, -signal.SIGKILL}
    _assert_same(workplace / "whole", workplace / "out")
    for name in (file.name for file in (workplace / "whole" / "history").iterdir()):
        one, two = (load_file(workplace / out / "history" / name) for out in ("whole", "out"))
        assert_equal(dict(sorted(one.items())), dict(sorted(two.items())))
    assert not list((workplace / "out" / "checkpoints").glob(".*"))
    assert json.loads((workplace / "out" / "result.json").read_text())["steps"] > 6
