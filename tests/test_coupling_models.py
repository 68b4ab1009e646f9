"""Couplings of real models: what is left when units are absent is a smaller network that computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import CASES, Case
from narrow_networks import NETWORKS
from narrow_plans import decoder, images
from slicing import draw, settle_counts, sliced, zeroed
from tithe.coupling import Coupling, Group, couple

_ZOO = (
    *("mlp", "tied_mlp", "depthwise", "signal", "volume", "time_major", "encoder", "functional"),
    *("resnet_basic", "resnet_bottleneck", "convnext", "bert", "vit", "gpt2", "gpt2_classifier"),
    *("llama", "llama_classifier", "mobilenet_v2", "swin"),
)


MODELS: dict[str, Case] = {
    **{name: images(name) for name in NETWORKS},
    **{name: CASES[name] for name in _ZOO},
    "grouped_query": decoder("Llama"),
    "grouped_query_tied": decoder("Qwen3", tie_word_embeddings=True),
}


@cache
def traced(name: str) -> tuple[nn.Module, Coupling]:
    """The model in float64 and its coupling; both are read only."""
    case = MODELS[name]
    model, batch = case.model(dtype=torch.float64), case.batch(2, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    return model, couple(model, lambda: case.loss(model, batch), names, samples=2)


def members(group: Group) -> set[tuple[str, int]]:
    return set(group.members)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_narrow_network_is_the_masked_one(name: str, training: bool) -> None:
    case, (model, coupling) = MODELS[name], traced(name)
    batch = case.batch(3, seed=5, dtype=torch.float64)
    for seed in range(3):
        mask = draw(coupling, seed)
        with torch.no_grad():
            masked = case.loss(zeroed(model, coupling, mask).train(training), batch)
            narrow = case.loss(settle_counts(sliced(model, coupling, mask)).train(training), batch)
        torch.testing.assert_close(narrow, masked, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_costs_are_those_of_the_narrow_network(name: str) -> None:
    case, (model, coupling) = MODELS[name], traced(name)
    batch = case.batch(2, dtype=torch.float64)
    for seed in range(3):
        mask = draw(coupling, seed)
        narrow = settle_counts(sliced(model, coupling, mask))
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            case.loss(narrow, batch)
        flops = float(coupling.cost(coupling.flops, mask.double()))
        assert flops == pytest.approx(counter.get_total_flops() / 2)
        params = float(coupling.cost(coupling.params, mask.double()))
        assert params == pytest.approx(sum(p.numel() for p in narrow.parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_every_unit_is_in_one_group_and_in_every_place_of_it(name: str) -> None:
    _, coupling = traced(name)
    assert [group.start for group in coupling.groups] == [0, *(group.stop for group in coupling.groups)][:-1]
    assert len({group.name for group in coupling.groups}) == len(coupling.groups)
    for group in coupling.groups:
        assert group.num_units > 1
        for tensor, axis in group.members:
            units = coupling.axes[coupling.places[tensor][axis]]
            assert set(range(group.start, group.stop)) <= set(units.tolist())
        tensor, axis = group.members[0]
        units = coupling.axes[coupling.places[tensor][axis]]
        first = [units.tolist().index(unit) for unit in range(group.start, group.stop)]
        assert first == sorted(first)


def test_tracing_leaves_no_trace() -> None:
    case = MODELS["residual"]
    model = case.model()
    before, batch = copy.deepcopy(model.state_dict()), case.batch(2)
    torch.manual_seed(3)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    couple(model, lambda: case.loss(model, batch), dict(model.named_parameters()), samples=2)
    assert torch.equal(torch.rand(3), drawn)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_flattened_channel_is_all_of_its_positions() -> None:
    _, coupling = traced("vgg")
    assert [(group.name, group.num_units) for group in coupling.groups] == [("0", 8), ("4", 6), ("10", 10)]
    assert members(coupling.groups[0]) == {
        *(("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0)),
        *(("1.running_mean", 0), ("1.running_var", 0), ("4.weight", 1)),
    }
    columns = coupling.axes[coupling.places["10.weight"][1]]
    assert torch.equal(columns, torch.arange(8, 14).repeat_interleave(4))
    assert coupling.whole == {"12": "an output of Sequential"}


def test_a_residual_joins_what_it_adds() -> None:
    _, coupling = traced("residual")
    sizes = {group.name: group.num_units for group in coupling.groups}
    assert sizes == {"stem.0": 8, "one.0": 6, "down.0": 4, "mid.0": 4, "up.0": 12}
    outputs = {tensor for tensor, axis in coupling.groups[0].members if axis == 0 and tensor.endswith("0.weight")}
    assert outputs == {"stem.0.weight", "two.0.weight"}
    assert {("project.0.weight", 0), ("fc.weight", 1)} <= members(coupling.groups[-1])


def test_padded_channels_always_exist() -> None:
    _, coupling = traced("padded_shortcut")
    assert [(group.name, group.num_units) for group in coupling.groups] == [("stem.0", 4), ("one.0", 8)]
    assert coupling.axes[coupling.places["two.0.weight"][0]].tolist() == [-1, -1, 0, 1, 2, 3, -1, -1]


def test_depthwise_channels_follow_and_excitation_meets_them() -> None:
    _, coupling = traced("inverted")
    sizes = {group.name: group.num_units for group in coupling.groups}
    assert sizes == {"stem.0": 6, "expand.0": 12, "squeeze": 4}
    assert {("depth.weight", 0), ("excite.weight", 0), ("reduce.0.weight", 1)} <= members(coupling.groups[1])
    assert coupling.axes[coupling.places["multiply.0.weight"][0]].tolist() == [k // 2 for k in range(12)]


def test_a_concatenation_keeps_its_producers_apart() -> None:
    _, coupling = traced("dense")
    assert [(g.name, g.num_units) for g in coupling.groups] == [("stem", 6), ("convs.0", 4), ("convs.1", 4)]
    assert coupling.axes[coupling.places["norm.weight"][0]].tolist() == list(range(14))
    assert coupling.axes[coupling.places["convs.1.weight"][1]].tolist() == list(range(10))


def test_groups_of_norms_and_convolutions_are_units_as_wholes() -> None:
    _, coupling = traced("grouped")
    assert [(group.name, group.num_units) for group in coupling.groups] == [("stem", 4), ("up", 6)]
    assert coupling.axes[coupling.places["stem.weight"][0]].tolist() == [k // 3 for k in range(12)]
    assert coupling.axes[coupling.places["grouped.weight"][0]].tolist() == [k // 6 for k in range(24)]
    assert 1 not in coupling.places["grouped.weight"]


def test_what_would_leave_no_rectangle_stays_whole() -> None:
    _, coupling = traced("shuffled")
    assert [group.name for group in coupling.groups] == ["two"]
    assert coupling.whole["one"] == "viewed as a grid of which no rectangle would be left in Shuffled"


def test_what_is_cut_at_a_fixed_place_stays_whole() -> None:
    _, coupling = traced("halved")
    assert [group.name for group in coupling.groups] == ["two"]
    assert coupling.whole["one"] == "taken apart at a fixed place in Halved"


def test_a_layer_that_runs_twice_has_one_set_of_channels() -> None:
    _, coupling = traced("twice")
    assert [(group.name, group.num_units) for group in coupling.groups] == [("one", 8)]
    assert coupling.places["twice.weight"][0] == coupling.places["twice.weight"][1]


def test_heads_of_one_product_and_halves_of_one_product() -> None:
    _, coupling = traced("block")
    assert [(group.name, group.num_units) for group in coupling.groups] == [("qkv", 3), ("up", 10)]
    heads = torch.arange(3).repeat_interleave(4)
    assert torch.equal(coupling.axes[coupling.places["qkv.weight"][0]], heads.repeat(3))
    assert torch.equal(coupling.axes[coupling.places["out.weight"][1]], heads)
    assert torch.equal(coupling.axes[coupling.places["up.weight"][0]], torch.arange(3, 13).repeat(2))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("bert", ["attention.self.query", "intermediate.dense"]),
        ("vit", ["attention.q_proj", "mlp.fc1"]),
        ("gpt2", ["attn.c_attn", "mlp.c_fc"]),
        ("grouped_query", ["self_attn.q_proj", "mlp.gate_proj"]),
        ("grouped_query_tied", ["self_attn.q_proj", "mlp.gate_proj"]),
        ("swin", ["attention.q_proj", "mlp.fc1"]),
    ],
)
def test_transformers_have_heads_and_hidden_units(name: str, kinds: list[str]) -> None:
    _, coupling = traced(name)
    names = [group.name for group in coupling.groups if "pooler" not in group.name]
    assert len(names) == 4
    assert all(name.endswith(kinds[k % 2]) for k, name in enumerate(names))
    assert [group.num_units for group in coupling.groups[::2]][:2] == [2, 2]


def test_a_key_has_all_of_its_queries() -> None:
    _, coupling = traced("grouped_query")
    places = {name: axes for name, axes in coupling.places.items() if ".0.self_attn." in name}
    query, key = (coupling.axes[places[f"model.layers.0.self_attn.{part}_proj.weight"][0]] for part in "qk")
    assert torch.equal(query, torch.arange(2).repeat_interleave(16))
    assert torch.equal(key, torch.arange(2).repeat_interleave(8))


def test_attention_modules_that_count_for_themselves_stay_whole() -> None:
    _, coupling = traced("encoder")
    assert [group.name for group in coupling.groups] == ["encoder.layers.0.linear1", "encoder.layers.1.linear1"]
    assert coupling.whole["encoder.layers.0.self_attn"].startswith("MultiheadAttention works out its sizes")


def test_only_what_may_be_cut_is() -> None:
    case = MODELS["residual"]
    model, batch = case.model(), case.batch(2)
    names = [name for name, _ in model.named_parameters() if not name.startswith("stem")]
    coupling = couple(model, lambda: case.loss(model, batch), names, samples=2)
    assert [group.name for group in coupling.groups] == ["one.0", "down.0", "mid.0", "up.0"]
    assert not any(name.startswith("stem") for name in coupling.places)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_kernel_of_attention_makes_no_difference(attention: str) -> None:
    import transformers

    widths = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, vocab_size=30)
    config = transformers.BertConfig(**widths, num_attention_heads=4, attn_implementation=attention)
    model = transformers.BertModel(config, add_pooling_layer=False).train()
    ids = torch.randint(1, 30, (2, 6))
    kinds: list[Callable[[], Tensor]] = [
        lambda: model(ids).last_hidden_state.sum(),
        lambda: model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state.sum(),
    ]
    for run in kinds:
        coupling = couple(model, run, dict(model.named_parameters()), samples=2)
        assert [group.num_units for group in coupling.groups] == [4, 32]
