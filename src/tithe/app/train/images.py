"""Images and a class for each: from a folder of class folders, or a data set by name; `arrays` reads `.npz` files."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from tithe.app.train.cells import Fault, read_label
from tithe.app.train.hub import class_names, load_split
from tithe.app.train.pictures import SUFFIXES, UNREADABLE, is_hidden, is_picture, open_picture
from tithe.app.train.recipe import Recipe
from tithe.app.train.skipping import Unusable
from tithe.errors import TitheError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and how much there is."""

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
_CHECKED = "pictures.json"


@dataclass(frozen=True)
class Images:
    """One split of images: an array in memory, or files that are read when they are needed.

    Args:
        source: the file or folder to name in messages.
        pixels: uint8 of shape (N, H, W) or (N, H, W, 3), or None where the images are files.
        files: one path an image, where they are files.
        label: the class of each image: its folder's name, its name in `classes`, or its number as a string.
        channels: 3 for colour, 1 for grey.
        labelled: whether the images have labels.
        names: of all classes, in the data set's own order; empty where it has none.
        skipped: the images that were left out, each with the reason.
    """

    source: str
    pixels: np.ndarray[Any, Any] | None
    files: tuple[Path, ...]
    label: tuple[str, ...]
    channels: int
    labelled: bool = True
    names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def place(self, row: int) -> str:
        """Say which image, for a message."""
        return str(self.files[row]) if self.files else f"{self.source} image {row}"

    def take(self, rows: Sequence[int]) -> Images:
        """The same images, these only, in this order."""
        pixels = None if self.pixels is None else self.pixels[np.asarray(rows, dtype=np.int64)]
        files = tuple(self.files[row] for row in rows) if self.files else ()
        return replace(self, pixels=pixels, files=files, label=tuple(self.label[row] for row in rows))

    def decode(self, row: int, size: int | None) -> torch.Tensor:
        """One image as uint8 of shape (channels, H, W).

        Args:
            row: which image.
            size: side in pixels that it is resized to, or None to leave arrays as they are (files: 224).

        Raises:
            TitheError: its file can no longer be read.
        """
        from PIL import Image

        if self.pixels is not None:
            return self._fit(Image.fromarray(self.pixels[row]), size)
        try:
            return self._fit(open_picture(self.files[row]), size or 224)
        except ValueError as error:
            raise _bad_picture(str(self.files[row]), str(error)) from error

    def _fit(self, image: Any, size: int | None) -> torch.Tensor:
        mode = "RGB" if self.channels == 3 else "L"
        image = image if image.mode == mode else image.convert(mode)
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), 2)  # 2 is bilinear
        pixels = np.array(image).reshape(image.height, image.width, self.channels)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def read_folder(recipe: Recipe, split: str, path: Path, progress: Progress) -> Images:
    """List the images of a folder with one subfolder for each class, and open each once.

    Not by `datasets`: it takes a folder called "test" or "train" for a split, whatever is in it.

    Raises:
        TitheError: there is no class folder, a class folder holds no image, or an image cannot be read.
    """
    place = recipe.place("data", split)
    folders = [entry for entry in _visible(path) if entry.is_dir()] if path.is_dir() else []
    if not folders:
        raise TitheError(
            place,
            found=f"no class folders in {path}" if path.is_dir() else f"a file {path}",
            expected="a folder with one subfolder of images for each class",
            remedy="move the images of each class to a folder of its name"
            if path.is_dir()
            else "unpack it, and name the folder",
        )
    if {folder.name.casefold() for folder in folders} <= _SPLIT_NAMES and any(
        entry.is_dir() for folder in folders for entry in _visible(folder)
    ):
        own = next((folder.name for folder in folders if folder.name.startswith(split[:3])), folders[0].name)
        raise TitheError(
            place,
            found=f"the folders {', '.join(folder.name for folder in folders)} in {path}, which are splits",
            expected="a folder with one subfolder of images for each class",
            remedy=f"name the split's own folder, such as {getattr(recipe.data, split)}/{own}",
        )
    unusable = Unusable(recipe)
    if loose := [entry.name for entry in _visible(path) if not entry.is_dir() and is_picture(entry)]:
        unusable.add(
            TitheError(
                str(path / loose[0]),
                found="a picture beside the class folders, which has no class"
                + (f" ({len(loose)} of them)" if len(loose) > 1 else ""),
                expected="every picture in the folder of its class",
                remedy="move it",
            )
        )
    files: list[Path] = []
    for folder in folders:
        files += _class_files(place, folder)
    faults = _check(recipe, split, path, files, progress)
    for file, fault in faults.items():
        unusable.add(_bad_picture(file, fault))
    skipped = unusable.settle()
    files = [file for file in files if str(file) not in faults]
    if lost := [folder for folder in folders if not any(file.parent == folder for file in files)]:
        raise TitheError(
            place,
            found=f"no image in {lost[0]} that can be read: {skipped[0]}",
            expected="at least one",
            remedy="replace the pictures, or remove the folder",
        )
    label = tuple(file.parent.name for file in files)
    return Images(path.name, None, tuple(files), label, recipe.data.channels, skipped=skipped)


