"""The table of rules tells the truth: every row is measured, and the pages show what it says."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import tithe
from oracles import Given
from tithe import Channels, TitheError
from tithe.rules import Catch, Leanness, Row, dispatch, register, table
from tithe.rules.dispatch import _RULES
from tithe.rules.lean import dispatch as lean_dispatch
from tithe.selection import Coordinates, Selection

DOCS = Path(__file__).parents[1] / "docs"
F4 = 4  # bytes of a float32
OURS = [row for row in table() if row.handler.startswith("tithe.rules.")]


def kept(run: Callable[[], Tensor], *, besides: nn.Module | None = None) -> int:
    """Bytes that autograd keeps of a forward pass, each memory once, a module's own tensors apart."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes() if tensor.is_contiguous() else tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    tensors = [] if besides is None else [*besides.parameters(), *besides.buffers()]
    own = {tensor.untyped_storage()._cdata for tensor in tensors}
    assert y.requires_grad
    return sum(size for address, size in found.items() if address not in own)


# --- the sparse wing


class Scale(nn.Module):
    """A vector along the last axis."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


@dataclass(frozen=True)
class Sparse:
    """A representative call: a layer, what is selected of its weight, and the bytes that the row's formulas give."""

    family: str
    layer: nn.Module
    x: Tensor
    chosen: Selection
    rule: int
    stock: int
    asked: bool = True

    @property
    def key(self) -> tuple[str, str]:
        return self.family, "channels" if isinstance(self.chosen, Channels) else "entries"


def _entries(shape: tuple[int, ...], columns: list[int], axis: int = 1) -> Coordinates:
    """All entries of these columns, or of these rows, but the first."""
    at = torch.arange(torch.Size(shape).numel()).view(shape).index_select(axis, torch.tensor(columns))
    return Coordinates(shape, at.flatten().sort().values[1:])


def _vector(count: int, *at: int) -> Coordinates:
    return Coordinates((count,), torch.tensor(at))


def _channels(shape: tuple[int, ...], ids: list[int], groups: int = 1, *, transposed: bool = False) -> Channels:
    return Channels(shape, torch.tensor(ids), groups=groups, transposed=transposed)


N = 16
ROWS_x = torch.randn(N, 32)
IMAGES = torch.randn(N, 8, 6, 6)
IDS = torch.randint(50, (N, 5))
PLANE = N * 36 * F4
CONV, BACK = "convolution", "transposed convolution"
SPARSE = [
    Sparse("linear map", nn.Linear(32, 24), ROWS_x, _entries((24, 32), [3, 7]), N * 2 * F4, N * 32 * F4),
    Sparse("linear map", nn.Linear(32, 24), ROWS_x, _channels((24, 32), [3, 7, 9]), N * 3 * F4, N * 32 * F4),
    Sparse(CONV, nn.Conv2d(8, 8, 3), IMAGES, _entries((8, 8, 3, 3), [2]), PLANE, 8 * PLANE),
    Sparse(CONV, nn.Conv2d(8, 8, 3, groups=4), IMAGES, _entries((8, 2, 3, 3), [2], 0), 2 * PLANE, 8 * PLANE),
    Sparse(CONV, nn.Conv2d(8, 8, 3), IMAGES, Coordinates.nothing((8, 8, 3, 3)), 0, 8 * PLANE),
    Sparse(CONV, nn.Conv2d(8, 8, 3), IMAGES, _channels((8, 8, 3, 3), [1, 2, 5]), 3 * PLANE, 8 * PLANE),
    Sparse(BACK, nn.ConvTranspose2d(8, 4, 3), IMAGES, _entries((8, 4, 3, 3), [2, 3], 0), 2 * PLANE, 8 * PLANE),
    Sparse(BACK, nn.ConvTranspose2d(8, 4, 3, groups=4), IMAGES, _entries((8, 1, 3, 3), [2], 0), 2 * PLANE, 8 * PLANE),
    Sparse(BACK, nn.ConvTranspose2d(8, 4, 3), IMAGES, Coordinates.nothing((8, 4, 3, 3)), 0, 8 * PLANE),
    Sparse(
        BACK,
        nn.ConvTranspose2d(8, 4, 3, groups=2),
        IMAGES,
        _channels((8, 2, 3, 3), [1, 2, 5], 2, transposed=True),
        3 * PLANE,
        8 * PLANE,
    ),
    Sparse("embedding", nn.Embedding(50, 8), IDS, _entries((50, 8), [2]), N * 5 * 8, N * 5 * 8, asked=False),
    Sparse("layer norm", nn.LayerNorm(32), ROWS_x, _vector(32, 1, 4), N * (32 + 2) * F4, N * (32 + 2) * F4),
    Sparse("layer norm", nn.LayerNorm(32), ROWS_x, _vector(32, 1, 4), N * 2 * F4, N * (32 + 2) * F4, asked=False),
    Sparse("RMS norm", nn.RMSNorm(32), ROWS_x, _vector(32, 1, 4), N * (32 + 1) * F4, 4 * N * 32 * F4),
    Sparse("RMS norm", nn.RMSNorm(32), ROWS_x, _vector(32, 1, 4), N * 2 * F4, N * 32 * F4, asked=False),
    Sparse(
        "batch norm in evaluation mode",
        nn.BatchNorm2d(8).eval(),
        IMAGES,
        _vector(8, 1, 4),
        2 * PLANE + 8 * F4,
        8 * PLANE,
    ),
    Sparse("vector along the last axis", Scale(32), ROWS_x, _vector(32, 1, 4), N * 2 * F4, N * 32 * F4),
]


