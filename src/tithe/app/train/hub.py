"""Models and data sets by name: a folder beside the recipe first, then the Hugging Face hub, if there is a network."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

from tithe.app.train.cells import canonical
from tithe.app.train.paths import expand, unwritable
from tithe.app.train.recipe import Recipe
from tithe.errors import TitheError

NO_NETWORK = "no network, and"
"""How a message begins that nothing of a name was found without one."""


@functools.cache
def is_reachable(seconds: float = 3.0) -> bool:
    """Whether the hub, or the proxy before it, takes a connection; asked once a process.

    Hugging Face's libraries ask for half a minute before they give up.

    Args:
        seconds: that it is waited for.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    asked = urlparse(constants.ENDPOINT)
    proxy = urllib.request.getproxies().get(asked.scheme or "https")
    if proxy and not urllib.request.proxy_bypass(asked.hostname or ""):
        asked = urlparse(proxy if "//" in proxy else f"//{proxy}")
    port = asked.port or (80 if asked.scheme == "http" else 443)
    taken = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection((asked.hostname or "", port), timeout=seconds):
            taken.set()

    # Looking a name up has no timeout of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return taken.is_set()


@contextlib.contextmanager
def no_retries() -> Generator[bool]:
    """Inside, only what was downloaded is looked for where there is no network; the value says whether there is one."""
    from huggingface_hub import constants

    if is_reachable():
        yield True
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield False
    finally:
        constants.HF_HUB_OFFLINE = before


def find_folder(recipe: Recipe, name: str, base: Path, *place: str) -> Path | None:
    """The folder that a name means, or None where it is an id of the hub.

    Args:
        recipe: the run.
        name: a path or an id.
        base: what a path is relative to.
        place: the key that holds the name.

    Raises:
        TitheError: it is a path to no folder, or the working directory holds a folder of that name: Hugging Face's
                libraries would take it, whichever recipe is run.
    """
    folder = base / expand(name)
    if folder.is_dir():
        return folder
    is_id = not name.startswith((".", "/", "~", "$")) and name.count("/") <= 1
    if not is_id:
        raise TitheError(
            recipe.place(*place),
            found=f"no folder {folder}",
            expected="a folder relative to the recipe",
            remedy="correct the path",
        )
    if os.path.exists(name):
        raise TitheError(
            recipe.place(*place),
            found=f"{name!r} in the working directory, and not beside the recipe ({base})",
            expected="a folder relative to the recipe, or an id of the hub",
            remedy=f"write the path to it: {str(Path(name).resolve())!r}",
        )
    return None


