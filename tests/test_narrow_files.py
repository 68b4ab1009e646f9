"""A file says what its network is, and a model made from it is asked what that network was asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import tithe
from narrow_plans import bound
from oracles import bits, equal_bits, sgd
from tithe import VRPGE, TitheError
from tithe.delta.format import seal
from tithe.forward import Probe, differs, make_probe, watch_call

IMAGES = (torch.randn(4, 3, 6, 6), torch.randn(4, 2, 6, 6))
TOKENS = (torch.randint(20, (4, 5)), torch.randint(20, (4, 5)))


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def _trained(
    model: nn.Module, batch: Any = IMAGES, *, keep: float = 0.5, settle: bool = True, loss: Any = _loss, **more: Any
) -> tithe.NarrowPlan:
    plan = tithe.attach(model, VRPGE(keep), loss=loss, data=[batch], **more)
    opt = bound(plan, sgd)
    for _ in range(3):
        plan.backward(lambda: loss(model, batch))
        opt.step()
        opt.zero_grad()
        plan.step()
    plan.end_epoch()
    if settle:
        plan.settle([batch], draws=2)
    return plan


def _header(path: Path) -> dict[str, Any]:
    with safe_open(str(path), "pt") as file:
        return json.loads(file.metadata()["tithe"])


def _rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write the file with another header, whose checksum is right."""
    header, tensors = _header(path), load_file(path)
    header.pop("checksum")
    change(header)
    save_file(tensors, path, metadata={"tithe": seal(json.dumps(header, separators=(",", ":")))})


def _convolutions(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), *middle, nn.ReLU(), nn.Conv2d(16, 2, 1))


# --- the numbers of the network


GROUPED: dict[str, Callable[[], nn.Module]] = {
    "groups": lambda: _convolutions(nn.Conv2d(16, 16, 3, padding=1, groups=2)),
    "depthwise": lambda: _convolutions(nn.Conv2d(16, 16, 3, padding=1, groups=16)),
    "transposed": lambda: _convolutions(nn.ConvTranspose2d(16, 16, 3, padding=1, groups=4)),
    "norms": lambda: _convolutions(nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 1, groups=4), nn.GroupNorm(2, 16)),
}


@pytest.mark.parametrize("settle", [True, False])
@pytest.mark.parametrize(("kind", "keep"), [*((kind, 0.5) for kind in GROUPED), ("depthwise", 0.1)])
def test_numbers_of_groups_are_those_of_the_saved_network(kind: str, keep: float, settle: bool, tmp_path: Path) -> None:
    """Also where a single group is left, which is an ordinary convolution by its own numbers."""
    path, build = tmp_path / "narrow.safetensors", GROUPED[kind]
    plan = _trained(build(), settle=settle, keep=keep)
    plan.save(path)
    network, fresh = plan.export(IMAGES).eval(), tithe.apply(build(), path).eval()
    assert torch.equal(network(IMAGES[0]), fresh(IMAGES[0]))
    assert [str(module) for module in network.modules()] == [str(module) for module in fresh.modules()]
    assert sum(p.numel() for p in fresh.parameters()) < sum(p.numel() for p in build().parameters())
    assert fresh[0].out_channels == fresh[0].weight.shape[0]


def test_a_file_that_lacks_a_number_is_refused_and_the_model_left_alone(tmp_path: Path) -> None:
    """Files of the first release lack the groups of a network of which one group is left."""
    path, build = tmp_path / "narrow.safetensors", GROUPED["groups"]
    _trained(build()).save(path)

    def spoil(header: dict[str, Any]) -> None:
        header["widths"].pop("2")
        header.pop("probe")

    _rewrite(path, spoil)
    model = build()
    before = bits(model)
    with pytest.raises(TitheError, match=r"^2: found (weight|bias) of shape .* where its numbers say"):
        tithe.apply(model, path)
    assert equal_bits(before, bits(model)) == []
    assert model[0].out_channels == 16


# --- what is asked


def test_files_of_before_have_no_probe_and_still_load(tmp_path: Path) -> None:
    path, build = tmp_path / "narrow.safetensors", GROUPED["depthwise"]
    plan = _trained(build())
    plan.save(path)
    assert _header(path)["version"] == 2
    _rewrite(path, lambda header: header.pop("probe"))
    assert torch.equal(tithe.apply(build(), path)(IMAGES[0]), plan.export()(IMAGES[0]))


def _other_activation() -> nn.Module:
    model = GROUPED["groups"]()
    model[1] = nn.GELU()
    return model


