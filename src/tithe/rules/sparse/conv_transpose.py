"""The rule for `F.conv_transpose1d`, `conv_transpose2d`, `conv_transpose3d`, grouped ones included.

    y = wᵀ ∗ x + b        ∇w[i, o] = x[:, i] ⋆ gy[:, o]

It is the convolution's own rule with the weight's two first axes in each other's place: axis 0 meets x, so that a
touched input channel is a row of the weight.

Shapes: x (N, I, ...), gy (N, O, ...), w (I, O / G, ...), G groups.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from tithe.rules.dispatch import Call, register
from tithe.rules.sparse.conv import conv_call
from tithe.rules.sparse.conv_kernels import Convolution


@register(
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    keeps="x[:, touched channels], of several groups all in the touched; nothing for biases alone or a frozen weight",
    channels="x[:, channels]",
    stock="x, also for a frozen weight",
    family="transposed convolution",
    probes=True,
    frozen=True,
)
def conv_transpose(*args: Any, **kwargs: Any) -> Call:
    """The transposed convolution y = wᵀ ∗ x + b; ∇w[i, o] = x[:, i] ⋆ gy[:, o] at the touched channels alone."""
    return conv_call(Convolution.transpose(*args, **kwargs))
