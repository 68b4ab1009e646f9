"""`tithe predict`: a finished run answers the rows of a file."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed

import tithe
from tithe.app.train.arrays import read_npz
from tithe.app.train.data import chunks, to_device
from tithe.app.train.decoding import read_bytes
from tithe.app.train.encoders import learned_positions
from tithe.app.train.images import Images, read_pictures
from tithe.app.train.models import load, score
from tithe.app.train.recipe import Recipe, parse_recipe
from tithe.app.train.tables import read_table
from tithe.app.train.tasks import task_of
from tithe.app.train.tasks.base import Predictor, Rows
from tithe.errors import TitheError
from tithe.files import replacing

_SOURCES = ("train", "validation", "test", "dataset", "config", "npz", "folder", "streaming", "labels")
"""Keys of `[data]` that say where a run's own rows are, or follow from them."""

_READING = ("text", "text_pair", "label", "messages", "separator", "documents", "encoding", "skip_bad")
"""Keys of `[data]` that say how a file is read, and may be others than the run's."""


@dataclass(frozen=True)
class Predictions:
    """What a run answers.

    Args:
        rows: one mapping for each row of the file, "place" first.
        metrics: of the answers, where the file says what is right; else empty.
        notes: what the user should know of how the rows were read.
    """

    rows: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, float]
    notes: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON data."""
        return {"rows": list(self.rows), "metrics": dict(self.metrics), "notes": list(self.notes)}

    def table(self, suffix: str = ".csv") -> str:
        """The rows as text: CSV, TSV, JSONL, or one JSON list.

        Args:
            suffix: ".csv", ".tsv", ".jsonl" or ".json".
        """
        if suffix == ".jsonl":
            return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        if suffix == ".json":
            return json.dumps(list(self.rows), ensure_ascii=False, indent=1) + "\n"
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.writer(text, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_cell(row.get(name, "")) for name in names] for row in self.rows)
        return text.getvalue()


SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")


def _cell(value: object) -> object:
    """One value of a table: lists of words with blanks between them, everything nested as JSON."""
    if isinstance(value, list):
        items = cast("list[object]", value)
        plain = all(isinstance(item, str) and item and not any(map(str.isspace, item)) for item in items)
        return " ".join(map(str, items)) if plain else json.dumps(items, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


def predict(
    run: Path,
    file: Path,
    *,
    output: Path | None = None,
    new_tokens: int = 64,
    overrides: Sequence[str] = (),
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Predictions:
    """Let a finished run answer the rows of a file.

    Args:
        run: the run's folder.
        file: rows as the run was trained on, which need no labels; or a picture, a folder of pictures, or an npz.
        output: where the answers are written as well; its ending says the format.
        new_tokens: how many tokens a language model writes at most.
        overrides: `data.key=value` settings of how the file is read, such as `data.text=body`.
        progress: told how many rows are done.

    Raises:
        TitheError: the folder holds no finished run, its base is not there or is another, or a row cannot be used.
    """
    if output is not None and output.suffix.lower() not in SUFFIXES:
        raise TitheError(
            str(output), found=f"the ending {output.suffix!r}", expected=", ".join(SUFFIXES), remedy="name another file"
        )
    result = _result(run)
    recipe, labels = _recipe(run, file, result, overrides), tuple(result["labels"])
    task = task_of(recipe)
    rows = _rows_of(recipe, file.resolve(), progress)
    set_seed(recipe.run.seed)  # what is fresh in the base is drawn as it was
    network = load(recipe, task.num_outputs(recipe, labels))
    delta = run / Path(result["files"]["delta"]).name
    if not delta.is_file():
        raise TitheError(str(delta), found="no file", expected="the delta of the run", remedy="restore it")
    tithe.apply(network.model, delta)
    wants_gpu = recipe.run.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if wants_gpu else "cpu")
    model = network.model.to(device).eval()
    positions = learned_positions(model)
    if task.generates and positions is not None and new_tokens >= positions:
        raise TitheError(
            "predict",
            found=f"{new_tokens} new tokens, and a model with {positions} learned positions",
            expected=f"fewer than {positions}",
            remedy=f"--tokens {positions // 2}",
        )
    how = Predictor(labels, network.encoder, new_tokens, positions)
    known = rows if rows.labelled else replace(rows, label=tuple(task.blank(text, labels) for text in _inputs(rows)))
    targets, notes = task.targets(recipe, known, labels), list(rows.skipped)
    items, told = task.prompts(how, known, targets)
    answers, tallies = list[dict[str, Any]](), list[torch.Tensor]()
    scored = rows.labelled and task.has_targets
    precise = recipe.run.precision == "no"
    autocast = contextlib.nullcontext() if precise else torch.autocast(device.type, dtype=_dtype(recipe))
    with torch.no_grad(), autocast:
        for part in chunks(range(len(items)), recipe.evaluated_at_once):
            batch = to_device(network.encoder.join([items[item] for item in part]), device)
            answers += task.predict(model, batch, how)
            if scored:
                tallies.append(task.tally(model, batch).cpu())
            progress("predicting", len(answers), len(items))
    metrics = score(recipe, torch.cat(tallies), labels) if tallies else {}
    made = [{"place": rows.place(row), **answer} for row, answer in enumerate(answers)]
    predictions = Predictions(made, metrics, [*notes, *network.notes, *told])
    if output is not None:
        with replacing(output) as partial:
            partial.write_text(predictions.table(output.suffix.lower()), encoding="utf-8")
    return predictions


def _dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.run.precision == "bf16" else torch.float16


def _inputs(rows: Rows) -> Sequence[Any]:
    return rows.files or list(rows.label) if isinstance(rows, Images) else rows.text


def _result(run: Path) -> dict[str, Any]:
    file = run / "result.json"
    if not file.is_file():
        raise TitheError(
            str(run),
            found="no result.json" if run.is_dir() else "no folder",
            expected="the folder of a finished run: [run] output",
            remedy="correct the path, or finish the run with tithe train RECIPE.toml --resume",
        )
    try:
        result = json.loads(read_bytes(file))
        _ = result["told"]["recipe"], result["told"]["folder"], result["labels"], result["files"]["delta"]
    except (ValueError, KeyError, TypeError) as error:
        raise TitheError(
            str(file), found=f"{type(error).__name__}: {error}", expected="what tithe train wrote", remedy="restore it"
        ) from error
    return cast("dict[str, Any]", result)


def _recipe(run: Path, file: Path, result: Mapping[str, Any], overrides: Sequence[str]) -> Recipe:
    """The recipe of a run, about another file."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key not in {f"data.{name}" for name in _READING}:
            raise TitheError(
                f"--set {override}",
                found=f"{key!r}, which a finished run has",
                expected=f"how the file is read: {', '.join(f'data.{name}' for name in _READING)}",
                remedy="leave it out",
            )
    told = {name: dict(section) for name, section in result["told"]["recipe"].items()}
    told["data"] = {key: value for key, value in told["data"].items() if key not in _SOURCES}
    told["data"] |= {"train": str(file.resolve()), **result["inputs"]}
    if len(result["labels"]) > 1:
        told["data"]["labels"] = result["labels"]
    told["run"]["output"] = str(run.resolve())
    if not file.exists():
        raise TitheError(str(file), found="no file or folder", expected="rows to answer", remedy="correct the path")
    return parse_recipe(told, result["told"]["folder"], overrides)


def _rows_of(recipe: Recipe, file: Path, progress: Callable[[str, int, int], None]) -> Rows:
    """Read the rows; what a recipe would say of them is said on the command line here."""
    try:
        return _rows(recipe, file, progress)
    except TitheError as error:
        if "[data]" not in error.remedy:
            raise
        remedy = f"{error.remedy} (here: --set data.KEY=VALUE)"
        raise TitheError(error.place, found=error.found, expected=error.expected, remedy=remedy) from error


def _rows(recipe: Recipe, file: Path, progress: Callable[[str, int, int], None]) -> Rows:
    if "image_size" not in recipe.data.terms.keys:
        return read_table(recipe, "test", file)
    if file.suffix.lower() == ".npz":
        splits = read_npz(recipe, file)
        return splits.get("test", splits["train"])
    return read_pictures(recipe, file, progress)
