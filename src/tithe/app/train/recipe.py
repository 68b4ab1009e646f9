"""A training run written down: a TOML file, checked to the last key before anything is loaded."""

from __future__ import annotations

import contextlib
import difflib
import re
import tomllib
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, cast

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import ErrorDetails

from tithe.app.methods import SECTIONS
from tithe.app.section import REFUSED, TABLES, MethodSection, Section, exactly_one, known_keys, refuse
from tithe.app.train.average_section import AverageSection, HistorySection, check_ending
from tithe.app.train.cells import canonical
from tithe.app.train.decoding import check_encoding, decode, kind_of, read_bytes
from tithe.app.train.locate import Lines, locate
from tithe.app.train.paths import check_path, exists, expand
from tithe.app.train.slips import explain_toml
from tithe.errors import TitheError

if TYPE_CHECKING:
    AnyMethod = MethodSection
else:
    AnyMethod = Union[tuple(dict.fromkeys(SECTIONS.values()))]  # noqa: UP007

Task = Literal["text-classification", "text-regression", "image-classification"]
Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
PathText = Annotated[str, AfterValidator(check_path)]


def _label_text(value: object) -> object:
    """Write a label as the rows have it: `labels = [0, 1]` means what `["0", "1"]` does."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    return canonical(value) if isinstance(value, str) else value


Label = Annotated[str, BeforeValidator(_label_text)]


class ModelSection(Section):
    """`[model]`: what is fine-tuned.

    Exactly one of `pretrained` (a Hugging Face id, a local folder, or `package:NAME/FOLDER` inside an installed Python
    package), `timm` (a timm name) and `callable` (`package.module:callable`, called with `num_labels=`).
    """

    pretrained: PathText | None = None
    timm: str | None = None
    callable: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")] | None = None
    tokenizer: PathText | None = None
    num_labels: Annotated[int, Field(ge=1)] | None = None
    head: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        exactly_one(self, "pretrained", "timm", "callable")
        return self


class DataSection(Section):
    """`[data]`: what it is fine-tuned on.

    Files (`train`, `validation`, `test`: TSV, CSV, JSONL, parquet, or a folder of class folders), a Hugging Face
    `dataset` (then the same three keys name its splits), or one `npz` of uint8 images (x_train,
    y_train, x_test, y_test). `encoding` is that of tables which are not UTF-8; `skip_bad` leaves out rows without a
    text or a label, and pictures that cannot be read.
    """

    task: Task
    folder: PathText | None = None
    train: PathText | None = None
    validation: PathText | None = None
    test: PathText | None = None
    dataset: PathText | None = None
    config: str | None = None
    npz: PathText | None = None
    encoding: str | None = None
    skip_bad: bool = False
    text: Annotated[str, Field(min_length=1)] = "text"
    text_pair: Annotated[str, Field(min_length=1)] | None = None
    label: Annotated[str, Field(min_length=1)] = "label"
    labels: Annotated[tuple[Label, ...], Field(min_length=2)] | None = None
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
            exactly_one(self, "npz", "dataset")
        elif self.train is None:
            exactly_one(self, "train", "npz", "dataset")
        if self.npz is not None and (beside := self.given("train", "validation", "test")):
            raise refuse(
                beside[0],
                found=f"{beside[0]} beside npz",
                expected="all splits in the npz, as x_train, x_validation and x_test",
                remedy=f"remove {beside[0]}, and put its images into the npz",
            )
        if self.config is not None and self.dataset is None:
            raise refuse("config", found="config without dataset", expected="both", remedy="remove config")
        return self

    @model_validator(mode="after")
    def _columns_differ(self) -> DataSection:
        columns = {"text": self.text, "text_pair": self.text_pair, "label": self.label}
        for key, other in (("label", "text"), ("text_pair", "text"), ("label", "text_pair")):
            if columns[key] == columns[other] and self.task != "image-classification":
                raise refuse(
                    key,
                    found=f"{columns[key]!r} as {key} and as {other}",
                    expected="a column for each",
                    remedy=f"name another column as {key}",
                )
        return self

    @model_validator(mode="after")
    def _labels_differ(self) -> DataSection:
        twice = [label for label in self.labels or () if (self.labels or ()).count(label) > 1]
        if twice:
            raise refuse("labels", found=f"{twice[0]!r} twice", expected="each class once", remedy="remove one")
        return self

    @model_validator(mode="after")
    def _pixels_from_0_to_1(self) -> DataSection:
        """Refuse what would scale pixels twice, or divide them by nothing."""
        for key, values in (("mean", self.mean or ()), ("std", self.std or ())):
            wrong = next((value for value in values if not 0 <= value <= 1 or (key == "std" and value == 0)), None)
            if wrong is not None:
                divided = ", ".join(f"{value / 255:.4g}" for value in values)
                raise refuse(
                    key,
                    found=f"{wrong:g}",
                    expected="numbers from 0 to 1, as pixels are" + (", and none of them 0" if key == "std" else ""),
                    remedy=f"write {key} = [{divided}]" if wrong > 1 else f"remove {key}, and it is measured",
                )
        return self

    @model_validator(mode="after")
    def _encoding_known(self) -> DataSection:
        if self.encoding is not None and (wrong := check_encoding(self.encoding)) is not None:
            raise refuse(
                "encoding",
                found=wrong,
                expected='a name such as "cp1252", "latin-1" or "utf-16"',
                remedy="correct it, or remove it where the tables are UTF-8",
            )
        return self


class OptimizerSection(Section):
    """`[optimizer]`: which, and how its learning rate moves."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip: Annotated[float, Field(gt=0)] | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None

    @property
    def states(self) -> int:
        """How many tensors of a parameter's size it keeps."""
        return 2 if self.name != "sgd" else int(self.momentum > 0)

    @model_validator(mode="after")
    def _fits_together(self) -> OptimizerSection:
        if self.momentum and self.name != "sgd":
            raise refuse(
                "momentum",
                found=f"momentum with {self.name}",
                expected='it with name = "sgd"',
                remedy="remove momentum, or change name",
            )
        if len(self.given("warmup_steps", "warmup_epochs")) > 1:
            raise refuse(
                "warmup_epochs",
                found="warmup_steps and warmup_epochs",
                expected="at most one of them",
                remedy="keep one",
            )
        return self


