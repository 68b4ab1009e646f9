"""What every test of an integration starts from."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _few_objects() -> Iterator[None]:
    """A Trainer collects garbage when it begins, which takes a second among all that these libraries have imported."""
    gc.freeze()
    yield
    gc.unfreeze()
