"""Methods: recipes of published parts, each with its citation, its defaults and its deviations."""

from tithe.methods.fish import FISH
from tithe.methods.sparse_update import SparseUpdate
from tithe.methods.spiel import SpIEL
from tithe.methods.taylor_pruning import TaylorPruning
from tithe.methods.trady import TraDy
from tithe.methods.twa import TWA
from tithe.methods.vrpge import VRPGE

__all__ = ["FISH", "TWA", "VRPGE", "SpIEL", "SparseUpdate", "TaylorPruning", "TraDy"]
