"""The price of training in the span of checkpoints is what its plan takes on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tithe
from histories import checkpoints, recorded
from models import CASES, LARGE, Batch, Case
from tithe.app.price import Quote, Subject, Terms, price
from tithe.averages import BLOCK
from tithe.errors import TitheError
from tithe.ledger import measure
from tithe.plan.outlined import working_bytes

pytest.importorskip("transformers")

UNPREDICTED = {"experts", "recurrent", "swin", "regression"}  # tests/test_memory.py has the reasons
EVERY = [
    pytest.param(case, id=name, marks=[pytest.mark.slow] if case in LARGE else [])
    for name, case in CASES.items()
    if name not in UNPREDICTED
]
FLOAT = 4
N = 5


class Wide(nn.Module):
    """A large weight that fills no whole number of blocks, one that is used twice, and small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 301)
        self.layer = nn.Linear(301, 301)
        self.decoder = nn.Linear(301, 300)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.layer(self.embedding(ids)).tanh())


def draw(num_samples: int, generator: torch.Generator) -> Batch:
    ids = torch.randint(300, (num_samples, 7), generator=generator)
    return {"ids": ids, "labels": ids.roll(1, 1)}


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten())


WIDE = Case("wide", Wide, draw, loss)


def subject(case: Case) -> Subject:
    return Subject(name=case.name, build=case.make, batch=case.batch, loss=case.loss, head=case.head)


def quote(case: Case, batch: int = 4, **terms: Any) -> Quote:
    (row,) = price(subject(case), batch=batch, methods=["twa"], terms=Terms(checkpoints=N, **terms)).rows
    return row


def attach(case: Case, folder: Path, *, bits: int = 8) -> tithe.SubspacePlan:
    model = case.model()
    history = recorded(folder / "run", checkpoints(model, N))
    return tithe.attach(model, tithe.TWA(history, bits=bits), loss=case.loss, data=case.batches(2))


def check_backward(row: Quote, plan: tithe.SubspacePlan, case: Case) -> None:
    """Forward and backward take what was said, to the byte; where writing the weights takes more, no more than that."""
    batch = case.batch(4)
    ledger = measure(lambda: plan.backward(lambda: case.loss(plan.model, batch)), model=plan.model)
    assert row.kept == ledger.kept
    assert row.layers == ledger.kept_by_module
    if row.moment == "forward and backward":
        assert sum(row.at_peak.values()) == ledger.peak
        assert row.at_peak["kept"] == ledger.by_kind["kept"]
    else:
        assert ledger.peak <= sum(row.at_peak.values())


