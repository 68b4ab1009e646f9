"""The network of a run: from transformers, timm or a callable, with its head and its way of reading inputs."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tithe.app.train.data import Batch, Encoder, Examples, ImageEncoder, TextEncoder
from tithe.app.train.hub import NO_NETWORK, find_folder, is_reachable, no_retries
from tithe.app.train.images import Images
from tithe.app.train.paths import expand
from tithe.app.train.recipe import Recipe
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
    """

    model: nn.Module
    head: tuple[str, ...]
    encoder: Encoder

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
            self.model.config.save_pretrained(folder)
        if isinstance(self.encoder, TextEncoder):
            cast(Any, self.encoder.tokenizer).save_pretrained(folder)

    def save(self, folder: Path) -> None:
        """Write a folder that `from_pretrained` reads (a transformers model)."""
        self.save_extras(folder)
        with quiet():
            cast(Any, self.model).save_pretrained(folder)


def find_model(recipe: Recipe) -> None:
    """Check that the model's source is there, without loading it.

    Raises:
        TitheError: a folder, package or module is missing.
    """
    section = recipe.model
    if section.pretrained is not None:
        resolve(recipe, section.pretrained, "pretrained")
    if section.timm is not None and importlib.util.find_spec("timm") is None:
        raise TitheError(
            recipe.place("model", "timm"), found="no package timm", expected="it installed", remedy="pip install timm"
        )
    if section.callable is not None:
        _callable(recipe)
    is_text = recipe.data.task != "image-classification"
    if is_text and section.pretrained is None and section.tokenizer is None:
        raise TitheError(
            recipe.place("model"), found="no tokenizer", expected="one for a text task", remedy='add tokenizer = "..."'
        )


def resolve(recipe: Recipe, name: str, key: str) -> str:
    """Turn a recipe's model name into a folder, or leave it as an id of the Hugging Face hub.

    `package:NAME/FOLDER` is a folder inside an installed Python package, found without importing it; a path is relative
    to the recipe.

    Raises:
        TitheError: the package or folder is missing.
    """
    place = recipe.place("model", key)
    if name.startswith("package:"):
        package, _, inner = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        roots = list(spec.submodule_search_locations or ()) if spec is not None else []
        if not roots:
            raise TitheError(
                place, found=f"no package {package!r}", expected="an installed package", remedy=f"pip install {package}"
            )
        folder = Path(roots[0]) / inner
        if not folder.is_dir():
            raise TitheError(
                place,
                found=f"no folder {folder}",
                expected=f"a folder inside the package {package}",
                remedy="correct the path",
            )
        return str(folder)
    folder = find_folder(recipe, name, recipe.folder, "model", key)
    return name if folder is None else str(folder)


def build(recipe: Recipe, examples: Examples) -> Network:
    """Load or make the network, with an output for each label of the examples.

    Raises:
        TitheError: the model cannot be loaded, has no head that is known, or `head` matches nothing.
    """
    network = load(recipe, recipe.model.num_labels or max(1, len(examples.labels)), examples)
    network.set_labels(examples.labels)
    return network


def load(recipe: Recipe, num_labels: int, examples: Examples | None = None) -> Network:
    """Load or make the network with this many outputs; without examples, images are not normalised."""
    section, fresh = recipe.model, ()
    if section.pretrained is not None:
        model, fresh = _pretrained(recipe, num_labels)
    elif section.timm is not None:
        model = _timm(recipe, num_labels)
    else:
        model = call(recipe, num_labels)
    encoder = (
        _text_encoder(recipe, model)
        if recipe.data.task != "image-classification"
        else _image_encoder(recipe, model, examples)
    )
    return Network(model, find_head(recipe, model, fresh), encoder)


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Keep transformers' loading report away: what is fresh here is fresh on purpose."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _loading(recipe: Recipe, key: str, expected: str) -> Generator[None]:
    """Inside, a model or tokenizer is loaded by name: at once where there is no network, and without a report."""
    try:
        with quiet(), no_retries():
            yield
    # Their readers raise what damaged files make them stumble over: SafetensorError, UnpicklingError, ImportError …
    except Exception as error:
        online = is_reachable()
        told = str(getattr(recipe.model, key))
        is_id = not told.startswith("package:") and not (recipe.folder / expand(told)).is_dir()
        found = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not online and is_id:
            found = f"{NO_NETWORK} {told!r} is no folder beside the recipe and was not downloaded before"
        raise TitheError(
            recipe.place("model", key),
            found=found,
            expected=expected,
            remedy="correct the name" + (", or connect to the network" if not online and is_id else ""),
        ) from error


