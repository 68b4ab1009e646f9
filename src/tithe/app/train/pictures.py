"""One picture of a file: opened whole, turned upright, and scaled to 8 bits whatever it was stored in."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from tithe.app.train.decoding import kind_of

_READABLE = "jpg jpeg jpe jfif png apng bmp dib gif webp avif ppm pgm pbm pnm tif tiff tga jp2"
_UNREADABLE = "heic heif avifs svg psd xcf raw cr2 cr3 nef arw dng orf rw2 raf jxl ai eps exr hdr dcm"
_SYSTEM_FOLDERS = "__macosx @eadir @recycle @recently-snapshot @tmp #recycle #snapshot $recycle.bin lost+found"
_SYSTEM_FILES = "__pycache__ thumbs.db ehthumbs.db desktop.ini folder.htt"

SUFFIXES = frozenset(f".{ending}" for ending in _READABLE.split())
"""Endings of files that are read as pictures."""

UNREADABLE = frozenset(f".{ending}" for ending in _UNREADABLE.split())
"""Endings of pictures that have to be converted first."""

# What systems and programs leave behind in folders; names that begin with a dot are left out too.
_SYSTEM = frozenset([*_SYSTEM_FOLDERS.split(), *_SYSTEM_FILES.split(), "system volume information"])

_MAX_PIXELS = 178_956_970
"""More than this PIL takes for an attack: a small file that unpacks to gigabytes."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder belongs to the system, not to the data.

    Example:
        >>> is_hidden(".ipynb_checkpoints"), is_hidden("@eaDir"), is_hidden("cats")
        (True, True, False)
    """
    return name.startswith(".") or name.casefold() in _SYSTEM


_MARKS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")


def is_picture(file: Path) -> bool:
    """Whether a file is meant to be a picture: by its ending, or else by how it begins."""
    ending = file.suffix.lower()
    if ending in SUFFIXES or ending in UNREADABLE:
        return True
    try:
        with file.open("rb") as opened:
            start = opened.read(12)
    except OSError:
        return False
    is_bitmap = start.startswith(b"BM") and start[6:10] == bytes(4)
    return start.startswith(_MARKS) or (start[:4], start[8:]) == (b"RIFF", b"WEBP") or is_bitmap


def open_picture(source: Path | bytes) -> Any:
    """Read a picture whole as 8-bit grey ("L") or colour ("RGB"), upright, the transparent parts white.

    Pixels of 16 bits and floats from 0 to 1 are scaled to 0–255; of an animation the first frame is taken.

    Args:
        source: a file, or what is in one.

    Raises:
        ValueError: it is not a picture, damaged, too large, or of a kind whose range is not known.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(source, Path) and source.is_dir():
        raise ValueError("a folder")
    if isinstance(source, Path) and not os.path.exists(source):
        raise ValueError("a link to nothing" if source.is_symlink() else "no file")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            if file.width * file.height > _MAX_PIXELS:
                raise ValueError(f"{file.width} × {file.height} pixels, more than {_MAX_PIXELS:,}")
            file.load()
            upright: Any = file
            with contextlib.suppress(Exception):  # what is wrong with what a camera says leaves the picture as it is
                upright = ImageOps.exif_transpose(file)
    except UnidentifiedImageError as error:
        raise ValueError(_instead(source)) from error
    except ValueError:
        raise
    # PIL's readers raise what their formats make them stumble over: SyntaxError, struct.error, EOFError, MemoryError …
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            said = error.strerror.lower()
        raise ValueError(f"a picture that cannot be read ({said})") from error
    return _as_8_bits(upright, str(file.format))


def _as_8_bits(image: Any, kind: str) -> Any:
    from PIL import Image

    if image.mode in {"L", "RGB"} and "transparency" not in image.info:
        return image
    # Older versions of PIL read 16 bits of these formats into 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in {"PNG", "PPM"}):
        pixels = np.asarray(image).astype(np.int64)
        return Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in {"I", "F"}:
        pixels = np.asarray(image, dtype=np.float64)
        if image.mode == "I" or not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
            finite = pixels[np.isfinite(pixels)]
            low, high = (finite.min(), finite.max()) if finite.size else (np.nan, np.nan)
            what = "32-bit integers" if image.mode == "I" else "floats that are not from 0 to 1"
            raise ValueError(f"{what} (from {low:g} to {high:g}): convert it to 8 or 16 bits")
        return Image.fromarray(np.round(pixels * 255).astype(np.uint8))
    grey = image.mode in {"1", "L", "LA", "La"}
    try:
        if image.has_transparency_data:
            clear = image.convert("RGBA")
            white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, clear)
        return image.convert("L" if grey else "RGB")
    except (ValueError, OSError) as error:
        raise ValueError(f"a picture of mode {image.mode}: convert it to RGB") from error


def _instead(source: Path | bytes) -> str:
    """Say what a file is that is no picture."""
    try:
        if isinstance(source, bytes):
            start = source[:4096]
        else:
            with source.open("rb") as file:
                start = file.read(4096)
    except OSError as error:
        return (error.strerror or "no file that can be read").lower()
    if not start:
        return "an empty file"
    if (kind := kind_of(start)) is not None and "picture" not in kind[0]:
        return f"{kind[0]}, not a picture"
    if b"ftyphei" in start[:32] or b"ftypmif1" in start[:32]:
        return "a picture in HEIC, which cannot be read here: convert it to JPEG or PNG"
    return f"no picture that can be read (it begins {start[:16]!r})"
