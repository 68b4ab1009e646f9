"""The weight that an operation reads where `torch.func` is at work.

θ stays where it is, a parameter outside of the transform, and the weight reaches it by graft, as in an ordinary forward
pass. Where `torch.func.functional_call` puts another tensor in θ's place, the weight is made from that one:

    w = b + S θ        b = the weight outside of the selection

Shapes: K selected entries of a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from tithe.errors import TitheError
from tithe.rules.theta import Binding, FlatTheta, SharedTheta
from tithe.rules.transforms import Lifted, outside, unwrapped
from tithe.selection import Selection


def lifted(weight: Tensor, binding: Binding, receive: Callable[[Tensor], Tensor | None]) -> Tensor:
    """The weight with θ behind it, inside of a transform; θ is read outside, where a view of it may be kept."""
    with outside():
        theta = binding.asked
    return cast(Tensor, Lifted.apply(weight, theta, receive))


def swapped(binding: Binding) -> Tensor | None:
    """What `functional_call` put in the place of θ, this weight's part of it; None where θ is there itself."""
    if binding.home is None:
        return None
    module, key = binding.home
    own = binding.theta if binding.common is None else binding.common.parameter
    given = module._parameters.get(key)
    if given is None or given is own:
        return None
    common = binding.common
    if isinstance(common, SharedTheta):
        raise TitheError(
            key,
            found="another tensor in place of the coefficients that all weights share",
            expected="the plan's own parameter, or other weights",
            remedy=f"leave {key!r} out of what is handed to functional_call: weights count by their own names, and"
            " loss.backward() gives the coefficients their gradient",
        )
    if not isinstance(common, FlatTheta):
        return given
    start = 0
    for other in common.bindings:
        if other is binding:
            break
        start += other.selection.size
    return given[start : start + binding.selection.size].reshape(binding.selection.theta_shape)


def spread(weight: Tensor, theta: Tensor, binding: Binding) -> Tensor:
    """The weight b + S θ as a new tensor, by operations that every transform knows.

    Raises:
        TitheError: when both are of another model, whose selection nobody knows here.
    """
    if weight is not binding.weight:
        _check_together(weight, theta, binding)
    selection = binding.selection
    at_K = places(selection, weight.device).reshape(-1)
    return weight.reshape(-1).index_put((at_K,), theta.reshape(-1).to(weight.dtype)).view(selection.shape)


def places(selection: Selection, device: torch.device) -> Tensor:
    """The flat index of every entry of θ in the weight, int64 in the shape of θ: S is read off its transpose."""
    with outside():
        return selection.gather(torch.arange(selection.num_weights, device=device).view(selection.shape))


def _check_together(weight: Tensor, theta: Tensor, binding: Binding) -> None:
    """Check that another weight and another θ, both handed in, hold the same values where they meet."""
    if torch.compiler.is_compiling():
        return
    inner, stacked = unwrapped(weight)
    if inner is binding.weight:
        return
    values, many = unwrapped(theta)
    same = False
    if not stacked and not many:
        with outside(), torch.no_grad():
            same = torch.equal(binding.selection.gather(inner), values.to(inner.dtype))
    if not same:
        raise TitheError(
            binding.name,
            found="another weight and another θ, both handed to functional_call, which need not belong together",
            expected="one of the two",
            remedy='leave names that end in "@theta" out of the dict, or hand in nothing but these and the head',
        )
