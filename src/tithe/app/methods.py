"""The methods of the command line: for each, the section of a recipe, its rows of `tithe price` and of `tithe demo`.

This is the one place that knows them by name. A section derives from the method's dataclass, and what a run, a price or
a demonstration does with a method follows from the capabilities of its plan; what stands here is what they cannot know:
which numbers are checked, what a recipe spells otherwise, and with which settings a method is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

import tithe
from tithe.app.section import (
    CutSection,
    DenseSection,
    MethodSection,
    NarrowSection,
    SparseSection,
    derive,
    exactly_one,
    refuse,
)

if TYPE_CHECKING:
    from tithe.app.price.terms import Site

_COUNT = Annotated[int, Field(ge=1)]
_FRACTION = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class PriceRow:
    """One row of `tithe price`.

    Args:
        key: what `--method` calls it.
        name: of the row.
        make: the method, for what is asked; raises TitheError where the budget does not fit it.
        lean: whether all layers are made lean first; a method may ask for that itself.
        budgeted: whether the budget says how much it trains.
        per_batch: whether a budget in bytes makes its choice depend on the size of the batch.
        on_request: whether it is priced only where it is named.
        like: key of a row with the same figures.
        note: what to know about the row.
    """

    key: str
    name: str
    make: Callable[[Site], Any]
    lean: bool = False
    budgeted: bool = True
    per_batch: bool = False
    on_request: bool = False
    like: str | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One row of `tithe demo`.

    Args:
        slug: name of the file it writes, without the suffix.
        name: of the row, at most 16 characters.
        make: the method, for a number of training images.
        lean: whether all layers are made lean first.
        fixed: the part of the steps after which the structure is fixed, where there is one to fix.
        note: what to know about the row.
    """

    slug: str
    name: str
    make: Callable[[int], Any]
    lean: bool = False
    fixed: float = 0.0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method of the command line.

    Args:
        name: how a recipe calls it.
        section: of a recipe.
        prices: its rows of `tithe price`.
        demos: its rows of `tithe demo`.
    """

    name: str
    section: type[MethodSection] | None = None
    prices: tuple[PriceRow, ...] = ()
    demos: tuple[DemoRow, ...] = ()


# ------------------------------------------------------------------------------------------------------------- FISH

DENSITY = 0.02
"""Part of all weights, head included, that the demonstration's sparse methods train."""

_MASK_NOTE = (
    "FISH is priced with a random mask of its size, which touches every column: the most it can keep. "
    "Fisher masks gather in few columns and keep less."
)


def _fish_fits(section: Any) -> None:
    exactly_one(section, "density", "k")
    if section.fisher == "true" and section.score in ("gradient", "snr", "saliency"):
        raise refuse(
            "fisher",
            found=f'fisher = "true" beside score = "{section.score}"',
            expected='"empirical": over the model\'s own distribution the mean gradient is zero',
            remedy='remove fisher, or write score = "fisher"',
        )


FISH = Entry(
    name="fish",
    section=derive(
        "fish",
        tithe.FISH,
        SparseSection,
        keys={
            "density": _FRACTION | None,
            "k": _COUNT | None,
            "samples": _COUNT,
            "warmup": Annotated[int, Field(ge=0)],
        },
        check=_fish_fits,
    ),
    prices=(
        PriceRow(key="fish", name="FISH", make=lambda site: site.mask(), note=_MASK_NOTE),
        PriceRow(key="fish+lean", name="FISH + lean", make=lambda site: site.mask(), lean=True, note=_MASK_NOTE),
        PriceRow(
            key="fish-columns",
            name="FISH columns",
            make=lambda site: site.mask("column"),
            lean=True,
            on_request=True,
            note="FISH columns are priced in a lean model, the same part of each matrix: Fisher information takes more "
            "of some and less of others.",
        ),
    ),
    demos=(
        DemoRow(
            slug="fish",
            name="FISH",
            make=lambda images: tithe.FISH(density=DENSITY, samples=images),
            note=f"FISH and random mask train {DENSITY:.0%} of the weights, the head among them.",
        ),
        DemoRow(
            slug="fish-lean",
            name="FISH + lean",
            make=lambda images: tithe.FISH(density=DENSITY, samples=images),
            lean=True,
            note="TraDy and FISH + lean let the other layers keep for backward only what it needs.",
        ),
    ),
)

