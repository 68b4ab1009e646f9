"""Damage to the files of a recorded history: it is named with the checkpoint that it hit, or it changes no number."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tithe
from histories import recorded, walk
from tithe import TWA, History, TitheError, TitheWarning
from tithe.averages import checksums
from tithe.averages.average import average

ALL_BITS = [None, 8, 4, 1]
each_bits = pytest.mark.parametrize("bits", ALL_BITS)


def network() -> nn.Module:
    """Weights that are coded, some that are shorter than their codes, statistics and a counter."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.BatchNorm1d(64), nn.Linear(64, 40))


Content = tuple[list[int], list[float | None], list[dict[str, Tensor]]]


def content(folder: Path) -> Content:
    """All that a history says, read in the two ways that there are."""
    history = History(folder)
    return history.steps, history.scores, [*history, history.mean()]


def same(one: Content, two: Content) -> bool:
    return one[:2] == two[:2] and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
        for a, b in zip(one[2], two[2], strict=True)
    )


# --- any damage

_WORDS = [b"1e309", b"-1", b"9" * 23, b"NaN", b"null", b"true", b'"', b"{", b"[" * 9, b"\xff\xfe", b"F64", b"\0" * 64]


def flipped(data: bytearray, at: int, draw: random.Random) -> bytes:
    data[at] ^= 1 << draw.randrange(8)
    return bytes(data)


