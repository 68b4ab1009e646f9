"""Files and folders are written whole or not at all, with the umask's mode, and what goes wrong is said in words."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tithe
from deltas import net
from tithe import TitheError
from tithe.averages.average import average
from tithe.files import NotWrittenError, is_full, replacing

Writer = Callable[[Path], object]


@contextlib.contextmanager
def file_limit(num_bytes: int) -> Generator[None]:
    """No file may grow beyond this meanwhile: what a full disk is, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _tree(folder: Path) -> dict[str, bytes | None]:
    """What is in a folder, hidden files too."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def _base(folder: Path) -> Path:
    """A folder as `save_pretrained` writes it, safetensors' own mode included."""
    folder.mkdir()
    save_file(net().state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "note.txt").write_text("kept")
    return folder


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A base, a delta from it, two checkpoints."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    tithe.diff(net(), net(1), folder / "delta.safetensors")
    _base(folder / "base")
    for name in ("one", "two"):
        save_file(net().state_dict(), folder / f"{name}.safetensors")
    return folder


def _plan_save(path: Path) -> None:
    plan = tithe.attach(net(), tithe.FISH(density=0.5, score="random"))
    plan.save(path)


def _narrow(path: Path) -> None:
    model = nn.Sequential(nn.Linear(60, 80), nn.ReLU(), nn.Linear(80, 2))
    data = [(torch.randn(4, 60), torch.tensor([0, 1, 0, 1]))]

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    plan = tithe.attach(model, tithe.VRPGE(keep=0.5), loss=loss, data=data)
    plan.settle(data, draws=1)
    plan.save(path)


def _figure(path: Path) -> None:
    from tithe.app import terminal

    figure = terminal.figure(3, 2)
    figure.add_subplot().plot([1, 2])
    terminal.save_figure(figure, path)


def _writers(inputs: Path) -> dict[str, tuple[str, Writer]]:
    """Everything that writes a file or a folder in one go: its ending, and the call."""
    ranking = tithe.Ranking({"0": 1.0}, {"0": (2, 2)})
    both = [inputs / "one.safetensors", inputs / "two.safetensors"]
    return {
        "plan.save": (".safetensors", _plan_save),
        "narrow": (".safetensors", _narrow),
        "diff": (".safetensors", lambda path: tithe.diff(net(), net(1), path)),
        "merge": ("", lambda path: tithe.merge(inputs / "base", inputs / "delta.safetensors", path)),
        "merge a file": (
            ".safetensors",
            lambda path: tithe.merge(inputs / "one.safetensors", inputs / "delta.safetensors", path),
        ),
        "average": (".safetensors", lambda path: average(both, path)),
        "ranking": (".json", ranking.save),
        "figure": (".png", _figure),
    }


NAMES = list(_writers(Path()))


# --- all of them


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_what_is_written_has_the_umasks_mode_and_nothing_else_is_left(
    name: str, umask: int, inputs: Path, tmp_path: Path
) -> None:
    ending, write = _writers(inputs)[name]
    out = tmp_path / "out"
    out.mkdir()
    before = os.umask(umask)
    try:
        write(out / f"new{ending}")
    finally:
        os.umask(before)
    assert [path.name for path in out.iterdir()] == [f"new{ending}"]
    for path in out.rglob("*"):
        mode = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == mode & ~umask, path


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_said_and_leaves_what_was_there(name: str, inputs: Path, tmp_path: Path) -> None:
    ending, write = _writers(inputs)[name]
    out = tmp_path / "out"
    out.mkdir()
    path = out / f"new{ending}"
    if ending and name not in ("merge a file", "average"):  # these never replace
        path.write_text("old")
    before = _tree(out)
    with file_limit(20), pytest.raises(NotWrittenError, match=f"new{ending}: found no room left") as error:
        write(path)
    assert is_full(error.value)
    assert "ulimit -f" in error.value.remedy
    assert _tree(out) == before
    write(path)  # as the remedy says
    assert path.exists()