class Fails(nn.Module):
    """Runs at full width alone."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 16:
            raise KeyError("16 channels")
        return x


def _needs_full_width() -> nn.Module:
    model = GROUPED["groups"]()
    model[1] = Fails()
    return model


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_other_activation, "found outputs that are off by .* of their size"),
        (_needs_full_width, "found a forward pass that fails in the network made from it .KeyError"),
    ],
    ids=["another activation", "a width in the program"],
)
def test_a_model_that_answers_otherwise_is_refused_and_left_alone(
    make: Callable[[], nn.Module], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "narrow.safetensors"
    _trained(GROUPED["groups"]()).save(path)
    model = make()
    before, numbers = bits(model), [str(module) for module in model.modules()]
    memory = [p.data_ptr() for p in model.parameters()]
    states = torch.get_rng_state()
    with pytest.raises(TitheError, match=told) as error:
        tithe.apply(model, path)
    assert "the class, the settings and the code" in error.value.remedy
    assert equal_bits(before, bits(model)) == []
    assert [str(module) for module in model.modules()] == numbers
    assert [p.data_ptr() for p in model.parameters()] == memory
    assert torch.equal(states, torch.get_rng_state())


def test_a_model_that_runs_nowhere_here_is_made_all_the_same(tmp_path: Path) -> None:
    """A kernel of another device, say: nothing can be told then but numbers and shapes."""
    path = tmp_path / "narrow.safetensors"
    plan = _trained(GROUPED["groups"]())
    plan.save(path)

    class Elsewhere(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise NotImplementedError("no such kernel")

    model = GROUPED["groups"]()
    model[1] = Elsewhere()
    tithe.apply(model, path)
    model[1] = nn.ReLU()
    assert torch.equal(model(IMAGES[0]), plan.export()(IMAGES[0]))


def test_a_model_without_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "narrow.safetensors"
    _trained(GROUPED["groups"]()).save(path)
    with torch.device("meta"):
        model = GROUPED["groups"]()
    with pytest.raises(TitheError, match="meta device"):
        tithe.apply(model, path)
    assert model[0].out_channels == 16


def test_what_stays_as_wide_keeps_its_memory(tmp_path: Path) -> None:
    path = tmp_path / "narrow.safetensors"
    _trained(GROUPED["groups"]()).save(path)
    model = GROUPED["groups"]()
    bias, identities = model[4].bias.data_ptr(), [id(p) for p in model.parameters()]
    model(IMAGES[0]).sum().backward()
    tithe.apply(model, path)
    assert model[4].bias.data_ptr() == bias
    assert [id(p) for p in model.parameters()] == identities
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


class Language(nn.Module):
    """Embedding and output share a table, where the constructor says so."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.out, self.drop = nn.Linear(16, 20, bias=False), nn.Dropout(0.5)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, ids: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        h = self.table(ids)
        return {"logits": self.out(h + self.down(F.gelu(self.drop(self.up(h))))) * scale, "ids": ids}


def _next(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0], scale=2.0)["logits"].flatten(0, 1), batch[1].flatten())


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_of_the_file_go_to_both_places(tied: bool, tmp_path: Path) -> None:
    path = tmp_path / "narrow.safetensors"
    plan = _trained(Language(), TOKENS, loss=_next)
    plan.save(path)
    probe = _header(path)["probe"]
    assert probe["answers"]
    assert "scale" in json.dumps(probe["inputs"])
    network, fresh = plan.export().eval(), tithe.apply(Language(tied), path).eval()
    assert torch.equal(network(TOKENS[0])["logits"], fresh(TOKENS[0])["logits"])


@pytest.mark.parametrize("training", [True, False])
def test_half_precision(training: bool, tmp_path: Path) -> None:
    path = tmp_path / "narrow.safetensors"
    images = tuple(x.bfloat16() for x in IMAGES)
    with pytest.warns(tithe.TitheWarning, match="bfloat16 rounds small updates away"):
        plan = _trained(GROUPED["depthwise"]().bfloat16().train(training), images)
    plan.save(path)
    fresh = tithe.apply(GROUPED["depthwise"]().bfloat16(), path)
    assert _header(path)["probe"]["answers"]
    assert torch.equal(fresh(images[0]), plan.export()(images[0]))


def test_a_network_that_draws_random_numbers_is_only_run(tmp_path: Path) -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    def build() -> nn.Module:
        return nn.Sequential(GROUPED["groups"](), Noise())

    path = tmp_path / "narrow.safetensors"
    _trained(build()).save(path)
    assert _header(path)["probe"]["answers"] == []
    tithe.apply(build(), path)


