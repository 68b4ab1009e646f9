"""Pictures as people have them: every kind is seen as a viewer shows it; what is none is named before training."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tithe import TitheError
from tithe.app.train import Recipe, parse_recipe
from tithe.app.train import images as images_module
from tithe.app.train.data import Examples, read_examples
from tithe.app.train.images import Images
from tithe.app.train.pictures import open_picture


def recipe(folder: Path, **data: Any) -> Recipe:
    return parse_recipe(
        {
            "model": {"callable": "m:f"},
            "data": {"task": "image-classification", "validation_fraction": 0.5, **data},
            "method": {"name": "head"},
            "optimizer": {"lr": 0.1},
            "run": {"epochs": 1, "output": "out"},
        },
        folder,
    )


def fill(folder: Path, *, num: int = 3, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """A folder of class folders."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for picture in range(num):
            colour = (40 * number, 20 * picture, 90)
            Image.new("RGB", (9, 7), colour).save(folder / name / f"{picture}.jpg")
    return folder


def read(folder: Path, **data: Any) -> Examples:
    return read_examples(recipe(folder, train="train", **data))


def refusal(folder: Path, **data: Any) -> TitheError:
    with pytest.raises(TitheError) as error:
        read(folder, **data)
    return error.value


# ------------------------------------------------------------------------------------------------------- every mode

RAMP = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)


def _saved(path: Path, image: Any, **settings: Any) -> Any:
    image.save(path, **settings)
    return np.asarray(open_picture(path))


def test_pixels_of_any_depth_are_scaled_to_8_bits(tmp_path: Path) -> None:
    deep = RAMP.astype(np.uint16) * 257
    for name in ("a.png", "a.tif"):
        assert np.array_equal(_saved(tmp_path / name, Image.fromarray(deep)), RAMP)
    floats = _saved(tmp_path / "f.tif", Image.fromarray((RAMP / 255).astype(np.float32)))
    assert np.array_equal(floats, RAMP)
    bits = _saved(tmp_path / "1.png", Image.fromarray(RAMP).convert("1"))
    assert set(np.unique(bits)) == {0, 255}
    for image, word in (
        (Image.fromarray(RAMP.astype(np.float32)), "not from 0 to 1"),
        (Image.fromarray((RAMP / 255).astype(np.float32) * np.nan), "not from 0 to 1"),
        (Image.fromarray(RAMP.astype(np.int32)), "32-bit integers"),
    ):
        image.save(tmp_path / "b.tif")
        with pytest.raises(ValueError, match=word):
            open_picture(tmp_path / "b.tif")


def test_what_is_transparent_is_white_whatever_colour_is_hidden_there(tmp_path: Path) -> None:
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[:, 4:, 3] = 255
    seen = _saved(tmp_path / "a.png", Image.fromarray(ink))
    assert seen[:, :4].min() == 255
    assert seen[:, 4:].max() == 0
    grey = _saved(tmp_path / "b.png", Image.fromarray(ink[..., 2:], "LA"))
    assert np.array_equal(grey, seen[..., 0])
    palette = Image.fromarray((RAMP > 99).astype(np.uint8), "P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    assert sorted({tuple(int(v) for v in pixel) for row in _saved(tmp_path / "c.png", palette) for pixel in row}) == [
        (10, 20, 30),
        (200, 100, 50),
    ]
    clear = _saved(tmp_path / "d.png", palette, transparency=0)
    assert {tuple(int(v) for v in pixel) for row in clear for pixel in row} == {(255, 255, 255), (200, 100, 50)}


def test_pictures_are_upright_in_rgb_and_of_their_first_frame(tmp_path: Path) -> None:
    colour = Image.fromarray(np.dstack([RAMP, RAMP[::-1], RAMP.T]))
    turned = Image.Exif()
    turned[0x0112] = 6  # turned by a quarter
    upright = _saved(tmp_path / "a.png", colour, exif=turned)
    assert np.array_equal(upright, np.asarray(colour.transpose(Image.Transpose.ROTATE_270)))
    inks = _saved(tmp_path / "b.tif", colour.convert("CMYK"))
    assert np.abs(inks.astype(int) - np.asarray(colour)).max() <= 2
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (0, 255)]
    assert _saved(tmp_path / "c.gif", frames[0], save_all=True, append_images=frames[1:]).max() == 0


