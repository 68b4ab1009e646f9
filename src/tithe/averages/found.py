"""Find the checkpoints at a path, and the files of a model in a folder: by their names and their first bytes alone.

A folder of checkpoints has a file or a folder for each; a link to one of them is that one. A folder that is one
checkpoint has the files of its model, maybe those of other models, and what else belongs to them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tithe.delta.source import PICKLES, find_shards
from tithe.errors import TitheError

_OF_A_RUN: Final = re.compile(
    r"(optimizer|optim|scheduler|lr_scheduler|scaler|sampler|dataloader|dl_state_dict|rng_state|random_states"
    r"|training_args|custom_checkpoint)(_\d+)*([._].*)?|.*_optim_states\.pt|(bf16_)?zero_pp_rank.*"
)
"""Names that Hugging Face's trainer, accelerate and DeepSpeed give files of a run beside the weights."""

_SAFE: Final = ("model.safetensors", "adapter_model.safetensors", "diffusion_pytorch_model.safetensors")
_PICKLED: Final = ("pytorch_model.bin", "adapter_model.bin", "diffusion_pytorch_model.bin")
"""What Hugging Face's libraries call the weights of a folder."""

_SAME_AGAIN: Final = re.compile(r"(pytorch_model|adapter_model|diffusion_pytorch_model|model)([-.].*)?")
"""Stems of pickles that have the weights of the safetensors file beside them."""

