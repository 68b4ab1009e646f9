"""Every model of the zoo under a plan: gradients, keys, copies, release."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tithe
from models import CASES, LARGE, ZOO, Case
from oracles import adamw, bits, equal_bits, gradients, thetas

EVERY = [pytest.param(case, id=name, marks=[pytest.mark.slow] if case in LARGE else []) for name, case in CASES.items()]
SOME = [
    pytest.param(CASES[name], id=name)
    for name in ("tied_mlp", "depthwise", "recurrent", "functional", "bert", "gpt2", "llama")
]
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def attach(model: nn.Module, case: Case, density: float, *, seed: int = 0, again: bool = False) -> tithe.Plan:
    """A random choice; `again`: one that could be made again, for which all θ share one flat parameter."""
    k = max(1, int(density * sum(p.numel() for p in model.parameters() if p.requires_grad)))
    method = tithe.FISH(k=k, score="random", reselect=tithe.every(1000) if again else None)
    return tithe.attach(model, method, seed=seed)


def _frozen_norms_in_evaluation(model: nn.Module, plan: tithe.Plan) -> None:
    """What a plan does to BatchNorm with nothing selected, done to a model that has no plan."""
    chosen = {name for name, selection in plan.selections.items() if selection.size}
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not {f"{path}.weight", f"{path}.bias"} & chosen:
            module.eval()


def _assert_gradients(plan: tithe.Plan, expected: dict[str, Tensor], case: Case) -> None:
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if "single" in case.tags else TOLERANCE
    seen = 0
    for name, theta in thetas(plan).items():
        if theta.numel() == 0:
            continue
        grad = theta.grad
        assert grad is not None, name
        want = expected[name] if name in plan.head else expected[name].flatten()[plan.selected(name)]
        torch.testing.assert_close(grad, want, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
        seen += theta.numel()
    assert seen > 0


@pytest.mark.parametrize("density", [0.01, 0.2, 0.9])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("case", EVERY)
def test_theta_gradient_is_the_selected_part_of_the_dense_one(case: Case, density: float, again: bool) -> None:
    model, batch = case.model(dtype=torch.float64), case.batch(dtype=torch.float64)
    if case.dropout:
        model.eval()
    plain = copy.deepcopy(model)
    plan = attach(model, case, density, seed=1, again=again)
    _frozen_norms_in_evaluation(plain, plan)
    expected = gradients(plain, case.loss, batch)
    loss = plan.backward(lambda: case.loss(model, batch))
    torch.testing.assert_close(loss, case.loss(plain, batch), **TOLERANCE)
    _assert_gradients(plan, expected, case)
    for name, parameter in model.named_parameters():
        if name not in plan.head and not name.endswith("@theta"):
            assert parameter.grad is None, name


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("case", EVERY)
def test_two_backwards_accumulate(case: Case, again: bool) -> None:
    model, (one, two) = case.model(dtype=torch.float64).eval(), case.batches(2, dtype=torch.float64)
    plain = copy.deepcopy(model)
    first, second = gradients(plain, case.loss, one), gradients(plain, case.loss, two)
    plan = attach(model, case, 0.2, again=again)
    for batch in (one, two):
        plan.backward(lambda batch=batch: case.loss(model, batch))
    _assert_gradients(plan, {name: first[name] + second[name] for name in first}, case)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("case", SOME)
def test_activation_checkpointing(case: Case, reentrant: bool, again: bool) -> None:
    """The loss recomputed as a whole: rules must give the same from a second forward inside backward."""
    from torch.utils.checkpoint import checkpoint

    model, batch = case.model(dtype=torch.float64).eval(), case.batch(dtype=torch.float64)
    expected = gradients(model, case.loss, batch)
    plan = attach(model, case, 0.2, again=again)
    tick = torch.zeros(
        (), dtype=torch.float64, requires_grad=True
    )  # the reentrant kind needs an input that requires grad

    def again(t: Tensor) -> Tensor:
        return case.loss(model, batch) + 0 * t

    plan.backward(lambda: checkpoint(again, tick, use_reentrant=reentrant))
    _assert_gradients(plan, expected, case)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", [pytest.param(CASES[n], id=n) for n in ("bert", "gpt2", "llama", "vit")])
def test_the_checkpointing_of_hugging_face(case: Case) -> None:
    model, batch = case.model(dtype=torch.float64), case.batch(dtype=torch.float64)
    expected = gradients(model, case.loss, batch)
    plan = attach(model, case, 0.2)
    model.gradient_checkpointing_enable()
    plan.backward(lambda: case.loss(model, batch))
    _assert_gradients(plan, expected, case)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("case", SOME)
def test_a_retained_graph_gives_the_same_twice(case: Case, again: bool) -> None:
    model, batch = case.model(dtype=torch.float64).eval(), case.batch(dtype=torch.float64)
    expected = gradients(model, case.loss, batch)
    plan = attach(model, case, 0.2, again=again)
    loss = case.loss(model, batch)
    loss.backward(retain_graph=True)
    loss.backward()
    _assert_gradients(plan, {name: 2 * grad for name, grad in expected.items()}, case)


@pytest.mark.parametrize("case", EVERY)
def test_evaluation_gives_the_same_output_and_records_nothing(case: Case) -> None:
    model, batch = case.model().eval(), case.batch()
    with torch.no_grad():
        before = case.loss(model, batch)
    plan = attach(model, case, 0.2)
    with torch.no_grad():
        assert torch.equal(case.loss(model, batch), before)
    with torch.inference_mode():
        assert torch.equal(case.loss(model, batch), before)
    assert all(theta.grad is None for theta in plan.parameters())


NO_KERNEL = "could not create a primitive"


def _has_kernels(loss: Callable[[], Tensor]) -> bool:
    """Whether oneDNN, which takes what it is given, has the kernels of a loss on this processor.

    An LSTM in bfloat16 it has only with AVX-512: elsewhere stock raises where torch's own kernel would do.
    """
    try:
        loss()
    except RuntimeError as error:
        if NO_KERNEL not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("case", EVERY)
def test_autocast(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient keeps θ's dtype and agrees with the dense one to the precision of the products."""
    model, batch = case.model().eval(), case.batch()

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case.loss(model, batch)

    if not _has_kernels(lambda: loss(model, batch)):
        refused = attach(copy.deepcopy(model), case, 0.2)
        with pytest.raises(RuntimeError, match=NO_KERNEL):  # ours calls what stock calls, and fails as it fails
            refused.backward(lambda: loss(refused.model, batch))
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    expected = gradients(model, loss, batch)
    plan = attach(model, case, 0.2)
    value = plan.backward(lambda: loss(model, batch))
    torch.testing.assert_close(value, loss(model, batch))
    for name, theta in thetas(plan).items():
        if theta.numel():
            assert theta.grad is not None
            assert theta.grad.dtype == theta.dtype == torch.float32
            dense = expected[name].flatten()
            error = (theta.grad.flatten() - dense[plan.selected(name)]).abs().max()
            assert error <= 0.05 * dense.abs().max() + 1e-6, name