def read_pictures(recipe: Recipe, path: Path, progress: Progress) -> Images:
    """List pictures without classes: one file, or all that lie in a folder and in the folders inside it.

    Raises:
        TitheError: there is none, or one cannot be read.
    """
    inside = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in inside if is_picture(file) and not any(map(is_hidden, file.relative_to(path).parts))]
    if not files:
        raise TitheError(
            str(path),
            found="no picture",
            expected=f"a picture, or a folder of pictures ({', '.join(sorted(SUFFIXES))})",
            remedy="correct the path",
        )
    unusable, faults = Unusable(recipe), dict[str, str]()
    for done, file in enumerate(files, start=1):
        progress("opening the pictures", done, len(files))
        if (fault := _fault(file)) is not None:
            faults[str(file)] = fault
            unusable.add(_bad_picture(str(file), fault))
    skipped = unusable.settle()
    kept = tuple(file for file in files if str(file) not in faults)
    labels = ("",) * len(kept)
    return Images(path.name, None, kept, labels, recipe.data.channels, labelled=False, skipped=skipped)


def read_hub_images(recipe: Recipe, split: str, name: str, progress: Progress) -> Images:
    """Read one split of a Hugging Face image data set into memory, with its first image column.

    Raises:
        TitheError: the data set has no image column or no label column, or an image cannot be read.
    """
    import datasets

    rows = load_split(recipe, split, name)
    kinds = {column: type(feature).__name__ for column, feature in rows.features.items()}
    image = next((column for column, kind in kinds.items() if kind == "Image"), None)
    if image is None or (recipe.data.label not in kinds and split != "test"):
        raise TitheError(
            recipe.place("data", "label" if image is not None else "dataset"),
            found=f"columns {', '.join(f'{column} ({kind})' for column, kind in kinds.items())}",
            expected=f"an image column and a label column {recipe.data.label!r}",
            remedy='set label = "..." in [data]',
        )
    source, num = f"{recipe.data.dataset} ({name})", len(rows)
    names = class_names(rows.features.get(recipe.data.label))
    if system := [name for name in names if is_hidden(name)]:
        raise TitheError(
            recipe.place("data", "dataset"),
            found=f"a class {system[0]!r}, a folder of the system",
            expected="folders of the classes only",
            remedy="remove it, or name the folder as train = ..., which passes over such",
        )
    values = list(rows[recipe.data.label]) if recipe.data.label in kinds else [None] * num
    labels = [read_label(value, names, set(recipe.data.labels or ())) for value in values]
    labelled = not all(isinstance(label, Fault) and label.missing for label in labels)
    stored: Any = rows.cast_column(image, datasets.Image(decode=False))[image]
    side, unusable = recipe.data.image_size or 224, Unusable(recipe)
    kept: list[tuple[np.ndarray[Any, Any], str]] = []
    for row, (held, label) in enumerate(zip(stored, labels, strict=True)):
        progress(f"reading {split}", row, num)
        place = f"{source} image {row}"
        if isinstance(label, Fault) and labelled:
            unusable.add(TitheError(place, found=label.found, expected="a label", remedy="write the label"))
            continue
        try:
            if held is None:
                raise ValueError("nothing")
            picture = open_picture(held["bytes"] if held["bytes"] is not None else Path(held["path"]))
        except ValueError as error:
            unusable.add(_bad_picture(held["path"] if held and held["bytes"] is None else place, str(error)))
            continue
        pixels = np.asarray(picture.convert("RGB").resize((side, side)))
        kept.append((pixels, label if isinstance(label, str) else ""))
    skipped = unusable.settle()
    if not kept:
        raise TitheError(
            recipe.place("data", split), found=f"no image in {source}", expected="at least one", remedy="check the name"
        )
    return Images(
        source,
        np.stack([pixels for pixels, _ in kept]),
        (),
        tuple(label for _, label in kept),
        recipe.data.channels,
        labelled=labelled,
        names=names,
        skipped=skipped,
    )


