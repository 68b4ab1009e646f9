"""The import law: which room may import which, read from the source itself.

A room is a file or a folder right under src/tithe, or under src/tithe/app. ROOMS says what
each may import of ours; a new room starts there.
Every breach is reported as `file:line: what it imports: the rule`.
"""

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tithe"
MAX_LINES = 600

VALUES = {"errors", "batch", "selection", "budget", "schedule"}
PARTS = {"rules", "select", "coupling", "narrow", "distributed", "ledger", "scoring", "method"}
PARTS |= {"delta", "averages", "forward"}
CORE = VALUES | PARTS | {"files", "living", "plan", "ranking"}

# room -> the rooms it may import beside itself. "tithe" is the package's own namespace: its public names.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "living": set(),
    "batch": {"errors"},
    "selection": {"errors"},
    "budget": {"errors"},
    "schedule": {"errors"},
    "distributed": {"errors", "batch", "living"},
    "rules": {"errors", "batch", "selection", "budget"},
    "select": {"errors", "batch", "selection", "budget"},  # never rules: a selector is handed a price list
    "forward": {"errors", "batch"},
    "coupling": {"errors", "batch", "forward"},
    "narrow": {"errors", "batch", "selection", "select", "coupling", "forward", "method"},
    "ledger": {"errors", "batch", "selection", "budget", "rules"},
    "delta": {"errors", "files", "batch", "selection", "budget", "rules", "forward"},
    "averages": {"errors", "files", "batch", "selection", "budget", "rules", "select", "delta"},
    "scoring": {"forward", "errors", "batch", "selection", "budget", "rules", "select", "distributed", "ledger"},
    "method": {"errors", "batch", "selection", "budget", "rules", "schedule", "select", "scoring", "averages"},
    "ranking": {"errors", "files", "batch", "selection", "rules", "method", "plan", "scoring", "select"},
    "plan": VALUES | PARTS | {"living"},  # never a method, nor anything above it
    "methods": CORE,  # what an outsider could import: a method has no door of its own
    "testing": CORE | {"tithe"},
    "__init__": CORE | {"methods", "testing"},
    "app": set(),
    "app.terminal": {"errors", "files", "ledger"},
    "app.dense": {"tithe", "errors", "ledger", "plan"},
    "app.section": {"tithe", "errors", "app.dense"},
    "app.methods": {"tithe", "app.section", "app.price"},
    "app.train": {
        "tithe",
        "errors",
        "files",
        "delta",
        "averages",
        "distributed",
        "app.terminal",
        "app.section",
        "app.methods",
    },
    "app.demo": {"tithe", "errors", "files", "delta", "app.dense", "app.methods", "app.train", "app.terminal"},
    "app.price": {"tithe", "errors", "app.dense", "app.methods", "app.train", "app.terminal"}
    | {"ledger", "delta", "method", "select", "plan"},  # what a plan holds, set up on shapes alone
    "app.average": {"tithe", "errors", "app.train", "app.terminal", "averages", "forward"},
    "app.cli": {"tithe", "errors", "files", "app.terminal", "app.train", "app.demo", "app.price", "app.average"},
    "integrations": {"tithe", "errors", "select", "forward"},
    "__main__": {"app.cli"},
}

# Rooms that an extra pays for. Everything else is the core and imports CORE_PACKAGES alone.
WITH_EXTRAS = {room for room in ROOMS if room.startswith("app")} | {"integrations", "__main__"}
CORE_PACKAGES = {"torch", "numpy", "safetensors"}

# The only rooms in which a method may be called by its name: its own, the registry of the command line, and where an
# average that is trained, or a mask that is drawn, is what the room is about.
KNOW_METHODS = {"methods", "__init__", "app.methods", "app.average", "app.train", "app.demo", "app.price"}
METHOD = re.compile(r"fish(?!er)|vr_?pge|trady|spiel|(?<![a-z])twa(?![a-z])", re.IGNORECASE)