@pytest.mark.parametrize("case", SOME)
def test_bfloat16_models(case: Case) -> None:
    model, batch = case.model(dtype=torch.bfloat16).eval(), case.batch(dtype=torch.bfloat16)
    expected = gradients(model, case.loss, batch)
    plan = attach(model, case, 0.2)
    plan.backward(lambda: case.loss(model, batch))
    for name, theta in thetas(plan).items():
        if theta.numel():
            assert theta.grad is not None
            assert theta.dtype == theta.grad.dtype == torch.float32
            dense = expected[name].flatten().float()
            error = (theta.grad.flatten().float() - dense[plan.selected(name)]).abs().max()
            assert error <= 0.05 * dense.abs().max() + 1e-4, name


def _trace(model: nn.Module) -> dict[str, object]:
    """Everything by which an outsider could see that a plan was here."""
    seen: dict[str, object] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        seen[path] = (
            type(module),
            {key: _identity(value) for key, value in vars(module).items()},
            {
                key: list(value)
                for key, value in vars(module).items()
                if key.endswith("_hooks") and isinstance(value, dict)
            },
            [
                (name, id(p), p.data_ptr(), p.requires_grad, type(p))
                for name, p in module._parameters.items()
                if p is not None
            ],
            [(name, id(b)) for name, b in module._buffers.items()],
            module.training,
        )
    return seen


def _identity(value: object) -> object:
    """Lists, such as an LSTM's flat weights, by what is in them; dictionaries are looked at one by one."""
    return None if isinstance(value, dict) else [id(item) for item in value] if isinstance(value, list) else id(value)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("case", EVERY)
