"""What a plan with absent channels was saved as, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from tithe.errors import TitheError
from tithe.narrow.probabilities import Structure

FORMAT = 1


def check_state(state: Mapping[str, Any], method: Structure, alive: Tensor, names: Collection[str]) -> None:
    """Compare a saved state with the plan that is to go on from it.

    Args:
        state: what `plan.state_dict()` returned.
        method: of the plan.
        alive: bool (n,), the units that the plan still has.
        names: of the model's tensors.

    Raises:
        TitheError: naming the first difference.
    """
    keys = {"keep", "cost", "num_steps", "num_epochs", "seed", "settled", "alive", "probabilities", "tensors"}
    if state.get("format") != FORMAT or not keys <= set(state):
        raise TitheError(
            "plan state",
            found=f"format {state.get('format')!r} with {', '.join(sorted(set(state) & keys)) or 'no known key'}",
            expected="what plan.state_dict() of this method returns",
            remedy="save it with plan.state_dict() of this version and method",
        )
    for setting in ("keep", "cost"):
        if state[setting] != getattr(method, setting):
            raise TitheError(
                setting,
                found=f"a state saved with {setting}={state[setting]!r}",
                expected=f"{setting}={getattr(method, setting)!r}",
                remedy="attach with the settings of the saved run",
            )
    saved: Tensor = state["alive"]
    if saved.shape != alive.shape or set(state["tensors"]) != set(names):
        raise TitheError(
            "plan state",
            found=f"{saved.numel()} units and {len(state['tensors'])} tensors",
            expected=f"{alive.numel()} units and {len(names)} tensors",
            remedy="attach to the model of the saved run, with its where= and head=",
        )
    if bool((saved & ~alive).any()):
        raise TitheError(
            "plan state",
            found=f"{int((saved & ~alive).sum())} units that this plan has dropped for good",
            expected="a freshly built model, or an earlier state of this plan",
            remedy="build the model again, attach, and load the state then",
        )
