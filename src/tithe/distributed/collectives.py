"""Sums, means and parts of tensors over ranks. Callers meet first (`tithe.distributed.meet`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tithe.distributed.meeting import exchange, world_size
from tithe.errors import TitheError

_BUCKET = 25 << 20
"""Bytes of tensors that travel together, as in DistributedDataParallel."""


def first(tensor: Tensor) -> Tensor:
    """Return rank 0's values on every rank: rounding may make results differ from processor to processor."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def first_all_(tensors: Iterable[Tensor]) -> None:
    """Write rank 0's values into tensors of any dtype, in place."""
    with torch.no_grad():
        for tensor in tensors:
            data = tensor.detach().contiguous()
            if data.device.type == "cpu" and dist.get_backend() == "nccl":  # which knows no other place than the GPU
                data = data.cuda()
            dist.broadcast(data.reshape(-1).view(torch.uint8), 0)  # as bytes: no backend knows every dtype
            if data.data_ptr() != tensor.data_ptr():
                tensor.copy_(data)


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


def mean_all_(tensors: Sequence[Tensor]) -> None:
    """Average tensors of the same shapes on every rank, in place, many of them in one message."""
    if world_size() == 1:
        return
    waiting: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        group = waiting.setdefault((tensor.dtype, tensor.device), [])
        group.append(tensor)
        if sum(other.nbytes for other in group) >= _BUCKET:
            _mean_bucket(waiting.pop((tensor.dtype, tensor.device)))
    for group in waiting.values():
        _mean_bucket(group)


def _mean_bucket(tensors: Sequence[Tensor]) -> None:
    if len(tensors) == 1 and tensors[0].is_contiguous():
        mean_(tensors[0])
        return
    flat = mean_(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


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
    """Compare a small tensor over ranks, and raise where they differ.

    Raises:
        TitheError: on every rank when any differs.
    """
    if len(set(exchange(what, str(digest.tolist())))) > 1:
        raise error or TitheError(
            what,
            found="ranks that differ",
            expected="the same on every rank",
            remedy="load the same weights and give the same method and seed on every rank",
        )