RANDOM = DemoRow(slug="random", name="random mask", make=lambda _: tithe.FISH(density=DENSITY, score="random"))
"""What a mask that is chosen has to be better than."""

# ------------------------------------------------------------------------------------------------------------ TraDy

BUDGET = "512 kB"
"""What the demonstration's channels may cost: θ, gradients, AdamW's state, indices, kept inputs, the head's share."""


def _ranked_or_all(section: Any) -> None:
    unread = [key for key in ("ranking", "coverage") if key in section.model_fields_set]
    if section.layers == "all" and unread:
        raise refuse(
            unread[0],
            found=f'{" and ".join(unread)} beside layers = "all"',
            expected='it beside layers = "topk", which draws from the layers that a ranking puts first',
            remedy=f'remove {" and ".join(unread)}, or layers = "all"',
        )


def _as_trady(told: Mapping[str, Any], run: Any) -> dict[str, Any]:
    """As in the paper: SGD without momentum, a cosine after 5 epochs of 50 and more: a tenth, 5 epochs at most."""
    warmup: dict[str, Any] = {}
    if not {"warmup_steps", "warmup_epochs"} & set(told):
        match run:
            case {"epochs": int(epochs)}:
                warmup = {"warmup_epochs": max(0.0, min(5.0, epochs / 10))}
            case {"steps": int(steps)}:
                warmup = {"warmup_steps": max(0, steps // 10)}
            case _:
                pass
    return {"name": "sgd", "schedule": "cosine", **warmup}


TRADY = Entry(
    name="trady",
    section=derive(
        "trady",
        tithe.TraDy,
        SparseSection,
        keys={"coverage": _FRACTION, "samples": _COUNT},
        check=_ranked_or_all,
        usual_optimizer=_as_trady,
        prices_inputs=True,
    ),
    prices=(
        PriceRow(
            key="trady",
            name="TraDy + lean",
            make=lambda site: tithe.TraDy(site.terms.budget, layers="all", optimizer_states=site.terms.states),
            per_batch=True,
        ),
    ),
    demos=(
        DemoRow(
            slug="trady",
            name="TraDy",
            make=lambda images: tithe.TraDy(tithe.Budget(BUDGET), samples=images),
            note=f"TraDy draws input channels anew each epoch, for at most {BUDGET} of a step, AdamW's state included; "
            "its file holds all that any epoch drew.",
        ),
    ),
)

# ----------------------------------------------------------------------------------------------------------- VR-PGE

KEEP, FIXED = 0.4, 0.8
"""Share of a forward pass's operations that the demonstration keeps; part of the steps after which widths are fixed."""


def _gradual_in_parts(section: Any) -> None:
    if section.gradual is not None and not 0 <= section.gradual[0] < section.gradual[1] <= 1:
        raise refuse(
            "gradual",
            found=f"{list(section.gradual)}",
            expected="two parts of the steps, from 0 to 1, the first smaller",
            remedy="the paper's: gradual = [0.16, 0.6]",
        )


def _gradual_in_steps(section: Any, told: dict[str, Any], steps: int) -> dict[str, Any]:
    """Count `gradual` in steps, where the recipe says parts of those before the widths are fixed."""
    if told["gradual"] is None:
        return told
    start, stop = (round(part * steps) for part in told["gradual"])
    return {**told, "gradual": (start, max(start + 1, stop))}


def _as_vrpge(told: Mapping[str, Any], run: Any) -> dict[str, Any]:
    """As in the paper: SGD with momentum and weight decay, a cosine."""
    sgd = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4} if told.get("name", "sgd") == "sgd" else {}
    return {"schedule": "cosine", **sgd}


VRPGE = Entry(
    name="vrpge",
    section=derive(
        "vrpge",
        tithe.VRPGE,
        NarrowSection,
        keys={
            "keep": _FRACTION,
            "structure_lr": Annotated[float, Field(ge=0)],
            "alpha": Annotated[float, Field(ge=0, le=1)],
            "gradual": tuple[float, float] | None,
        },
        check=_gradual_in_parts,
        spell=_gradual_in_steps,
        usual_optimizer=_as_vrpge,
    ),
    prices=(
        PriceRow(
            key="vrpge",
            name="VR-PGE",
            make=lambda site: tithe.VRPGE(site.share(), cost="flops"),
            on_request=True,
            note="VR-PGE keeps the budget's share of a forward pass's operations. Priced is its first step, of two "
            "drawn networks; its weights and optimizer state are whole then, and shrink as channels are dropped.",
        ),
    ),
    demos=(
        DemoRow(
            slug="vrpge",
            name="VR-PGE",
            # The probabilities have 80 steps to get somewhere, where the paper's have a hundred thousand.
            make=lambda images: tithe.VRPGE(keep=KEEP, cost="flops", structure_lr=0.05),
            fixed=FIXED,
            note="VR-PGE trains another narrow network in each step, of all weights in turn, and learns which hidden "
            f"units, heads and channels are worth {KEEP:.0%} of a forward pass's operations; after {FIXED:.0%} of the "
            "steps the widths are fixed, by the loss on the training images. Its file is the narrow network, whole.",
        ),
    ),
)

# --------------------------------------------------------------------------------------------------- Taylor pruning


def _start_before_stop(section: Any) -> None:
    if not section.start < section.stop:
        raise refuse(
            "start",
            found=f"start = {section.start}, stop = {section.stop}",
            expected="two parts of the steps, the first smaller",
            remedy="leave start out: cuts then come from the first step on",
        )


TAYLOR = Entry(
    name="taylor",
    section=derive(
        "taylor",
        tithe.TaylorPruning,
        CutSection,
        keys={
            "keep": _FRACTION,
            "stop": _FRACTION,
            "start": Annotated[float, Field(ge=0, lt=1)],
            "cuts": _COUNT,
            "floor": Annotated[float, Field(ge=0, le=1)],
        },
        check=_start_before_stop,
    ),
    prices=(
        PriceRow(
            key="taylor",
            name="Taylor pruning",
            make=lambda site: tithe.TaylorPruning(site.share(), stop=1, cuts=1),
            on_request=True,
            note="Taylor pruning keeps the budget's share of a forward pass's operations. Priced is a step before the "
            "first cut, when all units are there; its file is that of the narrow network.",
        ),
    ),
    demos=(
        DemoRow(
            slug="taylor",
            name="Taylor pruning",
            make=lambda images: tithe.TaylorPruning(KEEP, stop=5, cuts=5),
            note=f"Taylor pruning trains the whole network for five steps, in which what is worth least goes, down to "
            f"{KEEP:.0%} of a forward pass's operations; measured is what its largest step takes.",
        ),
    ),
)

# -------------------------------------------------------------------------------------------------------------- TWA
# Its section is [average], which ends the run of any other method; so does its row of the demonstration.

TWA = Entry(
    name="twa",
    prices=(
        PriceRow(
            key="twa",
            name="TWA",
            make=lambda site: tithe.TWA("checkpoints", bits=site.terms.bits),
            budgeted=False,
            on_request=True,
        ),
    ),
)

# ------------------------------------------------------------------------------------------------------------ SpIEL

SPIEL = Entry(
    name="spiel",
    section=derive(
        "spiel",
        tithe.SpIEL,
        SparseSection,
        keys={"density": _FRACTION, "replaced": Annotated[float, Field(ge=0, le=1)], "samples": _COUNT},
    ),
    prices=(
        PriceRow(
            key="spiel",
            name="SpIEL",
            make=lambda site: site.mask(),
            like="fish",
            note="SpIEL is priced with a random mask of its size, as FISH is.",
        ),
    ),
    demos=(
        DemoRow(
            slug="spiel",
            name="SpIEL",
            make=lambda images: tithe.SpIEL(density=DENSITY, samples=images),
            note="SpIEL trains as many as FISH; each epoch it drops the fifth that moved least, and grows as many by "
            "gradient.",
        ),
    ),
)

METHODS: tuple[Entry, ...] = (FISH, TRADY, VRPGE, TAYLOR, TWA, SPIEL)

SECTIONS: Mapping[str, type[MethodSection]] = {
    **{entry.name: entry.section for entry in METHODS if entry.section is not None},
    "full": DenseSection,
    "head": DenseSection,
}
"""The values of `[method] name`, and the keys that go with each."""
