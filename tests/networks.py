"""The hand-written networks of the zoo: each uses its weights in a way that some rule or score could get wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TiedMLP(nn.Module):
    """Two layers share one matrix, a third is called twice, the first has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(10, 12, bias=False)
        self.one, self.two, self.twice = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.two.weight = self.one.weight
        self.norm = nn.LayerNorm(12)
        self.classifier = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inp(x))
        h = self.two(torch.tanh(self.one(h)))
        h = self.norm(self.twice(F.gelu(self.twice(h))))
        return self.classifier(h)


class Depthwise(nn.Module):
    """An inverted residual as in MobileNetV2: expand, depthwise, project, with BatchNorm; channels-last inside."""

    def __init__(self) -> None:
        super().__init__()

        def unit(i: int, o: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
            conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(o))

        self.stem = unit(3, 8, 3, stride=2)
        self.expand, self.depth, self.project = unit(8, 24, 1), unit(24, 24, 3, groups=24), unit(24, 8, 1)
        self.grouped = unit(8, 12, 3, stride=2, groups=4)
        self.classifier = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.stem(x.to(memory_format=torch.channels_last)))
        h = h + self.project(F.relu6(self.depth(F.relu6(self.expand(h)))))
        return self.classifier(F.relu6(self.grouped(h), inplace=True).mean((2, 3)))


class Signal(nn.Module):
    """Conv1d, dilated and grouped, with GroupNorm, and a transposed convolution that no rule may know."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(2, 8, 3, padding=2, dilation=2)
        self.two = nn.Conv1d(8, 8, 3, padding="same", groups=2, padding_mode="circular")
        self.norm = nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose1d(8, 4, 2, stride=2)
        self.classifier = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.up(F.silu(self.norm(self.two(F.relu(self.one(x)))))).mean(2))


class Volume(nn.Module):
    """Conv3d with stride, InstanceNorm and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv3d(1, 4, 3, stride=(1, 2, 1), padding=1), nn.InstanceNorm3d(4, affine=True)
        self.two = nn.Conv3d(4, 6, (1, 2, 3), bias=False)
        self.classifier = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool3d(F.relu(self.norm(self.one(x))), 2)
        return self.classifier(self.two(F.pad(h, (1, 1, 0, 1))).mean((2, 3, 4)))


class Recurrent(nn.Module):
    """Embedding with a padding row and an LSTM that runs with time first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.lstm = nn.LSTM(8, 6, bidirectional=True)
        self.classifier = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.lstm(self.embedding(x).transpose(0, 1))
        return self.classifier(h.mean(0))


class TimeMajor(nn.Module):
    """Linear, norm and attention over `[time, sample, width]`: the sample axis is not the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x.transpose(0, 1))
        h = self.norm(h + self.attention(h, h, h)[0])
        return self.classifier((h + torch.tanh(self.linear(h))).mean(0))


class Encoder(nn.Module):
    """A class token used directly as a parameter in front of nn.TransformerEncoder."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, 8))
        self.project = nn.Linear(5, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.cls.expand(len(x), -1, -1), self.project(x)], dim=1)
        return self.classifier(self.encoder(h)[:, 0])


class Experts(nn.Module):
    """Each token goes to one of two experts: how many rows an expert sees of a sample depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.classifier = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            routed = (x[..., 0] > 0) == bool(number)
            h[routed] = torch.tanh(expert(x[routed])).to(h)
        return self.classifier(h.mean(1))


class Functional(nn.Module):
    """Weights used outside of the module that owns them: tied readout, product, einsum, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.linear = nn.Linear(8, 8)
        self.mix = nn.Parameter(torch.randn(8, 8) / 3)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        h = torch.tanh(self.linear(h)) @ self.linear.weight
        h = torch.einsum("ntd,de->nte", h * self.scale, self.mix)
        return F.linear(h.mean(1), self.embedding.weight)
