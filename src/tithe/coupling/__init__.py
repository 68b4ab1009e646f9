"""Find which positions of a model's tensors exist or are absent together.

groups      units, where they are, what they cost          couple    one forward pass, watched
labels      what is known of a tensor's entries            assemble  from what was seen to units
operations  the table: products, extents (along an axis), moves (entries go elsewhere)
"""

from tithe.coupling.couple import Unfollowed, couple
from tithe.coupling.groups import Coupling, Group, Term

__all__ = ["Coupling", "Group", "Term", "Unfollowed", "couple"]
