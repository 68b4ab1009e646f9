"""The network of a recipe as a subject: its configuration is read, its weights are not."""

from __future__ import annotations

import difflib
import importlib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tithe.app.price.subject import Subject
from tithe.app.train import Recipe, parse_recipe, read_recipe
from tithe.app.train.encoders import is_text, load_tokenizer
from tithe.app.train.models import call, configuration, find_head, find_model
from tithe.app.train.sources import quiet, resolve
from tithe.app.train.tasks import task_of
from tithe.errors import TitheError
from tithe.ledger import Blank

_TOKENS, _LABELS = 128, 2
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the inputs look like, as far as it is given; the rest is the model's own.

    Args:
        image: channels, height and width of an image.
        tokens: length of a text.
        labels: outputs of the head.
        language_model: the loss is that of every next token, and there is no head.
        dtype: "float32", "bfloat16", "float16" or "float64".
    """

    image: tuple[int, int, int] | None = None
    tokens: int | None = None
    labels: int | None = None
    language_model: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.image is not None and (self.tokens is not None or self.language_model):
            raise TitheError(
                "inputs", found="an image and tokens", expected="one of the two", remedy="drop --image or --tokens"
            )
        if self.dtype not in _DTYPES:
            raise TitheError(
                "dtype", found=repr(self.dtype), expected=" or ".join(_DTYPES), remedy="for example --dtype bfloat16"
            )

    @classmethod
    def parse_image(cls, text: str) -> tuple[int, int, int]:
        """The numbers of "3x224x224".

        Raises:
            TitheError: it is something else.
        """
        match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)[x×]([1-9]\d*)", text.strip().lower())
        if match is None:
            raise TitheError(
                "--image", found=repr(text), expected="channels x height x width", remedy="--image 3x224x224"
            )
        return int(match[1]), int(match[2]), int(match[3])


def outline(model: str, shape: Shape, settings: Sequence[str] = ()) -> Subject:
    """The subject behind a model's name.

    Args:
        model: a recipe (`.toml`); a folder with a `config.json`, or `package:NAME/FOLDER` in an installed package; a
            transformers model type such as "vit" in its default size; an id of the Hugging Face hub that was
            downloaded; `timm:NAME`; or `package.module:callable`, called with `num_labels=`.
        shape: what the inputs look like.
        settings: "KEY=VALUE" for a model's configuration, or "section.key=value" for a recipe.

    Raises:
        TitheError: there is no such model, or its inputs cannot be told.
    """
    if model.endswith(".toml"):
        recipe = read_recipe(model, settings)
        return _timm_or_callable(recipe, model, shape) or _pretrained(recipe, shape, ())
    timm = model.removeprefix("timm:") if model.startswith("timm:") else None
    is_callable = timm is None and re.fullmatch(r"[\w.]+:[\w.]+", model) is not None
    key = "timm" if timm is not None else "callable" if is_callable else "pretrained"
    is_image = shape.image is not None or (key == "timm" and shape.tokens is None)
    recipe = parse_recipe(
        {
            # A callable's texts need no tokenizer here; the key only says that it is known.
            "model": {key: timm or model, **({"tokenizer": "none"} if is_callable else {})},
            "data": {"task": "image-classification" if is_image else "text-classification", "train": "none"},
            "method": {"name": "full"},
            "optimizer": {"lr": 1e-3},
            "run": {"epochs": 1, "output": "none"},
        }
    )
    if settings and key != "pretrained":
        raise TitheError(
            f"--set {settings[0]}",
            found=f"a {key} model",
            expected="a model with a configuration",
            remedy="leave --set out",
        )
    return _timm_or_callable(recipe, model, shape) or _pretrained(recipe, shape, settings, free=True)


def _timm_or_callable(recipe: Recipe, name: str, shape: Shape) -> Subject | None:
    section = recipe.model
    if section.pretrained is not None or isinstance(section.scratch, dict):
        return None
    find_model(recipe)
    labels = shape.labels or _told_labels(recipe) or _LABELS
    if recipe.data.train != "none" and not recipe.data.terms.num_labels:
        labels = len(load_tokenizer(recipe)[0])
    image, tokens = _inputs(recipe, shape)
    channels = 3 if image is None else image[0]

    def build() -> nn.Module:
        if section.timm is None:
            return call(recipe, labels)
        try:
            return importlib.import_module("timm").create_model(
                section.timm, pretrained=False, num_classes=labels, in_chans=channels
            )
        except (RuntimeError, ValueError) as error:
            raise TitheError(
                section.timm, found=str(error), expected="a name of timm.list_models()", remedy="correct it"
            ) from error

    if section.timm is not None:
        image = image or (3, 224, 224)
    if image is None and tokens is None:
        raise TitheError(
            name,
            found="a model that does not say what its inputs look like",
            expected="their shape",
            remedy="give --image 3x224x224 or --tokens 128",
        )
    loss = task_of(recipe).loss
    return _subject(recipe, name, build, image, tokens, loss, shape, labels)


def _told_labels(recipe: Recipe) -> int | None:
    """The outputs of the head, as far as a recipe tells: classes that only the data tell are not known."""
    told, terms = recipe.model.num_labels or len(recipe.data.labels or ()), recipe.data.terms
    return told or (1 if terms.num_labels and "labels" not in terms.keys else None)


def _inputs(recipe: Recipe, shape: Shape) -> tuple[tuple[int, ...] | None, int | None]:
    data = recipe.data
    if data.task != "image-classification":
        return None, shape.tokens or (data.max_length if recipe.data.train != "none" else None)
    size = data.image_size
    return shape.image or (None if size is None else (data.channels, size, size)), None


def _subject(
    recipe: Recipe,
    name: str,
    build: Callable[[], nn.Module],
    image: tuple[int, ...] | None,
    tokens: int | None,
    loss: Callable[[nn.Module, Any], Tensor],
    shape: Shape,
    outputs: int,
) -> Subject:
    def batch(num_samples: int) -> dict[str, Any]:
        labels = task_of(recipe).blank_targets(recipe.data, num_samples, tokens or _TOKENS, outputs)
        if image is not None:
            return {"inputs": torch.empty(num_samples, *image), "labels": labels}
        ids = torch.ones(num_samples, tokens or _TOKENS, dtype=torch.int64)
        return {"inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "labels": labels}

    subject = Subject(name=name, build=build, batch=batch, loss=loss, dtype=_DTYPES[shape.dtype])
    if loss is _next_token_loss:
        return subject
    return replace(subject, head=find_head(recipe, subject.make(Blank()), ()))


def _next_token_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return model(**batch["inputs"], labels=batch["inputs"]["input_ids"]).loss


def _pretrained(recipe: Recipe, shape: Shape, settings: Sequence[str], *, free: bool = False) -> Subject:
    import transformers

    name, is_scratch = recipe.model.pretrained or "", isinstance(recipe.model.scratch, dict)
    if is_scratch:
        find_model(recipe)
        name, tokenizer = "scratch", load_tokenizer(recipe)[0] if is_text(recipe) else None
        config = configuration(recipe, _told_labels(recipe) or _LABELS, tokenizer)
    else:
        config = _configuration(recipe, name, settings, types=free)
    fits_images = _has(config, "image_size") or _has(config, "num_channels")
    is_image = recipe.data.task == "image-classification" or (
        free and shape.tokens is None and not shape.language_model and fits_images
    )
    if is_image and recipe.data.task != "image-classification":
        recipe = _as_images(recipe)
    task, labels = task_of(recipe), shape.labels or _told_labels(recipe)
    if labels is not None:
        config.num_labels = labels
    for key, value in task.settings.items():
        setattr(config, key, value)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # what a tokenizer would set; the texts here have no padding
    kind: Any = getattr(transformers, "AutoModelForCausalLM" if shape.language_model else task.architecture)

    def build() -> nn.Module:
        try:
            with quiet():
                return kind.from_config(config, dtype=torch.get_default_dtype())
        except (ValueError, TypeError, ImportError) as error:
            raise TitheError(
                name,
                found=str(error).strip().splitlines()[0],
                expected=f"a configuration that {kind.__name__} can build",
                remedy="give --image, --tokens or --language-model as the model takes it, or correct --set",
            ) from error

    image, tokens = _inputs(recipe, shape)
    if is_image and image is None:
        image = _image_of(config)
    loss = _next_token_loss if shape.language_model else task.loss
    return _subject(recipe, name, build, image, tokens, loss, shape, config.num_labels)


def _as_images(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"task": "image-classification"})})


def _has(config: Any, key: str) -> bool:
    return key in config.to_dict()


def _image_of(config: Any) -> tuple[int, int, int]:
    values = config.to_dict()
    size = values.get("image_size")
    height, width = (size, size) if isinstance(size, int) else tuple(size) if size is not None else (224, 224)
    return int(values.get("num_channels", 3)), height, width


def _configuration(recipe: Recipe, name: str, settings: Sequence[str], *, types: bool) -> Any:
    import transformers

    kinds: list[str] = list(transformers.CONFIG_MAPPING.keys())
    values: dict[str, Any] = {"model_type": name}
    known_type = types and name in kinds and not Path(name).is_dir()
    if not known_type:
        found = resolve(recipe, name, "pretrained")
        values = _read(recipe, found, sorted(kinds) if types else [])
    kind = values.pop("model_type", None)
    if kind not in kinds:
        raise TitheError(
            name,
            found=f"model_type {kind!r} in its config.json",
            expected="a model type that the installed transformers knows",
            remedy="upgrade transformers, or name the model as package.module:callable",
        )
    known = transformers.AutoConfig.for_model(kind).to_dict()
    changed = dict(_setting(setting, name, known) for setting in settings)
    try:
        return transformers.AutoConfig.for_model(kind, **{**values, **changed})
    except (TypeError, ValueError) as error:
        raise TitheError(
            f"--set {' '.join(settings)}" if settings else name,
            found=str(error).strip().splitlines()[0],
            expected=f"values that a {kind} model takes",
            remedy="correct the value",
        ) from error


def _setting(setting: str, name: str, known: Mapping[str, Any]) -> tuple[str, Any]:
    key, equals, value = (part.strip() for part in setting.partition("="))
    if not equals or key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        raise TitheError(
            f"--set {setting}",
            found=f"no key {key!r} in the configuration of {name}" if equals else "no KEY=VALUE",
            expected="for example hidden_size=256",
            remedy=f"did you mean {close[0]}?" if close else "correct the key",
        )
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _read(recipe: Recipe, found: str, types: Sequence[str]) -> dict[str, Any]:
    import transformers

    reason = "no configuration of that name"
    try:
        with quiet():
            values, _ = transformers.PretrainedConfig.get_config_dict(found, local_files_only=True)
        if values:
            return dict(values)
    except (OSError, ValueError) as error:
        if Path(found).is_dir():
            reason = str(error).strip().splitlines()[0]
    close = difflib.get_close_matches(found, types, n=1)
    raise TitheError(
        recipe.place("model", "pretrained") if not types else found,
        found=reason,
        expected="a folder with a config.json, a model type such as vit, an id of the Hugging Face hub that was "
        "downloaded, a recipe.toml, timm:NAME, or package.module:callable",
        remedy=f"did you mean {close[0]}?" if close else f"correct the name, or `hf download {found} config.json`",
    )
