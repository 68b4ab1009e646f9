"""What ranks have to agree on. The only importer of torch.distributed; on one process nothing happens."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tithe.errors import TitheError


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_number(number: int, device: torch.device) -> int:
    """Sum of a count over ranks."""
    return int(sum_(torch.tensor(number, dtype=torch.int64, device=device)))


def check_same(
    what: str,
    digest: Tensor,
    *,
    remedy: str = "load the same weights and give the same method and seed on every rank",
) -> None:
    """Compare a small int64 tensor over ranks.

    Raises:
        TitheError: on every rank when any differs.
    """
    if world_size() == 1:
        return
    low, high = digest.clone(), digest.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise TitheError(
            what,
            found="ranks that differ",
            expected="the same on every rank",
            remedy=remedy,
        )
