"""A training run written down: a TOML file, checked to the last key before anything is loaded."""

from __future__ import annotations

import contextlib
import copy
import difflib
import re
import tomllib
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, cast

from pydantic import Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import ErrorDetails

from tithe.app.methods import SECTIONS
from tithe.app.section import REFUSED, TABLES, MethodSection, Section, known_keys, refuse
from tithe.app.train.average_section import AverageSection, HistorySection, check_ending
from tithe.app.train.decoding import decode, kind_of, read_bytes
from tithe.app.train.locate import Lines, locate
from tithe.app.train.paths import exists, expand
from tithe.app.train.sections import DataSection, LogSection, ModelSection, OptimizerSection, RunSection
from tithe.app.train.slips import explain_toml
from tithe.app.train.terms import TERMS
from tithe.errors import TitheError

if TYPE_CHECKING:
    AnyMethod = MethodSection
else:
    AnyMethod = Union[tuple(dict.fromkeys(SECTIONS.values()))]  # noqa: UP007


class Recipe(Section):
    """One run: five sections or up to eight, all keys known, and the lines they stand on for later messages."""

    model: ModelSection
    data: DataSection
    method: Annotated[AnyMethod, Field(discriminator="name")]
    optimizer: OptimizerSection = OptimizerSection()
    run: RunSection
    log: LogSection = LogSection()
    history: HistorySection | None = None
    average: AverageSection | None = None
    _lines: Lines = PrivateAttr(default_factory=lambda: Lines("recipe"))
    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @model_validator(mode="before")
    @classmethod
    def _usual_optimizer(cls, settings: Any) -> Any:
        """Train a method as in its paper, as far as it is not told otherwise."""
        match settings:
            case {"method": {"name": str(name)}} if name in SECTIONS:
                told = cast(dict[str, Any], settings).get("optimizer", {})
            case _:
                return settings
        if not isinstance(told, dict):
            return settings
        own = cast(dict[str, Any], told)
        return {**settings, "optimizer": {**SECTIONS[name].usual_optimizer(own, settings.get("run")), **own}}

    @model_validator(mode="after")
    def _warmup_ends(self) -> Recipe:
        for unit in ("steps", "epochs"):
            warmup, length = getattr(self.optimizer, f"warmup_{unit}"), getattr(self.run, unit)
            if warmup is not None and length is not None and warmup >= length * (1 - self.method.finetuned):
                raise refuse(
                    f"optimizer.warmup_{unit}",
                    found=f"a warm-up of {warmup:g} {unit} in a run of {length}",
                    expected="a warm-up that ends before the run, so that lr is reached",
                    remedy=f"lower warmup_{unit}, or train for more {unit}",
                )
        return self

    @model_validator(mode="after")
    def _outputs_of_the_task(self) -> Recipe:
        told, terms = self.model.num_labels, self.data.terms
        if told is not None and (not terms.num_labels or (told != 1 and not terms.keys & {"labels"})):
            raise refuse(
                "model.num_labels",
                found=f"{told} outputs for {self.data.task}",
                expected="1" if terms.num_labels else "none: the outputs are the vocabulary",
                remedy="remove num_labels",
            )
        return self

    @model_validator(mode="after")
    def _metrics_of_the_task(self) -> Recipe:
        known = self.data.terms.metrics
        if wrong := [metric for metric in self.run.metrics or () if metric not in known]:
            raise refuse(
                "run.metrics",
                found=f"{wrong[0]} of {self.data.task}",
                expected=f"one of {', '.join(known)}",
                remedy="name one of them, or remove metrics",
            )
        return self

    @model_validator(mode="after")
    def _streams_have_no_end(self) -> Recipe:
        if not self.data.streaming:
            return self
        wrong: list[tuple[str, str, str]] = []
        if self.run.steps is None:
            wrong.append(("run.epochs", "epochs of a stream, whose end is not known", "count steps: steps = 1000"))
        if self.run.workers:
            wrong.append(("run.workers", "workers beside streaming", "remove workers"))
        if self.average is not None:
            wrong.append(("average", "[average] beside streaming", "remove [average]"))
        if self.method.holds_out is not None:
            wrong.append(("method.held_out", "a part of the rows held out of a stream", "remove streaming"))
        if self.method.prices_inputs and not self.data.packing:
            told = "a price of the largest row, which a stream does not show before"
            wrong.append(("method", told, "remove streaming, or make rows of one length (packing = true)"))
        for key, found, remedy in wrong:
            raise refuse(key, found=found, expected="what a stream allows", remedy=remedy)
        return self

    @model_validator(mode="after")
    def _losses_of_one_scale(self) -> Recipe:
        if self.method.compares_losses and self.run.precision == "fp16":
            raise refuse(
                "run.precision",
                found="fp16, whose losses are scaled by a number that changes",
                expected=f"losses as they are: {self.method.name} learns from their differences",
                remedy='set precision = "bf16"',
            )
        return self

    @model_validator(mode="after")
    def _ending_fits(self) -> Recipe:
        if self.average is not None and self.run.patience is not None:
            raise refuse(
                "run.patience",
                found="patience beside [average]",
                expected="one of them: an average is of checkpoints to the end of a run",
                remedy="remove patience",
            )
        check_ending(self.method, self.history, self.average, epochs=self.run.epochs, steps=self.run.steps)
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of a run; the first decides which checkpoint is the best."""
        return self.run.metrics or self.data.terms.usual

    @property
    def evaluated_at_once(self) -> int:
        """Rows of a batch in evaluation."""
        return self.run.eval_batch_size or self.data.terms.at_once or self.run.batch_size

    @property
    def folder(self) -> Path:
        """The folder that relative paths of the recipe start from."""
        return self._folder

    @property
    def output(self) -> Path:
        """The folder of the run's files."""
        return self._folder / expand(self.run.output)

    @property
    def data_folder(self) -> Path:
        """The folder that relative paths of `[data]` start from."""
        return self._folder if self.data.folder is None else self._folder / expand(self.data.folder)

    def place(self, *path: str) -> str:
        """Say where a key stands in the file, for a message."""
        return self._lines.place(*path)

    @contextlib.contextmanager
    def blamed(self, *path: str) -> Generator[None]:
        """Let a refusal inside the block name the key that it comes from."""
        try:
            yield
        except TitheError as error:
            place = f"{self.place(*path)}: {error.place}"
            raise TitheError(place, found=error.found, expected=error.expected, remedy=error.remedy) from error

    def data_path(self, key: Literal["train", "validation", "test", "npz"]) -> Path | None:
        """The file or folder that a key of `[data]` names, which must exist.

        Raises:
            TitheError: the path does not exist.
        """
        value = getattr(self.data, key)
        if value is None:
            return None
        path = self.data_folder / expand(value)
        if not exists(path):
            where = f"{self.data.folder!r} ([data] folder)" if self.data.folder is not None else "the recipe's folder"
            raise TitheError(
                self.place("data", key),
                found=f"no file or folder at {path}",
                expected=f"a path relative to {where}",
                remedy="correct the path, or give the folder with --data FOLDER",
            )
        return path

    def told(self) -> dict[str, Any]:
        """The keys that were told, with their values, as JSON data: what `parse_recipe` makes the same recipe of."""
        return self.model_dump(mode="json", exclude_unset=True)

    def settings(self) -> dict[str, Any]:
        """All keys of the sections that there are, with their values, as JSON data."""
        return {name: section for name, section in self.model_dump(mode="json").items() if section is not None}


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a TOML file.
        overrides: `section.key=value` settings that replace the file's; a value is TOML, or else a plain string.

    Raises:
        TitheError: the file is missing or not TOML, or a key is unknown, missing or of a wrong value; the message
                names the line.
    """
    path = Path(path)
    content = read_bytes(path)
    if (kind := kind_of(content)) is not None:
        raise TitheError(str(path), found=kind[0], expected="a recipe in TOML", remedy="check the path")
    text = decode(content, path.name).replace("\r\n", "\n")
    try:
        settings = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise explain_toml(text, path.name, error) from error
    except RecursionError as error:
        raise TitheError(
            path.name, found="brackets inside brackets without end", expected="TOML", remedy="close them"
        ) from error
    changed = [_override(settings, override) for override in overrides]
    lines = locate(text, path.name, changed)
    return _validate(settings, lines, path.resolve().parent)


def parse_recipe(settings: Mapping[str, Any], folder: str | Path = ".", overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe given as nested mappings, for use from Python.

    Args:
        settings: its sections.
        folder: that relative paths start from.
        overrides: as in `read_recipe`.

    Raises:
        TitheError: a key is unknown, missing or of a wrong value.
    """
    told = copy.deepcopy(dict(settings))
    changed = [_override(told, override) for override in overrides]
    return _validate(told, Lines("recipe", overridden=frozenset(changed)), Path(folder).resolve())


