"""A history while things go wrong: a full disk, a kill at any point, two runs in one folder; and what reading takes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import doomed
import tithe
from deltas import net
from histories import checkpoints, perturbed, recorded
from tithe import TWA, History, TitheError
from tithe.averages.recorder import Recorder, link, weights_of

ALL_BITS = [None, 8, 1]


def _run(what: str, *arguments: object) -> str:
    """What another process prints, `doomed.py`: it starts once and forks for each thing that may happen to it."""
    script = Path(__file__).with_name("doomed.py")
    words = [sys.executable, str(script), what, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _sound(folder: Path) -> History:
    """The history opens, and every row of it decodes."""
    history = History(folder)
    for state in history:
        assert all(tensor.isfinite().all() for tensor in state.values())
    return history


# --- two runs


def test_the_second_to_write_a_number_gets_the_error(tmp_path: Path) -> None:
    one, two = History(tmp_path / "run"), History(tmp_path / "run")
    models = checkpoints(net(), 2)
    assert one.record(models[0], 0)
    content = (tmp_path / "run" / "000000.safetensors").read_bytes()
    for step in (0, 7):
        with pytest.raises(TitheError, match=r"000000.safetensors: found a checkpoint that another run wrote"):
            two.record(models[1], step)
    assert one.record(models[1], 1)
    assert (tmp_path / "run" / "000000.safetensors").read_bytes() == content
    assert len(_sound(tmp_path / "run")) == 2
    assert len(list((tmp_path / "run").iterdir())) == 2


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_many_recorders_of_one_folder(
    bits: int | None, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that write one number, exactly one does; what it wrote is whole."""
    if not links:
        monkeypatch.setattr(os, "link", _refuses)
    recorders = [Recorder(tmp_path, bits, [], None) for _ in range(4)]
    models = checkpoints(net(), 4)
    written: list[int] = []
    told: list[TitheError] = []
    start = threading.Barrier(4)

    def record(index: int) -> None:
        weights, rest = weights_of(models[index])
        start.wait()
        try:
            assert recorders[index].record(weights, rest, 0, None)
            written.append(index)
        except TitheError as error:
            told.append(error)

    threads = [threading.Thread(target=record, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) + len(told) == 4
    assert written
    if links:  # without them a name that is taken meanwhile cannot be told in one step
        assert len(written) == 1
    states = [model.state_dict() for model in models]
    found = _sound(tmp_path)[0]
    assert any(all(torch.equal(found[name], states[index][name]) for name in found) for index in written)
    assert [path.name for path in tmp_path.iterdir()] == ["000000.safetensors"]


def _refuses(*paths: object, **settings: object) -> None:
    raise OSError(1, "Operation not permitted")  # what a file system without links says


def test_a_name_that_is_taken_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _refuses)
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    with pytest.raises(FileExistsError):
        link(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old"
    link(tmp_path / "new", tmp_path / "free")
    assert (tmp_path / "free").read_text() == "new"


# --- no room


def test_training_goes_on_when_the_disk_is_full(tmp_path: Path) -> None:
    told = _run("full", tmp_path).splitlines()
    assert len(told) == len(ALL_BITS)
    for bits, line in zip(ALL_BITS, told, strict=True):
        assert line.startswith("[True, True, True, False, False, False, True, True, True]")
        assert line.count("TitheWarning: ") == 1
        assert "no room for the checkpoint of step 3; the 3 before it are readable" in line
        assert line.endswith("doomed.py"), "the warning points to the caller"
        history = _sound(tmp_path / str(bits))
        assert history.bits == bits
        assert history.steps == [0, 1, 2, 6, 7, 8]
        assert len(list((tmp_path / str(bits)).iterdir())) == 6


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    recorded(tmp_path / "run", [net()])
    (tmp_path / "run").chmod(0o500)
    with pytest.raises(TitheError, match=r"000001.safetensors: found a file that cannot be written \(Permission"):
        History(tmp_path / "run").record(net(), 1)
    (tmp_path / "run").chmod(0o700)


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TitheError, match=r"a file that cannot be written \(Not a directory\)"):
        History(tmp_path / "file" / "run").record(net(), 0)


# --- kill -9


def test_a_kill_at_any_time_leaves_a_history(tmp_path: Path) -> None:
    """Killed after random times, on and on: each run goes on from what the one before it left."""
    counts = [int(count) for count in _run("anytime", tmp_path / "run").split()]
    assert len(counts) == 25
    assert counts == sorted(counts)
    history = _sound(tmp_path / "run")
    assert len(history) == counts[-1] > 25
    assert history.record(doomed.network(), history.steps[-1] + 1)
    assert not list((tmp_path / "run").glob(".*"))
    assert len(_sound(tmp_path / "run")) == counts[-1] + 1


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each point at which a process was killed while it wrote the third checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    assert _run("points", folder).split() == ["-9"] * (2 * len(doomed.POINTS) + 1)
    return folder


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("point", list(doomed.POINTS))
def test_a_kill_at_a_chosen_point(point: str, bits: int | None, killed: Path) -> None:
    folder = killed / f"{point}, {bits}"
    named = point in ("after its name", "before the folder is safe", "at the end")
    left = [path.name for path in folder.glob(".*")]
    assert len(left) == (point not in ("before it begins", "before the folder is safe", "at the end"))
    assert len(_sound(folder)) == 2 + named
    history = History(folder)
    assert history.record(doomed.network(), 10)
    assert not list(folder.glob(".*"))
    assert len(_sound(folder)) == 3 + named


def test_a_kill_in_the_first_checkpoint(killed: Path) -> None:
    folder = killed / "first"
    assert [path.name[0] for path in folder.iterdir()] == ["."]
    history = History(folder, 8)
    assert len(history) == 0
    assert history.record(net(), 0)
    assert [path.name for path in folder.iterdir()] == ["000000.safetensors"]


# --- what reading takes


def test_reading_needs_a_few_blocks(tmp_path: Path) -> None:
    """25 checkpoints of 8 MiB, 200 in all: of columns, blocks of 16 are in memory; of a mean, it and less."""
    model = nn.Linear(2048, 1024, bias=False)
    whole, coded = History(tmp_path / "whole"), History(tmp_path / "coded", 8)
    (tmp_path / "pt").mkdir()
    for step in range(25):
        with torch.no_grad():
            model.weight.add_(0.01 * torch.randn(2048))
        assert whole.record(model, step)
        assert coded.record(model, step)
        torch.save(model.state_dict(), tmp_path / "pt" / f"{step}.pt")
    recorded(tmp_path / "many", [net()] * 60)
    *peaks, num_read = [float(number) for number in _run("memory", tmp_path).split()]
    for kind, columns, mean in zip(doomed.KINDS, peaks[::2], peaks[1::2], strict=True):
        assert 8 < columns < 64, kind
        assert 8 < mean < 64, kind
    assert num_read == 60, "no file stays open: a history may be longer than a process may have files"


def test_a_run_may_be_averaged_while_it_records(tmp_path: Path) -> None:
    history = recorded(tmp_path / "run", checkpoints(net(), 3), 8)
    plan = tithe.attach(net(), TWA(History(tmp_path / "run")), data=[torch.randn(4, 8)])
    for step in range(3, 6):
        assert history.record(perturbed(net(), step), step)
        History(tmp_path / "run").mean()
    plan.release()
    assert len(_sound(tmp_path / "run")) == 6