def load_split(recipe: Recipe, split: str, name: str, *, streaming: bool = False) -> Any:
    """Load one split of a data set by its id, or from a local folder, as `datasets.Dataset` or `IterableDataset`.

    Raises:
        TitheError: there is none of this name, it lacks the split, or a file of it is damaged.
    """
    import datasets
    from datasets import config

    told = cast(str, recipe.data.dataset)
    folder = find_folder(recipe, told, recipe.data_folder, "data", "dataset")
    if folder is not None and not any(file.is_file() for file in folder.iterdir() if not file.name.startswith(".")):
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if not inside:
            raise TitheError(
                recipe.place("data", "dataset"),
                found=f"an empty folder {folder}",
                expected="the files of a data set",
                remedy="check the path",
            )
    with no_retries() as online, contextlib.ExitStack() as stack:
        if folder is None and not online and not _is_downloaded(told):
            raise _not_found(recipe, f"{NO_NETWORK} no folder {told!r} beside the recipe")
        if not online:
            stack.callback(setattr, config, "HF_HUB_OFFLINE", config.HF_HUB_OFFLINE)
            config.HF_HUB_OFFLINE = True
        stack.enter_context(_without_bars())
        cache: str | None = None
        if (reason := unwritable(Path(config.HF_DATASETS_CACHE))) is not None:
            if folder is None:
                raise TitheError(
                    recipe.place("data", "dataset"),
                    found=f"{reason}, where the hub's data sets are kept",
                    expected="a folder that can be written to",
                    remedy="set HF_HOME in the environment to such a folder",
                )
            cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="tithe-data-"))
        try:
            return cast(Any, datasets).load_dataset(
                told if folder is None else str(folder.resolve()),
                recipe.data.config,
                split=name,
                cache_dir=cache,
                # Of a stream nothing is kept anywhere.
                **({"streaming": True} if streaming else {"keep_in_memory": cache is not None}),
            )
        # Whatever its readers stumble over: pandas, pyarrow, zipfile and PIL have errors of their own.
        except Exception as error:
            damaged = None if folder is None else _damaged(folder)
            if damaged is not None:
                raise TitheError(
                    damaged[0], found=damaged[1], expected="a whole file", remedy="write the file again, or remove it"
                ) from error
            if isinstance(error, ConnectionError):
                raise _not_found(recipe, f"{NO_NETWORK} not all of {told!r} was downloaded before") from error
            raise TitheError(
                recipe.place("data", "dataset") if split == "train" else recipe.place("data", split),
                found=_root(error),
                expected="a data set of the hub, or a folder beside the recipe, with this split",
                remedy="check the name, the config and the split",
            ) from error


@contextlib.contextmanager
def streaming(recipe: Recipe, where: str) -> Generator[None]:
    """Inside, rows of a stream are read: what its readers stumble over is told as what is wrong with the data.

    Args:
        recipe: names the data set.
        where: which rows are read.
    """
    try:
        yield
    except TitheError:
        raise
    # As in `load_split`.
    except Exception as error:
        folder = find_folder(recipe, recipe.data.dataset or "", recipe.data_folder, "data", "dataset")
        damaged = None if folder is None else _damaged(folder)
        place, found = damaged or (f"{recipe.place('data', 'dataset')}: {where}", _root(error))
        raise TitheError(
            place,
            found=found,
            expected="rows that can be read",
            remedy="write the file again, or remove it" if damaged else "check the data set, and the network",
        ) from error


def class_names(feature: object) -> tuple[str, ...]:
    """The names of a `ClassLabel`, or of a list of them, in their order; empty for columns of another kind."""
    feature = getattr(feature, "feature", feature)
    return tuple(canonical(name) for name in cast("Sequence[str] | None", getattr(feature, "names", None)) or ())


def _not_found(recipe: Recipe, found: str) -> TitheError:
    return TitheError(
        recipe.place("data", "dataset"),
        found=found,
        expected="a folder relative to the recipe, or an id of the hub (with network)",
        remedy="correct the path, or connect to the network",
    )


def _is_downloaded(name: str) -> bool:
    """Whether the hub's cache has a data set.

    The cache of `datasets` does not tell: it holds what was read from a local folder by the folder's name, too.
    """
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}").is_dir()


@contextlib.contextmanager
def _without_bars() -> Generator[None]:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _root(error: BaseException) -> str:
    """What went wrong at first, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _damaged(folder: Path) -> tuple[str, str] | None:
    """The first file of a data set folder that cannot be read, with the reason."""
    from pyarrow import parquet

    for file in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        place = str(file)
        try:
            if file.stat().st_size == 0:
                return place, "an empty file"
            if file.suffix == ".parquet":
                cast(Any, parquet).ParquetFile(file).read()
            elif file.suffix in {".json", ".jsonl"}:
                text = file.read_text(encoding="utf-8-sig")
                if text.lstrip().startswith("["):
                    json.loads(text)
                    continue
                for number, line in enumerate(text.split("\n"), start=1):
                    place = f"{file} line {number}"
                    if line.strip():
                        json.loads(line)
            elif file.suffix in {".csv", ".tsv", ".txt"}:
                file.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            return place, str(error).splitlines()[0]
    return None
