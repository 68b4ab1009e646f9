"""What every section of a recipe is, and how the section of a method derives from the method's dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from pydantic_core import PydanticCustomError

import tithe
from tithe.app.dense import Dense
from tithe.errors import TitheError

REFUSED = "refused"
"""The type of an error whose context holds `found`, `expected`, `remedy`, and the `key` it is about or None."""


class Section(BaseModel):
    """One section: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, str_strip_whitespace=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, values: Any) -> Any:
        """Refuse `epochs = true`: Python, and with it pydantic, takes it for 1."""
        for key, value in cast(dict[str, Any], values).items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field is not None and not _takes_truth(field.annotation):
                raise refuse(
                    key,
                    found=str(value).lower(),
                    expected=f"a value of {key}: it is no switch",
                    remedy=f"write the value, or remove {key}",
                )
        return values

    def given(self, *names: str) -> list[str]:
        """List those of these keys that have a value."""
        return [name for name in names if getattr(self, name) is not None]


def _takes_truth(annotation: Any) -> bool:
    return annotation in {bool, Any} or any(_takes_truth(part) for part in get_args(annotation))


def refuse(key: str | None, *, found: str, expected: str, remedy: str) -> PydanticCustomError:
    """Make the error of a validator; `key` (dotted, from the section) is the one to point at, None for all of it."""
    return PydanticCustomError(REFUSED, "refused", {"key": key, "found": found, "expected": expected, "remedy": remedy})


def exactly_one(section: Section, *names: str) -> None:
    """Refuse a section that gives none or several of these keys."""
    given = section.given(*names)
    if len(given) != 1:
        raise refuse(
            None,
            found=" and ".join(given) or "none of them",
            expected=f"exactly one of {', '.join(names)}",
            remedy="keep one" if given else "add one",
        )


class Reselect(Section):
    """`reselect = {every = 1, unit = "epochs"}`."""

    every: Annotated[int, Field(ge=1)]
    unit: Literal["steps", "epochs"] = "epochs"

    @classmethod
    def of(cls, schedule: tithe.Schedule) -> Reselect:
        """Write down one of the library's schedules."""
        return cls.model_validate({"every": schedule.period, "unit": schedule.unit})

    def make(self) -> tithe.Schedule:
        """Make the library's schedule."""
        return tithe.every(self.every, self.unit)


class BudgetTable(Section):
    """`budget = "2MB"`, or `{elements = 27946}`, `{fraction = 0.01}`, `{flops = 1000000}`."""

    bytes: str | None = None
    elements: Annotated[int, Field(ge=1)] | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    flops: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_is_bytes(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"bytes": value}
        if isinstance(value, int | float):
            raise refuse(
                None,
                found=f"the number {value}",
                expected='bytes as text, "2MB", or a table that names the measure',
                remedy=f"write {{fraction = {value}}}"
                if value <= 1
                else f'write "{value / 1e6:g}MB", or {{elements = {value}}}',
            )
        return value

    @model_validator(mode="after")
    def _one_measure(self) -> BudgetTable:
        exactly_one(self, "bytes", "elements", "fraction", "flops")
        try:
            self.make()
        except TitheError as error:
            raise refuse(None, found=error.found, expected=error.expected, remedy=error.remedy) from error
        return self

    def make(self) -> tithe.Budget:
        """Make the library's budget."""
        return tithe.Budget(self.bytes, elements=self.elements, fraction=self.fraction, flops=self.flops)


TABLES: Mapping[str, type[Section]] = {"reselect": Reselect, "budget": BudgetTable}
"""The keys of methods that are tables."""


_STATES = "optimizer_states"
"""A field of methods that is no key of the recipe, since `[optimizer]` tells it."""


