"""Tables as people bring them: read as their authors meant them, or refused with the line and a remedy that works."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tithe import TitheError
from tithe.app.train import Recipe, parse_recipe
from tithe.app.train.cells import likeness, read_label
from tithe.app.train.data import Examples, read_examples
from tithe.app.train.rows import Table

Write = Callable[[Path], None]
GOOD = "text,label\na good film,1\na dull film,0\nfine,1\npoor,0\n"


def recipe(folder: Path, **data: Any) -> Recipe:
    return parse_recipe(
        {
            "model": {"pretrained": "tiny"},
            "data": {"task": "text-classification", **data},
            "method": {"name": "head"},
            "optimizer": {"lr": 0.1},
            "run": {"epochs": 1, "output": "out"},
        },
        folder,
    )


def read(folder: Path, name: str, content: str | bytes | None = None, **data: Any) -> Examples:
    """Read one file as every split."""
    if content is not None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_examples(recipe(folder, **{"train": name, "validation": name, **data}))


def table(examples: Examples, split: str = "train") -> Table:
    rows = examples.splits[split]
    assert isinstance(rows, Table)
    return rows


def refusal(folder: Path, name: str, content: str | bytes | None = None, **data: Any) -> TitheError:
    with pytest.raises(TitheError) as error:
        read(folder, name, content, **data)
    return error.value


# ---------------------------------------------------------------------------------------------- read as it was meant

MEANT = {
    "blanks in the header": ("a.csv", "text, label\nx, 1\ny, 0\n"),
    "blanks before quotes": ("a.csv", 'text, label\n"x", "1"\n"y", "0"\n'),
    "a mark of UTF-8": ("a.csv", "\ufefftext,label\nx,1\ny,0\n"),
    "UTF-16 with its mark": ("a.csv", "text,label\nx,1\ny,0\n".encode("utf-16")),
    "UTF-32 with its mark": ("a.tsv", "text\tlabel\nx\t1\ny\t0\n".encode("utf-32")),
    "semicolons": ("a.csv", "text;label\nx;1\ny;0\n"),
    "tabs in a csv": ("a.csv", "text\tlabel\nx\t1\ny\t0\n"),
    "commas in a tsv": ("a.tsv", "text,label\nx,1\ny,0\n"),
    "bars": ("a.csv", "text|label\nx|1\ny|0\n"),
    "a hint at the separator": ("a.csv", "sep=;\r\ntext;label\r\nx;1\r\ny;0\r\n"),
    "quotes everywhere, tabs": ("a.tsv", '"text"\t"label"\n"x"\t"1"\n"y"\t"0"\n'),
    "quotes around rows only, tabs": ("a.tsv", 'text\tlabel\n"x"\t"1"\n"y"\t"0"\n'),
    "old lines": ("a.csv", "text,label\rx,1\ry,0\r"),
    "blank lines": ("a.csv", "\n\ntext,label\n\nx,1\n\n\ny,0\n\n"),
    "empty rows of a spreadsheet": ("a.csv", "text,label\nx,1\n,\ny,0\n,\n"),
    "empty fields at the end": ("a.csv", "text,label,\nx,1,\ny,0,,\n"),
    "an index without a name": ("a.csv", ",text,label\n0,x,1\n1,y,0\n"),
    "a repeated column that is not used": ("a.csv", "id,text,label,id\n3,x,1,4\n3,y,0,4\n"),
    "1 and 1.0": ("a.csv", "text,label\nx,1.0\ny,0\n"),
    "objects a line": ("a.jsonl", '{"text": "x", "label": 1}\n\n{"text": "y", "label": "0"}\n'),
    "a list of objects": ("a.json", '[{"text": "x", "label": 1},\n {"text": "y", "label": 0.0}]'),
}


@pytest.mark.parametrize("name", MEANT)
def test_a_table_is_read_as_its_author_meant_it(name: str, tmp_path: Path) -> None:
    examples = read(tmp_path, *MEANT[name])
    assert table(examples).text == ("x", "y")
    assert examples.labels == ("0", "1")
    assert examples.targets["train"].tolist() == [1, 0]


def test_quotes_of_a_spreadsheet_go_and_those_of_a_text_stay(tmp_path: Path) -> None:
    written = 'text\tlabel\n"he said ""no"""\t1\n"two\nlines"\t0\nplain\t1\n'
    assert table(read(tmp_path, "a.tsv", written)).text == ('he said "no"', "two\nlines", "plain")
    assert table(read(tmp_path, "a.tsv", written)).lines == (2, 3, 5)
    raw = 'text\tlabel\n"I am," he said\t1\n"Quoted."\t0\nit "is\t1\n'
    assert table(read(tmp_path, "a.tsv", raw)).text == ('"I am," he said', '"Quoted."', 'it "is')


