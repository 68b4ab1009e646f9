"""What is left at the end: a plain narrow network of the same class, in memory, in a file, and as a program."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tithe
from models import Case
from narrow_plans import FAMILIES, KINDS, attach, bound, every, step
from oracles import adamw, bits, equal_bits, sgd
from tithe import VRPGE, NarrowPlan, TitheError


def _trained(case: Case, *, settle: bool = True, **settings: object) -> NarrowPlan:
    """A few steps, settled, and a step of the weights alone."""
    plan = attach(case, **settings)
    opt = bound(plan, sgd)
    for batch in case.batches(2):
        step(plan, opt, case, batch)
    if settle:
        plan.settle(draws=2)
        step(plan, opt, case, case.batch())
    return plan


def _attributes(model: nn.Module) -> list[list[str]]:
    return [sorted(vars(module)) for module in model.modules()]


# --- in memory


def test_what_was_lean_apart_is_not_in_the_exported_network() -> None:
    case = FAMILIES["bert"]
    model = case.model()
    layers = [m for m in model.modules() if type(m).__name__ == "BertLayer"]
    assert len(layers) > 1
    for layer in layers:
        tithe.lean(layer)
    network = attach(case, model).export(case.batch())
    assert tithe.Lean.all_of(network) == []
    assert len(tithe.Lean.all_of(model)) == len(layers)


@pytest.mark.parametrize("settle", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["settled", "likeliest"])
@pytest.mark.parametrize("case", every((*KINDS, "grouped", "grouped_query_tied")))
def test_the_exported_network_is_plain_and_gives_the_same(case: Case, settle: bool) -> None:
    plan = _trained(case, settle=settle)
    fresh, batch = case.model(), case.batch(seed=3)
    plan.model.train()
    network = plan.export(batch)
    assert type(network) is type(fresh)
    assert _attributes(network) == _attributes(fresh)
    assert list(network.state_dict()) == list(fresh.state_dict())
    assert [type(p) for p in network.parameters()] == [type(p) for p in fresh.parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._state_dict_hooks for m in network.modules())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert sum(p.numel() for p in network.parameters()) < sum(p.numel() for p in fresh.parameters())
    assert network.training
    with torch.no_grad():
        for training in (False, True):
            for model in (plan.model, network):
                model.train(training)
            torch.testing.assert_close(case.loss(network, batch), case.loss(plan.model, batch), rtol=1e-6, atol=1e-7)
    own = {p.data_ptr() for p in plan.model.parameters()}
    assert not own & {p.data_ptr() for p in network.parameters()}
    case.loss(network.train(), batch).backward()
    assert all(p.grad is None for p in plan.parameters())


def test_a_network_that_the_plan_cannot_vouch_for_is_not_exported() -> None:
    """A batch on which the copy loses something else; here because the loss looks at who is asked."""
    case = FAMILIES["vgg"]
    model = case.model()
    plan = attach(case, model, loss=lambda given, batch: case.loss(given, batch) + float(given is not model))
    with pytest.raises(TitheError, match="export: found a loss of"):
        plan.export(case.batch())
    assert type(plan.export()) is type(model)


def test_the_exported_network_is_trained_further_by_any_other_plan() -> None:
    case = FAMILIES["vgg"]
    network = _trained(case).export()
    before = bits(network)
    plan = tithe.attach(network, tithe.FISH(density=0.1), loss=case.loss, data=case.batches(1))
    opt = torch.optim.AdamW(plan.parameters(), lr=1e-2)
    plan.bind(opt)
    plan.backward(lambda: case.loss(network, case.batch()))
    opt.step()
    plan.step()
    plan.release()
    assert equal_bits(before, bits(network))
    again = attach(case, network, keep=0.7)
    step(again, bound(again, sgd), case, case.batch())
    assert sum(p.numel() for p in again.export().parameters()) < sum(p.numel() for p in network.parameters())


# --- in a file


@pytest.mark.parametrize("settle", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["likeliest", "settled"])
@pytest.mark.parametrize("case", every((*KINDS, "grouped", "grouped_query_tied")))
def test_a_file_makes_a_fresh_model_that_network_bit_for_bit(case: Case, settle: bool, tmp_path: Path) -> None:
    plan = _trained(case, settle=settle)
    network, path = plan.export(), tmp_path / "narrow.safetensors"
    plan.save(path, metadata={"note": "a test"})
    fresh = case.model(seed=9)
    assert tithe.apply(fresh, path) is fresh
    assert equal_bits(bits(network), bits(fresh)) == []
    assert [str(module) for module in fresh.modules()] == [str(module) for module in network.modules()]
    assert equal_bits(bits(network), bits(tithe.apply(fresh, path))) == []  # again changes nothing
    for training in (False, True):
        with torch.no_grad():
            one, other = (case.loss(model.train(training), case.batch(seed=3)) for model in (network, fresh))
        assert torch.equal(one, other)
    told = tithe.inspect(path)
    assert told.metadata["note"] == "a test"
    assert told.metadata["method"] == repr(plan.method)
    assert told.num_values == told.num_weights == sum(t.numel() for t in _distinct(network))
    assert "VRPGE(keep=0.5" in str(told)
    plan.save(tmp_path / "again.safetensors", metadata={"note": "a test"})
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def _distinct(model: nn.Module) -> list[Tensor]:
    kept = {value.data_ptr(): value for value in model.state_dict().values()}
    return list(kept.values())


def _saved(tmp_path: Path, name: str = "vgg") -> Path:
    path = tmp_path / "narrow.safetensors"
    _trained(FAMILIES[name]).save(path)
    return path


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: FAMILIES["residual"].model(), "no such number|no such tensor"),
        (lambda: nn.Sequential(*list(FAMILIES["vgg"].model())[:-1]), "no such"),
        (lambda: nn.Sequential(*FAMILIES["vgg"].model(), nn.Linear(3, 3)), "does not know"),
        (lambda: FAMILIES["vgg"].model().double(), "dtype"),
    ],
    ids=["another class", "a layer less", "a layer more", "another dtype"],
)
def test_another_model_is_refused_and_left_alone(make: object, told: str, tmp_path: Path) -> None:
    path, model = _saved(tmp_path), make()
    before = bits(model)
    with pytest.raises(TitheError, match=told):
        tithe.apply(model, path)
    assert equal_bits(before, bits(model)) == []


def test_a_narrower_model_is_refused_and_left_alone(tmp_path: Path) -> None:
    path, model = _saved(tmp_path), FAMILIES["vgg"].model()
    narrow = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(2), *list(model)[2:])
    before = bits(narrow)
    with pytest.raises(TitheError, match="at its full width"):
        tithe.apply(narrow, path)
    assert equal_bits(before, bits(narrow)) == []


@pytest.mark.parametrize("at", [0.2, 0.6, 0.95])
def test_a_damaged_file_is_refused_and_the_model_left_alone(at: float, tmp_path: Path) -> None:
    path, model = _saved(tmp_path), FAMILIES["vgg"].model()
    content, before = bytearray(path.read_bytes()), bits(model)
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(TitheError):
        tithe.apply(model, path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(TitheError):
        tithe.apply(model, path)
    assert equal_bits(before, bits(model)) == []
    assert [tuple(p.shape) for p in model.parameters()] == [
        tuple(p.shape) for p in FAMILIES["vgg"].model().parameters()
    ]


# --- as a program


@pytest.mark.parametrize("name", ["vgg", "residual", "inverted", "dense", pytest.param("bert", marks=pytest.mark.slow)])
def test_a_program_of_the_exported_network_gives_the_same(name: str) -> None:
    case = FAMILIES[name]
    plan = _trained(case)
    network, batch = plan.export().eval(), case.batch(3)
    given = (
        {"args": (batch["x"],)}
        if "mask" not in batch
        else {"args": (), "kwargs": {"input_ids": batch["x"], "attention_mask": batch["mask"]}}
    )
    program = torch.export.export(network, **given)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    kwargs = given.get("kwargs", {})
    found, expected = again(*given["args"], **kwargs), network(*given["args"], **kwargs)
    if name == "bert":
        found, expected = found.logits, expected.logits
    assert torch.equal(found, expected)


# --- settling


def test_the_best_of_the_candidates_stays_and_statistics_are_means_over_the_batches() -> None:
    case = FAMILIES["vgg"]
    model = case.model(dtype=torch.float64)
    plan = attach(case, model)
    opt = bound(plan, sgd)
    for batch in case.batches(2, dtype=torch.float64):
        step(plan, opt, case, batch)
    held = [case.batch(6, seed=seed, dtype=torch.float64) for seed in (20, 21, 22)]
    candidates = plan.structure.candidates(plan.seed, plan.num_steps, 5)
    assert len(candidates) > 3
    losses: list[float] = []
    for mask in candidates:
        twin = attach(case, _copy(model, case))
        twin.structure.s.detach().copy_(mask.double())
        twin.end_epoch()
        narrow = twin.export().train()
        with torch.no_grad():
            losses.append(float(sum(case.loss(narrow, batch) for batch in held)) / 3)
    before, drawn_next = bits(model), float(torch.rand(()))
    torch.manual_seed(1)
    expected_next = float(torch.rand(()))
    torch.manual_seed(1)
    model.eval()
    found = plan.settle(held, draws=5)
    assert float(torch.rand(())) == expected_next != drawn_next
    assert found == pytest.approx(min(losses), rel=1e-9)
    assert not model.training
    best = candidates[losses.index(min(losses))]
    kept = plan.stage.coupling.num_units
    assert kept == int(best.sum())
    assert all(bool((s == 1).all()) for s in plan.structure_parameters())

    reference = _copy(model, case, narrow=plan).train()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for batch in held:
            case.loss(reference, batch)
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}
    assert len(before) == len(bits(model))


def _copy(model: nn.Module, case: Case, narrow: NarrowPlan | None = None) -> nn.Module:
    """The same network without the plan that is attached."""
    if narrow is not None:
        return narrow.export()
    fresh = case.model(dtype=next(model.parameters()).dtype)
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_after_settling_only_the_weights_of_one_network_are_trained() -> None:
    case = FAMILIES["residual"]
    plan = attach(case)
    opt = bound(plan, adamw)
    for batch in case.batches(2):
        step(plan, opt, case, batch)
    plan.settle(draws=3)
    ordinary = plan.export()
    state = {name: {k: v.clone() for k, v in opt.state[p].items()} for name, p in plan.named_parameters()}
    other = adamw(ordinary.parameters())
    for name, parameter in ordinary.named_parameters():
        other.state[parameter] = state[name]
    calls = 0
    for batch in case.batches(3):
        other.zero_grad()
        case.loss(ordinary, batch).backward()
        other.step()

        def closure(batch: object = batch) -> Tensor:
            nonlocal calls
            calls += 1
            return case.loss(plan.model, batch)

        plan.backward(closure)
        opt.step()
        opt.zero_grad()
        assert plan.step() is False
    assert calls == 3
    assert plan.end_epoch() is False
    assert equal_bits(bits(plan.model), bits(ordinary)) == []


def test_frozen_norms_keep_their_statistics_when_settling() -> None:
    case = FAMILIES["residual"]
    model = case.model()
    model.stem[1].eval()
    plan = attach(case, model, where="!stem.*")
    before = bits(model)
    plan.settle(draws=1)
    after = bits(model)
    assert torch.equal(after["stem.1.running_mean"], before["stem.1.running_mean"])
    assert not torch.equal(after["up.1.running_mean"].sum(), before["up.1.running_mean"].sum())
    assert not model.stem[1].training
    assert model.up[1].training


def test_a_plan_of_which_everything_exists_has_nothing_to_export() -> None:
    plan = tithe.attach(nn.Linear(3, 2), tithe.FISH(k=2, score="magnitude"))
    with pytest.raises(TitheError, match="every channel exists"):
        plan.export()
    assert plan.structure_parameters() == []


def test_saving_does_not_disturb_training(tmp_path: Path) -> None:
    """Between steps, and within one."""
    case = FAMILIES["vgg"]
    plans = [attach(case, method=VRPGE(0.5, structure_lr=0.1)) for _ in range(2)]
    opts = [bound(plan, adamw) for plan in plans]
    for number, batch in enumerate(case.batches(4)):
        for plan, opt in zip(plans, opts, strict=True):
            plan.backward(lambda plan=plan, batch=batch: case.loss(plan.model, batch))
            if plan is plans[0]:
                plan.save(tmp_path / f"{number}.safetensors")
            opt.step()
            opt.zero_grad()
            plan.step()
        plans[0].export(batch)
    assert equal_bits(*(bits(plan.model) for plan in plans)) == []