class MethodSection(Section):
    """`[method]`: what every method may have, and what a run asks of it; a method that has nothing to say is silent."""

    lean: bool = False
    lean_bits: Literal[8] | None = None
    lean_exact: bool | None = None

    records_deltas: ClassVar[bool] = False
    """Whether a run's history is one of deltas: of n checkpoints with k trained weights, n·k numbers."""
    compares_losses: ClassVar[bool] = False
    """Whether it learns from the difference of two losses, which are then not to be scaled."""
    restarts: ClassVar[bool] = False
    """Whether the learning rate's schedule runs again once the structure is fixed."""
    prices_inputs: ClassVar[bool] = False
    """Whether it prices a step by the first batch it is given, which is then to be the largest."""
    files: ClassVar[Mapping[str, Callable[[Path], Any]]] = {}
    """Keys that name a file, and how it is read."""

    name: Any
    """How a recipe calls the method."""

    @model_validator(mode="after")
    def _fits_together(self) -> MethodSection:
        if not self.lean and (given := self.given("lean_bits", "lean_exact")):
            raise refuse(
                given[0],
                found=f"{' and '.join(given)} without lean",
                expected="lean = true beside it",
                remedy=f"add lean = true, or remove {' and '.join(given)}",
            )
        self.check()
        return self

    def check(self) -> None:
        """Refuse keys that do not go together."""

    @classmethod
    def usual_optimizer(cls, told: Mapping[str, Any], run: Any) -> dict[str, Any]:
        """Say how `[optimizer]` is filled in where the recipe says nothing.

        Args:
            told: the recipe's `[optimizer]`.
            run: the recipe's `[run]`, unchecked.
        """
        return {}

    @property
    def holds_out(self) -> float | None:
        """The part of the training rows that is kept for the method alone, or None."""
        return None

    @property
    def finetuned(self) -> float:
        """The part of the run's steps that follow once the structure is fixed."""
        return 0.0

    @property
    def num_draws(self) -> int:
        """How many structures are tried when one is fixed."""
        return 0

    def fixed_from(self, total_steps: int) -> int:
        """Count the steps before the structure is fixed; 0 where it always is."""
        return 0

    def finetuning_rate(self, lr: float) -> float:
        """Say the learning rate of the steps that follow, where the others have `lr`."""
        return lr

    def moves(self, head: Sequence[str]) -> str | Sequence[str]:
        """Say as globs which weights training moves."""
        return "*"

    def attach(
        self, model: Any, *, folder: Path, steps: int, states: int, head: Sequence[str], **settings: Any
    ) -> tithe.Plan:
        """Make the method ready to train a model.

        Args:
            model: a network on its device.
            folder: where relative paths start.
            steps: in which the structure is still being learned.
            states: tensors of a parameter's size that the recipe's optimizer keeps.
            head: names of the head's parameters.
            settings: of `tithe.attach`: `loss`, `data`, `seed`, `state`.
        """
        raise NotImplementedError


class DenseSection(MethodSection):
    """`[method] name = "full"` or `"head"`: the ordinary fine-tuning that a method is compared with."""

    name: Literal["full", "head"]

    def moves(self, head: Sequence[str]) -> str | Sequence[str]:
        """Say that all weights move, or the head's."""
        return head if self.name == "head" else "*"

    def attach(
        self, model: Any, *, folder: Path, steps: int, states: int, head: Sequence[str], **settings: Any
    ) -> tithe.Plan:
        """Make the whole model, or the head, ready to train."""
        names = [name for name, p in model.named_parameters() if p.is_floating_point()]
        plan = Dense(model, names if self.name == "full" else head, loss=settings["loss"])
        if settings["state"] is not None:
            plan.load_state_dict(settings["state"])
        return plan


class AttachedSection(MethodSection):
    """A method of the library: the arguments of its dataclass, and `where` of `tithe.attach`."""

    where: tuple[str, ...] = ("*",)

    of: ClassVar[Any]
    """The method's dataclass."""

    def spell(self, told: dict[str, Any], steps: int) -> dict[str, Any]:
        """Turn what a recipe spells otherwise into the dataclass's arguments."""
        return told

    def make(self, folder: Path, steps: int = 0) -> Any:
        """Make the method; relative paths start at `folder`, and `steps` are those before its structure is fixed.

        Raises:
            TitheError: a file that it names is missing or damaged.
        """
        told: dict[str, Any] = {}
        for field in dataclasses.fields(self.of):
            if field.name in type(self).model_fields:
                value = getattr(self, field.name)
                told[field.name] = value.make() if field.name in TABLES and value is not None else value
        told |= {
            key: load(folder / Path(told[key]).expanduser())
            for key, load in self.files.items()
            if told[key] is not None
        }
        return self.of(**self.spell(told, steps))

    def attach(
        self, model: Any, *, folder: Path, steps: int, states: int, head: Sequence[str], **settings: Any
    ) -> tithe.Plan:
        """Attach the method to the model; a budget that counts the optimizer's state counts the recipe's optimizer."""
        method = self.make(folder, steps)
        if _STATES in {field.name for field in dataclasses.fields(self.of)}:
            method = dataclasses.replace(method, **{_STATES: states})
        return tithe.attach(model, method, where=self.where, head=head, **settings)