def _validate(settings: Mapping[str, Any], lines: Lines, folder: Path) -> Recipe:
    try:
        recipe = Recipe.model_validate(settings)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        # A misspelt key also leaves the right one missing: the misspelling is the one to report.
        raise _explain(min(faults, key=lambda fault: fault["type"] != "extra_forbidden"), lines) from error
    recipe._lines, recipe._folder = lines, folder  # pyright: ignore[reportPrivateUsage]
    return recipe


def _override(settings: dict[str, Any], override: str) -> tuple[str, ...]:
    key, equals, value = override.partition("=")
    parts = tuple(part.strip() for part in key.split("."))
    if not equals or len(parts) < 2 or not all(parts):
        raise TitheError(
            f"--set {override}",
            found="no section.key=value",
            expected="for example run.seed=1",
            remedy="add both parts",
        )
    table = settings
    for part in parts[:-1]:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise TitheError(
                f"--set {override}", found=f"{part} is a value", expected="a section", remedy="check the key"
            )
        table = cast(dict[str, Any], inner)
    try:
        table[parts[-1]] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[parts[-1]] = value
    return parts


_SECTIONS: Mapping[str, type[Section]] = {
    "model": ModelSection,
    "data": DataSection,
    "optimizer": OptimizerSection,
    "run": RunSection,
    "log": LogSection,
    "history": HistorySection,
    "average": AverageSection,
}


