"""`[history]` and `[average]`: what a run records of itself, and the average of it that the run may end with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

import tithe
from tithe.app.section import MethodSection, Section, refuse
from tithe.averages import check_widths, ema_width

Optimizer = Literal["sgd", "adamw", "adam"]


def _every(value: Any) -> Any:
    if value == "epoch" or (type(value) is int and value > 0):
        return value
    raise refuse(
        None,
        found=repr(value),
        expected='"epoch", or a number of steps',
        remedy='write every = "epoch", or every = 100',
    )


def _start(value: Any) -> Any:
    if (type(value) is int and value >= 0) or (type(value) is float and 0 < value < 1):
        return value
    raise refuse(
        None,
        found=repr(value),
        expected="a number of epochs or steps, or a part of the run between 0 and 1",
        remedy="write start = 10, or start = 0.8 for the last fifth of the run",
    )


def _average_name(value: Any) -> Any:
    """The mean, the last, or a name of `History.weights`; a run has no scores to tell the best by."""
    try:
        if isinstance(value, str) and value not in ("mean", "last"):
            ema_width(value)
        return value
    except tithe.TitheError as error:
        raise refuse(None, found=repr(value), expected=error.expected, remedy="choose one of them") from None


def _widths(value: Any) -> Any:
    if isinstance(value, list | tuple):
        try:
            return check_widths(value)
        except tithe.TitheError as error:
            raise refuse(None, found=error.found, expected=error.expected, remedy=error.remedy) from None
    return value


class HistorySection(Section):
    """`[history]`: checkpoints recorded while the run trains, in the folder `history` of its output.

    `every` is "epoch" or a number of steps, and `start` the first epoch or step that is recorded: 0 is before the first
    step, and 0.8 stands for four fifths of the run. `bits` codes the checkpoints after the first; left out they are
    whole. Of a method that freezes the rest, what is recorded is deltas. `ema` are relative widths of moving averages,
    which follow every step and are recorded in the place of the weights.
    """

    every: Annotated[int | Literal["epoch"], BeforeValidator(_every)] = "epoch"
    bits: Literal[8, 4, 1] | None = None
    start: Annotated[int | float, BeforeValidator(_start)] = 0
    ema: Annotated[tuple[float, ...], BeforeValidator(_widths)] | None = None

    def due(self, step: int, steps_per_epoch: int, total: int) -> bool:
        """Whether a checkpoint is recorded after so many steps of so many in all.

        Example:
            >>> [step for step in range(9) if HistorySection(start=1).due(step, 4, 8)]
            [4, 8]
            >>> [step for step in range(11) if HistorySection(start=0.5, every=2).due(step, 4, 10)]
            [6, 8, 10]
        """
        unit = steps_per_epoch if self.every == "epoch" else self.every
        if isinstance(self.start, float):
            first = self.start * total
        else:
            first = self.start * (unit if self.every == "epoch" else 1)
        return step >= max(first, int(self.ema is not None)) and step % unit == 0


class AverageSection(Section):
    """`[average]`: after the run's own steps, the average of what was recorded, and how it is trained.

    `method` "mean" trains nothing: the mean, with statistics of its own. `like` trains nothing either: where a decay of
    the learning rate over these checkpoints would have led, "linear", "cosine" or "sqrt"; or of moving averages,
    `[history] ema`, one of any width, "ema:0.08". "twa" trains it from `start`, on the training rows or, by `on`, on a
    part of them, `held_out`, that the run itself does not see.

    SGD by itself is that of the authors' code: lr 2, momentum 0.9, weight decay 1e-5, a tenth of lr from half of the
    steps on and a hundredth from 0.8 of them. AdamW is that of the extension: lr 1e-3, a cosine after a warm-up of 0.2
    of the steps. SGD is for `granularity` "model", AdamW for "tensor", unless told otherwise.
    """

    method: Literal["twa", "mean"] = "twa"
    epochs: Annotated[int, Field(ge=1)] = 10
    granularity: Literal["model", "tensor"] = "model"
    bits: Literal[8, 4, 1] | None = None
    start: Annotated[str, BeforeValidator(_average_name)] = "mean"
    like: Annotated[str, BeforeValidator(_average_name)] | None = None
    on: Literal["train", "held_out"] = "train"
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    optimizer: Optimizer = "sgd"
    lr: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["steps", "cosine", "constant"]

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        own = cast(dict[str, Any], settings)
        name = own.get("optimizer", "adamw" if own.get("granularity") == "tensor" else "sgd")
        usual: dict[str, Any] = {"optimizer": name, "lr": 1e-3, "schedule": "cosine"}
        if name == "sgd":
            usual |= {"lr": 2.0, "momentum": 0.9, "weight_decay": 1e-5, "schedule": "steps"}
        unread = [key for key in own if key in cls.model_fields and key != "method"]
        if "like" in own:
            beside = [key for key in own if key in cls.model_fields and key != "like"]
            if beside:
                raise refuse(
                    beside[0],
                    found=f'{", ".join(beside)} beside like = "{own["like"]}"',
                    expected="like alone: nothing is trained",
                    remedy=f'remove {", ".join(beside)}; or remove like, and train from there: start = "{own["like"]}"',
                )
            usual["method"] = "mean"
        elif own.get("method") == "mean" and unread:
            raise refuse(
                unread[0],
                found=f'{", ".join(unread)} beside method = "mean"',
                expected='method = "mean" alone: nothing is trained',
                remedy=f'remove {", ".join(unread)}, or method = "mean"',
            )
        return {**usual, **own}

    @model_validator(mode="after")
    def _fits_together(self) -> AverageSection:
        if self.momentum and self.optimizer != "sgd":
            raise refuse(
                "momentum",
                found=f"momentum with {self.optimizer}",
                expected='it with optimizer = "sgd"',
                remedy="remove momentum, or change optimizer",
            )
        if "held_out" in self.model_fields_set and self.on != "held_out":
            raise refuse(
                "held_out",
                found=f'held_out beside on = "{self.on}"',
                expected='it beside on = "held_out"',
                remedy='add on = "held_out", or remove held_out',
            )
        return self

    def make(self, folder: Path) -> tithe.TWA:
        """The method over the history in a folder.

        Raises:
            TitheError: there is none, or it is damaged.
        """
        # Of an average that nothing trains the differences are never used: one bit each takes the least room.
        bits = 1 if self.method == "mean" else self.bits
        return tithe.TWA(tithe.History(folder), bits=bits, granularity=self.granularity, start=self.name)

    @property
    def name(self) -> str:
        """What the average is, before anything trains it."""
        return self.like or self.start


def check_ending(
    method: MethodSection,
    history: HistorySection | None,
    average: AverageSection | None,
    *,
    epochs: int | None,
    steps: int | None,
) -> None:
    """Refuse sections that do not fit the rest of a recipe.

    Args:
        method: of the run.
        history: its section, or None.
        average: its section, or None.
        epochs: of the run, where it counts them.
        steps: of the run, where it counts them.
    """
    if history is None:
        if average is not None:
            raise refuse(
                "average",
                found="[average] without [history]",
                expected="checkpoints to average",
                remedy="add a section [history]",
            )
        return
    if history.bits is not None and method.records_deltas:
        raise refuse(
            "history.bits",
            found=f"bits beside the method {method.name}",
            expected="none: its checkpoints are deltas, which hold what is trained, whole",
            remedy="remove bits",
        )
    if history.ema is not None and (history.bits is not None or method.records_deltas):
        raise refuse(
            "history.ema",
            found=f"ema beside {'bits' if history.bits is not None else f'the method {method.name}'}",
            expected="moving averages of all weights, whole",
            remedy="remove bits"
            if history.bits is not None
            else 'remove ema, and end with like = "cosine" or "linear"',
        )
    if average is not None and average.name.startswith("ema:") != (history.ema is not None):
        told = f'{"like" if average.like else "start"} = "{average.name}"'
        raise refuse(
            f"average.{'like' if average.like else 'start'}",
            found=f"{told} of {'weights as they were' if history.ema is None else 'moving averages'}",
            expected="an average of what [history] records",
            remedy="add [history] ema = [0.05, 0.10]" if history.ema is None else 'write "ema:0.08", or remove ema',
        )
    length = epochs if history.every == "epoch" else steps
    if length is not None and history.start > length:
        unit = "epochs" if history.every == "epoch" else "steps"
        raise refuse(
            "history.start",
            found=f"{history.start} in a run of {length} {unit}",
            expected="a start within the run, so that something is recorded",
            remedy="lower start",
        )