# No carriage returns: before Python 3.13 the writer puts no quotes around them where lines end in another way.
_CHARS = st.one_of(st.characters(exclude_categories=["Cs", "Cc"]), st.sampled_from("\t\n,;|\"'"))


@given(
    texts=st.lists(st.text(_CHARS, min_size=1).filter(str.strip), min_size=2, max_size=6),
    delimiter=st.sampled_from(",;\t|"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    ends=st.sampled_from(["\n", "\r\n"]),
    suffix=st.sampled_from(["csv", "tsv"]),
)
def test_what_the_csv_module_writes_is_read_back(
    texts: list[str], delimiter: str, quoting: Any, ends: str, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("table")
    with (folder / f"a.{suffix}").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=ends)
        writer.writerow(["text", "label"])
        writer.writerows([text, row % 2] for row, text in enumerate(texts))
    examples = read(folder, f"a.{suffix}")
    assert table(examples).text == tuple(texts)
    assert examples.targets["train"].tolist() == [row % 2 for row in range(len(texts))]


def test_a_field_may_be_of_any_length(tmp_path: Path) -> None:
    long = "word " * 40_000
    assert table(read(tmp_path, "a.csv", f"text,label\n{long},1\ny,0\n")).text[0] == long


def test_the_encoding_is_told_by_a_key(tmp_path: Path) -> None:
    content = "text,label\ncafé,1\nÄrger,0\n".encode("cp1252")
    error = refusal(tmp_path, "a.csv", content)
    assert error.place == "a.csv line 2 column 4"
    assert "cp1252" in error.found
    assert "café" in error.found
    told = re.search(r'encoding = "([\w-]+)"', error.remedy)
    assert told is not None
    assert table(read(tmp_path, "a.csv", encoding=told[1])).text == ("café", "Ärger")
    unmarked = refusal(tmp_path, "b.csv", GOOD.encode("utf-16-le"))
    assert "UTF-16-LE" in unmarked.found
    assert len(table(read(tmp_path, "b.csv", encoding="utf-16-le")).text) == 4
    other = refusal(tmp_path, "c.csv", "text,label\ncafé,1\ny,0\n", encoding="latin-1")
    assert "UTF-8" in other.found
    assert table(read(tmp_path, "c.csv")).text[0] == "café"
    for wrong in ("utf-9", "base64", "rot13"):
        with pytest.raises(TitheError, match=r"\[data\] encoding"):
            recipe(tmp_path, train="a.csv", encoding=wrong)


# --------------------------------------------------------------------------------------------------- columns

REPEATED = {
    "the text": ("text,text,label\nx,note,1\ny,note,0\n", "columns 'text'", "1 and 2"),
    "the label": ("text,label,label\nx,1,0\ny,0,1\n", "columns 'label'", "2 and 3"),
    "alike but for blanks": ("text, text,label\nx,note,1\ny,note,0\n", "columns 'text'", "1 and 2"),
    "alike but for quotes": ('"text"\ttext\tlabel\nx\tnote\t1\ny\tnote\t0\n', "columns 'text'", "1 and 2"),
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_repeated_column_that_is_used_is_refused(name: str, tmp_path: Path) -> None:
    content, *words = REPEATED[name]
    error = refusal(tmp_path, "a.csv", content)
    for word in words:
        assert word in error.found
    header, rest = content.split("\n", 1)
    first, _, others = header.partition("text")
    fixed = f"{first}text{others}".replace("text,text", "text,note").replace("label,label", "label,other")
    fixed = fixed.replace(", text", ",note").replace("\ttext", "\tnote")
    assert table(read(tmp_path, "a.csv", f"{fixed}\n{rest}")).text == ("x", "y")


def test_a_repeated_key_or_parquet_column_is_refused(tmp_path: Path) -> None:
    twice = '{"text": "x", "label": 1}\n{"text": "y", "text": "z", "label": 0}\n'
    error = refusal(tmp_path, "a.jsonl", twice)
    assert error.place == "a.jsonl line 2"
    assert "'text' twice" in error.found
    columns = [pyarrow.array(["x", "y"]), pyarrow.array(["a", "b"]), pyarrow.array([1, 0])]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=["text", "text", "label"]), tmp_path / "a.parquet")
    assert "columns 1 and 2" in refusal(tmp_path, "a.parquet").found