# ------------------------------------------------------------------------------------------------------ bad files


def _bomb(path: Path) -> None:
    """A PNG whose header says 20,000 × 20,000 pixels."""
    import struct
    import zlib

    def part(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")
    )


def _cut(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:1500])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (_cut, "truncated"),
    "empty": (lambda path: path.touch(), "an empty file"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><html></html>"), "web page"),
    "a text": (lambda path: path.write_text("picture"), "no picture that can be read"),
    "a folder": (lambda path: path.mkdir(), "a folder"),
    "a broken link": (lambda path: path.symlink_to("nowhere.jpg"), "a link to nothing"),
    "a link to itself": (lambda path: path.symlink_to(path), "a link to nothing"),
    "too large": (_bomb, "pixels"),
    "noise": (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256))), "no picture that can be read"),
    "an archive": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(40)), "a zip archive"),
    "heic": (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(40)), "HEIC"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_picture_that_is_none_is_named_before_training_and_may_be_left_out(
    name: str, split: str, tmp_path: Path
) -> None:
    fill(tmp_path / "train")
    fill(tmp_path / "test")
    make, word = BAD[name]
    bad = tmp_path / split / "cat" / "x.jpg"
    make(bad)
    error = refusal(tmp_path, test="test")
    assert error.place == str(bad)
    assert word in error.found
    assert "skip_bad = true" in error.remedy
    examples = read(tmp_path, test="test", skip_bad=True)
    assert len(examples.splits["test"].label) == 6
    assert examples.notes == (f"{split}: left out 1 that cannot be used: {bad}: {error.found}",)
    shutil.rmtree(bad) if bad.is_dir() else bad.unlink()
    assert read(tmp_path, test="test").notes == ()


def test_every_bad_picture_is_counted(tmp_path: Path) -> None:
    fill(tmp_path / "train")
    for number in range(8):
        (tmp_path / "train" / "dog" / f"bad{number}.png").touch()
    error = refusal(tmp_path)
    assert "7 more" in error.found
    assert "bad1.png" in error.found
    for file in (tmp_path / "train" / "cat").iterdir():
        file.write_bytes(b"")
    assert "no image in" in refusal(tmp_path, skip_bad=True).found


def test_pictures_are_opened_once_and_again_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "train")
    opened: list[Path] = []

    def count(file: Path) -> Any:
        opened.append(file)
        return open_picture(file)

    monkeypatch.setattr(images_module, "open_picture", count)
    told: list[tuple[int, int]] = []
    read_examples(recipe(tmp_path, train="train"), lambda what, done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]
    read(tmp_path)
    assert len(opened) == 6
    bad = tmp_path / "train" / "cat" / "0.jpg"
    bad.write_bytes(b"")
    assert refusal(tmp_path).place == refusal(tmp_path).place == str(bad)
    assert len(opened) == 12


def test_a_picture_that_is_lost_during_training_is_named(tmp_path: Path) -> None:
    rows = read_examples(recipe(fill(tmp_path / "train").parent, train="train")).splits["train"]
    assert isinstance(rows, Images)
    rows.files[0].unlink()
    with pytest.raises(TitheError, match=rows.files[0].name):
        rows.decode(0, None)


# ---------------------------------------------------------------------------------------------------------- folders


def test_folders_and_files_of_the_system_are_passed_over(tmp_path: Path) -> None:
    root = fill(tmp_path / "train")
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", "$RECYCLE.BIN", "System Volume Information"):
        fill(root, classes=(name,))
        fill(root / "cat", classes=(name,))
    for name in ("Thumbs.db", ".DS_Store", "._0.jpg", "desktop.ini"):
        (root / name).write_bytes(b"\0\0")
        (root / "cat" / name).write_bytes(b"\0\0")
    examples = read(tmp_path)
    assert examples.labels == ("cat", "dog")
    assert sum(len(rows.label) for rows in examples.splits.values()) == 6


def test_a_class_of_one_picture_is_trained_on(tmp_path: Path) -> None:
    fill(tmp_path / "train", num=9)
    fill(tmp_path / "train", num=1, classes=("owl",))
    for seed in range(5):
        assert "owl" in read(tmp_path, split_seed=seed).splits["train"].label