def room(path: Path) -> str:
    """The room that a file belongs to: `rules` for src/tithe/rules/linear.py."""
    first, *rest = (part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts)
    return f"app.{rest[0]}" if first == "app" and rest[0] != "__init__" else first


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that is imported, at any depth, relative imports resolved."""
    package = ("tithe", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*base, *([node.module] if node.module else [])))
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every name in the code, and of every string that is nothing but a method's name."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.Constant(value=str(text)) if METHOD.fullmatch(text):
                yield node.lineno, text
            case _:
                pass


def owner(module: str) -> str:
    """The room behind one of our own dotted names; `tithe` for a public name of the package."""
    parts = module.split(".")
    for room in (".".join(parts[1:3]), *parts[1:2]):
        if room in ROOMS:
            return room
    return "tithe"


def listing(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing of ours"


def breaches(source: str, path: Path) -> list[str]:
    """Every breach of the law in one file, one line each."""
    here = room(path)
    where = path.relative_to(ROOT)
    if here not in ROOMS:
        return [f"{where}:1: room `{here}`: a new room says what it may import in ROOMS of tests/test_imports.py"]
    tree = ast.parse(source)
    found: list[tuple[int, str, str]] = []
    for line, module in imports(tree, path):
        top = module.split(".")[0]
        if top == "tithe":
            there = owner(module)
            if there != here and there not in ROOMS[here]:
                found.append((line, f"imports {module}", f"{here} may import {listing(ROOMS[here])}"))
            elif there != here and any(part.startswith("_") for part in module.split(".")):
                found.append((line, f"imports {module}", "a private name stays in its room"))
        elif top not in CORE_PACKAGES and top not in sys.stdlib_module_names and here not in WITH_EXTRAS:
            found.append(
                (line, f"imports {module}", f"the core imports {listing(CORE_PACKAGES)} and the standard library")
            )
        if f"{module}.".startswith("torch.distributed.") and here != "distributed":
            found.append((line, f"imports {module}", "distributed/ is the only importer of torch.distributed"))
        if here not in KNOW_METHODS and METHOD.search(module):
            found.append((line, f"imports {module}", f"only {listing(KNOW_METHODS)} know a method's name"))
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed") if here != "distributed":
                rule = "distributed/ is the only user of torch.distributed"
                found.append((node.lineno, "uses torch.distributed", rule))
            case _:
                pass
    if here not in KNOW_METHODS:
        for line, name in identifiers(tree):
            if METHOD.search(name):
                found.append((line, f"names {name}", f"only {listing(KNOW_METHODS)} know a method's name"))
    return [f"{where}:{line}: {what}: {rule}" for line, what, rule in sorted(set(found))]


def test_every_import_keeps_the_law() -> None:
    found = [line for path in sorted(PACKAGE.rglob("*.py")) for line in breaches(path.read_text("utf-8"), path)]
    assert not found, "\n" + "\n".join(found)


def test_no_file_is_too_long() -> None:
    folders = [ROOT / name for name in ("src", "tests", "benchmarks", "examples")]
    lengths = {path: len(path.read_text("utf-8").splitlines()) for folder in folders for path in folder.rglob("*.py")}
    found = [f"{path.relative_to(ROOT)}: {n} lines" for path, n in sorted(lengths.items()) if n > MAX_LINES]
    assert not found, f"\nsplit what has more than {MAX_LINES} lines:\n" + "\n".join(found)


def test_importing_tithe_loads_no_extra() -> None:
    code = "import sys, tithe; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    extras = {"accelerate", "datasets", "matplotlib", "PIL", "pyarrow", "pydantic", "rich", "tensorboard"}
    assert not loaded & (extras | {"timm", "torchvision", "transformers", "typer"})


@pytest.mark.parametrize(
    ("file", "source", "breach"),
    [
        ("selection.py", "import tithe.rules", ":1: imports tithe.rules: selection may import errors"),
        ("errors.py", "import tithe", ":1: imports tithe: errors may import nothing of ours"),
        ("select/importance.py", "from ..rules.linear import Way", ":1: imports tithe.rules.linear.Way: select may"),
        ("select/importance.py", "from tithe import rules", ":1: imports tithe.rules: select may import"),
        ("plan.py", "from .methods.base import Recipe", ":1: imports tithe.methods.base.Recipe: plan may import"),
        ("plan.py", "def f():\n    from .app.cli import app", ":2: imports tithe.app.cli.app: plan may import"),
        ("app/train/loop.py", "from tithe.plan import Plan", ":1: imports tithe.plan.Plan: app.train may import"),
        ("plan.py", "from tithe.rules.sparse.linear import _way", ": a private name stays in its room"),
        ("ledger/table.py", "from rich.table import Table", ": the core imports numpy, safetensors, torch and"),
        ("scoring.py", "from torch import distributed as dist", ": distributed/ is the only importer"),
        ("scoring.py", "import torch\ntorch.distributed.barrier()", ":2: uses torch.distributed"),
        (
            "plan.py",
            "def attach_fish(): ...",
            ":1: names attach_fish: only __init__, app.average, app.demo, app.methods",
        ),
        ("plan.py", "if name == 'trady': ...", ":1: names trady"),
        ("colour.py", "", "colour.py:1: room `colour`: a new room says what it may import"),
    ],
)
def test_a_breach_is_found(file: str, source: str, breach: str) -> None:
    found = breaches(source, PACKAGE / file)
    assert len(found) == 1
    assert breach in found[0]
    assert found[0].startswith(f"src/tithe/{file}:")


def test_what_the_law_allows() -> None:
    source = """
        import math
        import torch
        from torch import Tensor
        from tithe import errors
        from ..selection import Coordinates
        from .ruled import Rule, _private_to_the_room
        fisher = software = "fish the selected columns out"
    """
    assert breaches(textwrap.dedent(source), PACKAGE / "rules" / "linear.py") == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach each other by imports."""
    reach = {name: set(edges) for name, edges in graph.items()}
    for middle in graph:
        for edges in reach.values():
            if middle in edges:
                edges |= reach[middle]
    groups = {frozenset(a for a in reach[name] if name in reach.get(a, set())) for name in graph if name in reach[name]}
    return sorted(sorted(group) for group in groups)