_OTHER_KINDS: Final = (".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".distcp")
PIPELINE: Final = "model_index.json"
_CONFIGURATIONS: Final = ("config.json", "adapter_config.json", PIPELINE)


@dataclass
class Found:
    """The checkpoints at a path.

    Args:
        paths: in the order of the numbers in their names.
        skipped: what else is there that looks like one → why it does not count.
    """

    paths: list[Path]
    skipped: dict[Path, str] = field(default_factory=dict[Path, str])


@dataclass
class Contents:
    """The files of a folder that is one checkpoint.

    Args:
        main: of the model: the safetensors files, or a file by `torch.save`.
        others: of further models, relative to the folder.
        copied: configuration, tokenizer and the like, relative to the folder.
        skipped: the rest → why it is left out.
    """

    main: tuple[Path, ...]
    others: list[Path] = field(default_factory=list[Path])
    copied: list[Path] = field(default_factory=list[Path])
    skipped: dict[Path, str] = field(default_factory=dict[Path, str])


def is_pickle(path: Path) -> bool:
    """Return whether a file was written by `torch.save`: by its first bytes, or its name where they say nothing."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        start = b""
    if start[8:] == b"{":
        return False
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return True
    return path.suffix in PICKLES or path.suffix == ".tar"


def find_checkpoints(path: Path) -> Found:
    """Find the checkpoints at a path.

    A folder that is one checkpoint itself is that one; else every subfolder with weights, and every file of weights.
    Of a checkpoint and links to it, one counts: a link to a file that is there as well, or a second name of a file.

    Args:
        path: a file, which is that one, or a folder.

    Raises:
        TitheError: when there are none, or the folder is a checkpoint and has others of its run in it.
    """
    if not path.is_dir():
        return Found([path])
    if (path / PIPELINE).is_file():
        return Found([path])
    inside = [one for one in _listed(path) if not one.name.startswith(".")]
    folders = [one for one in inside if one.is_dir() and _has_weights(one)]
    if is_checkpoint(path):
        others = [one.name for one in folders if re.fullmatch(r"checkpoint-\d+", one.name)]
        if others:
            raise TitheError(
                str(path),
                found=f"a checkpoint, and {len(others)} more in folders like {others[0]}",
                expected="one or the other",
                remedy="pass those to average one by one",
            )
        return Found([path])
    found = Found(folders)
    for one in inside:
        if not _looks_like_weights(one):
            continue
        if _of_a_run(one):
            found.skipped[one] = "state of a run, no weights"
        else:
            found.paths.append(one)
    if not found.paths:
        raise TitheError(
            str(path),
            found=f"{len(inside)} files and folders, none of them a checkpoint",
            expected="safetensors or .pt files, or folders with safetensors files",
            remedy="check the path, or pass the checkpoints themselves",
        )
    found.paths.sort(key=_natural)
    _leave_links_out(found)
    return found


def _of_a_run(path: Path) -> bool:
    stored = path.suffix in (".safetensors", ".tar", *PICKLES)
    return path.name == "trainer_state.json" or (stored and _OF_A_RUN.fullmatch(path.name) is not None)


def _looks_like_weights(path: Path) -> bool:
    """Whether a file counts as a checkpoint by its name, or has none that says and begins like one."""
    if path.is_dir():
        return False
    if path.suffix in (".safetensors", *PICKLES) or re.search(r"\.(pth|pt|ckpt|bin)\.tar$", path.name):
        return True
    return not path.suffix and path.is_file() and _begins_like_weights(path)


def _begins_like_weights(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    return start[8:] == b"{" or is_pickle(path)


def _leave_links_out(found: Found) -> None:
    """Keep one of the names of each file or folder: none that is a link, one with a number in it, or the first."""
    names: dict[tuple[int, int], list[Path]] = {}
    for path in found.paths:
        if path.exists():  # a link to nothing stays, and is refused when it is opened
            told = path.stat()
            names.setdefault((told.st_dev, told.st_ino), []).append(path)
    for same in names.values():
        kept = min(same, key=lambda path: (path.is_symlink(), not re.search(r"\d", path.name)))
        for path in same:
            if path is not kept:
                found.skipped[path] = f"a link to {kept.name}"
    found.paths = [path for path in found.paths if path not in found.skipped]


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is one checkpoint: weights under a library's name, or one file beside a configuration."""
    names = {path.name for path in _listed(folder)}
    if names & {*_SAFE, *_PICKLED, PIPELINE} or any(name.endswith(".safetensors.index.json") for name in names):
        return True
    return sum(name.endswith(".safetensors") for name in names) == 1 and bool(names & set(_CONFIGURATIONS))


def _has_weights(folder: Path) -> bool:
    return is_checkpoint(folder) or any(folder.glob("*.safetensors"))


def open_folder(folder: Path) -> Contents:
    """Tell the files of a folder that is one checkpoint apart.

    Args:
        folder: with the weights of a model, and what else belongs to it.

    Raises:
        TitheError: when it has none, or which of several is its model cannot be told.
    """
    main = _main(folder)
    contents = Contents(main)
    _sort_out(folder, folder, contents)
    return contents


@dataclass
class Pipeline:
    """The files of a folder with several models, each in a folder of its own.

    Args:
        models: the folders of those with weights, relative.
        copied: configuration, tokenizers and the like, relative.
        skipped: the rest → why it is left out.
    """

    models: list[str]
    copied: list[Path]
    skipped: dict[Path, str]


def open_pipeline(folder: Path) -> Pipeline:
    """Tell the models of a pipeline, as diffusers writes them, from what else is in it."""
    models = sorted(path.name for path in _listed(folder) if path.is_dir() and _has_weights(path))
    rest = Contents(tuple(folder / name for name in models))
    _sort_out(folder, folder, rest)
    return Pipeline(models, rest.copied, {**rest.skipped, **dict.fromkeys(rest.others, "no model of the pipeline")})


def _main(folder: Path) -> tuple[Path, ...]:
    if (folder / PIPELINE).is_file():
        models = open_pipeline(folder).models
        raise TitheError(
            str(folder),
            found=f"a pipeline of several models ({', '.join(models)})",
            expected="one model",
            remedy="name the folder of one of them; tithe.average takes pipelines as they are",
        )
    if not any(folder.glob("*.safetensors.index.json")):
        for name in _SAFE:
            if (folder / name).is_file():
                return (folder / name,)
        if not any(folder.glob("*.safetensors")):
            for name in _PICKLED:
                if (folder / name).is_file():
                    return (folder / name,)
    try:
        return find_shards(folder).files
    except OSError as error:  # names in a damaged index, which no file can have
        raise TitheError(
            str(folder),
            found=f"an index that cannot be read ({error.strerror})",
            expected="a shard index",
            remedy="download it again",
        ) from error


def _sort_out(folder: Path, root: Path, contents: Contents) -> None:
    """Put the files below a folder where they belong."""
    safe = any(folder.glob("*.safetensors"))
    for path in sorted(_listed(folder)):
        place = path.relative_to(root)
        if path.name.startswith(".") or path in contents.main:
            continue
        if path.is_dir() and path.is_symlink():
            contents.skipped[place] = "a link to a folder"
        elif path.is_dir():
            if not re.fullmatch(r"checkpoint-\d+", path.name):
                _sort_out(path, root, contents)
        elif _of_a_run(path):
            contents.skipped[place] = "state of a run, no weights"
        elif path.suffix == ".safetensors":
            contents.others.append(place)
        elif path.suffix in (*PICKLES, ".tar"):
            if safe and _SAME_AGAIN.fullmatch(path.stem):
                contents.skipped[place] = "the safetensors beside it once more"
            elif folder == root or path.name in _PICKLED:
                contents.others.append(place)
            else:
                contents.skipped[place] = "no weights by the names of a library"
        elif path.suffix in _OTHER_KINDS:
            contents.skipped[place] = f"a file of another kind ({path.suffix})"
        elif not (safe and path.name.endswith(".bin.index.json")):
            contents.copied.append(place)


def _listed(folder: Path) -> list[Path]:
    """What a folder holds.

    Raises:
        TitheError: when it cannot be read.
    """
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise TitheError(
            str(folder),
            found=f"a folder that cannot be read ({error.strerror})",
            expected="checkpoints",
            remedy="check its permissions",
        ) from error


def _natural(path: Path) -> list[str | int]:
    """Digits compare as numbers: checkpoint-500 comes before checkpoint-1000."""
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]
