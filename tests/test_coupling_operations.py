"""One operation at a time: what it lets be absent, what it keeps whole, and that the narrow network agrees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from slicing import draw, sliced, zeroed
from tithe.coupling import Coupling, couple


class Between(nn.Module):
    """A convolution of 8 channels, something done to them, and what reads the result."""

    def __init__(self, do: Callable[[Tensor], Tensor], after: nn.Module | None = None) -> None:
        super().__init__()
        self.one, self.do, self.after = nn.Conv2d(3, 8, 1), do, after or nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.do(self.one(x)))


def trace(model: nn.Module) -> tuple[nn.Module, Coupling, Tensor]:
    model, x = model.double().train(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    return model, couple(model, lambda: model(x).sum(), dict(model.named_parameters()), samples=2), x


def check(model: nn.Module, expected: dict[str, int]) -> None:
    model, coupling, x = trace(model)
    assert {group.name: group.num_units for group in coupling.groups} == expected
    for seed in range(3):
        mask = draw(coupling, seed)
        with torch.no_grad():
            torch.testing.assert_close(sliced(model, coupling, mask)(x), zeroed(model, coupling, mask)(x))


def _shift_some(h: Tensor) -> Tensor:
    return torch.cat([h[:, :4].roll(1, 0), h[:, 4:]], 1)


def _into_a_buffer(h: Tensor) -> Tensor:
    buffer = torch.zeros(len(h), 8, *h.shape[2:], dtype=h.dtype)
    buffer[:, :, 1:] = h[:, :, 1:]
    return buffer


def _into_one_like_it(h: Tensor) -> Tensor:
    buffer = torch.zeros_like(h)
    buffer[:, :, 1:] = h[:, :, :-1]
    return buffer


def _attend(h: Tensor) -> Tensor:
    rows = h.flatten(2)
    return ((rows @ rows.transpose(1, 2)).softmax(-1) @ rows).unflatten(2, (8, 8))


@pytest.mark.parametrize(
    "do",
    [
        nn.PReLU(8),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.ReflectionPad2d(1),
        nn.Dropout2d(0.0),
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        _into_one_like_it,
        lambda h: torch.stack([h, 2 * h]).mean(0),
        lambda h: torch.where(h.mean(3, keepdim=True) > 0, h, 0.5),
        lambda h: h * torch.rand_like(h).mul(0).add(1),
        lambda h: h.clone().relu_().mul_(2),
        lambda h: checkpoint(torch.tanh, h, use_reentrant=False),
        lambda h: h.flatten(2).logsumexp(2)[:, :, None, None],
        lambda h: h[torch.tensor([1, 0])],
        lambda h: torch.einsum("nchw,nchv->nchv", h, h.softmax(3)),
        lambda h: h + torch.arange(8.0).double(),  # along the width of the image
    ],
)
def test_channels_pass(do: Callable[[Tensor], Tensor]) -> None:
    check(Between(do), {"one": 8})


@pytest.mark.parametrize(
    ("do", "reason"),
    [
        (nn.LocalResponseNorm(3), "in a window in do"),
        (nn.Softmax2d(), "taken whole by _softmax in do"),
        (nn.GroupNorm(1, 8), "normalised in one group in do"),
        (_shift_some, "taken apart at a fixed place in Between"),
        (_into_a_buffer, "meets a tensor of fixed size in Between"),
        (_attend, "taken whole by _softmax in Between"),
        (lambda h: h[:, torch.arange(7, -1, -1)], "taken by index in Between"),
        (lambda h: h.flip(1), "taken whole by flip in Between"),
        (lambda h: F.normalize(h, dim=1), "taken whole by linalg_vector_norm in Between"),
        (lambda h: h.cumsum(1), "taken whole by cumsum in Between"),
        (lambda h: h + torch.arange(8.0).view(8, 1, 1).double(), "meets a tensor of fixed size in Between"),
        (lambda h: h.index_copy(0, torch.tensor([0]), h[1:]), "taken whole by index_copy in Between"),
    ],
)
def test_what_needs_all_channels_keeps_them(do: Callable[[Tensor], Tensor], reason: str) -> None:
    _, coupling, _ = trace(Between(do))
    assert coupling.groups == ()
    assert coupling.whole["one"] == reason


@pytest.mark.parametrize(
    ("do", "after", "units"),
    [
        (nn.PixelShuffle(2), nn.Conv2d(2, 2, 1), 2),
        (nn.PixelUnshuffle(2), nn.Conv2d(32, 2, 1), 8),
        (nn.GLU(1), nn.Conv2d(4, 2, 1), 4),
        (nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, groups=4), 4),
        (nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), 2),
        (lambda h: h.unflatten(1, (-1, 2)).amax(2), nn.Conv2d(4, 2, 1), 4),
        (lambda h: torch.stack([h, h.sin()], 2).flatten(1, 2), nn.Conv2d(16, 2, 1), 8),
        (lambda h: torch.cat([h, h.mean((2, 3), keepdim=True).expand_as(h)], 1), nn.Conv2d(16, 2, 1), 8),
        (lambda h: h.repeat(1, 2, 1, 1), nn.Conv2d(16, 2, 1), 8),
        (lambda h: h.flatten(1), nn.Linear(8 * 64, 2), 8),
    ],
)
def test_positions_that_live_and_die_together(do: Callable[[Tensor], Tensor], after: nn.Module, units: int) -> None:
    reader = after if after.weight.dim() == 2 else nn.Sequential(after, nn.Conv2d(after.out_channels, 2, 1))
    model, coupling, x = trace(Between(do, reader))
    assert coupling.groups[0].name == "one"
    assert coupling.groups[0].num_units == units
    mask = draw(coupling, 0)
    with torch.no_grad():
        torch.testing.assert_close(sliced(model, coupling, mask)(x), zeroed(model, coupling, mask)(x))


def test_what_nothing_reads_stays() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
            self.idle, self.table = nn.Linear(4, 5), nn.Parameter(torch.zeros(1, 8, 16, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x) + self.table[:, :, :8])  # a table longer than this input needs

    _, coupling, _ = trace(Idle())
    assert [(group.name, group.num_units) for group in coupling.groups] == [("one", 8)]
    assert coupling.places["table"] == {1: coupling.places["one.weight"][0]}
    assert "idle.weight" not in coupling.places


def test_a_normalised_weight_keeps_its_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), spectral_norm(nn.Conv2d(8, 4, 1)), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    _, coupling, _ = trace(model)
    assert [group.name for group in coupling.groups] == ["2"]


def test_under_autocast_a_cast_weight_is_the_weight() -> None:
    model, x = Between(torch.relu).train(), torch.randn(2, 3, 8, 8)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().sum()

    coupling = couple(model, run, dict(model.named_parameters()), samples=2)
    assert [group.members for group in coupling.groups] == [(("one.weight", 0), ("one.bias", 0), ("after.weight", 1))]
