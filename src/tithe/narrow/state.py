"""Check the saved state of a plan with absent channels before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tithe.errors import TitheError
from tithe.narrow.stage import Stage

FORMAT = 2
"""1 had neither the draws, which are made anew then, nor a control variate, which starts from nothing."""


def check_state(
    state: Mapping[str, Any],
    settings: Mapping[str, Any],
    structure: frozenset[str],
    alive: Tensor,
    stage: Stage,
    tensors: Mapping[str, Tensor],
) -> None:
    """Compare a saved state with the plan that continues from it.

    Args:
        state: what `plan.state_dict()` returned.
        settings: of the plan, which have to be those of the state, by their keys there.
        structure: keys of the state of what decides which units exist.
        alive: bool (n,), the units that the plan still has.
        stage: of the model.
        tensors: the model's, by every name.

    Raises:
        TitheError: naming the first difference.
    """
    keys = {"keep", "cost", "num_steps", "num_epochs", "seed", "settled", "alive", "probabilities", "tensors"}
    if state.get("format") == FORMAT:
        keys |= {"weights", "masks", "age", "control"}
    if state.get("format") not in (1, FORMAT) or not keys <= set(state):
        raise TitheError(
            "plan state",
            found=f"format {state.get('format')!r} with {', '.join(sorted(set(state) & keys)) or 'no known key'}",
            expected="what plan.state_dict() of this method returns",
            remedy="save it with plan.state_dict() of this version and method",
        )
    if not structure <= set(state["probabilities"]):
        raise TitheError(
            "plan state",
            found=f"the state of another kind of method, with {', '.join(sorted(state['probabilities']))}",
            expected=f"one with {', '.join(sorted(structure))}",
            remedy="attach with the method of the saved run",
        )
    for setting, value in settings.items():
        if setting in state and state[setting] != value:
            raise TitheError(
                setting,
                found=f"a state saved with {setting}={state[setting]!r}",
                expected=f"{setting}={value!r}",
                remedy="attach with the settings of the saved run",
            )
    saved: Tensor = state["alive"]
    if saved.shape != alive.shape or set(state["tensors"]) != set(tensors):
        raise TitheError(
            "plan state",
            found=f"{saved.numel()} units and {len(state['tensors'])} tensors",
            expected=f"{alive.numel()} units and {len(tensors)} tensors",
            remedy="attach to the model of the saved run, with its where= and head=",
        )
    if bool((saved & ~alive).any()):
        raise TitheError(
            "plan state",
            found=f"{int((saved & ~alive).sum())} units that this plan has dropped for good",
            expected="a freshly built model, or an earlier state of this plan",
            remedy="build the model again, attach, and load the state then",
        )
    grids = stage.grids(saved[alive])
    narrow = {tensor.data_ptr(): grids[name] for name, tensor in stage.tensors.items()}  # tied ones have more names
    for name, tensor in tensors.items():
        grid, found = narrow.get(tensor.data_ptr()), tuple(state["tensors"][name].shape)
        expected = tuple(tensor.shape) if grid is None else grid.theta_shape
        if found != expected:
            raise TitheError(
                name,
                found=f"shape {list(found)} in the saved state",
                expected=f"{list(expected)}",
                remedy="build the model with the configuration of the saved run",
            )