@pytest.mark.parametrize("case", SPARSE, ids=lambda case: f"{case.key[0]}-{case.key[1]}".replace(" ", "_"))
def test_a_sparse_row_keeps_what_it_says(case: Sparse) -> None:
    """The bias is frozen; `+ 0` makes an input that nobody else holds."""
    x = case.x.clone()
    asked = x.requires_grad_(case.asked) if x.is_floating_point() else x
    others = [p for name, p in case.layer.named_parameters() if name != "weight"]
    for parameter in others:
        parameter.requires_grad_(False)
    stock = kept(lambda: case.layer(asked + 0), besides=case.layer)
    plan = tithe.attach(case.layer, Given({"weight": case.chosen}))
    work = kept(lambda: case.layer(asked + 0), besides=case.layer)
    plan.release()
    assert work == case.rule
    assert stock == case.stock or (case.family == "RMS norm" and stock > case.stock / 4)  # a composition of calls


# --- the lean wing

FULL = Leanness()


@dataclass(frozen=True)
class Lean:
    """A representative call, and the bytes that the row's formulas give; `several`: stock keeps at least so much."""

    family: str
    run: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    rule: int
    stock: int
    leanness: Leanness = FULL
    several: bool = False

    @property
    def key(self) -> tuple[str, str]:
        return self.family, ""


