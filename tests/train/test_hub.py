"""Models and data sets by name: a folder beside the recipe, never one of that name elsewhere, and no waiting."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tithe import TitheError
from tithe.app.train import Recipe, parse_recipe
from tithe.app.train import hub as hub_module
from tithe.app.train.data import Examples, read_examples
from tithe.app.train.models import find_model

Edit = Callable[..., Path]


def recipe(place: Path, model: dict[str, Any] | None = None, /, **data: Any) -> Recipe:
    return parse_recipe(
        {
            "model": model or {"callable": "json:loads", "tokenizer": "none"},
            "data": {"task": "text-classification", "train": "train", "validation_fraction": 0.5, **data},
            "method": {"name": "head"},
            "optimizer": {"lr": 0.1},
            "run": {"epochs": 1, "output": "out"},
        },
        place,
    )


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of data sets."""
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Not tmp_path: `datasets` takes a folder with "test" in its name for a test split.
    return tmp_path_factory.mktemp("place")


def rows(folder: Path, *labels: str) -> None:
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": f"film {i}", "label": label}) for i, label in enumerate(labels * 2)]
    (folder / "train.jsonl").write_text("\n".join(lines))


def test_a_data_set_lies_beside_the_recipe_wherever_it_is_started(
    place: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(place / "one" / "hub", "here", "there")
    rows(place / "two" / "hub", "now", "then")
    for start in ("one", "two"):
        monkeypatch.chdir(place / start)
        assert read_examples(recipe(place / "one", dataset="hub")).labels == ("here", "there")
        assert read_examples(recipe(place / "two", dataset="hub")).labels == ("now", "then")
    (place / "three").mkdir()
    with pytest.raises(TitheError, match="in the working directory, and not beside the recipe"):
        read_examples(recipe(place / "three", dataset="hub"))
    monkeypatch.chdir(place)
    with pytest.raises(TitheError) as error:  # it was read before, and is in the cache by this name
        read_examples(recipe(place / "three", dataset="hub"))
    assert error.value.found == "no network, and no folder 'hub' beside the recipe"
    assert read_examples(recipe(place / "three", dataset="../one/hub")).labels == ("here", "there")
    assert read_examples(recipe(place, dataset="hub", folder="two")).labels == ("now", "then")


def test_a_model_lies_beside_the_recipe_too(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    (tmp_path / "other").mkdir()
    find_model(recipe(workplace, {"pretrained": "tiny"}))
    with pytest.raises(TitheError, match="in the working directory, and not beside the recipe") as error:
        find_model(recipe(tmp_path / "other", {"pretrained": "tiny"}))
    told = error.value.remedy.partition("'")[2].rstrip("'")
    find_model(recipe(tmp_path / "other", {"pretrained": told}))


def test_a_cache_that_cannot_be_written_is_done_without(
    place: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/proc/nowhere/cache"))
    rows(place / "hub", "a", "b")
    assert read_examples(recipe(place, dataset="hub")).labels == ("a", "b")


DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "a line": ("train.jsonl", b'{"text": "x", "label": 1}\n{"text": \n', "train.jsonl line 2"),
    "parquet": ("train.parquet", b"PAR1nothingPAR1", "train.parquet"),
    "nothing": ("train.jsonl", b"", "train.jsonl"),
    "bytes": ("train.csv", b"text,label\n\xff\xfe\xfa,1\n", "train.csv"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_of_a_data_set_is_named(name: str, place: Path, cache: Path) -> None:
    file, content, where = DAMAGED[name]
    (place / "hub").mkdir()
    (place / "hub" / file).write_bytes(content)
    with pytest.raises(TitheError) as error:
        read_examples(recipe(place, dataset="hub"))
    assert error.value.place == f"{place / 'hub'}/{where}"
    (place / "hub" / file).unlink()
    (place / "hub" / "train.csv").write_text("text,label\nx,1\ny,0\nz,1\n")
    assert read_examples(recipe(place, dataset="hub")).labels == ("0", "1")


def test_cells_of_a_data_set_are_read_by_the_same_rules(place: Path, cache: Path) -> None:
    (place / "hub").mkdir()
    (place / "hub" / "train.csv").write_text("text,label\nx,1\ny,\nz,0\n,1\nw,0\n")
    with pytest.raises(TitheError, match=r"hub \(train\) row 2 column 'label': found .* \(and 1 more"):
        read_examples(recipe(place, dataset="hub"))
    assert read_examples(recipe(place, dataset="hub", skip_bad=True)).labels == ("0", "1")


def _pictures(folder: Path, split: str, labels: list[int], names: list[str], *, cut: int | None = None) -> None:
    import datasets

    (folder / "hub").mkdir(exist_ok=True)
    pictures: list[dict[str, Any]] = []
    for number in range(len(labels)):
        file = folder / "picture.png"
        Image.fromarray(np.full((6, 6), 20_000 * (number % 3), np.uint16)).save(file)
        content = file.read_bytes()
        pictures.append({"bytes": content[:50] if number == cut else content, "path": f"{number}.png"})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    made: Any = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    made.to_parquet(folder / "hub" / f"{split}.parquet")


def _images(folder: Path, **data: Any) -> Examples:
    return read_examples(recipe(folder, task="image-classification", dataset="hub", image_size=6, **data))


def test_pictures_of_a_data_set_are_read_as_those_of_files(place: Path, cache: Path) -> None:
    _pictures(place, "train", [0, 1, 0, 1, 0], ["zebra", "ant"])
    _pictures(place, "test", [-1, -1], ["zebra", "ant"])
    examples = _images(place, test="test")
    assert examples.labels == ("zebra", "ant")
    assert examples.notes == ("test: no labels, so no score",)
    pixels = {int(examples.splits["train"].decode(row, None).max()) for row in range(3)}  # pyright: ignore
    assert pixels <= {0, 78, 156}
    _pictures(place, "train", [0, 1, 0, 1, 0], ["zebra", "ant"], cut=2)
    with pytest.raises(TitheError, match=r"hub \(train\) image 2: found "):
        _images(place)
    assert "left out 1" in _images(place, skip_bad=True).notes[0]


# ---------------------------------------------------------------------------------------------------- no network


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no host be found, as on a machine without a network, and nobody say that there is none."""
    from huggingface_hub import constants

    def lost(*args: object, **settings: object) -> Any:
        raise socket.gaierror("no address")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lost)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub_module.is_reachable.cache_clear()


def test_a_name_without_a_network_is_told_at_once(
    no_network: None, place: Path, cache: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tithe.app.train.models import load

    def wait(seconds: float) -> None:
        raise AssertionError("waited to try again")

    monkeypatch.setattr(time, "sleep", wait)
    try:
        with pytest.raises(TitheError, match="no network, and no folder 'spam/eggs' beside the recipe"):
            read_examples(recipe(place, dataset="spam/eggs"))
        with pytest.raises(TitheError) as error:
            load(recipe(place, {"pretrained": "spam/eggs"}), 2)
        assert error.value.found.startswith("no network, and 'spam/eggs' is no folder beside the recipe")
        assert "connect" in error.value.remedy
    finally:
        hub_module.is_reachable.cache_clear()


def test_a_server_that_takes_connections_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        hub_module.is_reachable.cache_clear()
        try:
            assert hub_module.is_reachable()
            with hub_module.no_retries() as online:
                assert online
                assert not constants.HF_HUB_OFFLINE
        finally:
            hub_module.is_reachable.cache_clear()


@pytest.mark.slow
def test_a_run_needs_no_home(edit: Edit, workplace: Path) -> None:
    path = edit(("epochs = 2", "steps = 1"))
    environment = {**os.environ, "HOME": "/proc/nowhere"}
    for name in ("HF_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    ran = subprocess.run(
        [sys.executable, "-m", "tithe", "train", str(path)], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert (workplace / "out" / "result.json").is_file()
