"""A training run written down: a TOML file, checked to the last key before anything is loaded."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from tithe.errors import TitheError
from tithe.train.locate import Lines, locate

Task = Literal["text-classification", "text-regression", "image-classification"]
Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, str_strip_whitespace=True)


def _exactly_one(section: _Section, *names: str) -> None:
    given = [name for name in names if getattr(section, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise PydanticCustomError(
            "exactly_one", "{found}|exactly one of {names}", {"found": found, "names": ", ".join(names)}
        )


class ModelSection(_Section):
    """`[model]`: what is fine-tuned.

    Exactly one of `pretrained` (a Hugging Face id, a local folder, or `package:NAME/FOLDER` inside an installed Python
    package), `timm` (a timm name) and `callable` (`package.module:callable`, called with `num_labels=`).
    """

    pretrained: str | None = None
    timm: str | None = None
    callable: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")] | None = None
    tokenizer: str | None = None
    num_labels: Annotated[int, Field(ge=1)] | None = None
    head: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        _exactly_one(self, "pretrained", "timm", "callable")
        return self


class DataSection(_Section):
    """`[data]`: what it is fine-tuned on.

    Files (`train`, `validation`, `test`: TSV, CSV, JSONL, parquet, or a folder of class folders), a Hugging Face
    `dataset` (then the same three keys name its splits), or one `npz` of uint8 images (x_train,
    y_train, x_test, y_test).
    """

    task: Task
    folder: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    dataset: str | None = None
    config: str | None = None
    npz: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] | None = None
    max_length: Annotated[int, Field(ge=2)] = 128
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    split_seed: Annotated[int, Field(ge=0)] = 0
    image_size: Annotated[int, Field(ge=1)] | None = None
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if self.npz is not None or self.dataset is not None:
            _exactly_one(self, "npz", "dataset")
        elif self.train is None:
            _exactly_one(self, "train", "npz", "dataset")
        return self


class Reselect(_Section):
    """`reselect = {every = 1, unit = "epochs"}`."""

    every: Annotated[int, Field(ge=1)]
    unit: Literal["steps", "epochs"] = "epochs"


class FishMethod(_Section):
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
        _exactly_one(self, "density", "k")
        return self


class DenseMethod(_Section):
    """`[method] name = "full"` or `"head"`: the ordinary fine-tuning that a method is compared with."""

    name: Literal["full", "head"]


class OptimizerSection(_Section):
    """`[optimizer]`: which, and how its learning rate moves."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip: Annotated[float, Field(gt=0)] | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0