def _explain(error: ErrorDetails, lines: Lines) -> TitheError:
    path = [str(part) for part in error["loc"]]
    method = None
    if len(path) > 1 and path[0] == "method" and path[1] in SECTIONS:
        method, path = path[1], [path[0], *path[2:]]
    place, kind = lines.place(*path), error["type"]
    if kind == "extra_forbidden":
        known = _known(path, method)
        close = difflib.get_close_matches(path[-1], known, n=1)
        home = [name for name, section in _SECTIONS.items() if len(path) > 1 and path[-1] in section.model_fields]
        columns = {name: key for terms in TERMS.values() for key, name in terms.columns.items()}
        if path[0] == "data" and path[-1] in columns:
            key = columns[path[-1]]
            close, elsewhere = [], f'name the column by {key} = "{error["input"]}"'
        else:
            elsewhere = "remove it or correct its name"
        elsewhere = f"move it to [{home[0]}]" if home else elsewhere
        return TitheError(
            place,
            found=f"unknown key {path[-1]!r}",
            expected=f"one of {', '.join(known)}",
            remedy=f"did you mean {close[0]}?" if close and not home else elsewhere,
        )
    if kind in {"missing", "union_tag_not_found"}:
        name = "name" if kind == "union_tag_not_found" else path[-1]
        section = path if kind == "union_tag_not_found" else path[:-1]
        thing = f"[{section[0]}] {name}" if section else f"section [{name}]"
        return TitheError(lines.place(*section), found=f"no {name}", expected=thing, remedy=f"add {thing}")
    if kind == REFUSED:
        said = error.get("ctx", {})
        place = place if said["key"] is None else lines.place(*path, *said["key"].split("."))
        return TitheError(place, found=said["found"], expected=said["expected"], remedy=said["remedy"])
    expected = error["msg"].removeprefix("Input should be ").replace("valid tuple", "list")
    if kind == "union_tag_invalid":
        place, expected = lines.place("method", "name"), "one of " + ", ".join(map(repr, SECTIONS))
        error["input"] = cast(Mapping[str, Any], error["input"]).get("name")
    if kind == "string_pattern_mismatch":
        expected = "package.module:callable"
    return TitheError(
        place, found=repr(error["input"]), expected=expected, remedy=_corrected(kind, path[-1] if path else "", error)
    )


def _corrected(kind: str, key: str, error: ErrorDetails) -> str:
    """Say how to write a value of a wrong type."""
    value: object = error["input"]
    if kind == "string_type" and isinstance(value, int | float):
        return f'write {key} = "{value}"'
    if kind in {"tuple_type", "list_type"} and isinstance(value, str):
        return f'write {key} = ["{value}"]'
    if kind in {"float_parsing", "int_parsing"}:
        return "write a number, without quotes and units"
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))
        close = difflib.get_close_matches(str(value).lower(), known, n=1)
        return f'write {key} = "{close[0]}"' if close else "correct the value"
    return "correct the value"


def _known(path: Sequence[str], method: str | None) -> list[str]:
    if len(path) == 1:
        return list(Recipe.model_fields)
    if len(path) > 2 and path[1] in TABLES:
        return list(TABLES[path[1]].model_fields)
    section = SECTIONS[method] if method is not None else _SECTIONS[path[0]]
    return list(known_keys(section))
