"""The pages keep their word: Python runs and prints what is shown, recipes and commands parse, links lead somewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from accelerate.state import GradientState
from typer.main import get_command

import tithe
from tithe.app.cli import app
from tithe.app.train import parse_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]*))?\)")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, text and first line, and the text block right below it, where there is one."""

    language: str
    text: str
    line: int
    shown: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = list(FENCE.finditer(text))
    out: list[Block] = []
    for i, match in enumerate(found):
        after = found[i + 1] if i + 1 < len(found) else None
        close = after is not None and after[1] == "text" and not text[match.end() : after.start()].strip()
        line = text.count("\n", 0, match.start(2)) + 1
        out.append(Block(match[1], match[2], line, after[2] if close and after is not None else None))
    return out


def commands(page: Path) -> list[tuple[int, list[str]]]:
    """Line and words of every command of the page's bash blocks; a backslash at a line's end joins the next line."""
    found: list[tuple[int, list[str]]] = []
    for block in blocks(page):
        if block.language != "bash":
            continue
        joined = block.text.replace("\\\n", " ")
        found += [(block.line, words) for line in joined.splitlines() if (words := shlex.split(line, comments=True))]
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as a Markdown viewer makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_block_has_a_language(page: Path) -> None:
    known = {"python", "text", "bash", "toml", "json", "bibtex"}
    assert {block.language for block in blocks(page)} <= known
    assert page.read_text("utf-8").count("```") == 2 * len(blocks(page))


@each_page
def test_python_runs_and_prints_what_is_shown(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    GradientState._reset_state()  # accelerate takes the last loader of a process for the next loop's
    names: dict[str, object] = {"__name__": __name__}  # a module that exists: dataclasses look it up
    for block in blocks(page):
        if block.language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # Blank lines first, so that a traceback names the page's own line.
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
        if block.shown is not None:
            found, shown = printed.getvalue().splitlines(), block.shown.splitlines()
            assert [line.rstrip() for line in found] == [line.rstrip() for line in shown]


@each_page
def test_recipes_are_valid(page: Path) -> None:
    for block in blocks(page):
        if block.language == "toml":
            parse_recipe(tomllib.loads(block.text))


@each_page
def test_commands_parse(page: Path) -> None:
    group = get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for line, words in commands(page):
        if words[0] == "make":
            assert words[1] in targets, f"{page.name}:{line}: no target {words[1]}"
        start = next((i for i, word in enumerate(words) if word in ("tithe",)), None)
        if start is None:
            continue
        name, *rest = words[start + 1 :]
        assert name in group.commands, f"{page.name}:{line}: no command {name}"
        group.commands[name].make_context(name, rest)  # raises for an option or an argument that does not exist


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {path}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {path}#{anchor}"


@pytest.mark.parametrize("method", [tithe.FISH, tithe.TraDy, tithe.TaylorPruning])
def test_the_method_card_lists_every_option_with_its_default(method: type) -> None:
    page = "taylor-pruning" if method is tithe.TaylorPruning else method.__name__.lower()
    card = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    for option in dataclasses.fields(method):
        if not option.init:
            continue
        default = f'`"{option.default}"`' if isinstance(option.default, str) else f"`{option.default}`"
        if option.default is dataclasses.MISSING:
            default = "required"
        assert f"| `{option.name}` | {default} |" in card


def test_the_pages_know_every_public_name() -> None:
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    assert [name for name in tithe.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 150


def test_the_readme_begins_with_python_that_runs() -> None:
    first = next(block for block in blocks(ROOT / "README.md") if block.language == "python")
    assert first.line - 1 <= 20
    assert "tithe.lean(model)" in first.text


def test_the_architecture_page_names_every_file() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rooms = page[page.index("## The rooms") : page.index("## Who imports whom")]
    for folders, holds in re.findall(r"^\| (.*?) \| (.*) \|$", rooms, re.MULTILINE):
        for folder in re.findall(r"`([a-z/_]+)/`", folders):
            files = {path.stem for path in (ROOT / "src" / "tithe" / folder).glob("*.py")} - {"__init__"}
            assert files - set(re.findall(r"`([a-z_]+)`", holds)) == set(), folder
