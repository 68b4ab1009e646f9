"""The network of the demonstration: a small vision transformer with a convolutional stem, in plain PyTorch."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tithe.app.demo.digits import NUM_CLASSES

WIDTH, DEPTH, HEADS, TOKENS = 96, 2, 4, 16


@final
class Block(nn.Module):
    """One pre-norm transformer block: attention and a two-layer perceptron, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_NTC: Tensor) -> Tensor:
        """Tokens of shape (images, tokens, channels) to tokens of the same shape."""
        n, t, _ = x_NTC.shape
        qkv = self.qkv(self.norm1(x_NTC)).view(n, t, 3, -1, WIDTH // HEADS)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        x_NTC = x_NTC + self.proj(mixed)
        return x_NTC + self.down(F.gelu(self.up(self.norm2(x_NTC))))


@final
class Digits(nn.Module):
    """Two convolutions make 16 tokens of an 8 x 8 image, two blocks mix them, a linear head reads their mean.

    Nothing in it knows that a method may be attached: it is what a user would bring.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, WIDTH // 4, 3, padding=1), nn.GELU(), nn.Conv2d(WIDTH // 4, WIDTH, 3, stride=2, padding=1)
        )
        self.position = nn.Parameter(0.02 * torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images of shape (N, 1, 8, 8) to logits of shape (N, 5)."""
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def classification_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of `model` over a batch of images and labels, a scalar."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)