def _plan_of_codes() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A linear map of which a plan has selected 8 of 32 columns."""
    layer = nn.Linear(32, 24)
    tithe.attach(layer, Given({"weight": _channels((24, 32), list(range(0, 32, 4)))}))
    return layer, lambda x: layer(x + 0)


KERNEL, BACK_KERNEL, ONES = torch.randn(8, 8, 3, 3), torch.randn(8, 4, 3, 3), torch.ones(8)
CODED, coded = _plan_of_codes()
SIZE, PLACES = N * 8 * 36, N * 8 * 9
BYTES = SIZE * F4
ROWS, CLASSES = 96, torch.arange(96) % 48
IMAGE, HEADS = (N, 8, 6, 6), (2, 4, 8, 16)
ATTENDED, PAIRS = 2 * 4 * 8 * 16 * F4, 2 * 4 * 8 * 8
DERIVATIVES, SMOOTH = "two derivatives, in place too", "smooth activation, in place too"
NORMS = "layer norm, RMS norm (also those that models write themselves)"
PRODUCT = "product of such an activation and a tensor (SwiGLU, GeGLU)"


def _product(x: Tensor) -> Tensor:
    return F.silu(x) * (x + 1)


def _attend(x: Tensor, dropout: float = 0.0) -> Tensor:
    return F.scaled_dot_product_attention(x + 1, x + 2, x + 3, dropout_p=dropout)


LEAN = [
    Lean(DERIVATIVES, lambda x: F.relu6(x + 0), IMAGE, SIZE // 8, BYTES),
    Lean(DERIVATIVES, F.relu, IMAGE, SIZE // 8, BYTES),
    Lean(DERIVATIVES, lambda x: torch.clamp(x + 0, 0, 1), IMAGE, SIZE // 8, BYTES),
    Lean(SMOOTH, lambda x: F.gelu(x + 0), IMAGE, SIZE, BYTES),
    Lean(SMOOTH, lambda x: F.silu(x + 0), IMAGE, BYTES, BYTES, Leanness(exact=True)),
    Lean(PRODUCT, _product, IMAGE, 3 * SIZE + 2 * SIZE // 128 * F4, 3 * BYTES),
    Lean("dropout", lambda x: F.dropout(x, 0.5), IMAGE, SIZE // 8, BYTES),
    Lean("maximum over windows", lambda x: F.max_pool2d(x + 0, 2), IMAGE, PLACES, BYTES + 8 * PLACES),
    Lean("mean over windows", lambda x: F.avg_pool2d(x + 0, 2), IMAGE, 0, BYTES),
    Lean("convolution with a frozen kernel", lambda x: F.conv2d(x + 0, KERNEL), IMAGE, KERNEL.numel() * F4,
         BYTES + KERNEL.numel() * F4),
    Lean("convolution with a frozen kernel", lambda x: F.conv_transpose2d(x + 0, BACK_KERNEL), IMAGE,
         BACK_KERNEL.numel() * F4, BYTES + BACK_KERNEL.numel() * F4),
    Lean("batch norm with a frozen scale in evaluation mode", lambda x: F.batch_norm(x + 0, 0 * ONES, ONES, ONES),
         IMAGE, 2 * 8 * F4, BYTES + 2 * 8 * F4),
    Lean(NORMS, lambda x: F.layer_norm(x + 0, (6,)), IMAGE, BYTES + SIZE // 6 * F4, BYTES + 2 * SIZE // 6 * F4),
    Lean(NORMS, lambda x: F.layer_norm(x + 0, (6,)), IMAGE, SIZE + SIZE // 128 * F4 + SIZE // 6 * F4,
         BYTES + 2 * SIZE // 6 * F4, Leanness(8)),
    Lean(NORMS, lambda x: F.rms_norm(x + 0, (6,)), IMAGE, BYTES + SIZE // 6 * F4, BYTES, several=True),
    Lean("group norm", lambda x: F.group_norm(x + 0, 2), IMAGE, BYTES + 2 * N * 2 * F4, BYTES + 2 * N * 2 * F4),
    Lean("group norm", lambda x: F.group_norm(x + 0, 2), IMAGE, SIZE + SIZE // 128 * F4 + N * 2 * F4,
         BYTES + 2 * N * 2 * F4, Leanness(8)),
    Lean("attention", _attend, HEADS, 3 * ATTENDED, 4 * ATTENDED + PAIRS // 8 * F4),
    Lean("attention", lambda x: _attend(x, 0.5), HEADS, 3 * ATTENDED + PAIRS // 8, 3 * ATTENDED + 2 * PAIRS * F4,
         several=True),
    Lean("cross entropy", lambda x: F.cross_entropy(x + 0, CLASSES), (ROWS, 48), ROWS * (48 * F4 + 2 * F4 + 8) + 8,
         ROWS * (48 * F4 + 8) + F4),
    Lean("cross entropy", lambda x: F.cross_entropy(x.bfloat16().float(), CLASSES), (ROWS, 48),
         ROWS * (48 * 2 + 2 * F4 + 8) + 8, ROWS * (48 * F4 + 8) + F4),
    Lean("linear map with a plan's columns of an input in codes", coded, (N, 32), N * 8 + N * 8 // 128 * F4,
         N * 8 * F4, Leanness(8)),
]  # fmt: skip


@pytest.mark.parametrize("case", LEAN, ids=lambda case: case.family.replace(" ", "_"))
def test_a_lean_row_keeps_what_it_says(case: Lean) -> None:
    x = torch.randn(case.shape, requires_grad=True)
    stock = kept(lambda: case.run(x), besides=CODED)
    with Catch(case.leanness):
        work = kept(lambda: case.run(x), besides=CODED)
    assert work == case.rule
    assert stock >= case.stock if case.several else stock == case.stock


# --- the table itself


def test_every_row_has_a_measurement_a_statement_and_a_handler() -> None:
    assert {(row.family, row.selected) for row in OURS} == {case.key for case in [*SPARSE, *LEAN]}
    for row in OURS:
        assert row.keeps, row
        assert row.stock, row
        assert row.note or row.wing == "sparse", row
        found: object = sys.modules[row.handler.rpartition(".")[0]] if "<locals>" not in row.handler else None
        assert found is None or callable(getattr(found, row.handler.rpartition(".")[2]))


def test_every_handler_says_what_it_computes() -> None:
    """A sentence, and for the first of a row its equation."""
    handlers = [*dispatch._SERVED, *lean_dispatch._KIN]
    first = {row.handler for row in OURS}
    for handler in handlers:
        if getattr(sys.modules[handler.__module__], handler.__name__, None) is not handler:
            continue  # of an example that ran before
        if handler.__module__.startswith("tithe.rules."):
            said = handler.__doc__ or ""
            assert len(re.split(r"[.;:]\s", said)[0].split()) > 3 or "in place" in said, handler
            if f"{handler.__module__}.{handler.__qualname__}" in first:
                assert re.search(r"[=≤]", said), handler


def test_the_table_prints_at_80_columns_and_lists_its_rows() -> None:
    found = tithe.rules.table()
    assert len(found) == len(list(found)) >= len(OURS)
    assert max(map(len, str(found).splitlines())) <= 80
    assert repr(found) == str(found)
    (linear,) = [row for row in found.wing("sparse") if row.family == "linear map" and row.selected == "channels"]
    assert linear.keeps == "x[..., channels]"
    assert "torch.Tensor.__matmul__" in linear.operations
    assert linear.short == ["linear", "addmm", "matmul", "mm"]


def _marked(page: str) -> list[str]:
    return re.findall(r"<!-- table: (\w+) -->", (DOCS / page).read_text("utf-8"))


def test_the_pages_show_the_table() -> None:
    """Rewrite them with `python -c 'import tithe; tithe.rules.table().write("docs/rules.md", "docs/lean.md")'`."""
    assert _marked("rules.md") == ["sparse"]
    assert _marked("lean.md") == ["lean"]
    for page in ("rules.md", "lean.md"):
        text = (DOCS / page).read_text("utf-8")
        assert table().rewrite(text) == text, page


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(TitheError, match="no mark of a table"):
        table().write(page)
    page.write_text("<!-- table: lean -->\n<!-- end of table -->\nbelow")
    table().write(page)
    assert "| dropout |" in page.read_text() or "| `dropout` |" in page.read_text()
    assert page.read_text().endswith("<!-- end of table -->\nbelow")


def _rows(family: str) -> list[Row]:
    return [row for row in table() if row.family == family]


def test_a_row_of_a_strangers_own() -> None:
    """It takes operations over from another row, and gives way when it is taken out."""

    @register(F.bilinear, keeps="nothing", stock="both inputs", family="mine")
    def first(*args: object, **kwargs: object) -> Tensor:
        return NotImplemented

    @register(torch.bmm, like=first)
    def second(*args: object, **kwargs: object) -> Tensor:
        return NotImplemented

    try:
        (row,) = _rows("mine")
        assert row.short == ["bilinear", "bmm"]
        register(F.bilinear, keeps="all", stock="both inputs", family="theirs")(lambda *args: NotImplemented)
        assert [row.short for row in _rows("mine")] == [["bmm"]]
        assert [row.keeps for row in _rows("theirs")] == ["all"]
        with pytest.raises(TitheError, match="not registered"):
            register(torch.bmm, like=test_a_row_of_a_strangers_own)(first)
    finally:
        _RULES.pop(F.bilinear)
        _RULES.pop(torch.bmm)
    assert not _rows("mine")
    assert not _rows("theirs")
