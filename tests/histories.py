"""Histories of real models, and what training in their span must give, written the slow and obvious way."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from models import Batch, Case
from tithe import History


def perturbed(model: nn.Module, seed: int, scale: float = 0.1) -> nn.Module:
    """A copy with every weight moved at random, as a step of training might; statistics moved as well."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            if weight.is_floating_point():
                weight.add_(scale * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
        for name, buffer in other.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(1 + scale)
            elif name.endswith("num_batches_tracked"):
                buffer.add_(seed)
    return other


def checkpoints(model: nn.Module, count: int) -> list[nn.Module]:
    """So many perturbed copies."""
    return [perturbed(model, seed) for seed in range(1, count + 1)]


def walk(model: nn.Module, count: int, scale: float = 0.01) -> list[nn.Module]:
    """A run: each checkpoint is a small step from the one before."""
    models = [model]
    for seed in range(count - 1):
        models.append(perturbed(models[-1], seed, scale))
    return models


def recorded(folder: Path, models: list[nn.Module], bits: int | None = None) -> History:
    """A history of some models."""
    history = History(folder, bits)
    for step, model in enumerate(models):
        assert history.record(model, step)
    return history


def weights(model: nn.Module) -> list[Tensor]:
    """The floating-point parameters, a plan's θ apart."""
    named = model.named_parameters()
    return [p for name, p in named if p.is_floating_point() and not name.endswith("@theta")]


def flat(model: nn.Module) -> Tensor:
    """All weights as one float64 vector."""
    return torch.cat([p.detach().double().reshape(-1) for p in weights(model)])


def load(model: nn.Module, vector: Tensor) -> None:
    """The inverse of `flat`."""
    at = 0
    with torch.no_grad():
        for p in weights(model):
            p.copy_(vector[at : at + p.numel()].view(p.shape))
            at += p.numel()


def gram_schmidt(vectors: Tensor, tolerance: float = 1e-6) -> Tensor:
    """An orthonormal basis of the rows, (r, d) float64, twice orthogonalised; what is nearly spanned is left out."""
    basis: list[Tensor] = []
    for row in vectors.double():
        rest = row.clone()
        for _ in range(2):
            for q in basis:
                rest -= (rest @ q) * q
        if rest.norm() > tolerance * row.norm().clamp_min(1e-300):
            basis.append(rest / rest.norm())
    return torch.stack(basis) if basis else vectors.new_zeros(0, vectors.shape[1], dtype=torch.float64)


def gradient(model: nn.Module, case: Case, batch: Batch) -> Tensor:
    """The ordinary gradient of all weights, one float64 vector."""
    model = copy.deepcopy(model)
    model.zero_grad()
    case.loss(model, batch).backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).double().reshape(-1) for p in weights(model)])
