"""The device under test: a GPU where there is one, else the pretend accelerator of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from device import pretend


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        return torch.device("cuda", 0)
    try:
        return pretend.load(request.config.cache.mkdir("pretend-device"))
    except pretend.NoCompilerError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _one_device(device: torch.device) -> Iterator[None]:
    """No operator meets two devices, even where the code under test catches the error; attention is one formula."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
    if device.type != "cuda":
        assert pretend.take_refusals() == []
