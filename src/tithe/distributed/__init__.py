"""Everything that ranks agree on. This room is the only importer of torch.distributed; on one process nothing happens.

    meeting      ranks meet by name before they exchange tensors: who is missing, who failed, what differs
    collectives  sums, means and parts of tensors over ranks
    wrappers     what shards or wraps a model, by its name

DistributedDataParallel sees θ as it sees any parameter: that of its layer, or, in a plan that chooses again, one flat
parameter of the model (`tithe.rules.theta.FlatTheta`), whose size stays the same. A plan that averages gradients itself
(`plan.averages_gradients`) is not to be wrapped.
"""

from __future__ import annotations

from tithe.distributed.collectives import (
    check_same,
    first,
    first_all_,
    fixed_sizes_error,
    gather,
    mean_,
    mean_all_,
    mean_number,
    scatter_mean,
    sum_,
    sum_number,
)
from tithe.distributed.meeting import (
    compare,
    exchange,
    launched_size,
    meet,
    rank,
    telling,
    together,
    world_size,
)
from tithe.distributed.wrappers import (
    active_wrapper,
    check_whole,
    is_joining,
    is_replica,
    kind_of_module,
    kind_of_tensor,
    reduces,
    refuse_wrapper,
    wrappers_of,
)

__all__ = [
    "active_wrapper",
    "check_same",
    "check_whole",
    "compare",
    "exchange",
    "first",
    "first_all_",
    "fixed_sizes_error",
    "gather",
    "is_joining",
    "is_replica",
    "kind_of_module",
    "kind_of_tensor",
    "launched_size",
    "mean_",
    "mean_all_",
    "mean_number",
    "meet",
    "rank",
    "reduces",
    "refuse_wrapper",
    "scatter_mean",
    "sum_",
    "sum_number",
    "telling",
    "together",
    "world_size",
    "wrappers_of",
]