@pytest.mark.parametrize("name", NAMES)
def test_places_that_cannot_be_written(name: str, inputs: Path, tmp_path: Path) -> None:
    ending, write = _writers(inputs)[name]
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    before = _tree(tmp_path / "taken")
    for path, found in (
        (tmp_path / "none" / f"new{ending}", "found no folder"),
        (tmp_path / "file" / f"new{ending}", r"cannot be written \(Not a directory\)|found no folder"),
        (tmp_path / ("x" * 300 + ending), r"cannot be written \(File name too long\)"),
        (tmp_path / "taken", "found a folder|an existing"),
        (tmp_path / "pipe", "a device, a pipe or a socket|an existing|the ending"),
        (Path(f"/proc/new{ending}"), "cannot be written|found no|bytes of room"),
    ):
        with pytest.raises(TitheError, match=found) as error:
            write(path)
        assert error.value.remedy
    assert _tree(tmp_path / "taken") == before
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize("name", NAMES)
def test_a_file_system_that_is_read_only_or_small(name: str, inputs: Path, tmp_path: Path) -> None:
    ending, write = _writers(inputs)[name]
    out = tmp_path / "small"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", out], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (out / "filler").write_bytes(bytes(4096))
        with pytest.raises(NotWrittenError, match=r"no room left|bytes of room") as error:
            write(out / f"new{ending}")
        assert "make room" in error.value.remedy
        assert [path.name for path in out.iterdir()] == ["filler"]
        subprocess.run(["mount", "-o", "remount,ro", out], check=True)
        with pytest.raises(NotWrittenError, match=r"Read-only file system|bytes of room"):
            write(out / f"new{ending}")
    finally:
        subprocess.run(["umount", out], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_may_not_be_written(name: str, inputs: Path, tmp_path: Path) -> None:
    ending, write = _writers(inputs)[name]
    out = tmp_path / "closed"
    out.mkdir(mode=0o500)
    with pytest.raises(NotWrittenError, match="Permission denied"):
        write(out / f"new{ending}")
    out.chmod(0o700)
    write(out / f"new{ending}")


# --- one at a time


def _write(path: Path, act: Writer) -> None:
    with replacing(path) as temporary:
        act(temporary)


def test_a_delta_replaces_the_one_before_with_the_umasks_mode(tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    path.write_text("old")
    path.chmod(0o600)
    tithe.diff(net(), net(1), path)
    assert load_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def test_a_folder_that_vanishes_while_it_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    def lose(temporary: Path) -> None:
        shutil.rmtree(tmp_path / "out")
        temporary.write_text("lost")

    with pytest.raises(NotWrittenError, match=r"No such file.*expected the folder .*out") as error:
        _write(tmp_path / "out" / "file", lose)
    assert not is_full(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_cannot_be_read_is_not_taken_for_the_target(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    source = tmp_path / "elsewhere" / "source"
    with pytest.raises(TitheError, match=r"elsewhere/source: found a file that cannot be read") as error:
        _write(tmp_path / "target" / "file", lambda temporary: shutil.copyfile(source, temporary))
    assert not isinstance(error.value, NotWrittenError)
    assert _tree(tmp_path / "target") == {}


def test_other_errors_pass_and_leave_nothing(tmp_path: Path) -> None:
    def half(temporary: Path, kind: type[BaseException]) -> None:
        temporary.write_text("half")
        raise kind

    for kind in (KeyboardInterrupt, ZeroDivisionError, RuntimeError):
        with pytest.raises(kind):
            _write(tmp_path / "file", partial(half, kind=kind))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with replacing(tmp_path / "folder", folder=True, overwrite=True) as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    assert _tree(tmp_path) == {"folder": None, "folder/two": b"two"}


def test_a_link_to_a_file_is_replaced_and_what_it_leads_to_is_kept(tmp_path: Path) -> None:
    (tmp_path / "shared").write_text("of others")
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("mine")
    assert (tmp_path / "link").read_text() == "mine"
    assert (tmp_path / "shared").read_text() == "of others"


HOLD = """
import sys, time
from pathlib import Path
from tithe.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("begun", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_goes_with_the_next_and_what_a_live_one_writes_stays(tmp_path: Path) -> None:
    def begun() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path / "file")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        return process

    killed, living = begun(), begun()
    try:
        assert len(list(tmp_path.iterdir())) == 2
        killed.kill()
        killed.wait()
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("whole")
        left = sorted(path.name for path in tmp_path.iterdir())
        assert len(left) == 2
        assert left[0].startswith(".file.")
        assert (tmp_path / "file").read_text() == "whole"
    finally:
        for process in (killed, living):
            process.send_signal(signal.SIGINT)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