def test_another_case_of_a_column_is_named_and_the_remedy_works(tmp_path: Path) -> None:
    error = refusal(tmp_path, "a.csv", "Text,LABEL\nx,1\ny,0\n")
    assert 'text = "Text"' in error.remedy
    error = refusal(tmp_path, "a.csv", text="Text")
    assert 'label = "LABEL"' in error.remedy
    assert table(read(tmp_path, "a.csv", text="Text", label="LABEL")).text == ("x", "y")


def test_a_file_without_a_header_says_so_and_the_remedy_works(tmp_path: Path) -> None:
    content = "a good film of its kind,1\na dull film it was,0\n"
    error = refusal(tmp_path, "a.csv", content)
    told = re.search(r"such as '(.*)'", error.remedy)
    assert told is not None
    assert len(table(read(tmp_path, "a.csv", f"{told[1]}\n{content}")).text) == 2


def test_one_column_is_not_both_text_and_label(tmp_path: Path) -> None:
    for keys in ({"label": "text"}, {"text_pair": "text"}, {"text_pair": "label"}):
        with pytest.raises(TitheError, match="a column for each"):
            recipe(tmp_path, train="a.csv", **keys)


# ----------------------------------------------------------------------------------------------- cells

SURROGATE = '"half \\ud83d of it"'
CELLS: dict[str, tuple[str, str]] = {
    "null label": ('"x"', "null"),
    "NaN label": ('"x"', "NaN"),
    "empty label": ('"x"', '" "'),
    "a word for nothing": ('"x"', '"NaN"'),
    "another": ('"x"', '"None"'),
    "a third": ('"x"', '"N/A"'),
    "a list for a label": ('"x"', "[1]"),
    "an object for a label": ('"x"', '{"id": 0}'),
    "null text": ("null", "1"),
    "NaN text": ("NaN", "1"),
    "empty text": ('""', "1"),
    "blank text": ('" \\t "', "1"),
    "a list for a text": ('["the", "film"]', "1"),
    "an object for a text": ('{"en": "x"}', "1"),
    "half a character": (SURROGATE, "1"),
    "half a character in a label": ('"x"', '"\\udc80"'),
}


def _holds(kind: str, text: object, label: object) -> bool:
    """Whether a format can hold two cells: a table holds texts, a column of parquet values of one type."""
    told = [value for value in (text, label) if not isinstance(value, str) or not value.isprintable()]
    if kind in {"jsonl", "json"}:
        return True
    if kind == "parquet":
        return all(value is None or isinstance(value, float) or value == " \t " for value in told)
    return all(value == " \t " and kind == "csv" for value in told)


HELD = [
    (name, kind)
    for name, cells in CELLS.items()
    for kind in ("jsonl", "json", "parquet", "csv", "tsv")
    if _holds(kind, *map(json.loads, cells))
]