class RunSection(Section):
    """`[run]`: how long, how large, where to, and how often it is saved and looked at."""

    epochs: Annotated[int, Field(ge=1)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 16
    accumulate: Annotated[int, Field(ge=1)] = 1
    eval_batch_size: Annotated[int, Field(ge=1)] = 64
    seed: Annotated[int, Field(ge=0)] = 0
    output: PathText
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    evaluate_every: Annotated[int, Field(ge=1)] | None = None
    log_every: Annotated[int, Field(ge=1)] = 10
    workers: Annotated[int, Field(ge=0)] = 0
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _one_length(self) -> RunSection:
        exactly_one(self, "epochs", "steps")
        return self


class Recipe(Section):
    """One run: five sections or up to seven, all keys known, and the lines they stand on for later messages."""

    model: ModelSection
    data: DataSection
    method: Annotated[AnyMethod, Field(discriminator="name")]
    optimizer: OptimizerSection
    run: RunSection
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
        usual = SECTIONS[name].usual_optimizer(own, settings.get("run"))
        # Where lr is missing too, the missing section is the one to report.
        return {**settings, "optimizer": {**usual, **own}} if own or "lr" in usual else settings

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
    def _one_output_for_a_value(self) -> Recipe:
        if self.data.task == "text-regression" and (self.model.num_labels or 1) != 1:
            raise refuse(
                "model.num_labels",
                found=f"{self.model.num_labels} outputs for text-regression",
                expected="1",
                remedy="remove num_labels",
            )
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
        check_ending(self.method, self.history, self.average, epochs=self.run.epochs, steps=self.run.steps)
        return self

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


_SECTIONS: Mapping[str, type[Section]] = {
    "model": ModelSection,
    "data": DataSection,
    "optimizer": OptimizerSection,
    "run": RunSection,
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
        elsewhere = f"move it to [{home[0]}]" if home else "remove it or correct its name"
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
