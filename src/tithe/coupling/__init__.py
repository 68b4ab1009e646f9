"""Find which positions of a model's tensors exist or are absent together.

coupling    units, where they are, what they cost          trace     one forward pass, watched
labels      what is known of a tensor's entries            assemble  from what was seen to units
operations  the table: products, extents (along an axis), moves (entries go elsewhere)
"""

from tithe.coupling.coupling import Coupling, Group, Term
from tithe.coupling.trace import couple

__all__ = ["Coupling", "Group", "Term", "couple"]
