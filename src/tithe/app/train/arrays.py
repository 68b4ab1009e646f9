"""Images of a `.npz` file: every array in it is one that is known, or the file is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tithe.app.train.images import Images
from tithe.app.train.recipe import Recipe
from tithe.errors import TitheError

_SPLITS = {"train": "train", "test": "test", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation")}
_ARRAY = re.compile(rf"([xy])_({'|'.join(_SPLITS)})")
_LIKE = re.compile(r"(^|[^a-z])(x|y|train\w*|val\w*|dev|test\w*|images?|labels?)($|[^a-z])")
_SAVE = "numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)"

Array = np.ndarray[Any, Any]


def read_npz(recipe: Recipe, path: Path) -> dict[str, Images]:
    """Read the splits train, validation and test of a `.npz` file, as far as they are there.

    Arrays `x_train`, `x_validation`, `x_test` are uint8 of shape (N, H, W) or (N, H, W, 3); `y_…` are class numbers;
    `classes` holds their names, where it is there.

    Raises:
        TitheError: an array is missing, not known, or of another type or shape.
    """
    arrays = _load(recipe, path)
    names = _names(recipe, path.name, arrays["classes"]) if "classes" in arrays else ()
    parts: dict[tuple[str, str], str] = {}
    for name in arrays:
        if match := _ARRAY.fullmatch(name):
            part = (match[1], _SPLITS[match[2]])
            if part in parts:
                raise _refused(recipe, f"both {parts[part]} and {name} in {path.name}", "one of them", "remove one")
            parts[part] = name
    if ("x", "train") not in parts or ("y", "train") not in parts:
        raise _refused(
            recipe,
            f"arrays {', '.join(arrays) or 'none'} in {path.name}",
            "x_train and y_train",
            f"save the file with {_SAVE}",
        )
    for name in arrays:
        if name != "classes" and name not in parts.values() and _LIKE.search(name.casefold()):
            raise _refused(
                recipe,
                f"an array {name!r} in {path.name}, which is not known",
                "x_ and y_ of train, validation and test, and classes",
                "rename it (x_validation, y_validation …), or leave it out of the file",
            )
    splits: dict[str, Images] = {}
    for split in ("train", "validation", "test"):
        x, y = parts.get(("x", split)), parts.get(("y", split))
        if x is None and y is not None:
            raise _refused(recipe, f"{y} without x_{split} in {path.name}", "both", f"add x_{split}, or remove {y}")
        if x is not None:
            splits[split] = _images(recipe, path.name, arrays, x, y, names)
    return splits


def _refused(recipe: Recipe, found: str, expected: str, remedy: str) -> TitheError:
    return TitheError(recipe.place("data", "npz"), found=found, expected=expected, remedy=remedy)


def _load(recipe: Recipe, path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as handle:  # numpy leaves its own open where the file is damaged
            file: Any = np.load(handle, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise _refused(
                    recipe,
                    f"one array of shape {tuple(file.shape)} (.npy) in {path.name}",
                    "a .npz file of numbers: several arrays, each with its name",
                    f"save it with {_SAVE}",
                )
            with file:
                return {str(name): file[name] for name in file.files}
    except TitheError:
        raise
    # numpy and zipfile raise what a damaged file makes them stumble over: BadZipFile, EOFError, MemoryError …
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "pickle" in said:
            said = "objects, which are never unpickled" if path.stat().st_size else "an empty file"
        if path.stat().st_size == 0:
            said = "an empty file"
        raise _refused(
            recipe, f"{said} in {path.name}", "a .npz file of numbers", f"save the file again, with {_SAVE}"
        ) from error


def _names(recipe: Recipe, source: str, classes: Array) -> tuple[str, ...]:
    if classes.ndim != 1 or classes.dtype.kind not in "USiu":
        raise _refused(
            recipe,
            f"classes in {source} of type {classes.dtype} and shape {tuple(classes.shape)}",
            "a list of texts",
            "save classes=numpy.array([...]) of texts",
        )
    names = tuple(
        (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)).strip()
        for value in classes.tolist()
    )
    if len(set(names)) < len(names) or not all(names):
        wrong = next((name for name in names if not name or names.count(name) > 1), "")
        raise _refused(
            recipe, f"{wrong!r} twice or empty in classes of {source}", "a name for each class", "correct classes"
        )
    return names


def _images(
    recipe: Recipe, source: str, arrays: Mapping[str, Array], x_name: str, y_name: str | None, names: tuple[str, ...]
) -> Images:
    x = arrays[x_name]
    if x.dtype != np.uint8 or x.ndim not in {3, 4} or (x.ndim == 4 and x.shape[-1] not in {1, 3}) or 0 in x.shape:
        raise _refused(
            recipe,
            f"{x_name} in {source} of type {x.dtype} and shape {tuple(x.shape)}" + _range(x),
            "uint8 of shape (N, H, W), (N, H, W, 1) or (N, H, W, 3)",
            _conversion(x),
        )
    pixels = np.ascontiguousarray(x[..., 0]) if x.ndim == 4 and x.shape[-1] == 1 else x
    if y_name is None:
        if x_name != "x_test":
            raise _refused(
                recipe,
                f"{x_name} without y_{x_name[2:]} in {source}",
                "both",
                f"add y_{x_name[2:]}, or remove {x_name}",
            )
        return Images(source, pixels, (), ("",) * len(x), recipe.data.channels, labelled=False, names=names)
    y = arrays[y_name]
    if y.shape == (len(x), 1):
        y = y[:, 0]
    if np.issubdtype(y.dtype, np.floating) and bool(np.isfinite(y).all()) and bool((y == np.round(y)).all()):
        y = y.astype(np.int64)
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
        one_hot = y.ndim == 2 and len(y) == len(x)
        raise _refused(
            recipe,
            f"{y_name} in {source} of type {y.dtype} and shape {tuple(y.shape)}",
            f"{len(x)} class numbers",
            f"convert the array: {y_name}.argmax(axis=1)" if one_hot else "convert the array",
        )
    if x_name == "x_test" and bool((y == -1).all()):
        return Images(source, pixels, (), ("",) * len(x), recipe.data.channels, labelled=False, names=names)
    highest = len(names) - 1 if names else int(np.iinfo(np.int64).max)
    if bool((bad := (y < 0) | (y > highest)).any()):
        row = int(np.argmax(bad))
        raise TitheError(
            f"{source}: {y_name}, image {row}",
            found=f"class {int(y[row])} ({int(bad.sum())} of {len(y)} are out of range)",
            expected=f"0 to {highest}, the {len(names)} names in `classes`" if names else "class numbers from 0",
            remedy="correct the array",
        )
    label = tuple(names[int(value)] if names else str(int(value)) for value in y)
    return Images(source, pixels, (), label, recipe.data.channels, names=names)


def _range(x: Array) -> str:
    if x.size == 0 or x.dtype.kind not in "fiub" or x.dtype == np.uint8:
        return ""
    return f", from {float(x.min()):g} to {float(x.max()):g}"


def _conversion(x: Array) -> str:
    """The expression that makes an array the one that is expected, as far as it is plain."""
    if 0 in x.shape:
        return "save at least one image"
    steps = ""
    if x.ndim == 4 and x.shape[-1] == 4:
        steps = "[..., :3]"
    elif x.ndim == 4 and x.shape[1] in {1, 3} and x.shape[-1] not in {1, 3}:
        steps = ".transpose(0, 2, 3, 1)"
    elif x.ndim == 2 and int(np.sqrt(x.shape[1])) ** 2 == x.shape[1]:
        side = int(np.sqrt(x.shape[1]))
        steps = f".reshape(-1, {side}, {side})"
    if x.dtype == np.uint8:
        return f"save x{steps}" if steps else "convert the array"
    if x.dtype.kind not in "fiub":
        return "convert the array to uint8"
    low, high = float(x.min()), float(x.max())
    if x.dtype == np.bool_ or (x.dtype.kind == "f" and low >= 0 and high <= 1):
        return f'save (x{steps} * 255).round().astype("uint8")'
    if low >= 0 and high <= 255:
        return f'save x{steps}.astype("uint8")'
    return f'scale it to 0 to 255, then save x{steps}.astype("uint8")'
