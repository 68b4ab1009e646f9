"""Images and a class number, from a `.npz` file of uint8 arrays or from a folder of class folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from tithe.app.train.recipe import Recipe
from tithe.errors import TitheError

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}


@dataclass(frozen=True)
class Images:
    """One split of images: an array in memory, or files that are read when they are needed.

    Args:
        source: the file or folder to name in messages.
        pixels: uint8 of shape (N, H, W) or (N, H, W, 3), or None where the images are files.
        files: one path an image, where they are files.
        label: the class of each image: its folder's name, its name in `classes`, or its number as a string.
        channels: 3 for colour, 1 for grey.
    """

    source: str
    pixels: np.ndarray[Any, Any] | None
    files: tuple[Path, ...]
    label: tuple[str, ...]
    channels: int

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
        """
        from PIL import Image

        if self.pixels is None:
            with Image.open(self.files[row]) as file:
                return self._fit(file, size or 224)
        return self._fit(Image.fromarray(self.pixels[row]), size)

    def _fit(self, image: Any, size: int | None) -> torch.Tensor:
        mode = "RGB" if self.channels == 3 else "L"
        image = image if image.mode == mode else image.convert(mode)
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), 2)  # 2 is bilinear
        pixels = np.array(image).reshape(image.height, image.width, self.channels)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def read_npz(recipe: Recipe, path: Path) -> dict[str, Images]:
    """Read the splits train, validation and test of a `.npz` file, as far as they are there.

    Arrays `x_train`, `x_validation`, `x_test` are uint8 of shape (N, H, W) or (N, H, W, 3); `y_…` are class numbers;
    `classes` holds their names, where it is there.

    Raises:
        TitheError: an array is missing or of another type or shape.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [str(name) for name in file["classes"]] if "classes" in file.files else None
            arrays = {name: file[name] for name in file.files if name[:2] in {"x_", "y_"}}
    except (ValueError, OSError) as error:
        raise TitheError(
            recipe.place("data", "npz"), found=str(error), expected="a .npz file of numbers", remedy="check the file"
        ) from error
    splits: dict[str, Images] = {}
    for split in ("train", "validation", "test"):
        if f"x_{split}" in arrays and f"y_{split}" in arrays:
            splits[split] = _arrays(recipe, path.name, split, arrays[f"x_{split}"], arrays[f"y_{split}"], names)
        elif split == "train":
            raise TitheError(
                recipe.place("data", "npz"),
                found=f"arrays {', '.join(arrays) or 'none'} in {path.name}",
                expected="x_train and y_train",
                remedy="save the file with numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)",
            )
    return splits


def read_folder(recipe: Recipe, split: str, path: Path) -> Images:
    """List the images of a folder with one subfolder for each class.

    Not by `datasets`: it takes a folder called "test" or "train" for a split, whatever is in it.

    Raises:
        TitheError: there is no class folder, or a class folder holds no image.
    """
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir()) if path.is_dir() else []
    if not folders:
        raise TitheError(
            recipe.place("data", split),
            found=f"no class folders in {path}",
            expected="a folder with one subfolder of images for each class",
            remedy="move the images of each class to a folder of its name",
        )
    files: list[Path] = []
    for folder in folders:
        images = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
        if not images:
            raise TitheError(
                recipe.place("data", split), found=f"no image in {folder}", expected="at least one", remedy="remove it"
            )
        files += images
    return Images(path.name, None, tuple(files), tuple(file.parent.name for file in files), recipe.data.channels)


def read_hub_images(recipe: Recipe, split: str, name: str) -> Images:
    """Read one split of a Hugging Face image data set into memory, with its first image column.

    Raises:
        TitheError: the data set has no image column or no label column.
    """
    from tithe.app.train.tables import load_hub_split

    rows = load_hub_split(recipe, split, name)
    kinds = {column: type(feature).__name__ for column, feature in rows.features.items()}
    image = next((column for column, kind in kinds.items() if kind == "Image"), None)
    if image is None or recipe.data.label not in kinds:
        raise TitheError(
            recipe.place("data", "label" if image is not None else "dataset"),
            found=f"columns {', '.join(f'{column} ({kind})' for column, kind in kinds.items())}",
            expected=f"an image column and a label column {recipe.data.label!r}",
            remedy='set label = "..." in [data]',
        )
    side = recipe.data.image_size or 224
    pixels = np.stack([np.asarray(picture.convert("RGB").resize((side, side))) for picture in rows[image]])
    names = cast("list[str] | None", getattr(rows.features[recipe.data.label], "names", None))
    labels: tuple[str, ...] = tuple(
        str(value) if names is None else names[value] for value in cast("list[int]", rows[recipe.data.label])
    )
    return Images(f"{recipe.data.dataset} ({name})", pixels, (), labels, recipe.data.channels)


def _arrays(
    recipe: Recipe, source: str, split: str, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], names: list[str] | None
) -> Images:
    if x.dtype != np.uint8 or x.ndim not in {3, 4} or (x.ndim == 4 and x.shape[-1] not in {1, 3}) or len(x) == 0:
        raise TitheError(
            recipe.place("data", "npz"),
            found=f"x_{split} in {source} of type {x.dtype} and shape {tuple(x.shape)}",
            expected="uint8 of shape (N, H, W), (N, H, W, 1) or (N, H, W, 3)",
            remedy="convert the array",
        )
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
        raise TitheError(
            recipe.place("data", "npz"),
            found=f"y_{split} in {source} of type {y.dtype} and shape {tuple(y.shape)}",
            expected=f"{len(x)} class numbers",
            remedy="convert the array",
        )
    if names is not None and (int(y.min()) < 0 or int(y.max()) >= len(names)):
        raise TitheError(
            f"{source}: y_{split}",
            found=f"class {int(y.max() if int(y.max()) >= len(names) else y.min())}",
            expected=f"0 to {len(names) - 1}, the {len(names)} names in `classes`",
            remedy="correct the array",
        )
    pixels = np.ascontiguousarray(x[..., 0]) if x.ndim == 4 and x.shape[-1] == 1 else x
    label = tuple(str(int(value)) if names is None else names[int(value)] for value in y)
    return Images(source, pixels, (), label, recipe.data.channels)
