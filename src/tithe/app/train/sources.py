"""What a recipe's names lead to: a folder, a package's data, or the hub; and loading from there, without a report."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Generator
from pathlib import Path

from tithe.app.train.hub import NO_NETWORK, find_folder, is_reachable, no_retries
from tithe.app.train.paths import expand
from tithe.app.train.recipe import Recipe
from tithe.errors import TitheError


def resolve(recipe: Recipe, name: str, key: str) -> str:
    """Turn a recipe's model name into a folder, or leave it as an id of the Hugging Face hub.

    `package:NAME/FOLDER` is a folder inside an installed Python package, found without importing it; a path is relative
    to the recipe.

    Raises:
        TitheError: the package or folder is missing.
    """
    place = recipe.place("model", key)
    if name.startswith("package:"):
        package, _, inner = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        roots = list(spec.submodule_search_locations or ()) if spec is not None else []
        if not roots:
            raise TitheError(
                place, found=f"no package {package!r}", expected="an installed package", remedy=f"pip install {package}"
            )
        folder = Path(roots[0]) / inner
        if not folder.is_dir():
            raise TitheError(
                place,
                found=f"no folder {folder}",
                expected=f"a folder inside the package {package}",
                remedy="correct the path",
            )
        return str(folder)
    folder = find_folder(recipe, name, recipe.folder, "model", key)
    return name if folder is None else str(folder)


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Keep transformers' loading report away: what is fresh here is fresh on purpose."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def loading(recipe: Recipe, key: str, expected: str) -> Generator[None]:
    """Inside, a model or tokenizer is loaded by name: at once where there is no network, and without a report."""
    try:
        with quiet(), no_retries():
            yield
    # Their readers raise what damaged files make them stumble over: SafetensorError, UnpicklingError, ImportError …
    except Exception as error:
        online = is_reachable()
        told = str(getattr(recipe.model, key))
        is_id = not told.startswith("package:") and not (recipe.folder / expand(told)).is_dir()
        found = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not online and is_id:
            found = f"{NO_NETWORK} {told!r} is no folder beside the recipe and was not downloaded before"
        raise TitheError(
            recipe.place("model", key),
            found=found,
            expected=expected,
            remedy="correct the name" + (", or connect to the network" if not online and is_id else ""),
        ) from error
