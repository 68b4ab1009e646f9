"""How a run's rows become inputs: the tokenizer of a text model, or the size and the statistics of images."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tithe.app.train.data import Examples
from tithe.app.train.images import Images
from tithe.app.train.recipe import Recipe
from tithe.app.train.sources import loading, resolve
from tithe.app.train.tasks import task_of
from tithe.app.train.tasks.base import Encoder
from tithe.app.train.tasks.image_classification import ImageEncoder
from tithe.app.train.tasks.text import TextTask
from tithe.errors import TitheError

BYTES = "bytes"
"""The name of the tokenizer that needs no file: a token for each byte of UTF-8, and three that begin, end and pad."""


def is_text(recipe: Recipe) -> bool:
    """Whether the inputs of a run are texts."""
    return isinstance(task_of(recipe), TextTask)


def load_tokenizer(recipe: Recipe) -> tuple[Any, tuple[str, ...]]:
    """Load the tokenizer of a run, with a token that pads; and say where that token is another one.

    Raises:
        TitheError: it cannot be loaded, or has neither a token that pads nor one that ends a text.
    """
    import transformers

    if recipe.model.tokenizer == BYTES:
        return transformers.ByT5Tokenizer(extra_ids=0), ()
    key = "tokenizer" if recipe.model.tokenizer is not None else "pretrained"
    name = resolve(recipe, recipe.model.tokenizer or recipe.model.pretrained or "", key)
    with loading(recipe, key, f'a tokenizer, or tokenizer = "{BYTES}", which needs no file'):
        tokenizer: Any = cast(Any, transformers.AutoTokenizer).from_pretrained(name)
    if tokenizer.pad_token is not None:
        return tokenizer, ()
    if tokenizer.eos_token is None:
        raise TitheError(
            recipe.place("model", key),
            found="a tokenizer without a token that pads or ends a text",
            expected="one, to make texts of a batch equally long",
            remedy='add "pad_token" to its tokenizer_config.json, or choose another with tokenizer = "..."',
        )
    tokenizer.pad_token = tokenizer.eos_token
    told = (
        f"the tokenizer has no token that pads: {tokenizer.eos_token!r}, which ends a text, pads, and is masked there"
    )
    return tokenizer, (told,)


def text_encoder(recipe: Recipe, tokenizer: Any, model: nn.Module) -> Encoder:
    """How the texts of a run become batches for a model.

    Raises:
        TitheError: the tokenizer or the model cannot take what the recipe says.
    """
    import transformers

    task = task_of(recipe)
    assert isinstance(task, TextTask)
    if isinstance(model, transformers.PreTrainedModel):
        cast(Any, model.config).pad_token_id = tokenizer.pad_token_id
    return task.encoder(recipe, tokenizer, _length(recipe, model))


def _length(recipe: Recipe, model: nn.Module) -> int:
    """How many tokens a text is cut to: as the recipe says, or else no more than the model has learned positions for.

    Raises:
        TitheError: the recipe says more than there are positions.
    """
    told, positions = recipe.data.max_length, learned_positions(model)
    if positions is None or told <= positions:
        return told
    if "max_length" in recipe.data.model_fields_set:
        raise TitheError(
            recipe.place("data", "max_length"),
            found=f"{told} tokens, and a model with {positions} learned positions",
            expected=f"at most {positions}",
            remedy=f"set max_length = {positions} in [data]",
        )
    return positions


def learned_positions(model: nn.Module) -> int | None:
    """How many positions of a text a model has learned; None where they are computed."""
    counts: list[int] = []
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (own == "wpe" or ("posit" in own and "rel" not in own)):
            # Where a row of the table is padding, as in RoBERTa, positions begin after it.
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            counts.append(module.num_embeddings - int(getattr(module, "offset", offset)))
    return min(counts, default=None)


def image_encoder(recipe: Recipe, model: nn.Module, examples: Examples | None) -> ImageEncoder:
    """How the images of a run become batches for a model; without examples, none but the model's own statistics count.

    Raises:
        TitheError: the recipe gives another number of means or deviations than there are channels.
    """
    data = recipe.data
    mean, std, size = _expected_images(recipe, model)
    if not mean:
        mean, std = _statistics(recipe, examples)
    mean, std = data.mean or mean, data.std or std
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != data.channels:
            raise TitheError(
                recipe.place("data", key),
                found=f"{len(values)} numbers",
                expected=f"{data.channels}",
                remedy="one a channel",
            )
    return ImageEncoder(mean, std, data.image_size or size or _side(examples))


def _side(examples: Examples | None) -> int | None:
    """The side of the arrays that are trained on, where they are square: pictures that come later are resized to it."""
    images = None if examples is None else examples.splits["train"]
    if not isinstance(images, Images) or images.pixels is None:
        return None
    height, width = images.pixels.shape[1:3]
    return int(height) if height == width else None


def _expected_images(recipe: Recipe, model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...], int | None]:
    """Mean, deviation (empty: not known) and size of the images that the model was trained on."""
    import transformers

    if recipe.model.timm is not None:
        settings: Any = importlib.import_module("timm.data").resolve_model_data_config(model)
        return tuple(settings["mean"]), tuple(settings["std"]), settings["input_size"][-1]
    if not isinstance(model, transformers.PreTrainedModel):
        return (), (), None
    size: object = getattr(model.config, "image_size", None)
    file = Path(resolve(recipe, recipe.model.pretrained or "", "pretrained")) / "preprocessor_config.json"
    values: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    mean, std = tuple(values.get("image_mean", ())), tuple(values.get("image_std", ()))
    return mean, std, size if isinstance(size, int) else None


def _statistics(recipe: Recipe, examples: Examples | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = recipe.data.channels
    if examples is None:
        return (0.0,) * channels, (1.0,) * channels
    images = examples.splits["train"]
    assert isinstance(images, Images)
    # 512 images tell mean and deviation to about 1 %.
    rows = range(0, len(images.label), max(1, len(images.label) // 512))
    pixels_CP = torch.cat([images.decode(row, None).reshape(channels, -1) for row in rows], dim=1).double() / 255
    mean_C, std_C = pixels_CP.mean(dim=1), pixels_CP.std(dim=1).clamp_min(1e-3)
    return tuple(round(value, 6) for value in mean_C.tolist()), tuple(round(value, 6) for value in std_C.tolist())
