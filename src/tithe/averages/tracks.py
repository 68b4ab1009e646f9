"""Follow a model's weights with moving averages of growing memory: a copy of the weights for each width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tithe.averages.power_ema import Profile, Runs, exponent, followed
from tithe.averages.stacked import computed_dtype
from tithe.errors import TitheError


def check_widths(widths: Sequence[float], bits: int | None = None) -> tuple[float, ...]:
    """Return the widths of moving averages that a history is to record.

    Raises:
        TitheError: when there is none, one is out of range or there twice, or the averages are to be coded.
    """
    found = tuple(float(width) for width in widths)
    for width in found:
        exponent(width)
    if not found or len(set(found)) < len(found):
        raise TitheError(
            "History", found=f"ema={found}", expected="one width or several, no two alike", remedy="as in (0.05, 0.10)"
        )
    if bits is not None:
        raise TitheError(
            "History",
            found=f"bits={bits} beside ema={found}",
            expected="moving averages as they are: the weights of their sums are large, and so would the errors be",
            remedy="leave out bits",
        )
    return found


def followed_tensors(weights: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what of a model's state is averaged: weights, and buffers of floating-point or complex numbers."""
    buffers = {name: tensor for name, tensor in rest.items() if tensor.is_floating_point() or tensor.is_complex()}
    return {**weights, **buffers}


class Track:
    """One moving average, in float32, or float64 of float64, on the devices of the weights.

        θ̂_u = β θ̂_v + (1 − β) θ(u),    β = (v / u)^{γ+1},    v the step followed before u

    Args:
        width: relative, of its profile.
        runs: the steps that were followed already.
        values: name → the average after them.
    """

    def __init__(self, width: float, runs: Runs = (), values: Mapping[str, Tensor] | None = None) -> None:
        self.width, self.runs, self._power = width, runs, exponent(width) + 1
        self.values = dict(values or {})

    @property
    def step(self) -> int:
        """Return the last step that was followed; 0 before the first."""
        return self.runs[-1][1] if self.runs else 0

    @property
    def profile(self) -> Profile:
        """Return how much of each step's weights the average holds."""
        return Profile(self.width, self.runs)

    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after a step.

        Args:
            weights: name → floating-point or complex tensor.
            step: later than the last one.

        Raises:
            TitheError: when it is not, or the tensors are others than before.
        """
        if step <= self.step:
            raise TitheError(
                "ema",
                found=f"step {step} after step {self.step}",
                expected="a later step" if self.runs else "step 1 or later: what an optimizer's steps have left",
                remedy="count the steps of the whole run, and go on counting after a resume",
            )
        keep = (self.step / step) ** self._power
        if not self.values:
            self.values = {name: tensor.to(computed_dtype(tensor.dtype), copy=True) for name, tensor in weights.items()}
        else:
            self.check(weights)
            for name, tensor in weights.items():
                if self.values[name].device != tensor.device:  # the model moved, or this run goes on from a file
                    self.values[name] = self.values[name].to(tensor.device)
            new = [weights[name] for name in self.values]
            old = list(self.values.values())
            torch._foreach_mul_(old, keep)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(old, new, alpha=1 - keep)  # pyright: ignore[reportPrivateImportUsage]
        self.runs = followed(self.runs, step)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Check that a model is the one that is followed.

        Raises:
            TitheError: when it has other tensors.
        """
        shapes = {name: tuple(value.shape) for name, value in self.values.items()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        odd = sorted(name for name in shapes | found if shapes.get(name) != found.get(name))
        if odd:
            raise TitheError(
                odd[0],
                found=f"shape {found.get(odd[0], 'none: no such tensor')} in the model",
                expected=f"{shapes.get(odd[0], 'none')}, as in the model that was followed so far",
                remedy="follow the same model, or record another one into a folder of its own",
            )


class Tracks:
    """The moving averages of a run that are recorded together.

    Args:
        tracks: one for each width.
    """

    def __init__(self, tracks: Sequence[Track]) -> None:
        self.tracks = list(tracks)

    @property
    def step(self) -> int:
        """Return the last step that all of them followed."""
        return min(track.step for track in self.tracks)

    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after a step."""
        with torch.no_grad():
            for track in self.tracks:
                track.update(weights, step)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the steps that they followed, as tensors and plain data."""
        return {
            "tracks": [
                {"width": track.width, "steps": [list(run) for run in track.runs], "values": dict(track.values)}
                for track in self.tracks
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            TitheError: when it is of other widths.
        """
        found = [told["width"] for told in state["tracks"]]
        expected = [track.width for track in self.tracks]
        if found != expected:
            raise TitheError(
                "ema", found=f"a state of widths {found}", expected=f"{expected}", remedy="open the history with those"
            )
        self.tracks = [
            Track(
                told["width"],
                tuple((first, last, stride) for first, last, stride in told["steps"]),
                {name: tensor.clone() for name, tensor in told["values"].items()},
            )
            for told in state["tracks"]
        ]