@pytest.mark.parametrize(("name", "kind"), HELD)
def test_a_cell_that_is_no_text_or_label_is_refused_with_its_line_or_left_out_by_wish(
    name: str, kind: str, tmp_path: Path
) -> None:
    text, label = (json.loads(value) for value in CELLS[name])
    rows: list[dict[str, Any]] = [{"text": f"film {i}", "label": str(i % 2)} for i in range(6)]
    rows.insert(2, {"text": text, "label": label})
    path = tmp_path / f"a.{kind}"
    if kind in {"csv", "tsv"}:
        cut = "," if kind == "csv" else "\t"
        lines = [f"{row['text']}{cut}{row['label']}" for row in rows]
        path.write_text("\n".join([f"text{cut}label", *lines]))
    elif kind == "parquet":
        text, label = (None if value != value else value for value in (text, label))
        columns = {"text": [row["text"] for row in rows], "label": [row["label"] for row in rows]}
        columns["text"][2], columns["label"][2] = text, label if label is None else str(label)
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]")
    error = refusal(tmp_path, path.name)
    place = {"jsonl": "line 3", "csv": "line 4", "tsv": "line 4"}.get(kind, "row 3")
    assert error.place == f"{path.name} {place} column {'label' if text == 'x' else 'text'!r}"
    assert "skip_bad = true" in error.remedy
    examples = read(tmp_path, path.name, skip_bad=True)
    assert table(examples).text == tuple(f"film {i}" for i in range(6))
    assert examples.labels == ("0", "1")
    assert "left out 1" in examples.notes[0]
    assert place in examples.notes[0]


def test_columns_of_lists_bytes_and_structs_are_refused(tmp_path: Path) -> None:
    for values, word in (([["a"], ["b"]], "a list"), ([b"a", b"b"], "bytes"), ([{"id": 0}, {"id": 1}], "an object")):
        for name in ("text", "label"):
            columns: dict[str, list[Any]] = {"text": ["x", "y"], "label": [1, 0], name: values}
            pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
            error = refusal(tmp_path, "a.parquet")
            assert error.place == f"a.parquet row 1 column {name!r}"
            assert error.found.startswith(word)


def test_a_class_that_is_named_like_nothing_is_one_where_the_recipe_lists_it(tmp_path: Path) -> None:
    content = "text,label\nx,None\ny,1\n"
    assert "list it in [data] labels" in refusal(tmp_path, "a.csv", content).remedy
    assert read(tmp_path, "a.csv", labels=["None", "1"]).labels == ("None", "1")
    assert read(tmp_path, "a.csv", "text,label\nx,none\ny,NONE of it\n").labels == ("NONE of it", "none")


def test_a_missing_key_and_a_malformed_line_are_named_together(tmp_path: Path) -> None:
    lines = ['{"text": "x", "label": 1}', '{"text": "y"', '{"text": "z"}', "[1]", '{"text": "w", "label": 0}']
    error = refusal(tmp_path, "a.jsonl", "\n".join(lines))
    assert error.place == "a.jsonl line 2 column 13"
    assert "2 more" in error.found or "1 more" in error.found
    examples = read(tmp_path, "a.jsonl", skip_bad=True)
    assert table(examples).text == ("x", "w")
    assert "left out 3" in examples.notes[0]


# ------------------------------------------------------------------------------------------------- labels

ALIKE = {
    "numbers": ("1.5", "1.50", "2"),
    "leading zeros": ("01", "1", "2"),
    "case": ("Good", "good", "bad"),
    "quotes": ('"good"', "good", "bad"),
    "blanks inside": ("very  good", "very good", "bad"),
    "full width": ("ｇｏｏｄ", "good", "bad"),
}


@pytest.mark.parametrize("name", ALIKE)
def test_two_ways_to_write_a_class_are_refused_unless_the_recipe_lists_both(name: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"film {i}", "label": label}) for i, label in enumerate(ALIKE[name] * 2)]
    error = refusal(tmp_path, "a.jsonl", "\n".join(lines))
    assert error.place == "a.jsonl line 2"
    assert "a.jsonl line 1" in error.found
    assert read(tmp_path, "a.jsonl", labels=list(ALIKE[name])).labels == ALIKE[name]


def test_whole_numbers_are_one_label_however_they_are_written() -> None:
    assert {read_label(value) for value in (1, 1.0, "1", "1.0", "1.", " 1.00 ", "+1.0")} == {"1"}
    assert {read_label(value) for value in (-1, "-1", "-1.0")} == {"-1"}
    assert read_label(True) == "True"
    assert read_label("v1.0") == "v1.0"
    assert likeness("A") != likeness("a")


