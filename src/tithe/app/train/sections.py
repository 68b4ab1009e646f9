"""The sections of a recipe that every method shares: `[model]`, `[data]`, `[optimizer]`, `[run]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, model_validator

from tithe.app.section import Section, exactly_one, refuse
from tithe.app.train.cells import canonical
from tithe.app.train.decoding import check_encoding
from tithe.app.train.paths import check_path
from tithe.app.train.terms import KEYS, METRICS, TERMS, Terms

if TYPE_CHECKING:
    TaskName = Metric = str
else:
    TaskName, Metric = Literal[tuple(TERMS)], Literal[METRICS]

PathText = Annotated[str, AfterValidator(check_path)]


def _label_text(value: object) -> object:
    """Write a label as the rows have it: `labels = [0, 1]` means what `["0", "1"]` does."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    return canonical(value) if isinstance(value, str) else value


def _bare(value: object) -> str:
    """Take the blanks around a separator away, unless it is nothing else: pydantic would take those, too."""
    if not isinstance(value, str) or not value:
        raise refuse(None, found=repr(value), expected="what parts two classes", remedy='for example separator = ";"')
    return value.strip() or value


Label = Annotated[str, BeforeValidator(_label_text)]


class ModelSection(Section):
    """`[model]`: what is fine-tuned.

    Exactly one of `pretrained` (a Hugging Face id, a local folder, or `package:NAME/FOLDER` inside an installed Python
    package), `timm` (a timm name), `callable` (`package.module:callable`, called with `num_labels=`) and a table
    `scratch` (a configuration of transformers, with its `model_type`). `scratch = true` beside `pretrained` or `timm`
    takes the architecture alone, with fresh weights; `weights` is a file of weights to begin with instead (safetensors,
    or a state dict of torch), for every source but `pretrained`. `tokenizer` is a name as `pretrained` is, or "bytes".
    """

    pretrained: PathText | None = None
    timm: str | None = None
    callable: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")] | None = None
    tokenizer: PathText | None = None
    num_labels: Annotated[int, Field(ge=1)] | None = None
    head: tuple[str, ...] | None = None
    scratch: bool | dict[str, Any] = False
    weights: PathText | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if not isinstance(self.scratch, dict):
            exactly_one(self, "pretrained", "timm", "callable")
        elif given := self.given("pretrained", "timm", "callable"):
            raise refuse(
                "scratch",
                found=f"a configuration beside {given[0]}",
                expected="one of them",
                remedy=f"remove {given[0]}, or write scratch = true to take its architecture",
            )
        if self.weights is not None and self.pretrained is not None:
            raise refuse(
                "weights",
                found="weights beside pretrained",
                expected="the folder that holds them: pretrained alone",
                remedy="remove one of them",
            )
        if self.scratch is True and self.callable is not None:
            raise refuse(
                "scratch",
                found="scratch beside callable",
                expected="the callable alone: what it returns is trained",
                remedy="remove scratch",
            )
        return self