def test_a_folder_of_pictures_that_cannot_be_read_names_their_endings(tmp_path: Path) -> None:
    fill(tmp_path / "train")
    other = tmp_path / "train" / "owl"
    other.mkdir()
    for name in ("a.heic", "b.HEIC", "c.txt"):
        (other / name).write_bytes(b"x")
    error = refusal(tmp_path)
    assert "2 ending in .heic" in error.found
    assert "JPEG or PNG" in error.remedy
    Image.new("RGB", (4, 4)).save(other / "a.jpg")
    error = refusal(tmp_path)
    assert error.place.endswith("a.heic")
    assert ".heic" in error.found
    for file in other.glob("*.[hH]*"):
        file.unlink()
    assert read(tmp_path).labels == ("cat", "dog", "owl")


def test_pictures_in_no_class_folder_or_deeper_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "data" / "train")
    fill(tmp_path / "data" / "test")
    with pytest.raises(TitheError) as error:
        read_examples(recipe(tmp_path, train="data"))
    assert "which are splits" in error.value.found
    told = error.value.remedy.rpartition(" ")[2]
    assert read_examples(recipe(tmp_path, train=told)).labels == ("cat", "dog")
    deeper = fill(tmp_path / "train")
    Image.new("L", (4, 4)).save(deeper / "loose.png")
    assert refusal(tmp_path).place == str(deeper / "loose.png")
    os.remove(deeper / "loose.png")
    fill(deeper / "cat", classes=("tabby",))
    assert "tabby" in refusal(tmp_path).found
    for file in (deeper / "cat" / "tabby").iterdir():
        file.rename(deeper / "cat" / f"tabby{file.name}")
    assert len(read(tmp_path).splits["train"].label) in {4, 5}


# ------------------------------------------------------------------------------------------------------------- npz

X, Y = np.zeros((4, 5, 5), np.uint8), np.array([0, 1, 0, 1])


def _npz(folder: Path, **arrays: Any) -> Examples:
    np.savez(folder / "a.npz", **{"x_train": X, "y_train": Y, **arrays})
    return read_examples(recipe(folder, npz="a.npz"))


def test_the_usual_names_of_a_validation_part_are_known(tmp_path: Path) -> None:
    for name in ("validation", "val", "valid", "dev"):
        examples = _npz(tmp_path, **{f"x_{name}": X[:2], f"y_{name}": Y[:2]})
        assert (len(examples.splits["validation"].label), len(examples.splits["train"].label)) == (2, 4)


def test_classes_have_the_order_of_their_names(tmp_path: Path) -> None:
    examples = _npz(tmp_path, classes=np.array([b"zebra", b"ant", b"cow"]))
    assert examples.labels == ("zebra", "ant", "cow")
    assert sorted(set(examples.targets["train"].tolist())) == [0, 1]


def test_a_test_part_without_labels_is_not_scored(tmp_path: Path) -> None:
    for arrays in ({"x_test": X}, {"x_test": X, "y_test": np.full(4, -1)}):
        examples = _npz(tmp_path, **arrays)
        assert "test" not in examples.splits
        assert examples.notes == ("test: no labels, so no score",)