def _pretrained(recipe: Recipe, num_labels: int) -> tuple[nn.Module, tuple[str, ...]]:
    import transformers

    name = resolve(recipe, recipe.model.pretrained or "", "pretrained")
    is_image = recipe.data.task == "image-classification"
    kind: Any = (
        transformers.AutoModelForImageClassification if is_image else transformers.AutoModelForSequenceClassification
    )
    with _loading(
        recipe,
        "pretrained",
        f"a model for {recipe.data.task}: a hub id (with network), a folder, or package:NAME/FOLDER",
    ):
        model, info = kind.from_pretrained(
            name, num_labels=num_labels, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32
        )
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    fresh = {*info["missing_keys"], *mismatched}
    return cast(nn.Module, model), tuple(key for key, _ in model.named_parameters() if key in fresh)


def _timm(recipe: Recipe, num_labels: int) -> nn.Module:
    timm: Any = importlib.import_module("timm")
    with _loading(recipe, "timm", "a name of timm.list_models()"):
        return timm.create_model(
            recipe.model.timm, pretrained=True, num_classes=num_labels, in_chans=recipe.data.channels
        )


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


def _text_encoder(recipe: Recipe, model: nn.Module) -> TextEncoder:
    import transformers

    key = "tokenizer" if recipe.model.tokenizer is not None else "pretrained"
    name = resolve(recipe, recipe.model.tokenizer or recipe.model.pretrained or "", key)
    with _loading(recipe, key, "a tokenizer"):
        tokenizer: Any = cast(Any, transformers.AutoTokenizer).from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise TitheError(
            recipe.place("model", key),
            found="a tokenizer without a token that pads or ends a text",
            expected="one, to make texts of a batch equally long",
            remedy='add "pad_token" to its tokenizer_config.json, or choose another with tokenizer = "..."',
        )
    if isinstance(model, transformers.PreTrainedModel):
        cast(Any, model.config).pad_token_id = tokenizer.pad_token_id
    return TextEncoder(tokenizer, _length(recipe, model))


def _length(recipe: Recipe, model: nn.Module) -> int:
    """How many tokens a text is cut to: as the recipe says, or else no more than the model has learned positions for.

    Raises:
        TitheError: the recipe says more than there are positions.
    """
    told, positions = recipe.data.max_length, _positions(model)
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


def _positions(model: nn.Module) -> int | None:
    """How many positions of a text a model has learned; None where they are computed."""
    counts: list[int] = []
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (own == "wpe" or ("posit" in own and "rel" not in own)):
            # Where a row of the table is padding, as in RoBERTa, positions begin after it.
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            counts.append(module.num_embeddings - int(getattr(module, "offset", offset)))
    return min(counts, default=None)


def _image_encoder(recipe: Recipe, model: nn.Module, examples: Examples | None) -> ImageEncoder:
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
    return ImageEncoder(mean, std, data.image_size or size)


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


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Run the model on a batch: (N, labels)."""
    inputs = batch["inputs"]
    output: Any = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return output if isinstance(output, Tensor) else output["logits"]


def answer(
    model: nn.Module, batches: Iterable[Batch], *, progress: Callable[[int], None] = lambda done: None
) -> Tensor:
    """Run the model on batches in evaluation mode, in which it is left.

    Args:
        model: the network.
        batches: on its device.
        progress: called with the number of samples of each batch when it is done.

    Returns:
        (N, labels) on the CPU, float32; empty without a batch.
    """
    outputs: list[Tensor] = []
    model.eval()
    with torch.no_grad():
        for batch in batches:
            outputs.append(logits(model, batch).float().cpu())
            progress(len(batch["labels"]))
    return torch.cat(outputs) if outputs else torch.empty(0)


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a batch."""
    return F.cross_entropy(logits(model, batch), batch["labels"])


def regression_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of a batch."""
    return F.mse_loss(logits(model, batch).squeeze(-1), batch["labels"])
