"""`[method]`: what may stand there, and the library's object that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

import tithe
from tithe.app.train.section import Section, exactly_one, refuse
from tithe.errors import TitheError


class _Method(Section):
    """What every method may have: `lean`, and how much lean layers keep."""

    lean: bool = False
    lean_bits: Literal[8] | None = None
    lean_exact: bool | None = None

    @model_validator(mode="after")
    def _lean_first(self) -> _Method:
        if not self.lean and (given := self.given("lean_bits", "lean_exact")):
            raise refuse(
                given[0],
                found=f"{' and '.join(given)} without lean",
                expected="lean = true beside it",
                remedy=f"add lean = true, or remove {' and '.join(given)}",
            )
        return self


class Reselect(Section):
    """`reselect = {every = 1, unit = "epochs"}`."""

    every: Annotated[int, Field(ge=1)]
    unit: Literal["steps", "epochs"] = "epochs"


class FishMethod(_Method):
    """`[method] name = "fish"`: the arguments of `tithe.FISH`, and `where` of `tithe.attach`."""

    name: Literal["fish"]
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    k: Annotated[int, Field(ge=1)] | None = None
    samples: Annotated[int, Field(ge=1)] = 1024
    fisher: Literal["empirical", "true"] = "empirical"
    score: Literal["fisher", "gradient", "magnitude", "random"] = "fisher"
    scope: Literal["global", "tensor"] = "global"
    warmup: Annotated[int, Field(ge=0)] = 0
    reselect: Reselect | None = None
    where: tuple[str, ...] = ("*",)

    @model_validator(mode="after")
    def _one_size(self) -> FishMethod:
        exactly_one(self, "density", "k")
        return self

    def make(self, folder: Path) -> tithe.FISH:
        """The method; `folder` is where relative paths start, and it names none."""
        again = self.reselect
        return tithe.FISH(
            density=self.density,
            k=self.k,
            samples=self.samples,
            fisher=self.fisher,
            score=self.score,
            scope=self.scope,
            warmup=self.warmup,
            reselect=None if again is None else tithe.every(again.every, again.unit),
        )


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
        """The library's budget."""
        return tithe.Budget(self.bytes, elements=self.elements, fraction=self.fraction, flops=self.flops)


class TradyMethod(_Method):
    """`[method] name = "trady"`: the arguments of `tithe.TraDy`, and `where` of `tithe.attach`."""

    name: Literal["trady"]
    budget: BudgetTable
    ranking: str | None = None
    coverage: Annotated[float, Field(gt=0, le=1)] = 0.97
    layers: Literal["topk", "all"] = "topk"
    dynamic: bool = True
    lean: bool = True
    score: Literal["uniform", "rgn", "fisher"] = "uniform"
    samples: Annotated[int, Field(ge=1)] = 256
    where: tuple[str, ...] = ("*",)

    @model_validator(mode="after")
    def _ranked_or_all(self) -> TradyMethod:
        unread = [key for key in ("ranking", "coverage") if key in self.model_fields_set]
        if self.layers == "all" and unread:
            raise refuse(
                unread[0],
                found=f'{" and ".join(unread)} beside layers = "all"',
                expected='it beside layers = "topk", which draws from the layers that a ranking puts first',
                remedy=f'remove {" and ".join(unread)}, or layers = "all"',
            )
        return self

    def make(self, folder: Path) -> tithe.TraDy:
        """The method; a relative path of its ranking starts at `folder`.

        Raises:
            TitheError: there is no ranking at that path.
        """
        return tithe.TraDy(
            self.budget.make(),
            ranking=None if self.ranking is None else tithe.Ranking.load(folder / self.ranking),
            coverage=self.coverage,
            layers=self.layers,
            dynamic=self.dynamic,
            lean=self.lean,
            score=self.score,
            samples=self.samples,
        )


class VrpgeMethod(_Method):
    """`[method] name = "vrpge"`: the arguments of `tithe.VRPGE`, `where` of `tithe.attach`, and how the run ends.

    `gradual` counts in parts of the steps before the widths are fixed. They are fixed on `held_out`, a part of the
    training rows that is used for nothing else; `finetune` is the part of the run's steps that follow, at
    `finetune_lr`, which is a hundredth of lr unless given.
    """

    name: Literal["vrpge"]
    keep: Annotated[float, Field(gt=0, le=1)]
    structure_lr: Annotated[float, Field(ge=0)] = 12e-3
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    gradual: tuple[float, float] | None = None
    cost: Literal["channels", "flops", "params"] = "channels"
    draws: Annotated[int, Field(ge=0)] = 10
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    finetune: Annotated[float, Field(ge=0, lt=1)] = 0.12
    finetune_lr: Annotated[float, Field(gt=0)] | None = None
    where: tuple[str, ...] = ("*",)

    @model_validator(mode="after")
    def _gradual_in_parts(self) -> VrpgeMethod:
        if self.gradual is not None and not 0 <= self.gradual[0] < self.gradual[1] <= 1:
            raise refuse(
                "gradual",
                found=f"{list(self.gradual)}",
                expected="two parts of the steps, from 0 to 1, the first smaller",
                remedy="the paper's: gradual = [0.16, 0.6]",
            )
        return self

    def make(self, steps: int) -> tithe.VRPGE:
        """The method; `steps` are those before the widths are fixed."""
        gradual = None
        if self.gradual is not None:
            start, stop = (round(part * steps) for part in self.gradual)
            gradual = (start, max(start + 1, stop))
        return tithe.VRPGE(
            keep=self.keep, structure_lr=self.structure_lr, alpha=self.alpha, gradual=gradual, cost=self.cost
        )


class DenseMethod(_Method):
    """`[method] name = "full"` or `"head"`: the ordinary fine-tuning that a method is compared with."""

    name: Literal["full", "head"]


AnyMethod = FishMethod | TradyMethod | VrpgeMethod | DenseMethod

METHODS: dict[str, type[AnyMethod]] = {
    "fish": FishMethod,
    "trady": TradyMethod,
    "vrpge": VrpgeMethod,
    "full": DenseMethod,
    "head": DenseMethod,
}
"""The values of `name`, and the keys that go with each."""
