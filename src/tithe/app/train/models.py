"""The network of a run: from transformers, timm or a callable, with its head and its way of reading inputs."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from tithe.app.train.data import Examples
from tithe.app.train.encoders import BYTES, image_encoder, is_text, load_tokenizer, text_encoder
from tithe.app.train.paths import expand
from tithe.app.train.recipe import Recipe
from tithe.app.train.rows import Batch
from tithe.app.train.sources import loading, quiet, resolve
from tithe.app.train.tasks import task_of
from tithe.app.train.tasks.base import Encoder, Task
from tithe.errors import TitheError

Loss = Callable[[nn.Module, Batch], Tensor]

_HEADS = ("classifier.*", "score.*", "classification_head.*", "head.*", "heads.*", "fc.*", "output.*")


@dataclass(frozen=True)
class Network:
    """A model with what is needed to feed and to save it.

    Args:
        model: the module.
        head: names of the parameters of its task head.
        encoder: makes its inputs.
        notes: what the user should know of how it was made.
    """

    model: nn.Module
    head: tuple[str, ...]
    encoder: Encoder
    notes: tuple[str, ...] = ()

    def set_labels(self, labels: Sequence[str]) -> None:
        """Write the class names into the configuration of a transformers model; others have no place for them."""
        import transformers

        if isinstance(self.model, transformers.PreTrainedModel) and labels:
            config: Any = self.model.config
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: number for number, label in enumerate(labels)}

    def save_extras(self, folder: Path) -> None:
        """Write configuration and tokenizer, as far as there are any, to a folder."""
        import transformers

        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, transformers.PreTrainedModel):
            config: Any = copy.deepcopy(self.model.config)
            if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
                config.use_cache = True  # off only while blocks run again
            config.save_pretrained(folder)
        if self.encoder.tokenizer is not None:
            self.encoder.tokenizer.save_pretrained(folder)

    def save(self, folder: Path) -> None:
        """Write all of it: a folder that `from_pretrained` reads, or the weights of another model in one file."""
        import transformers

        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, transformers.PreTrainedModel):
            with quiet():
                cast(Any, self.model).save_pretrained(folder)
        else:
            safetensors.torch.save_model(self.model, str(folder / "model.safetensors"))
        self.save_extras(folder)


def find_model(recipe: Recipe) -> None:
    """Check that the model's source is there, without loading it.

    Raises:
        TitheError: a folder, package or module is missing.
    """
    section = recipe.model
    if section.pretrained is not None:
        resolve(recipe, section.pretrained, "pretrained")
    if section.weights is not None and not (recipe.folder / expand(section.weights)).is_file():
        raise TitheError(
            recipe.place("model", "weights"),
            found=f"no file {recipe.folder / expand(section.weights)}",
            expected="a file relative to the recipe",
            remedy="correct the path",
        )
    if section.timm is not None and importlib.util.find_spec("timm") is None:
        raise TitheError(
            recipe.place("model", "timm"), found="no package timm", expected="it installed", remedy="pip install timm"
        )
    if section.callable is not None:
        _callable(recipe)
    if is_text(recipe) and section.pretrained is None and section.tokenizer is None:
        raise TitheError(
            recipe.place("model"),
            found="no tokenizer",
            expected="one for a text task",
            remedy=f'add tokenizer = "...", or "{BYTES}", which needs no file',
        )


def build(recipe: Recipe, examples: Examples) -> Network:
    """Load or make the network, with an output for each label of the examples.

    Raises:
        TitheError: the model cannot be loaded, has no head that is known, or `head` matches nothing.
    """
    network = load(recipe, task_of(recipe).num_outputs(recipe, examples.labels), examples)
    network.set_labels(examples.labels)
    return network


def load(recipe: Recipe, num_labels: int, examples: Examples | None = None) -> Network:
    """Load or make the network with this many outputs; without examples, images are not normalised."""
    fresh: tuple[str, ...] = ()
    if recipe.model.pretrained is not None and recipe.model.scratch is False:
        model, fresh = _pretrained(recipe, num_labels)
        tokenizer, notes = load_tokenizer(recipe) if is_text(recipe) else (None, ())
    else:
        tokenizer, notes = load_tokenizer(recipe) if is_text(recipe) else (None, ())
        model = _made(recipe, num_labels, tokenizer)
        if recipe.model.weights is not None:
            left = start_from(recipe, model, find_head(recipe, model, ()))
            notes = (*notes, *left)
    encoder = text_encoder(recipe, tokenizer, model) if is_text(recipe) else image_encoder(recipe, model, examples)
    return Network(model, find_head(recipe, model, fresh), encoder, notes)


def _pretrained(recipe: Recipe, num_labels: int) -> tuple[nn.Module, tuple[str, ...]]:
    import transformers

    name, task = resolve(recipe, recipe.model.pretrained or "", "pretrained"), task_of(recipe)
    kind: Any = getattr(transformers, task.architecture)
    told = {"num_labels": num_labels} if task.terms.num_labels else {}
    with loading(
        recipe,
        "pretrained",
        f"a model for {recipe.data.task}: a hub id (with network), a folder, or package:NAME/FOLDER",
    ):
        model, info = kind.from_pretrained(
            name,
            **told,
            **task.settings,
            ignore_mismatched_sizes=task.needs_head,
            output_loading_info=True,
            dtype=torch.float32,
        )
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    fresh = {*info["missing_keys"], *mismatched}
    return cast(nn.Module, model), tuple(key for key, _ in model.named_parameters() if key in fresh)


def start_from(recipe: Recipe, model: nn.Module, head: Sequence[str]) -> tuple[str, ...]:
    """Write the weights of the file that `[model] weights` names into a model; its head may stay as it is.

    Args:
        recipe: names the file.
        model: the network.
        head: parameters that the file need not have, or may have in another shape.

    Returns:
        What the user should know of it.

    Raises:
        TitheError: the file cannot be read, or lacks a tensor that is not of the head.
    """
    place, told = recipe.place("model", "weights"), recipe.model.weights or ""
    file = recipe.folder / expand(told)
    try:
        if file.suffix == ".safetensors":
            found: Any = safetensors.torch.load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    # Damaged files make their readers raise anything: SafetensorError, UnpicklingError, EOFError …
    except Exception as error:
        raise TitheError(
            place,
            found=f"{file}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}",
            expected="a safetensors file, or a state dict that torch.save wrote",
            remedy="correct the path, or write the file again",
        ) from error
    for key in ("state_dict", "model"):  # as training scripts wrap it
        if isinstance(found, dict) and isinstance(cast("dict[str, Any]", found).get(key), dict):
            found = found[key]
    own, kept = model.state_dict(), list[str]()
    with torch.no_grad():
        for name, tensor in own.items():
            given = found.get(name) if isinstance(found, dict) else None
            if isinstance(given, Tensor) and given.shape == tensor.shape:
                tensor.copy_(given)
                continue
            if name not in head:
                shape = f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else "not in the file"
                raise TitheError(
                    place,
                    found=f"{name} {shape} ({file.name})",
                    expected=f"it of shape {tuple(tensor.shape)}, as in the model",
                    remedy="name the file of this model, or another model",
                )
            kept.append(name)
    unread = sorted(set(found) - set(own))
    notes = [f"weights: {', '.join(kept)} of the head begin afresh"] if kept else []
    notes += (
        [f"weights: {len(unread)} tensors of {file.name} are not in the model, such as {unread[0]}"] if unread else []
    )
    return tuple(notes)


def _made(recipe: Recipe, num_labels: int, tokenizer: Any) -> nn.Module:
    """A model that is not loaded by transformers."""
    if recipe.model.timm is not None:
        return _timm(recipe, num_labels)
    if recipe.model.callable is not None:
        return call(recipe, num_labels if task_of(recipe).terms.num_labels else len(tokenizer))
    return from_scratch(recipe, num_labels, tokenizer)


def _timm(recipe: Recipe, num_labels: int) -> nn.Module:
    timm: Any = importlib.import_module("timm")
    with loading(recipe, "timm", "a name of timm.list_models()"):
        return timm.create_model(
            recipe.model.timm,
            pretrained=recipe.model.scratch is False and recipe.model.weights is None,
            num_classes=num_labels,
            in_chans=recipe.data.channels,
        )


def from_scratch(recipe: Recipe, num_labels: int, tokenizer: Any) -> nn.Module:
    """A model of transformers with fresh weights, which the run's seed decides.

    Args:
        recipe: whose `[model] scratch` is a configuration, or true beside a `pretrained` of which nothing else is read.
        num_labels: outputs of its head, where the task has one.
        tokenizer: of the run; its vocabulary is the model's where the configuration does not say another.

    Raises:
        TitheError: there is no such model, or a key of the configuration is none of its own.
    """
    import transformers

    kind: Any = getattr(transformers, task_of(recipe).architecture)
    config, place = configuration(recipe, num_labels, tokenizer), recipe.place("model", "scratch")
    try:
        with quiet():
            return kind.from_config(config, dtype=torch.float32)
    # Configurations raise what their own checks do: ValueError, TypeError, ZeroDivisionError …
    except Exception as error:
        raise TitheError(
            place,
            found=(str(error).strip().splitlines() or [type(error).__name__])[0],
            expected=f"a configuration of which {kind.__name__} makes a model",
            remedy="correct the numbers, or take another model_type",
        ) from error


def configuration(recipe: Recipe, num_labels: int, tokenizer: Any) -> Any:
    """The configuration of a model with fresh weights, of transformers; the arguments are those of `from_scratch`.

    Raises:
        TitheError: there is no such model, or a key of the configuration is none of its own.
    """
    import transformers

    task, told = task_of(recipe), recipe.model.scratch
    own: dict[str, Any] = dict(task.settings) | ({"num_labels": num_labels} if task.terms.num_labels else {})
    if isinstance(told, bool):
        name = resolve(recipe, recipe.model.pretrained or "", "pretrained")
        with loading(
            recipe, "pretrained", "a configuration: a hub id (with network), a folder, or package:NAME/FOLDER"
        ):
            config: Any = transformers.AutoConfig.from_pretrained(name, **own)
    else:
        config = _configuration(recipe, told, own)
        if tokenizer is not None:
            _complete(config, told, tokenizer)
    return config


def _complete(config: Any, told: Mapping[str, Any], tokenizer: Any) -> None:
    """Let a configuration have the vocabulary and the special tokens of a tokenizer, but for what it was told."""
    values = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "forced_eos_token_id": tokenizer.eos_token_id,
    }
    for key, value in values.items():
        if key not in told and value is not None and key in config.to_dict():
            setattr(config, key, value)
    if config.is_encoder_decoder and "decoder_start_token_id" not in told:
        config.decoder_start_token_id = tokenizer.pad_token_id  # as in T5, whose configuration knows no default


def _configuration(recipe: Recipe, told: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    import transformers

    place, kinds = recipe.place("model", "scratch"), list(transformers.CONFIG_MAPPING.keys())
    kind = told.get("model_type")
    if kind not in kinds:
        close = difflib.get_close_matches(str(kind), kinds, n=1)
        raise TitheError(
            place,
            found=f"model_type {kind!r}",
            expected='a type that the installed transformers knows, such as "llama"',
            remedy=f'did you mean "{close[0]}"?' if close else "correct it",
        )
    known: Any = transformers.CONFIG_MAPPING[kind]()
    keys = {*known.to_dict(), *known.attribute_map}
    for key in told:
        if key not in keys:
            close = difflib.get_close_matches(key, keys, n=1)
            raise TitheError(
                recipe.place("model", "scratch", key),
                found=f"{key!r}, which a {kind} configuration does not have",
                expected="keys of that configuration",
                remedy=f"did you mean {close[0]}?" if close else "correct its name, or remove it",
            )
    try:
        return transformers.AutoConfig.for_model(**{key: value for key, value in told.items() if key not in own}, **own)
    except Exception as error:
        raise TitheError(
            place,
            found=(str(error).strip().splitlines() or [type(error).__name__])[0],
            expected=f"values that a {kind} configuration takes",
            remedy="correct them",
        ) from error


def _callable(recipe: Recipe) -> Callable[..., object]:
    module, _, attribute = (recipe.model.callable or "").partition(":")
    place = recipe.place("model", "callable")
    # A script beside the recipe counts as importable.
    if str(recipe.folder) not in sys.path:
        sys.path.insert(0, str(recipe.folder))
    try:
        found: object = importlib.import_module(module)
    except ImportError as error:
        raise TitheError(
            place,
            found=str(error),
            expected="an installed module, or a script beside the recipe",
            remedy="correct the name",
        ) from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise TitheError(
            place,
            found=f"no callable {attribute!r} in {module}",
            expected="a function that returns a module",
            remedy="correct it",
        )
    return found


def call(recipe: Recipe, num_labels: int) -> nn.Module:
    """The network that `[model] callable` makes.

    Raises:
        TitheError: there is no such function, it does not take `num_labels=`, or it returns something else.
    """
    place = recipe.place("model", "callable")
    try:
        model = _callable(recipe)(num_labels=num_labels)
    except TypeError as error:
        raise TitheError(
            place, found=str(error), expected="a callable that takes num_labels=", remedy="add the argument"
        ) from error
    if not isinstance(model, nn.Module):
        raise TitheError(
            place, found=type(model).__name__, expected="an nn.Module returned", remedy="return the module"
        )
    return model


def find_head(recipe: Recipe, model: nn.Module, fresh: Sequence[str]) -> tuple[str, ...]:
    """Names of the parameters of the task head: the recipe's, or what is `fresh` or has a head's usual name.

    Raises:
        TitheError: a glob of the recipe matches nothing, or no head is known.
    """
    names = [name for name, _ in model.named_parameters()]
    if recipe.model.head is not None:
        for glob in recipe.model.head:
            if not fnmatch.filter(names, glob):
                raise TitheError(
                    recipe.place("model", "head"),
                    found=f"no parameter like {glob!r}",
                    expected=f"names such as {', '.join(names[-4:])}",
                    remedy="correct the glob",
                )
        return tuple(name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in recipe.model.head))
    if not task_of(recipe).needs_head:
        return tuple(name for name in names if name in fresh)
    known = next((found for glob in _HEADS if (found := fnmatch.filter(names, glob))), [])
    head = {*fresh, *known}
    if not head:
        raise TitheError(
            recipe.place("model"),
            found=f"no head of a known name ({', '.join(_HEADS)})",
            expected="the parameters that are new to this task",
            remedy=f'add head = ["..."], for example from {", ".join(names[-4:])}',
        )
    return tuple(name for name in names if name in head)


def checkpoint_gradients(recipe: Recipe, model: Any) -> None:
    """Let a model run its blocks again in the backward pass, so that it keeps no more than their inputs.

    Raises:
        TitheError: it has no such switch.
    """
    import transformers

    place = recipe.place("run", "gradient_checkpointing")
    refusal = TitheError(
        place,
        found=f"{type(model).__name__}, which cannot run its blocks again",
        expected="a model of transformers or timm that supports gradient checkpointing",
        remedy="remove gradient_checkpointing, or call torch.utils.checkpoint in the model itself",
    )
    if isinstance(model, transformers.PreTrainedModel):
        if not model.supports_gradient_checkpointing:
            raise refusal
        # transformers renamed it; the old name warns where there is a new one.
        switch: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        switch({"use_reentrant": False})
        cast(Any, model.config).use_cache = False  # what is kept of keys and values is of no use in training
    elif recipe.model.timm is not None:
        importlib.import_module("timm.layers").set_reentrant_ckpt(False)
        try:
            model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise refusal from error
    else:
        raise refusal


def answer(
    task: Task, model: nn.Module, batches: Iterable[Batch], *, progress: Callable[[int], None] = lambda done: None
) -> Tensor:
    """Run the model on batches in evaluation mode, in which it is left.

    Args:
        task: of the run.
        model: the network.
        batches: on its device.
        progress: called with the number of samples of each batch when it is done.

    Returns:
        The task's tally (N, width) on the CPU; empty without a batch.
    """
    tallies: list[Tensor] = []
    model.eval()
    with torch.no_grad():
        for batch in batches:
            tallies.append(task.tally(model, batch).cpu())
            progress(len(batch["labels"]))
    return torch.cat(tallies) if tallies else torch.empty(0)


def score(recipe: Recipe, tally: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """The recipe's metrics of a split, from the tally of all its samples."""
    task = task_of(recipe)
    return {name: task.score(name, tally, classes) for name in recipe.metrics}
