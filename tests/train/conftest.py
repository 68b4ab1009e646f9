"""The fixtures of runs: a workplace each test may change, and a recipe it may edit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from workplace import RECIPE, fill, make_tiny, write_images


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny encoder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny(folder)
    return folder


@pytest.fixture
def workplace(tiny: Path, tmp_path: Path) -> Path:
    """A folder with model, data and recipe."""
    fill(tmp_path, tiny)
    return tmp_path


@pytest.fixture
def edit(workplace: Path) -> Callable[..., Path]:
    """Write the recipe with some of its text replaced; return its path."""

    def write(*changes: tuple[str, str]) -> Path:
        text = RECIPE
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = workplace / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of images."""
    path = tmp_path_factory.mktemp("images") / "corners.npz"
    write_images(path)
    return path