def several(data: bytearray, at: int, draw: random.Random) -> bytes:
    for _ in range(draw.randrange(2, 20)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def written_over(data: bytearray, at: int, draw: random.Random) -> bytes:
    word = draw.choice(_WORDS)
    data[at : at + len(word)] = word
    return bytes(data)


def inserted(data: bytearray, at: int, draw: random.Random) -> bytes:
    data[at:at] = draw.choice(_WORDS)
    return bytes(data)


def torn(data: bytearray, at: int, draw: random.Random) -> bytes:
    stop = min(at + draw.randrange(1, 4096), len(data))
    data[at:stop] = bytes(stop - at)
    return bytes(data)


def exchanged(data: bytearray, at: int, draw: random.Random) -> bytes:
    size = draw.randrange(1, 600)
    other = draw.randrange(len(data) - size)
    at = min(at, len(data) - size)
    data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
    return bytes(data)


def cut(data: bytearray, at: int, draw: random.Random) -> bytes:
    return bytes(data[:at])


def longer(data: bytearray, at: int, draw: random.Random) -> bytes:
    return bytes(data) + b"\0" * draw.randrange(1, 9)


def another_number(data: bytearray, at: int, draw: random.Random) -> bytes:
    """A number of the header is another, and the length of the header follows."""
    (length,) = struct.unpack("<Q", data[:8])
    digits = [place for place in range(8, 8 + length) if chr(data[place]).isdigit()]
    first = draw.choice(digits)
    stop = first
    while chr(data[stop]).isdigit():
        stop += 1
    word = draw.choice(_WORDS)
    return struct.pack("<Q", length + len(word) - (stop - first)) + bytes(data[8:first]) + word + bytes(data[stop:])


DAMAGES = [flipped, several, written_over, inserted, torn, exchanged, cut, longer, another_number]


@each_bits
def test_any_damage_is_named_or_changes_nothing(bits: int | None, tmp_path: Path) -> None:
    """Twenty thousand of these, with other seeds, gave no other outcome."""
    recorded(tmp_path / "run", walk(network(), 3), bits)
    expected = content(tmp_path / "run")
    files = sorted((tmp_path / "run").iterdir())
    whole = [path.read_bytes() for path in files]
    draw = random.Random(0)
    for number in range(180):
        place = draw.randrange(len(files))
        length = 8 + int.from_bytes(whole[place][:8], "little")
        at = draw.randrange(length if draw.random() < 0.5 else len(whole[place]))
        files[place].write_bytes(DAMAGES[number % len(DAMAGES)](bytearray(whole[place]), at, draw))
        said = ""
        try:
            told = same(content(tmp_path / "run"), expected)
        except TitheError as error:
            told, said = files[place].name in str(error), str(error)
        assert told, (number, said)
        files[place].write_bytes(whole[place])
    assert same(content(tmp_path / "run"), expected)


# --- each way to read


@each_bits
@pytest.mark.parametrize("place", [0, 2])
def test_a_flipped_bit_is_found_by_each_way_to_read(bits: int | None, place: int, tmp_path: Path) -> None:
    model = network()
    recorded(tmp_path / "run", walk(model, 4), bits)
    path = tmp_path / "run" / f"{place:06d}.safetensors"
    data = bytearray(path.read_bytes())
    data[-300] ^= 4
    path.write_bytes(data)
    for read in (
        lambda: list(History(tmp_path / "run")),
        lambda: History(tmp_path / "run").mean(),
        lambda: [History(tmp_path / "run").columns(n, 0, p.numel()) for n, p in model.named_parameters()],
        lambda: average(tmp_path / "run", tmp_path / "out.safetensors"),
        lambda: tithe.attach(network(), TWA(tmp_path / "run")),
    ):
        with pytest.raises(TitheError, match=rf"{path.name}: found bytes .* that are not what was recorded"):
            read()
    assert not (tmp_path / "out.safetensors").exists()


@each_bits
def test_the_remedy_opens_the_history_without_it(bits: int | None, tmp_path: Path) -> None:
    recorded(tmp_path / "run", walk(network(), 4), bits)
    path = tmp_path / "run" / "000002.safetensors"
    whole = path.read_bytes()
    data = bytearray(whole)
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.warns(TitheWarning, match=r"left out: .*00000[23]"):
        history = History(tmp_path / "run", skip_damaged=True)
    assert history.steps == ([0, 1, 3] if bits is None else [0, 1])
    assert len(list(history)) == len(history)
    path.write_bytes(whole)
    assert len(list(History(tmp_path / "run"))) == 4


def test_pages_are_told_apart_by_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pages that changed places, or came from another checkpoint, are damage."""
    monkeypatch.setattr(checksums, "PAGE", 512)
    recorded(tmp_path / "run", walk(network(), 2))
    first, path = sorted((tmp_path / "run").iterdir())
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    pages = [whole[at : at + 512] for at in range(start, len(whole), 512)]
    pages[3], pages[7] = pages[7], pages[3]
    path.write_bytes(whole[:start] + b"".join(pages))
    with pytest.raises(TitheError, match=r"000001.safetensors: found bytes"):
        list(History(tmp_path / "run"))
    path.write_bytes(whole[:start] + whole[start : start + 1024] + first.read_bytes()[-len(whole) + start + 1024 :])
    with pytest.raises(TitheError, match=r"000001.safetensors: found bytes"):
        list(History(tmp_path / "run"))


@pytest.mark.parametrize("page", [16, 100, 1 << 17])
def test_ranges_of_any_size_are_checked(page: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "PAGE", page)
    models = walk(network(), 3)
    history = recorded(tmp_path / "run", models)
    for first, last in ((0, 1), (7, 8), (3, 600), (2559, 2560), (0, 2560), (5, 5)):
        rows = torch.stack([model[0].weight.detach().view(-1)[first:last] for model in models])
        assert torch.equal(History(tmp_path / "run").columns("0.weight", first, last), rows)
    assert torch.equal(history[1]["2.weight"], models[1][2].weight)


@pytest.mark.parametrize("swap", [("000001", "000002"), ("000000", "000001"), ("000002", "000003")])
@each_bits
def test_files_that_changed_places(bits: int | None, swap: tuple[str, str], tmp_path: Path) -> None:
    recorded(tmp_path / "run", walk(network(), 4), bits)
    one, two = (tmp_path / "run" / f"{name}.safetensors" for name in swap)
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    with pytest.raises(TitheError, match=rf"{swap[0]}.safetensors: found a checkpoint of another history"):
        History(tmp_path / "run")


@pytest.mark.parametrize("place", [0, 1, 2])
@each_bits
def test_a_file_of_another_run(bits: int | None, place: int, tmp_path: Path) -> None:
    recorded(tmp_path / "run", walk(network(), 3), bits)
    recorded(tmp_path / "other", walk(network(), 3), bits)
    name = f"{place:06d}.safetensors"
    shutil.copy(tmp_path / "other" / name, tmp_path / "run" / name)
    with pytest.raises(TitheError, match=rf"{name}.*"):
        History(tmp_path / "run")


# --- histories from before


def _of_before(folder: Path) -> None:
    """Make the files of a history those of version 1, without checksums."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        note = json.loads(header["__metadata__"]["tithe_history"])
        save_file(load_file(path), path, metadata={"tithe_history": json.dumps({**note, "version": 1})})


@each_bits
def test_a_history_without_checksums_is_read_and_goes_on(bits: int | None, tmp_path: Path) -> None:
    models = walk(network(), 4)
    recorded(tmp_path / "run", models[:3], bits)
    expected = content(tmp_path / "run")
    _of_before(tmp_path / "run")
    assert same(content(tmp_path / "run"), expected)
    assert History(tmp_path / "run").record(models[3], 9)
    assert History(tmp_path / "run").steps == [0, 1, 2, 9]
    assert len(list(History(tmp_path / "run"))) == 4


def _without(key: str) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(key.encode(), key.encode()[:-1] + b"X")


@pytest.mark.parametrize("key", ["tithe_checksums", "tithe_history"])
@pytest.mark.parametrize("place", [0, 1])
@each_bits
def test_damage_does_not_pass_for_a_history_from_before(bits: int | None, place: int, key: str, tmp_path: Path) -> None:
    recorded(tmp_path / "run", walk(network(), 2), bits)
    path = tmp_path / "run" / f"{place:06d}.safetensors"
    path.write_bytes(_without(key)(path.read_bytes()))
    with pytest.raises(TitheError, match=path.name):
        History(tmp_path / "run")


def test_an_average_has_no_checksums_of_its_parts(tmp_path: Path) -> None:
    recorded(tmp_path / "run", walk(network(), 2))
    out = average(tmp_path / "run", tmp_path / "out.safetensors")
    assert b"tithe_" not in out.read_bytes()
    assert len(list(History([out]))) == 1
