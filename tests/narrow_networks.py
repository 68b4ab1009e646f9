"""Networks whose channels are joined in every way that a coupling has to see, small enough to enumerate by eye."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _unit(i: int, o: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(o))


def vgg() -> nn.Module:
    """BatchNorm, in-place ReLU, and a classifier of two layers on 2 × 2 positions of each channel."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.0), nn.Linear(6 * 2 * 2, 10), nn.ReLU(), nn.Linear(10, 3)),
    )


class Residual(nn.Module):
    """A stem, a basic block, a bottleneck with a projection, as in ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _unit(3, 8)
        self.one, self.two = _unit(8, 6), _unit(6, 8)
        self.down, self.mid, self.up = _unit(8, 4, 1), _unit(4, 4, 3, 2), _unit(4, 12, 1)
        self.project = _unit(8, 12, 1, 2)
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = F.relu(h + self.two(F.relu(self.one(h))))
        h = F.relu(self.up(F.relu(self.mid(F.relu(self.down(h))))) + self.project(h))
        return self.fc(F.adaptive_avg_pool2d(h, 1).flatten(1))


class PaddedShortcut(nn.Module):
    """CIFAR ResNet's parameter-free shortcut: every other position, and zeros for the channels that are missing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _unit(3, 4)
        self.one, self.two = _unit(4, 8, 3, 2), _unit(8, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        shortcut = F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0)
        h = F.relu(self.two(F.relu(self.one(h))) + shortcut)
        return self.fc(h.mean((2, 3)))


class Inverted(nn.Module):
    """MobileNetV2's inverted residual, padded by hand, with squeeze and excitation and a depth multiplier of two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _unit(3, 6)
        self.expand, self.depth, self.reduce = _unit(6, 12, 1), nn.Conv2d(12, 12, 3, groups=12), _unit(12, 6, 1)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.multiply = _unit(6, 12, 3, 2, groups=6)
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.stem(x))
        e = F.relu6(self.depth(F.pad(F.relu6(self.expand(h)), (1, 1, 1, 1))))
        e = e * torch.sigmoid(self.excite(F.relu(self.squeeze(e.mean((2, 3), keepdim=True)))))
        h = h + self.reduce(e)
        return self.fc(F.hardswish(self.multiply(h)).mean((2, 3)))


class Dense(nn.Module):
    """DenseNet: every layer's channels are appended to those before, and normalised together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * k) for k in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * k, 4, 3, padding=1, bias=False) for k in range(2))
        self.norm, self.fc = nn.BatchNorm2d(14), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.fc(F.relu(self.norm(torch.cat(features, 1))).mean((2, 3)))


class Grouped(nn.Module):
    """ResNeXt's grouped convolution, GroupNorm, InstanceNorm and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12)
        self.grouped = nn.Conv2d(12, 24, 3, groups=4)
        self.up, self.own = nn.ConvTranspose2d(24, 6, 2, stride=2), nn.InstanceNorm2d(6, affine=True)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(self.stem(x)))
        return self.fc(torch.tanh(self.own(self.up(self.grouped(h)))).amax((2, 3)))


class Shuffled(nn.Module):
    """ShuffleNet: channels of two halves take turns, so that none may be absent alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        n, c, *size = h.shape
        h = h.view(n, 2, c // 2, *size).transpose(1, 2).reshape(n, c, *size)
        return self.fc(F.relu(self.two(F.relu(h))).mean((2, 3)))


class Halved(nn.Module):
    """One half of the channels goes through a layer, the other passes by: a fixed place to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.one(x)).chunk(2, 1)
        return self.fc(torch.cat([left, F.relu(self.two(right))], 1).mean((2, 3)))


class Twice(nn.Module):
    """A layer that runs twice, so that what goes in and what comes out are the same channels; dropout of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.twice, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.one(x))
        h = F.dropout2d(F.relu(self.twice(F.relu(self.twice(h)))), 0.0, self.training)
        return self.fc(h.mean((2, 3)))


class Block(nn.Module):
    """A transformer block by hand: query, key and value from one product, a gated FFN whose halves are one product."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.patch, self.norm = nn.Linear(48, width), nn.LayerNorm(width)
        self.cls, self.position = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 20), nn.Linear(10, width)
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(len(x), 4, 48))
        h = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        q, k, v = self.qkv(self.norm(h)).view(len(x), 5, 3, -1, 4).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q / 2 @ k.transpose(-2, -1)).softmax(-1)
        h = h + self.out((scores @ v).transpose(1, 2).flatten(2))
        value, gate = self.up(self.norm(h)).chunk(2, -1)
        return self.fc((h + self.down(value * F.silu(gate)))[:, 0])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg": vgg,
    "residual": Residual,
    "padded_shortcut": PaddedShortcut,
    "inverted": Inverted,
    "dense": Dense,
    "grouped": Grouped,
    "shuffled": Shuffled,
    "halved": Halved,
    "twice": Twice,
    "block": Block,
}
"""Each takes images (n, 3, 8, 8) and returns (n, 3)."""


class Decides(nn.Module):
    """How often a layer runs depends on what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        if h.sum() > 0:
            h = torch.tanh(h)
        return self.two(h)
