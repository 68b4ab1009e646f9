"""The average of checkpoints when things go wrong: bad input, a full disk, a kill, a small memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tithe import TitheError, TitheWarning
from tithe.averages.average import average


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that runs some code, with its arguments in `sys.argv`."""
    words = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    # Without a threshold glibc keeps what was freed, more or less of it by the kernels that a processor has.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def write(folder: Path, count: int = 3, numel: int = 100, dtype: torch.dtype = torch.float32) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.safetensors" for number in range(count)]
    for number, path in enumerate(paths):
        save_file({"a": torch.full((numel,), float(number), dtype=dtype), "b": torch.ones(3)}, path)
    return paths


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([0.5, 0.5], "found 2 weights for 3 checkpoints"),
        ([1.0, 1.0, 1.0], "found weights that sum to 3; expected a sum of 1.*divide each by 3"),
        ([0.5, float("nan"), 0.5], "found weights that sum to nan.*use weights that sum to 1"),
        ([0.5, float("inf"), -float("inf")], "found weights that sum to nan"),
        ([0.0, 0.0, 0.0], "found weights that sum to 0"),
    ],
)
def test_bad_weights(weights: list[float], words: str, tmp_path: Path) -> None:
    paths = write(tmp_path)
    with pytest.raises(TitheError, match=words):
        average(paths, tmp_path / "out.safetensors", weights)
    assert len(list(tmp_path.iterdir())) == 3


def test_weights_written_to_three_places_are_taken_as_they_are_meant(tmp_path: Path) -> None:
    out = load_file(average(write(tmp_path), tmp_path / "out.safetensors", [0.333, 0.333, 0.333]))
    assert torch.equal(out["a"], torch.ones(100))


def test_bad_outputs(tmp_path: Path) -> None:
    paths = write(tmp_path / "in")
    (tmp_path / "folder").mkdir()
    for output, words in (
        (paths[0], "found an existing file or folder"),
        (tmp_path / "folder", "found an existing file or folder"),
        (tmp_path / "none" / "out.safetensors", "found no folder"),
        (tmp_path / "out.pt", r"found the ending \.pt; expected \.safetensors"),
        (tmp_path / ("n" * 300), r"found a place that cannot be written \(File name too long\)"),
        (tmp_path / ("n" * 250), r"found a place that cannot be written \(File name too long\)"),
    ):
        with pytest.raises(TitheError, match=words):
            average(paths, output)
    torch.save({"a": torch.ones(2)}, tmp_path / "0.pt")
    with pytest.raises(TitheError, match=r"found the ending \.safetensors; expected \.pt"):
        average(tmp_path / "0.pt", tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "folder", "in"]


def test_nothing_to_average(tmp_path: Path) -> None:
    with pytest.raises(TitheError, match="found no checkpoint"):
        average(tmp_path / "nowhere", tmp_path / "out.safetensors")


def test_a_damaged_checkpoint_is_left_out_on_request_alone(tmp_path: Path) -> None:
    paths = write(tmp_path)
    paths[1].write_bytes(paths[1].read_bytes()[:-7])
    with pytest.raises(TitheError, match=r"1\.safetensors: found a file that cannot be read"):
        average(paths, tmp_path / "out.safetensors")
    with pytest.warns(TitheWarning, match=r"left out: .*1\.safetensors"):
        average(paths, tmp_path / "out.safetensors", skip_damaged=True)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["a"], torch.ones(100))


def test_a_checkpoint_that_shrinks_meanwhile_is_named(tmp_path: Path) -> None:
    paths = write(tmp_path)

    def cut(done: int, total: int) -> None:
        paths[2].write_bytes(paths[2].read_bytes()[:-400])

    from tithe import History

    history = History(paths)
    cut(0, 0)
    with pytest.raises(TitheError, match=r"2\.safetensors: found a file that can no longer be read"):
        average(history, tmp_path / "out.safetensors")
    assert len(list(tmp_path.iterdir())) == 3


FULL = """
    import resource, signal, sys
    from tithe import TitheError
    from tithe.averages.average import average
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        average(sys.argv[1:-1], sys.argv[-1])
    except TitheError as error:
        print(error)
"""


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_no_room_is_said_and_leaves_nothing(ending: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk with less room than it says."""
    paths = write(tmp_path, numel=200_000)
    if ending == "pt":
        for number, path in enumerate(paths):
            torch.save(load_file(path), path.with_suffix(".pt"))
            path.unlink()
            paths[number] = path.with_suffix(".pt")
    process = run(FULL, *paths, tmp_path / f"out.{ending}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"out.{ending}: found no room left (File too large); expected 800,012 bytes" in out, out
    assert sorted(tmp_path.iterdir()) == paths


def test_too_little_room_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    paths = write(tmp_path)
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=411))
    with pytest.raises(TitheError, match="found 411 bytes of room; expected 412 bytes"):
        average(paths, tmp_path / "out.safetensors")


STOPS = """
    import itertools, sys, time
    from tithe.averages.average import average
    calls = itertools.count(1)
    def wait(done, total):
        assert done < total
        if next(calls) == 6:
            print(done, flush=True)
            time.sleep(300)
    average(sys.argv[1:-1], sys.argv[-1], progress=wait)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_a_kill_leaves_no_output_and_the_inputs_as_they_were(number: signal.Signals, tmp_path: Path) -> None:
    paths = write(tmp_path, count=4, numel=20 << 20, dtype=torch.float16)
    before = [path.read_bytes()[-1000:] for path in paths]
    process = run(STOPS, *paths, tmp_path / "out.safetensors")
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(number)
    process.communicate(timeout=300)
    assert process.returncode in (-number, 130)
    left = {path.name for path in tmp_path.iterdir()} - {path.name for path in paths}
    assert "out.safetensors" not in left
    assert [path.read_bytes()[-1000:] for path in paths] == before
    if number == signal.SIGINT:
        assert not left
    else:
        average(paths, tmp_path / "out.safetensors")  # what the dead run left is in nobody's way
        assert load_file(tmp_path / "out.safetensors")["a"][-1] == 1.5


PEAK = """
    import sys, time
    from pathlib import Path
    from tithe.averages.average import average
    def peak():
        told = Path("/proc/self/status").read_text()
        return int(told.split("VmHWM:")[1].split()[0]) * 1024
    before = peak()
    paths = sys.argv[1:-1]
    average(paths, sys.argv[-1], [1 / len(paths)] * len(paths))  # links to one file, which count by their weights
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(("count", "ending"), [(12, "safetensors"), (4, "pt")])
def test_memory_is_a_few_blocks_whatever_there_is(count: int, ending: str, tmp_path: Path) -> None:
    """Two sets of buffers; of a file by torch.save the average besides."""
    numel = 30 << 20
    state = {"a": torch.arange(numel, dtype=torch.float32).to(torch.bfloat16)}
    paths = [tmp_path / f"0.{ending}"]
    (save_file if ending == "safetensors" else torch.save)(state, paths[0])
    for number in range(1, count):
        paths.append(tmp_path / f"{number}.{ending}")
        os.link(paths[0], paths[-1])
    del state
    process = run(PEAK, *paths, tmp_path / f"out.{ending}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert int(out) < (310e6 if ending == "safetensors" else 250e6)