def test_release_leaves_no_trace_and_attaching_again_works(case: Case, again: bool) -> None:
    model = case.model()
    frozen = next(iter(model.parameters())) if case.head else None
    if frozen is not None:
        frozen.requires_grad_(False)
    before, saved = _trace(model), bits(model)
    for seed in (1, 2):
        plan = tithe.attach(model, tithe.FISH(density=0.3, score="random"), head=case.head, seed=seed)
        assert list(model.state_dict()) == list(saved)
        plan.release()
        assert _trace(model) == before
    assert equal_bits(saved, bits(model)) == []
    plan = attach(model, case, 0.3, again=again)
    opt = adamw(plan.parameters())
    plan.bind(opt)
    plan.backward(lambda: case.loss(model, case.batch()))
    opt.step()
    plan.step()
    after = bits(model)
    plan.release()
    assert _trace(model) == before
    assert equal_bits(after, bits(model)) == []
    assert equal_bits(saved, after)
    if frozen is not None:
        frozen.requires_grad_(True)
    case.loss(model, case.batch()).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("case", EVERY)
def test_state_dict_keeps_its_keys_and_loads_strictly(case: Case, again: bool) -> None:
    model, other = case.model(), case.model(seed=1)
    keys = list(model.state_dict())
    plan = attach(model, case, 0.3, again=again)
    assert list(model.state_dict()) == keys
    assert all(type(value) is Tensor for value in model.state_dict().values())
    case.model().load_state_dict(model.state_dict(), strict=True)
    result = model.load_state_dict(other.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert equal_bits(bits(model), bits(other)) == []
    for name, theta in thetas(plan).items():
        want = dict(other.named_parameters(remove_duplicate=False))[name].flatten()[plan.selected(name)]
        assert torch.equal(theta.detach(), want), f"{name}: θ did not follow load_state_dict"


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("case", EVERY)
def test_deepcopy_is_independent_and_trains(case: Case, again: bool) -> None:
    model, batch = case.model(dtype=torch.float64).eval(), case.batch(dtype=torch.float64)
    plan = attach(model, case, 0.3, again=again)
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    saved = bits(model)
    loss = case.loss(twin, batch)
    loss.backward()
    torch.testing.assert_close(loss, case.loss(model, batch))
    assert all(theta.grad is None for theta in plan.parameters())
    grads = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    assert grads
    assert sum(g.numel() for g in grads.values()) == sum(t.numel() for t in plan.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert equal_bits(saved, bits(model)) == []


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("case", SOME)
def test_pickle_and_torch_save_of_an_attached_model(case: Case, again: bool) -> None:
    model, batch = case.model().eval(), case.batch()
    plan = attach(model, case, 0.3, again=again)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(case.loss(twin, batch), case.loss(model, batch))
    assert equal_bits(bits(model), bits(twin)) == []
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(case.loss(torch.load(buffer, weights_only=False), batch), case.loss(model, batch))
    plan.release()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("case", EVERY)
def test_commit_writes_theta_into_the_weights_and_tied_weights_stay_tied(case: Case, again: bool) -> None:
    model = case.model()
    plan = attach(model, case, 0.3, again=again)
    with torch.no_grad():
        for theta in plan.parameters():
            theta.add_(1)
    plan.step()
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, theta in thetas(plan).items():
        assert torch.equal(named[name].detach().flatten()[plan.selected(name)], theta.detach())
    state = model.state_dict()
    assert all(torch.equal(state[name], p) for name, p in named.items() if not name.endswith("@theta"))


def test_the_same_seed_chooses_the_same_and_another_does_not() -> None:
    case = ZOO[0]
    first, second, third = (attach(case.model(), case, 0.1, seed=seed) for seed in (5, 5, 6))
    same = [torch.equal(first.selected(name), second.selected(name)) for name in first.selections]
    assert all(same)
    assert not all(torch.equal(first.selected(name), third.selected(name)) for name in first.selections)


def test_hugging_face_saves_and_loads_an_attached_model(tmp_path: object) -> None:
    from transformers import BertForSequenceClassification

    case = CASES["bert"]
    model = case.model().eval()
    plan = attach(model, case, 0.1)
    model.save_pretrained(str(tmp_path))
    loaded = BertForSequenceClassification.from_pretrained(str(tmp_path)).eval()
    assert torch.equal(case.loss(loaded, case.batch()), case.loss(model, case.batch()))
    assert list(loaded.state_dict()) == list(model.state_dict())
    plan.release()