def test_labels_of_a_recipe_may_be_numbers(tmp_path: Path) -> None:
    assert read(tmp_path, "a.csv", GOOD, labels=[1, 0]).labels == ("1", "0")
    with pytest.raises(TitheError, match="twice"):
        recipe(tmp_path, train="a.csv", labels=["1", 1.0])


def _named(path: Path, values: list[int], names: list[str]) -> None:
    feature = {"names": names, "_type": "ClassLabel"}
    said = {"info": {"features": {"text": {"dtype": "string", "_type": "Value"}, "label": feature}}}
    made = pyarrow.table({"text": [f"film {i}" for i in range(len(values))], "label": values})
    pyarrow.parquet.write_table(made.replace_schema_metadata({"huggingface": json.dumps(said)}), path)


def test_classes_keep_the_order_of_the_data_set(tmp_path: Path) -> None:
    _named(tmp_path / "a.parquet", [0, 1, 2, 0], ["ham", "spam", "eggs"])
    examples = read(tmp_path, "a.parquet")
    assert examples.labels == ("ham", "spam", "eggs")
    assert examples.targets["train"].tolist() == [0, 1, 2, 0]
    label = pyarrow.array(["yes", "no", "yes"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y", "z"], "label": label}), tmp_path / "b.parquet")
    assert read(tmp_path, "b.parquet").labels == ("yes", "no")
    assert read(tmp_path, "b.parquet", labels=["no", "yes"]).labels == ("no", "yes")


def test_a_test_split_without_labels_is_not_scored_and_says_so(tmp_path: Path) -> None:
    names = ["ham", "spam"]
    _named(tmp_path / "train.parquet", [0, 1, 0, 1], names)
    for made in ("-1", "text", "null", "column"):
        path = tmp_path / "test.parquet"
        if made == "-1":
            _named(path, [-1, -1], names)
        elif made == "column":
            pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y"]}), path)
        else:
            label = pyarrow.nulls(2) if made == "null" else pyarrow.array(["-1", "-1"])
            pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y"], "label": label}), path)
        examples = read(tmp_path, "train.parquet", test="test.parquet")
        assert "test" not in examples.splits
        assert examples.notes == ("test: no labels, so no score",)
    _named(tmp_path / "some.parquet", [0, -1, 1], names)
    assert "row 2" in refusal(tmp_path, "train.parquet", test="some.parquet").place
    _named(tmp_path / "none.parquet", [-1, -1], names)
    error = refusal(tmp_path, "train.parquet", validation="none.parquet")
    assert "remove validation" in error.remedy
    assert read_examples(recipe(tmp_path, train="train.parquet", validation_fraction=0.5)).labels == ("ham", "spam")
    with pytest.raises(TitheError, match="no label in any row of the train split"):
        read(tmp_path, "none.parquet")
    _named(tmp_path / "beyond.parquet", [0, 1, 2], names)
    assert "class 2 of 2" in refusal(tmp_path, "beyond.parquet").found


def test_minus_one_is_a_class_where_training_has_it(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("text,label\nx,-1\ny,-1\n")
    examples = read(tmp_path, "a.csv", "text,label\nx,-1\ny,0\nz,1\n", test="test.csv")
    assert examples.labels == ("-1", "0", "1")
    assert examples.targets["test"].tolist() == [0, 0]


def test_no_class_loses_its_only_row_to_validation(tmp_path: Path) -> None:
    rows = "".join(f"film {i},{'rare' if i == 7 else 'often'}\n" for i in range(20))
    (tmp_path / "a.csv").write_text(f"text,label\n{rows}")
    for seed in range(20):
        data: dict[str, Any] = {"train": "a.csv", "validation_fraction": 0.5, "split_seed": seed}
        examples = read_examples(recipe(tmp_path, **data))
        assert "rare" in examples.splits["train"].label
        assert len(examples.splits["validation"].label) == 10


@pytest.mark.parametrize("value", ["much", "nan", "inf", "1e39", "1_0", "0,5", "True"])
def test_a_regression_wants_numbers_that_float32_holds(value: str, tmp_path: Path) -> None:
    content = f"text;label\nx;0.5\ny;{value}\nz;1\n"
    error = refusal(tmp_path, "a.csv", content, task="text-regression")
    assert error.place == "a.csv line 3"
    assert value in error.found
    assert ("decimal point" in error.remedy) == (value == "0,5")
    examples = read(tmp_path, "a.csv", task="text-regression", skip_bad=True)
    assert examples.targets["train"].tolist() == [0.5, 1.0]


# -------------------------------------------------------------------------------------------------- whole files


def _zip(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.csv", GOOD)
    return path.read_bytes()


def _sheet(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("[Content_Types].xml", "<Types/>")
        file.writestr("xl/workbook.xml", "<workbook/>")
    return path.read_bytes()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda path: gzip.compress(GOOD.encode()), "gzip"),
        (_zip, "a zip archive"),
        (_sheet, "spreadsheet"),
        (lambda path: b"PAR1" + b"\x15\x04" * 9, "parquet"),
        (lambda path: b"<!DOCTYPE html>\n<html></html>", "web page"),
        (lambda path: b"%PDF-1.7\n", "PDF"),
        (lambda path: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" * 4, "spreadsheet"),
        (lambda path: b"", "empty"),
        (lambda path: b"\n \n", "empty"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_a_file_that_is_something_else_is_told_as_what_it_is(
    make: Callable[[Path], bytes], word: str, suffix: str, tmp_path: Path
) -> None:
    error = refusal(tmp_path, f"a.{suffix}", make(tmp_path / "made"))
    assert word in error.found


def test_unpacking_is_the_remedy_of_an_archive(tmp_path: Path) -> None:
    error = refusal(tmp_path, "a.csv", gzip.compress(GOOD.encode()))
    assert "gunzip" in error.remedy
    assert len(table(read(tmp_path, "a.csv", gzip.decompress((tmp_path / "a.csv").read_bytes()))).text) == 4


@pytest.mark.parametrize(
    ("name", "content", "place", "fixed"),
    [
        ("a.csv", 'text,label\nx,1\n"y,0\nz,1\n', "a.csv line 3", 'text,label\nx,1\n"y",0\nz,1\n'),
        ("a.csv", 'text,label\nx,1\n"a "b" c",0\n', "a.csv line 3", 'text,label\nx,1\n"a ""b"" c",0\n'),
        ("a.csv", "text,label\nx,1\na, b,0\n", "a.csv line 3", 'text,label\nx,1\n"a, b",0\n'),
        ("a.tsv", "text\tlabel\nx\t1\ny\n", "a.tsv line 3", "text\tlabel\nx\t1\ny\t0\n"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": }\n', "a.jsonl line 2 column 10", None),
        ("a.jsonl", "[" * 100_000, "a.jsonl line 1", None),
        ("a.csv", b"text,label\nx\0,1\ny,0\n", "a.csv line 2 column 2", "text,label\nx,1\ny,0\n"),
    ],
)
def test_a_damaged_line_is_named_and_mended(
    name: str, content: str | bytes, place: str, fixed: str | None, tmp_path: Path
) -> None:
    assert refusal(tmp_path, name, content).place == place
    if fixed is not None:
        assert read(tmp_path, name, fixed).labels == ("0", "1")


def test_a_file_that_the_system_does_not_give_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").symlink_to("/proc/self/mem")
    error = refusal(tmp_path, "a.csv")
    assert "a.csv" in error.place
    assert "input/output error" in error.found
    (tmp_path / "b.parquet").symlink_to("/proc/self/mem")
    assert "b.parquet" in refusal(tmp_path, "b.parquet").place


def test_marks_of_every_encoding_win_over_the_key(tmp_path: Path) -> None:
    for mark, encoding in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        content = mark + "text,label\ncafé,1\ny,0\n".encode(encoding)
        assert table(read(tmp_path, "a.csv", content, encoding="latin-1")).text[0] == "café"