def test_labels_in_a_column_or_as_whole_floats_are_class_numbers(tmp_path: Path) -> None:
    for y in (Y[:, None], Y.astype(float), Y.astype(np.uint8)):
        assert _npz(tmp_path, y_train=y).labels == ("0", "1")


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "a part of another name": ({"x_extra": X, "y_extra": Y}, "x_extra", "rename"),
    "images of another library": ({"val_images": X}, "val_images", "rename"),
    "capitals": ({"X_test": X, "Y_test": Y}, "X_test", "rename"),
    "two validation parts": ({"x_val": X, "y_val": Y, "x_valid": X, "y_valid": Y}, "both x_val and x_valid", "remove"),
    "labels alone": ({"y_test": Y}, "y_test without x_test", "add x_test"),
    "validation without labels": ({"x_val": X}, "x_val without y_val", "add y_val"),
    "floats of one": ({"x_train": X / 255}, "float64", "* 255).round()"),
    "floats of 255": ({"x_train": X + 200.0}, "float64", 'astype("uint8")'),
    "floats beyond": ({"x_train": X - 1.0}, "from -1 to -1", "scale"),
    "channels first": ({"x_train": np.zeros((4, 3, 5, 5), np.uint8)}, "(4, 3, 5, 5)", "transpose(0, 2, 3, 1)"),
    "alpha": ({"x_train": np.zeros((4, 5, 5, 4), np.uint8)}, "(4, 5, 5, 4)", "[..., :3]"),
    "flat": ({"x_train": np.zeros((4, 25), np.uint8)}, "(4, 25)", "reshape(-1, 5, 5)"),
    "booleans": ({"x_train": X > 0}, "bool", "* 255"),
    "complex": ({"x_train": X + 1j}, "complex", "uint8"),
    "no images": ({"x_train": X[:0], "y_train": Y[:0]}, "(0, 5, 5)", "at least one"),
    "one-hot labels": ({"y_train": np.eye(4)[Y]}, "(4, 4)", "argmax(axis=1)"),
    "fractions": ({"y_train": Y + 0.5}, "float64", "convert"),
    "texts": ({"y_train": np.array(["a", "b", "a", "b"])}, "<U1", "convert"),
    "negative": ({"y_train": np.array([0, -2, 1, 1])}, "class -2", "correct"),
    "a class that has no name": ({"classes": np.array(["a"])}, "class 1", "correct"),
    "names twice": ({"classes": np.array(["a", "a"])}, "'a' twice", "correct"),
    "a name for nothing": ({"classes": np.array(["a", ""])}, "empty", "correct"),
    "a table of names": ({"classes": np.array([["a", "b"]])}, "(1, 2)", "texts"),
    "sizes that differ": ({"x_test": np.zeros((2, 6, 6), np.uint8), "y_test": Y[:2]}, "6 × 6", "image_size = 5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_array_that_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    arrays, found, remedy = WRONG[name]
    with pytest.raises(TitheError) as error:
        _npz(tmp_path, **arrays)
    assert found in error.value.found
    assert remedy in error.value.remedy


@pytest.mark.parametrize("name", ["floats of one", "floats of 255", "channels first", "alpha", "flat", "booleans"])
def test_the_expression_of_the_remedy_works(name: str, tmp_path: Path) -> None:
    arrays, _, _ = WRONG[name]
    with pytest.raises(TitheError) as error:
        _npz(tmp_path, **arrays)
    expression = error.value.remedy.removeprefix("save ")
    assert _npz(tmp_path, x_train=eval(expression, {"x": arrays["x_train"]})).labels == ("0", "1")


def test_arrays_that_are_nobodys_business_are_left_alone(tmp_path: Path) -> None:
    assert _npz(tmp_path, author=np.array(["me"]), mean=np.zeros(3)).labels == ("0", "1")


class _Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("sprung",)


def _array(path: Path) -> None:
    np.save(path.with_suffix(".npy"), X)
    path.with_suffix(".npy").rename(path)


def _truncated(path: Path) -> None:
    np.savez(path, x_train=X, y_train=Y)
    path.write_bytes(path.read_bytes()[:-40])


def _inner(path: Path) -> None:
    np.savez_compressed(path, x_train=np.random.default_rng(0).integers(0, 255, (9, 99, 99), np.uint8), y_train=Y)
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (_array, ".npy"),
        (lambda path: path.touch(), "an empty file"),
        (lambda path: path.write_text("arrays"), "objects"),
        (lambda path: path.write_bytes(b"PK\x03\x04"), "zip"),
        (_truncated, "zip"),
        (_inner, "a.npz"),
        (lambda path: np.savez(path, x_train=np.array([_Trap()], object), y_train=Y), "never unpickled"),
    ],
)
def test_a_file_that_is_no_npz_is_named_and_never_unpickled(
    make: Callable[[Path], object], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a.npz")
    with pytest.raises(TitheError) as error:
        read_examples(recipe(tmp_path, npz="a.npz"))
    assert word in error.value.found
    assert "numpy.savez" in error.value.remedy
    assert not (tmp_path / "sprung").exists()


def test_a_split_beside_an_npz_is_refused(tmp_path: Path) -> None:
    for key in ("train", "validation", "test"):
        with pytest.raises(TitheError, match=f"{key} beside npz"):
            recipe(tmp_path, npz="a.npz", **{key: "nowhere.npz"})