class SparseSection(AttachedSection):
    """A method that selects what may move, and leaves the rest at its value."""

    records_deltas: ClassVar[bool] = True


class NarrowSection(AttachedSection):
    """A method that learns which channels exist, and how the run ends.

    The widths are fixed on `held_out`, a part of the training rows that is used for nothing else; `finetune` is the
    part of the run's steps that follow, at `finetune_lr`, which is a hundredth of lr unless given.
    """

    draws: Annotated[int, Field(ge=0)] = 10
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    finetune: Annotated[float, Field(ge=0, lt=1)] = 0.12
    finetune_lr: Annotated[float, Field(gt=0)] | None = None

    compares_losses: ClassVar[bool] = True
    restarts: ClassVar[bool] = True

    @property
    def holds_out(self) -> float | None:
        """The part of the training rows on which the widths are fixed."""
        return self.held_out

    @property
    def finetuned(self) -> float:
        """The part of the run's steps that follow once the widths are fixed."""
        return self.finetune

    @property
    def num_draws(self) -> int:
        """How many networks are drawn when the widths are fixed."""
        return self.draws

    def fixed_from(self, total_steps: int) -> int:
        """Count the steps before the widths are fixed."""
        return max(1, total_steps - round(self.finetune * total_steps))

    def finetuning_rate(self, lr: float) -> float:
        """Say the learning rate of the fixed network: a hundredth, as in the paper, unless given."""
        return self.finetune_lr or lr / 100


class CutSection(AttachedSection):
    """A method that lets units go in the first part of the run; `start` and `stop` are parts of all its steps."""

    start: Any
    stop: Any
    cuts: Any

    def fixed_from(self, total_steps: int) -> int:
        """Count the steps before the last cut."""
        return max(1, round(self.stop * total_steps))

    def spell(self, told: dict[str, Any], steps: int) -> dict[str, Any]:
        """Count `start` and `stop` in steps; of a short run there are no more cuts than steps."""
        stop = max(1, steps)
        start = min(stop - 1, round(told["start"] / told["stop"] * stop))
        return {**told, "start": start, "stop": stop, "cuts": min(told["cuts"], stop - start)}


_SPELLED = {tithe.Schedule: Reselect, tithe.Budget: BudgetTable}
_FILES: Mapping[Any, Callable[[Path], Any]] = {tithe.Ranking: tithe.Ranking.load}


def derive(
    name: str, of: type, base: type[AttachedSection], *, keys: Mapping[str, Any] | None = None, **told: Any
) -> type[AttachedSection]:
    """Make the section of a method from its dataclass: its fields are the keys, with their types and defaults.

    A schedule is written as a table, a budget as a text or a table, and a file by its path.

    Args:
        name: how a recipe calls the method.
        of: the method's dataclass.
        base: the section of its kind.
        keys: annotations of fields that the recipe checks more closely than their type does.
        told: attributes of the section, which replace those of its base.
    """
    hints, files = get_type_hints(of), dict[str, Callable[[Path], Any]]()
    fields: dict[str, Any] = {"name": (cast(Any, Literal)[name], ...)}
    for field in dataclasses.fields(of):
        if not field.init or field.name == _STATES:
            continue
        hint = (keys or {}).get(field.name, hints[field.name])
        parts: tuple[Any, ...] = getattr(hint, "__args__", ()) if type(None) in getattr(hint, "__args__", ()) else ()
        for kind in parts or (hint,):
            if kind in _SPELLED:
                hint = _SPELLED[kind] | None if parts else _SPELLED[kind]
            elif kind in _FILES:
                hint, files[field.name] = str | None if parts else str, _FILES[kind]
        default = Reselect.of(field.default) if isinstance(field.default, tithe.Schedule) else field.default
        fields[field.name] = (hint, ... if default is dataclasses.MISSING else default)
    section = create_model(f"{of.__name__}Section", __base__=base, __module__=__name__, **fields)
    for key, value in {"of": of, "files": files, "__doc__": f"`[method] name = {name!r}`.", **told}.items():
        setattr(section, key, value)
    return section


def known_keys(section: type[Section]) -> Iterable[str]:
    """List the keys of a section; what all methods share comes last."""
    return sorted(section.model_fields, key=lambda key: key.startswith("lean"))
