"""Deltas: what a fine-tuned model differs by from its base, in one safetensors file that holds data and nothing else.

write   a plan, or a pair of checkpoints, to a delta      apply   a delta to a model, all of it or none
merge   deltas into a plain checkpoint on disk            info    what is in a delta, without reading its values
network  a narrow network, whole, with its widths
format  the versioned header                              fingerprint  the digest of what a delta leaves alone
"""

from tithe.checkpoint.apply import apply
from tithe.checkpoint.fingerprint import state_tensors
from tithe.checkpoint.info import DeltaInfo, TensorInfo, inspect
from tithe.checkpoint.merge import merge
from tithe.checkpoint.network import write_network
from tithe.checkpoint.write import diff, write_delta

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