class DataSection(Section):
    """`[data]`: what it is fine-tuned on.

    Files (`train`, `validation`, `test`: TSV, CSV, JSONL, parquet, plain text, or a folder of class folders), a Hugging
    Face `dataset` (then the same three keys name its splits), or one `npz` of uint8 images (x_train,
    y_train, x_test, y_test). `encoding` is that of tables which are not UTF-8; `skip_bad` leaves out rows without a
    text or a label, and pictures that cannot be read. `messages` names a column of chats; `documents` says what one
    text of a text file is, and `packing` puts texts one after the other into rows of `max_length` tokens.
    """

    task: TaskName
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
    messages: Annotated[str, Field(min_length=1)] | None = None
    documents: Literal["file", "line", "paragraph"] = "file"
    packing: bool = False
    streaming: bool = False
    shuffle_buffer: Annotated[int, Field(ge=0)] | None = None
    separator: Annotated[str, PlainValidator(_bare)] = ","
    labels: Annotated[tuple[Label, ...], Field(min_length=2)] | None = None
    max_length: Annotated[int, Field(ge=2)] = 128
    max_target_length: Annotated[int, Field(ge=2)] = 128
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    split_seed: Annotated[int, Field(ge=0)] = 0
    image_size: Annotated[int, Field(ge=1)] | None = None
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def terms(self) -> Terms:
        """What may be said of the task."""
        return TERMS[self.task]

    @model_validator(mode="before")
    @classmethod
    def _usual_columns(cls, settings: Any) -> Any:
        match settings:
            case {"task": str(task)} if task in TERMS:
                return {**TERMS[task].columns, **cast(dict[str, Any], settings)}
            case _:
                return settings

    @model_validator(mode="after")
    def _keys_of_the_task(self) -> DataSection:
        """Refuse keys that this task does not read."""
        unread = sorted((self.model_fields_set & KEYS) - self.terms.keys)
        if unread:
            tasks = [name for name, terms in TERMS.items() if unread[0] in terms.keys]
            raise refuse(
                unread[0],
                found=f'{unread[0]} with task = "{self.task}"',
                expected=f"it with {' or '.join(tasks)}",
                remedy=f"remove {unread[0]}, or change task",
            )
        if self.messages is not None and "text" in self.model_fields_set and self.text != self.terms.columns["text"]:
            raise refuse("messages", found="text and messages", expected="one of them", remedy="keep one")
        return self

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
    def _streams_a_data_set(self) -> DataSection:
        if self.shuffle_buffer is not None and not self.streaming:
            raise refuse(
                "shuffle_buffer",
                found="shuffle_buffer without streaming",
                expected="it beside streaming = true; rows in memory are shuffled whole",
                remedy="remove shuffle_buffer",
            )
        if self.streaming and self.dataset is None:
            raise refuse(
                "streaming",
                found="streaming of files",
                expected="it of a data set",
                remedy='put the files into a folder, and name it: dataset = "FOLDER"',
            )
        if self.streaming and self.validation is None:
            raise refuse(
                "streaming",
                found="a stream without a validation split",
                expected="one, since no part of a stream can be held out",
                remedy='add validation = "..."',
            )
        return self

    @model_validator(mode="after")
    def _columns_differ(self) -> DataSection:
        columns = {"text": self.text, "text_pair": self.text_pair, "label": self.label}
        for key, other in (("label", "text"), ("text_pair", "text"), ("label", "text_pair")):
            if columns[key] == columns[other] and {key, other} <= self.terms.keys:
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
    """`[optimizer]`: which, and how its learning rate moves.

    `lr` is the highest rate of the schedule. Without it, `plan.suggest_lr` gives the one of adamw and adam.
    """

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] | None = None
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
        if self.lr is None and self.name == "sgd":
            raise refuse(
                None,
                found="no lr",
                expected="[optimizer] lr: none can be suggested for sgd",
                remedy='add [optimizer] lr, or set name = "adamw"',
            )
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
    """`[run]`: how long, how large, where to, and how often it is saved and looked at.

    After `patience` evaluations in which the first metric does not get better, the run ends.
    """

    epochs: Annotated[int, Field(ge=1)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 16
    accumulate: Annotated[int, Field(ge=1)] = 1
    eval_batch_size: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    output: PathText
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    evaluate_every: Annotated[int, Field(ge=1)] | None = None
    log_every: Annotated[int, Field(ge=1)] = 10
    workers: Annotated[int, Field(ge=0)] = 0
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    patience: Annotated[int, Field(ge=1)] | None = None
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _one_length(self) -> RunSection:
        exactly_one(self, "epochs", "steps")
        return self


class LogSection(Section):
    """`[log]`: trackers that a run is logged to, by the names that accelerate has for them, and the project there."""

    trackers: tuple[str, ...] = ("tensorboard",)
    project: Annotated[str, Field(min_length=1)] = "tithe"