@pytest.mark.parametrize("case", [*EVERY, pytest.param(WIDE, id="wide")])
def test_a_step_takes_what_was_said(case: Case, tmp_path: Path) -> None:
    row, plan = quote(case), attach(case, tmp_path)
    check_backward(row, plan, case)
    theta = next(iter(plan.parameters()))
    assert row.trained == theta.numel() == N
    assert (row.theta, row.gradients, row.optimizer) == (theta.nbytes, theta.nbytes, 2 * theta.nbytes)
    blocks = sum(-(-selection.num_weights // BLOCK) for selection in plan.selections.values())
    assert row.basis == plan.index_bytes + blocks * BLOCK * FLOAT
    assert row.sent == blocks * BLOCK * FLOAT
    basis, kept = plan.basis, plan._sharing.kept
    standing = [
        basis._paths,
        basis.gram,
        basis.squares,
        basis.offsets,
        next(iter(plan.selections.values())).state()["mix"],
    ]
    assert row.index == sum(t.nbytes for t in standing) + (0 if kept is None else kept.waiting.nbytes)
    plan.release()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("case", [WIDE, CASES["bert"], CASES["resnet_bottleneck"]], ids=lambda case: case.name)
def test_making_the_weights_anew_takes_what_was_said(case: Case, bits: int, tmp_path: Path) -> None:
    row, plan = quote(case, bits=bits, optimizer="sgd"), attach(case, tmp_path, bits=bits)
    check_backward(row, plan, case)
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.1)
    plan.bind(optimizer)
    written = measure(optimizer.step, model=plan.model).peak
    said = sum(row.at_peak.values())
    if row.moment == "optimizer step":
        assert written <= said <= written + 64 + row.gradients  # what SGD holds of θ is not there at that moment
    else:
        assert written <= said
    plan.release()


def test_one_bit_is_priced_within_a_part_of_the_kernels_memory(tmp_path: Path) -> None:
    row, plan = quote(WIDE, bits=1), attach(WIDE, tmp_path, bits=1)
    batch = WIDE.batch(4)
    ledger = measure(lambda: plan.backward(lambda: loss(plan.model, batch)), model=plan.model)
    assert row.kept == ledger.kept
    assert abs(sum(row.at_peak.values()) - ledger.peak) <= 0.2 * ledger.peak
    assert quote(WIDE).basis - row.basis == row.sent // (BLOCK * FLOAT) * (N - 1) * (256 - 32)
    plan.release()


def test_the_file_is_as_large_as_was_said(tmp_path: Path) -> None:
    case = CASES["resnet_bottleneck"]
    row, plan = quote(case), attach(case, tmp_path)
    plan.save(tmp_path / "it.safetensors")
    written = (tmp_path / "it.safetensors").stat().st_size
    assert abs(row.file - written) <= max(256, 0.01 * written)
    plan.release()


def test_the_basis_grows_with_checkpoints_and_bits_and_the_peak_hardly() -> None:
    case = CASES["bert"]
    few, many = (
        price(subject(case), methods=["twa"], terms=Terms(checkpoints=n, bits=bits)).rows[0]
        for n, bits in ((10, 4), (1000, 8))
    )
    blocks = few.sent // (BLOCK * FLOAT)
    assert many.basis - few.basis == blocks * (999 * (256 + 2) - 9 * (128 + 2))
    assert few.kept == many.kept
    assert few.flops is not None
    assert many.flops is not None
    weights = sum(p.numel() for p in case.model().parameters())
    assert many.flops.weight_gradient - few.flops.weight_gradient == 4 * 990 * weights
    assert many.flops.forward == few.flops.forward


def test_all_layers_are_differentiated_and_no_gradient_of_all_weights_stands() -> None:
    full, twa = price(subject(WIDE), methods=["full", "twa"], terms=Terms(checkpoints=N)).rows
    assert (full.kept, full.sent > 0.9 * twa.sent) == (twa.kept, True)
    assert twa.gradients == N * FLOAT < full.gradients / 1000
    assert twa.peak < full.peak
    assert full.flops is not None
    assert twa.flops is not None
    weights = full.trained
    assert twa.flops.input_gradient == full.flops.input_gradient
    assert twa.flops.weight_gradient - full.flops.weight_gradient == 4 * (N - 1) * weights


def test_working_memory_stops_growing() -> None:
    grows = [working_bytes(blocks, 40, 8) for blocks in (1, 16, 1024, 2048)]
    assert grows[0] < grows[1] < grows[2] == grows[3]


def test_a_layer_of_any_size_is_priced() -> None:
    width = 2**16  # 17 GB

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    huge = Subject(
        name="huge", build=build, batch=lambda n: torch.empty(n, width), loss=lambda model, x: model(x).square().mean()
    )
    row = price(huge, batch=2, methods=["twa"]).rows[0]
    assert row.basis > 100 * width**2
    assert 2 * 4 * width**2 < row.peak < 2.1 * 4 * width**2  # the weight, and its gradient or the new one
    assert row.optimizer == 2 * 100 * FLOAT


def test_micro_batches_fit() -> None:
    case = CASES["bert"]
    one, whole = quote(case, 1), quote(case, 64)
    memory = (one.peak + whole.peak) // 2
    fit = price(subject(case), batch=64, methods=["twa"], terms=Terms(checkpoints=N), memory=memory).rows[0].fit
    assert fit is not None
    assert fit.peak <= memory
    assert 1 <= fit.micro_batch < 64
    assert fit.fraction is None


def test_pricing_gives_the_model_back() -> None:
    case = CASES["bert"]
    before, twa, after = price(subject(case), methods=["full", "twa", "full"], terms=Terms(checkpoints=N)).rows
    assert before == after != twa


@pytest.mark.parametrize(
    ("terms", "message"),
    [({"checkpoints": 0}, "checkpoints: found 0; expected at least 1"), ({"bits": 2}, "bits: found 2; expected 8, 4")],
)
def test_refusals(terms: dict[str, int], message: str) -> None:
    with pytest.raises(TitheError, match=message):
        Terms(**terms)