class RunSection(_Section):
    """`[run]`: how long, how large, where to, and how often it is saved and looked at."""

    epochs: Annotated[int, Field(ge=1)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 16
    accumulate: Annotated[int, Field(ge=1)] = 1
    eval_batch_size: Annotated[int, Field(ge=1)] = 64
    seed: Annotated[int, Field(ge=0)] = 0
    output: str
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    evaluate_every: Annotated[int, Field(ge=1)] | None = None
    log_every: Annotated[int, Field(ge=1)] = 10
    workers: Annotated[int, Field(ge=0)] = 0
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _one_length(self) -> RunSection:
        _exactly_one(self, "epochs", "steps")
        return self


class Recipe(_Section):
    """One run: five sections, all keys known, and the lines they stand on for later messages."""

    model: ModelSection
    data: DataSection
    method: Annotated[FishMethod | DenseMethod, Field(discriminator="name")]
    optimizer: OptimizerSection
    run: RunSection
    _lines: Lines = PrivateAttr(default_factory=lambda: Lines("recipe"))
    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @property
    def folder(self) -> Path:
        """The folder that relative paths of the recipe start from."""
        return self._folder

    @property
    def output(self) -> Path:
        """The folder of the run's files."""
        return self._folder / self.run.output

    def place(self, *path: str) -> str:
        """Say where a key stands in the file, for a message."""
        return self._lines.place(*path)

    def data_path(self, key: Literal["train", "validation", "test", "npz"]) -> Path | None:
        """The file or folder that a key of `[data]` names, which must exist.

        Raises:
            TitheError: the path does not exist.
        """
        value = getattr(self.data, key)
        if value is None:
            return None
        base = self._folder if self.data.folder is None else self._folder / self.data.folder
        path = base / value
        if not path.exists():
            where = f"{self.data.folder!r} ([data] folder)" if self.data.folder is not None else "the recipe's folder"
            raise TitheError(
                self.place("data", key),
                found=f"no file or folder at {path}",
                expected=f"a path relative to {where}",
                remedy="correct the path, or give the folder with --data FOLDER",
            )
        return path

    def settings(self) -> dict[str, Any]:
        """All keys with their values, as JSON data."""
        return self.model_dump(mode="json")


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
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TitheError(
            str(path), found=error.strerror or "nothing", expected="a recipe in TOML", remedy="check the path"
        ) from error
    try:
        settings = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        place = f"{path.name} line {match[1]}" if match else f"{path.name} line {max(1, len(text.splitlines()))}"
        found = str(error).split(" (at ", maxsplit=1)[0]
        raise TitheError(
            place, found=found, expected="TOML", remedy='write `key = value`, texts in "quotes"'
        ) from error
    changed = [_override(settings, override) for override in overrides]
    lines = locate(text, path.name, changed)
    return _validate(settings, lines, path.resolve().parent)


def parse_recipe(settings: Mapping[str, Any], folder: str | Path = ".") -> Recipe:
    """Check a recipe given as nested mappings, for use from Python.

    Raises:
        TitheError: a key is unknown, missing or of a wrong value.
    """
    return _validate(settings, Lines("recipe"), Path(folder).resolve())


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


_SECTIONS: Mapping[str, Sequence[type[_Section]]] = {
    "model": (ModelSection,),
    "data": (DataSection,),
    "method": (FishMethod, DenseMethod),
    "optimizer": (OptimizerSection,),
    "run": (RunSection,),
}


def _explain(error: ErrorDetails, lines: Lines) -> TitheError:
    path = [str(part) for part in error["loc"]]
    method = None
    if len(path) > 1 and path[0] == "method" and path[1] in {"fish", "full", "head"}:
        method, path = path[1], [path[0], *path[2:]]
    place, kind = lines.place(*path), error["type"]
    if kind == "extra_forbidden":
        known = _known(path, method)
        close = difflib.get_close_matches(path[-1], known, n=1)
        return TitheError(
            place,
            found=f"unknown key {path[-1]!r}",
            expected=f"one of {', '.join(known)}",
            remedy=f"did you mean {close[0]}?" if close else "remove it or correct its name",
        )
    if kind in {"missing", "union_tag_not_found"}:
        name = "name" if kind == "union_tag_not_found" else path[-1]
        section = path if kind == "union_tag_not_found" else path[:-1]
        thing = f"[{section[0]}] {name}" if section else f"section [{name}]"
        return TitheError(lines.place(*section), found=f"no {name}", expected=thing, remedy=f"add {thing}")
    if kind == "exactly_one":
        found, _, expected = error["msg"].partition("|")
        return TitheError(
            place, found=found, expected=expected, remedy="add one" if found.startswith("none") else "keep one"
        )
    expected = error["msg"].removeprefix("Input should be ").replace("valid tuple", "list")
    if kind == "union_tag_invalid":
        place, expected = lines.place("method", "name"), "'fish', 'full' or 'head'"
        error["input"] = cast(Mapping[str, Any], error["input"]).get("name")
    if kind == "string_pattern_mismatch":
        expected = "package.module:callable"
    return TitheError(place, found=repr(error["input"]), expected=expected, remedy="correct the value")


def _known(path: Sequence[str], method: str | None) -> list[str]:
    if len(path) == 1:
        return list(_SECTIONS)
    if path[1] == "reselect" and len(path) > 2:
        return list(Reselect.model_fields)
    sections = _SECTIONS[path[0]]
    return list((sections[-1] if method in {"full", "head"} else sections[0]).model_fields)