def imports_of(source: str, path: Path, faces: dict[str, str], modules: set[str]) -> set[str]:
    """The files of ours that a file imports, at any depth; a name that a package shows means the file behind it."""
    found: set[str] = set()
    for _, name in imports(ast.parse(source), path):
        while name in faces:
            name = faces[name]
        parts = name.split(".")
        while parts and ".".join(parts) not in modules:
            parts.pop()
        found.add(".".join(parts))
    return found - {""}


def test_no_file_reaches_itself_by_imports() -> None:
    """Imports for annotations alone and imports inside functions count; a package's `__init__` is a face, no stop."""
    sources = {path: path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}
    faces: dict[str, str] = {}
    for path, source in sources.items():
        if path.stem == "__init__":
            package = ".".join(("tithe", *path.relative_to(PACKAGE).parent.parts))
            shown = {f"{package}.{name.rpartition('.')[2]}": name for _, name in imports(ast.parse(source), path)}
            faces |= {name: origin for name, origin in shown.items() if name != origin}
    modules = {
        ".".join(("tithe", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in sources
        if path.stem != "__init__"
    }
    graph = {name: imports_of(sources[path], path, faces, set(modules)) for name, path in modules.items()}
    assert "tithe.rules.theta" in graph["tithe.plan.mount"]
    assert circles(graph) == []


def test_a_circle_is_found() -> None:
    source = "def f():\n    if TYPE_CHECKING:\n        from tithe.rules.lean import norm"
    path, modules = PACKAGE / "rules" / "base.py", {"tithe.rules.base", "tithe.rules.lean.norm"}
    assert imports_of(source, path, {}, modules) == {"tithe.rules.lean.norm"}
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"e"}}
    assert circles(graph) == [["a", "b", "c"], ["e"]]
