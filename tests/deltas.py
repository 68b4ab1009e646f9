"""Small networks, and what training one leaves behind, for the tests of deltas."""

import hashlib

import torch
from torch import Tensor, nn

from tithe.selection import Coordinates


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.body = nn.Linear(3, 3)
        self.out = nn.Linear(3, 7, bias=False)
        if tied:
            self.out.weight = self.embed.weight


def bits(model: nn.Module) -> str:
    hashed = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        hashed.update(name.encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def pick(tensor: Tensor, density: float, seed: int = 0) -> Coordinates:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tensor.numel(), generator=generator) < density
    return Coordinates(tuple(tensor.shape), chosen.nonzero().reshape(-1))


def train(model: nn.Module, density: float, seed: int = 0) -> dict[str, Coordinates]:
    """Move a random selection of every parameter, as training would."""
    selections = {name: pick(p, density, seed) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        selections[name].scatter_(p.detach(), torch.full((selections[name].size,), 9.5).to(p.dtype))
    return selections


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
