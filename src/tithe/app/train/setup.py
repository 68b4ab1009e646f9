"""What a run needs before its first step: the device, a checkpoint that fits it, the method on the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from importlib import metadata
from typing import Any

import accelerate
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

import tithe
from tithe import distributed
from tithe.app.train.checkpoints import Checkpoints
from tithe.app.train.data import Examples
from tithe.app.train.models import Loss, Network
from tithe.app.train.paths import expand, unwritable
from tithe.app.train.recipe import Recipe
from tithe.app.train.recording import recorded_steps
from tithe.app.train.rows import Batch
from tithe.errors import TitheError

# What may differ when a run is resumed: where things are and how they are shown, not what is computed.
_SHOWN = {("run", "log_every"), ("run", "workers"), ("data", "folder"), ("log", "trackers"), ("log", "project")}
_FREE = {("run", "output"), *_SHOWN}

# What processes may have of their own: where the same data is, and how a run is shown.
_OWN = _SHOWN
PACKAGES = ("tithe", "torch", "transformers", "accelerate", "safetensors", "numpy")
"""Whose versions are compared over processes, and told in the result."""

_TIMEOUT = timedelta(minutes=10)
"""How long a process waits for another that says nothing."""


def make_accelerator(recipe: Recipe) -> accelerate.Accelerator:
    """The recipe's device and precision, and the processes that torchrun or `accelerate launch` started.

    Raises:
        TitheError: the device is not there, cannot compute in this precision, or processes were launched that make no
            group.
    """
    device = recipe.run.device
    if device == "cuda" and not torch.cuda.is_available():
        raise TitheError(
            recipe.place("run", "device"), found="no CUDA device", expected="one", remedy='set device = "auto" or "cpu"'
        )
    if recipe.run.precision == "fp16" and (device == "cpu" or not torch.cuda.is_available()):
        raise TitheError(
            recipe.place("run", "precision"), found="fp16 on the CPU", expected="a GPU", remedy='set precision = "bf16"'
        )
    # accelerate keeps the first precision of a process; a process may run several recipes.
    AcceleratorState._reset_state()
    launched = distributed.launched_size()
    try:
        accelerator = accelerate.Accelerator(
            mixed_precision=recipe.run.precision,
            # Of several processes accelerate makes a group on the CPU only where it is told that this is the device.
            cpu=device == "cpu" or (launched > 1 and not torch.cuda.is_available()),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT)] if launched > 1 else None,
        )
    except (RuntimeError, ValueError) as error:
        AcceleratorState._reset_state(reset_partial_state=True)  # it keeps what it had begun
        if launched == 1:
            raise
        raise _no_group(launched, f"none ({error})") from error
    if launched > 1 and accelerator.num_processes != launched:
        raise _no_group(launched, f"one of {accelerator.num_processes}")
    return accelerator


def _no_group(launched: int, found: str) -> TitheError:
    return TitheError(
        "WORLD_SIZE",
        found=f"{launched} processes launched, and as their group {found}",
        expected="one group of all of them",
        remedy="launch with torchrun or `accelerate launch`, which also set RANK, LOCAL_RANK and MASTER_ADDR, or"
        " unset WORLD_SIZE",
    )


def compare_ranks(recipe: Recipe, examples: Examples, steps: Sequence[int]) -> None:
    """Compare over processes what the run starts from.

    Args:
        recipe: the run.
        examples: its data.
        steps: of the checkpoints that are there.

    Raises:
        TitheError: in every process, naming what differs.
    """
    facts = {name: metadata.version(name) for name in PACKAGES}
    facts["the processes launched"] = str(distributed.launched_size())
    for section, values in recipe.settings().items():
        facts |= {f"[{section}] {key}": str(value) for key, value in values.items() if (section, key) not in _OWN}
    facts["data"] = examples.fingerprint()
    facts["the last checkpoint"] = f"of step {steps[-1]}" if steps else "none"
    distributed.compare("the start of the run", facts)


def check_writable(recipe: Recipe) -> None:
    """Check that the run's folder can be made and written to, without making it.

    Raises:
        TitheError: it is a file, or belongs to somebody else.
    """
    if (reason := unwritable(recipe.output)) is not None:
        raise TitheError(
            recipe.place("run", "output"),
            found=reason,
            expected="a folder that can be made and written to",
            remedy="choose another output",
        )


def check_output(recipe: Recipe, steps: Sequence[int]) -> None:
    """Check that a new run finds nothing of another in its folder.

    Args:
        recipe: the run.
        steps: of the checkpoints that are there.

    Raises:
        TitheError: there is a checkpoint or a history.
    """
    found = f"a checkpoint of step {steps[-1]}" if steps else ""
    if not steps and recipe.history is not None and (recorded := recorded_steps(recipe)):
        found = f"a history of {len(recorded)} checkpoints"
    if found:
        raise TitheError(
            recipe.place("run", "output"),
            found=f"{found} in {recipe.output}",
            expected="a new folder, or --resume",
            remedy="add --resume to go on, or choose another output",
        )


def load_state(
    recipe: Recipe, examples: Examples, checkpoints: Checkpoints, step: int, processes: int
) -> dict[str, Any]:
    """Read a checkpoint to go on from.

    Raises:
        TitheError: it was written by another recipe, on other data or by another number of processes.
    """
    state, place = checkpoints.load(step), str(checkpoints.path(step))
    differ = differences(state["recipe"], recipe.settings())
    if state["position"].get("average") is None:  # it has not begun: a run may be given another end, or one at all
        differ = [(key, text) for key, text in differ if key[0] != "average"]
    if differ:
        raise TitheError(
            recipe.place(*differ[0][0]),
            found=f"a recipe that differs from the checkpoint's in {'; '.join(text for _, text in differ)}",
            expected=f"the recipe of {place}",
            remedy="undo the change, or start anew in another output folder",
        )
    if state["data"] != examples.fingerprint():
        raise TitheError(
            place,
            found="other data than when it was written",
            expected="the same rows in the same order",
            remedy="restore the data, or start anew in another output folder",
        )
    if state["processes"] != processes:
        raise TitheError(
            place,
            found=f"a run of {state['processes']} processes",
            expected=f"{processes}, as launched now",
            remedy="launch as many processes as before",
        )
    return state


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[tuple[str, str], str]]:
    """The keys of two recipes that differ, each with a sentence; where files are does not count.

    Example:
        >>> differences({"run": {"seed": 0}}, {"run": {"seed": 1}})
        [(('run', 'seed'), '[run] seed: 0 then, 1 now')]
    """
    found: list[tuple[tuple[str, str], str]] = []
    for section in {**now, **before}:
        for key in {**before.get(section, {}), **now.get(section, {})}:
            then, new = before.get(section, {}).get(key), now.get(section, {}).get(key)
            if then != new and (section, key) not in _FREE:
                found.append(((section, key), f"[{section}] {key}: {then!r} then, {new!r} now"))
    return found


def find_method(recipe: Recipe) -> None:
    """Check that the files that the method reads are there.

    Raises:
        TitheError: one of them is missing or damaged.
    """
    for key, load in recipe.method.files.items():
        path = getattr(recipe.method, key)
        if path is not None:
            with recipe.blamed("method", key):
                load(recipe.folder / expand(path))


def attach(
    recipe: Recipe,
    network: Network,
    loss: Loss,
    data: Iterable[Batch],
    state: Mapping[str, Any] | None,
    *,
    structure_steps: int,
) -> tithe.Plan:
    """Make the recipe's method ready to train.

    Args:
        recipe: the run.
        network: its model, on its device.
        loss: mean loss of a batch.
        data: batches to choose by.
        state: a `state_dict` of the same run; its choice is taken and nothing is scored.
        structure_steps: in which the network's widths are still being learned.
    """
    make_lean(recipe, network)  # before the choice is made, which then keeps no more than training does
    with recipe.blamed("method"):
        return recipe.method.attach(
            network.model,
            folder=recipe.folder,
            steps=structure_steps,
            states=recipe.optimizer.states,
            head=network.head,
            loss=loss,
            data=data,
            seed=recipe.run.seed,
            state=None if state is None else dict(state),
        )


def make_lean(recipe: Recipe, network: Network) -> None:
    """Let all layers keep only what backward needs, where the recipe says so; it goes with the model."""
    method = recipe.method
    if method.lean:
        tithe.lean(network.model, method.lean_bits, exact=bool(method.lean_exact))