def _bad_picture(place: str, fault: str) -> TitheError:
    return TitheError(place, found=fault, expected="a picture", remedy="replace or remove it")


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder and is not the system's, in order."""
    try:
        return sorted(entry for entry in folder.iterdir() if not is_hidden(entry.name))
    except OSError as error:
        raise TitheError(
            str(folder),
            found=(error.strerror or "no folder").lower(),
            expected="a folder that can be read",
            remedy="check that you may read it",
        ) from error


def _class_files(place: str, folder: Path) -> list[Path]:
    """The pictures of one class, those included that turn out not to be any."""
    entries = _visible(folder)
    files = [entry for entry in entries if is_picture(entry)]
    inside = [entry for entry in entries if entry.is_dir() and entry not in files]
    deeper = [entry for entry in inside if any(is_picture(file) for file in entry.rglob("*"))]
    if deeper:
        raise TitheError(
            place,
            found=f"pictures in folders inside the class folder {folder}: {', '.join(entry.name for entry in deeper)}",
            expected="the pictures of a class in its own folder",
            remedy="move them up into it, or name the folder that holds the class folders",
        )
    if all(file.suffix.lower() in UNREADABLE for file in files):
        endings = Counter(entry.suffix.lower() or "(none)" for entry in entries if not entry.is_dir())
        told = ", ".join(f"{count} ending in {ending}" for ending, count in endings.most_common(4))
        raise TitheError(
            place,
            found=f"no image in {folder}" + (f" that can be read, only files: {told}" if told else ""),
            expected=f"at least one file ending in {', '.join(sorted(SUFFIXES))}",
            remedy="convert them to JPEG or PNG" if endings else "remove it",
        )
    return files


def _check(recipe: Recipe, split: str, path: Path, files: Sequence[Path], progress: Progress) -> dict[str, str]:
    """Open every picture as training does; what was found is kept in the run's folder for when it is resumed.

    Returns:
        The files that are no pictures, with the reason.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            status = os.stat(file)
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        except OSError:
            digest.update(f"{file}\0\0".encode())
    key, store = f"{path} {digest.hexdigest()[:32]}", recipe.output / _CHECKED
    known = _known(store)
    if key in known:
        return dict(known[key])
    faults: dict[str, str] = {}
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # PIL's of large pictures and odd metadata: what it can read is read
        for done, (file, fault) in enumerate(zip(files, pool.map(_fault, files), strict=True), start=1):
            progress(f"opening the pictures of {split}", done, len(files))
            if fault is not None:
                faults[str(file)] = fault
    _remember(store, {**known, key: faults})
    return faults


def _fault(file: Path) -> str | None:
    if file.suffix.lower() in UNREADABLE and file.is_file():
        return f"a picture ending in {file.suffix}, which cannot be read here: convert it to JPEG or PNG"
    try:
        open_picture(file)
    except ValueError as error:
        return str(error)
    return None


def _known(store: Path) -> dict[str, Mapping[str, str]]:
    try:
        return cast("dict[str, Mapping[str, str]]", json.loads(store.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _remember(store: Path, found: Mapping[str, Mapping[str, str]]) -> None:
    """Write what was found, beside its place first; a run that cannot write says so itself, later."""
    partial = store.with_name(f"{store.name}.{os.getpid()}")
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(found), encoding="utf-8")
        os.replace(partial, store)
    except OSError:
        partial.unlink(missing_ok=True)
