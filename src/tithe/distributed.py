"""Make ranks agree. This is the only importer of torch.distributed; on one process nothing happens.

DistributedDataParallel sees θ as it sees any parameter: that of its layer, or, in a plan that chooses again, one flat
parameter of the model (`tithe.rules.theta.FlatTheta`), whose size stays the same. A plan that averages gradients itself
(`plan.averages_gradients`) is not to be wrapped.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tithe.errors import TitheError


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's place among the ranks; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def first(tensor: Tensor) -> Tensor:
    """Return rank 0's values on every rank: rounding may make results differ from processor to processor."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def scatter_mean(flat: Tensor) -> Tensor:
    """Return this rank's equal part of the mean over ranks of a 1-D tensor; their number divides its length."""
    out = flat.new_empty(flat.numel() // world_size())
    dist.reduce_scatter(out, list(flat.chunk(world_size())))  # the form that has one name in every release of torch
    return out.div_(world_size())


def gather(part: Tensor) -> Tensor:
    """Return every rank's part of a 1-D tensor, one after the other."""
    out = part.new_empty(part.numel() * world_size())
    dist.all_gather(list(out.chunk(world_size())), part)
    return out


def _device() -> torch.device:
    """Where the process group can reduce: NCCL only reduces on the GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def sum_(tensor: Tensor) -> Tensor:
    """Sum `tensor` over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_number(number: int, device: torch.device) -> int:
    """Return the sum of a count over ranks."""
    return int(sum_(torch.tensor(number, dtype=torch.int64, device=device)))


def mean_(tensor: Tensor) -> Tensor:
    """Average `tensor` over ranks, in place."""
    return sum_(tensor).div_(world_size()) if world_size() > 1 else tensor


def mean_number(number: float, device: torch.device) -> float:
    """Return the mean of a number over ranks."""
    return float(mean_(torch.tensor(number, dtype=torch.float64, device=device))) if world_size() > 1 else number


def fixed_sizes_error() -> TitheError:
    """Make the error for a θ that changed its size under a wrapper that had fixed its buckets."""
    return TitheError(
        "theta",
        found="sizes other than those that DistributedDataParallel fixed when it wrapped",
        expected="the same sizes, or one flat θ",
        remedy="give the method a reselect= schedule, which keeps one flat θ, or wrap the model again after reselect()",
    )


def check_same(
    what: str,
    digest: Tensor,
    error: TitheError | None = None,
) -> None:
    """Compare a small int64 tensor over ranks, and raise where they differ.

    Raises:
        TitheError: on every rank when any differs.
    """
    if world_size() == 1:
        return
    digest = digest.to(_device())
    low, high = digest.clone(), digest.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise error or TitheError(
            what,
            found="ranks that differ",
            expected="the same on every rank",
            remedy="load the same weights and give the same method and seed on every rank",
        )
