"""Whether model and data fit together, tried once before training: the inputs, the outputs, the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tithe.app.train.data import Samples, to_device
from tithe.app.train.models import Network
from tithe.app.train.recipe import Recipe
from tithe.app.train.rows import Batch
from tithe.app.train.tasks import task_of
from tithe.errors import TitheError


def check_fits(
    recipe: Recipe, network: Network, samples: Mapping[str, Samples], num_classes: int, device: torch.device
) -> None:
    """Run the model on the largest example of every split, and compare what it gives with what the data asks for.

    Modes, buffers and random states are as before.

    Args:
        recipe: the run.
        network: its model, on the device.
        samples: every split.
        num_classes: in the data; 0 for a regression.
        device: where the model is.

    Raises:
        TitheError: the model does not take the inputs, or has another number of outputs; it names both numbers.
    """
    model = network.model
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [device] if device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            for split, rows in samples.items():
                largest = rows.largest
                (batch,) = rows.batches([[largest, 0 if largest else len(rows) - 1]])
                _check_batch(recipe, model, split, to_device(batch, device), num_classes)
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _check_batch(recipe: Recipe, model: nn.Module, split: str, batch: Batch, num_classes: int) -> None:
    inputs = batch["inputs"]
    _check_tokens(recipe, model, inputs)
    try:
        task_of(recipe).check(recipe, model, batch, num_classes)
    except TitheError:
        raise
    # A model of the user's own may raise anything.
    except Exception as error:
        raise _unfit(recipe, model, split, inputs, error) from error


def _check_tokens(recipe: Recipe, model: nn.Module, inputs: Mapping[str, Tensor] | Tensor) -> None:
    """Compare the tokens with the rows of the embedding: a GPU says of a wrong index no more than that it asserted."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)() if ids is not None else None
    if ids is None or not isinstance(embedding, nn.Embedding) or int(ids.max()) < embedding.num_embeddings:
        return
    raise TitheError(
        recipe.place("model", "tokenizer" if recipe.model.tokenizer is not None else "pretrained"),
        found=f"token {int(ids.max())}, and a model with {embedding.num_embeddings} tokens",
        expected="the tokenizer that the model was trained with",
        remedy='set tokenizer = "..." in [model]',
    )


def _unfit(
    recipe: Recipe, model: nn.Module, split: str, inputs: Mapping[str, Tensor] | Tensor, error: Exception
) -> TitheError:
    said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    if isinstance(inputs, Tensor):
        channels, taken = recipe.data.channels, _channels(model)
        if taken is not None and taken != channels:
            return TitheError(
                recipe.place("data", "channels"),
                found=f"images of {channels} channel{'s' * (channels > 1)}, and a model that takes {taken}",
                expected="as many in both",
                remedy=f"set channels = {taken} in [data]" if taken in {1, 3} else "use a model that takes 1 or 3",
            )
        return TitheError(
            recipe.place("data", "image_size"),
            found=f"{said} on images of shape {tuple(inputs.shape)}, of {split}",
            expected="images as the model takes them",
            remedy="set image_size (pixels a side) and channels in [data] to what the model takes",
        )
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
    return TitheError(
        recipe.place("model"),
        found=f"{said} on {shapes}, of {split}",
        expected="a model that takes what its tokenizer gives, and returns logits",
        remedy="lower max_length in [data] where the text is too long; else use the model's own tokenizer",
    )


def _channels(model: nn.Module) -> int | None:
    """The channels of the images that a model takes, as far as its first convolution tells."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return None
