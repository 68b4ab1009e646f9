"""Deltas hold the difference between a fine-tuned model and its base, in one safetensors file with data alone.

write   a plan, or a pair of checkpoints, to a delta      apply   a delta to a model, all of it or none
merge   deltas into a plain checkpoint on disk            info    what is in a delta, without reading its values
network  a narrow network, whole, with its widths
format  the versioned header                              fingerprint  the digest of what a delta leaves alone
size    how large a file will be, from names and shapes
"""

from tithe.delta.apply import apply
from tithe.delta.fingerprint import state_tensors
from tithe.delta.info import DeltaInfo, TensorInfo, inspect
from tithe.delta.merge import merge
from tithe.delta.network import write_network
from tithe.delta.write import diff, write_delta

__all__ = [
    "DeltaInfo",
    "TensorInfo",
    "apply",
    "diff",
    "inspect",
    "merge",
    "state_tensors",
    "write_delta",
    "write_network",
]