def test_inputs_that_cannot_be_told_leave_the_probe_out(tmp_path: Path) -> None:
    class Boxed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = GROUPED["groups"]()

        def forward(self, x: Callable[[], Tensor]) -> Tensor:
            return self.inner(x())

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(lambda: batch[0]), batch[1])

    path = tmp_path / "narrow.safetensors"
    _trained(Boxed(), loss=loss).save(path)
    assert "probe" not in _header(path)
    tithe.apply(Boxed(), path)


@pytest.mark.parametrize(
    "probe",
    [
        None,
        [],
        {},
        {"inputs": 3, "answers": [[[2], ["x"]]]},
        {"inputs": {"list": [{"tensor": ["float32", [2**40], 0, 1]}, {"dict": {}}]}, "answers": []},
        {"inputs": {"list": [{"tensor": ["float32", [-1], 0, 1]}, {"dict": {}}]}, "answers": []},
        {"inputs": {"list": [{"tensor": ["object", [1], 0, 1]}, {"dict": {}}]}, "answers": []},
        {"inputs": {"list": [{"tensor": ["float32", [1], 1, 0]}, {"dict": {}}]}, "answers": []},
        {"inputs": {"eval": "1"}, "answers": []},
    ],
    ids=str,
)
def test_a_probe_that_is_none_is_refused(probe: Any, tmp_path: Path) -> None:
    path = tmp_path / "narrow.safetensors"
    _trained(GROUPED["groups"]()).save(path)
    _rewrite(path, lambda header: header.update(probe=probe))
    with pytest.raises(TitheError, match="malformed"):
        tithe.apply(GROUPED["groups"](), path)


_TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.sampled_from(["", "a"])
    | st.builds(
        lambda shape, dtype: torch.ones(shape).to(dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=2).map(tuple)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=50, deadline=None)
@given(_TREES)
def test_inputs_come_back_with_their_structure(tree: Any) -> None:
    seen: list[Any] = []

    class Sees(nn.Module):
        def forward(self, given: Any) -> Tensor:
            seen.append(given)
            return torch.ones(2)

    model = Sees()
    inputs = json.loads(json.dumps(watch_call(model, lambda: model(tree))))
    probe = make_probe(model, inputs)
    assert probe is not None
    assert Probe.of(json.loads(json.dumps(probe.plain()))) == probe
    assert differs(model, probe) is None
    plain = [
        torch.utils._pytree.tree_map(lambda x: (x.shape, x.dtype) if isinstance(x, Tensor) else x, one) for one in seen
    ]
    assert all(one == plain[0] for one in plain)


# --- modules that make their weight from others


REPARAMETRISED: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "pruned channels": lambda layer: prune.ln_structured(layer, "weight", 0.3, 2, 0),
    "spectral norm": spectral_norm,
    "parametrised weight norm": parametrizations.weight_norm,
    "parametrised spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("settle", [True, False])
@pytest.mark.parametrize("kind", [*REPARAMETRISED, "weight norm"])
def test_a_layer_that_makes_its_weight_from_others_is_copied_and_saved(kind: str, settle: bool, tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 12, 1), nn.ReLU(), nn.Conv2d(12, 2, 1))
        if kind == "weight norm":
            with pytest.warns(FutureWarning, match="weight_norm"):
                nn.utils.weight_norm(model[4])
        else:
            REPARAMETRISED[kind](model[4])
        return model

    path = tmp_path / "narrow.safetensors"
    plan = _trained(build(), keep=0.8, settle=settle, where="!4.*")
    network = plan.export(IMAGES)
    plan.save(path)
    fresh = tithe.apply(build(), path)
    assert torch.equal(network.eval()(IMAGES[0]), fresh.eval()(IMAGES[0]))
    F.mse_loss(network.train()(IMAGES[0]), IMAGES[1]).backward()
    assert all(p.grad is not None for p in network[4].parameters())
    assert {p.data_ptr() for p in network.parameters()}.isdisjoint(p.data_ptr() for p in plan.model.parameters())


def test_outputs_that_a_model_remembers_are_copied() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last, self.all = GROUPED["groups"](), None, list[Tensor]()

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.inner(x)
            self.all.append(self.last)
            return self.last

    plan = _trained(Remembers())
    assert not plan.export(IMAGES).all[0].requires_grad


def test_a_module_that_cannot_be_copied_is_named() -> None:
    import threading

    model = GROUPED["groups"]()
    plan = _trained(model)
    model[0].lock = threading.Lock()
    with pytest.raises(TitheError, match=r"^0.lock: found something that cannot be copied"):
        plan.export()
    del model[0].lock  # as told: outside of the model
    plan.export()
