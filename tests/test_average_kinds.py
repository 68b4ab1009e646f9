"""What the tensors of checkpoints stand for: averaged right, or refused with a way that works."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

import tithe
from histories import recorded
from tithe import TWA, History, TitheError
from tithe.averages.average import average

State = dict[str, Tensor]


def written(folder: Path, states: list[State], kind: str = "safetensors") -> list[Path]:
    folder.mkdir(exist_ok=True, parents=True)
    paths = [folder / f"{number}.{kind}" for number in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        (save_file if kind == "safetensors" else torch.save)(state, path)
    return paths


def read(path: Path) -> State:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


# --- complex numbers


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.complex64, "safetensors"),
        (torch.complex64, "pt"),
        (torch.complex128, "pt"),
        (torch.complex32, "pt"),
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3]], ids=str)
def test_complex_weights_are_averaged_as_they_are(
    dtype: torch.dtype, kind: str, weights: list[float] | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    half = dtype == torch.complex32
    numbers = [torch.randn(40_001, dtype=torch.complex64 if half else dtype) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls complex32 experimental
        states = [{"w": each.to(dtype), "b": torch.randn(3)} for each in numbers]
    paths = written(tmp_path, states, kind)
    factors = weights or [1 / 3] * 3
    wide = torch.complex128
    for name in ("w", "b"):
        told = sum(f * state[name].to(wide) for f, state in zip(factors, states, strict=True))
        for found in (
            read(average(paths, tmp_path / f"{name}.{kind}", weights))[name],
            History(paths).average(factors)[name],
        ):
            assert found.dtype == states[0][name].dtype
            assert torch.allclose(found.to(wide), told, rtol=1e-6, atol=1e-3 if half and name == "w" else 1e-7)


@pytest.mark.parametrize("bits", [None, 8])
def test_complex_tensors_of_a_recorded_history(bits: int | None, tmp_path: Path) -> None:
    models: list[nn.Module] = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Linear(40, 40)
        model.register_parameter("phase", nn.Parameter(torch.randn(300, dtype=torch.complex64)))
        model.register_buffer("turn", torch.randn(5, dtype=torch.complex64))
        models.append(model)
    history = recorded(tmp_path / "run", models, bits)
    out = load_file(average(tmp_path / "run", tmp_path / "out.safetensors"))
    for name in ("phase", "turn"):
        told = torch.stack([model.state_dict()[name] for model in models]).mean(0)
        assert torch.allclose(out[name], told, atol=1e-6)
        assert torch.allclose(history.mean()[name], told, atol=1e-6)


def test_a_complex_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    states = [{"a": torch.ones(3), "w": torch.ones(5, dtype=torch.complex64)} for _ in range(2)]
    states[1]["w"][2] = complex(0, float("inf"))
    paths = written(tmp_path, states)
    for act in (lambda: average(paths, tmp_path / "out.safetensors", [0.5, 0.5]), History(paths).mean):
        with pytest.raises(TitheError, match=r"1\.safetensors: found values of w that are not finite"):
            act()


# --- float8


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz], ids=str)
def test_float8_without_scales_is_averaged(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    states = [{"w": torch.randn(1000).to(dtype)} for _ in range(3)]
    told = torch.stack([state["w"].float() for state in states]).mean(0).to(dtype)
    for kind in ("safetensors", "pt"):
        out = read(average(written(tmp_path / kind, states, kind), tmp_path / f"out.{kind}"))["w"]
        assert out.dtype == dtype
        assert (out.float() != told.float()).float().mean() < 0.01  # where the sum rounds the other way


def test_float8_that_is_not_finite_is_named(tmp_path: Path) -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        bad = torch.ones(5)
        bad[3] = float("nan")
        paths = written(tmp_path / str(dtype), [{"w": torch.ones(5).to(dtype)}, {"w": bad.to(dtype)}])
        with pytest.raises(TitheError, match=r"1\.safetensors: found values of w that are not finite"):
            average(paths, tmp_path / "out.safetensors")


def test_names_that_only_sound_like_codes_or_factors(tmp_path: Path) -> None:
    """A scale of something else, and a network of roads."""
    states = [
        {
            "logit_scale": torch.tensor(1.0 + k),
            "projection": (torch.ones(4) + k).to(torch.float8_e5m2),
            "road_encoder.weight": torch.ones(2, 2) * k,
            "oft_used": torch.ones(2) * k,
        }
        for k in range(2)
    ]
    out = load_file(average(written(tmp_path, states), tmp_path / "out.safetensors"))
    assert out["projection"].float().tolist() == [1.5] * 4
    assert out["road_encoder.weight"].flatten().tolist() == [0.5] * 4


# --- quantised weights: codes and what turns them into numbers


def int8(seed: int, weight: str = "w", scale: str = "w_scale") -> State:
    torch.manual_seed(seed)
    w = torch.randn(8, 8)
    s = w.abs().max() / 127
    return {weight: (w / s).round().to(torch.int8), scale: s.view(1)}


def float8(seed: int, weight: str = "l.weight", scale: str = "l.weight_scale_inv") -> State:
    torch.manual_seed(seed)
    w = torch.randn(8, 8)
    s = w.abs().max() / 448
    return {weight: (w / s).to(torch.float8_e4m3fn), scale: s}


def packed(seed: int, *names: str, dtype: torch.dtype = torch.int32) -> State:
    draw = torch.Generator().manual_seed(seed)
    codes = {name: torch.randint(0, 100, (8, 8), generator=draw).to(dtype) for name in names}
    return {**codes, "l.scales": torch.rand(8, generator=draw)}


QUANTISED = {
    "scale": int8,
    "scales": lambda seed: int8(seed, "l.weight", "l.weight.scales"),
    "bitsandbytes": lambda seed: int8(seed, "l.weight", "l.SCB"),
    "quanto": lambda seed: int8(seed, "l.weight._data", "l.weight._scale"),
    "nf4": lambda seed: {
        "l.weight": packed(seed, "w", dtype=torch.uint8)["w"],
        "l.weight.absmax": torch.rand(4),
        "l.weight.quant_map": torch.linspace(-1, 1, 16),
    },
    "gptq": lambda seed: packed(seed, "l.qweight", "l.qzeros"),
    "compressed": lambda seed: packed(seed, "l.weight_packed"),
    "mxfp4": lambda seed: packed(seed, "l_blocks", "l_scales", dtype=torch.uint8),
    "without a scale": lambda seed: {"w": int8(seed)["w"], "b": torch.ones(3)},
    "float8": float8,
    "float8 weight_scale": lambda seed: float8(seed, scale="l.weight_scale"),
    "float8 scale_weight": lambda seed: float8(seed, scale="l.scale_weight"),
    "under a name that counts": lambda seed: int8(seed, "steps.n", "steps.scale"),
    "float8 experts": lambda seed: float8(seed, "e.gate_up_proj", "e.gate_up_proj_scale"),
}


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("name", list(QUANTISED))
def test_quantised_weights_are_refused(name: str, kind: str, tmp_path: Path) -> None:
    paths = written(tmp_path, [QUANTISED[name](seed) for seed in range(2)], kind)
    for act in (lambda: average(paths, tmp_path / f"out.{kind}", [0.5, 0.5]), History(paths).mean):
        with pytest.raises(TitheError, match=r"\d\.(pt|safetensors): found quantised weights: .*codes of .*dequantise"):
            act()
    assert len(list(tmp_path.iterdir())) == 2
    average(paths[:1], tmp_path / f"one.{kind}")  # one is its own average
    with (tmp_path / f"one.{kind}").open("rb") as out, paths[0].open("rb") as origin:
        assert kind == "pt" or out.read()[-64:] == origin.read()[-64:]


def test_the_remedy_for_quantised_weights(tmp_path: Path) -> None:
    states = [int8(seed) for seed in range(2)]
    plain = [{"w": state["w"] * state["w_scale"]} for state in states]
    out = load_file(average(written(tmp_path, plain), tmp_path / "out.safetensors"))
    assert torch.allclose(out["w"], (plain[0]["w"] + plain[1]["w"]) / 2)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch deprecates them, but there are such files
def test_quantised_tensors_of_torch(tmp_path: Path) -> None:
    codes = torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8)
    torch.save({"w": codes}, tmp_path / "0.pt")
    with pytest.raises(TitheError, match=r"0.pt: found (quantised tensors of torch|w, a .* tensor of torch.qint8)"):
        average(tmp_path / "0.pt", tmp_path / "out.pt")
    torch.save({"w": codes.dequantize()}, tmp_path / "0.pt")
    average(tmp_path / "0.pt", tmp_path / "out.pt")


def test_codes_are_no_columns_of_a_span(tmp_path: Path) -> None:
    states = [int8(seed, "weight", "weight_scale") for seed in range(2)]
    model = nn.Linear(8, 8, bias=False)
    with pytest.raises(TitheError, match="found quantised weights: weight, codes of int8 with weight_scale"):
        tithe.attach(model, TWA(History(written(tmp_path, states))))


# --- integers and masks that are no weights


def test_counters_flags_and_tables_are_kept(tmp_path: Path) -> None:
    def state(seed: int) -> State:
        return {
            "w": torch.full((4,), float(seed)),
            "scale": torch.tensor(1.0 + seed),
            "bn.num_batches_tracked": torch.tensor(10 * seed),
            "n_averaged": torch.tensor([seed]),
            "experts.token_counts": torch.tensor([seed, 2, 3]),
            "initialized": torch.tensor(seed > 0),
            "position_ids": torch.arange(5)[None],
            "mask": torch.ones(3, 3).tril().bool(),
            "index": torch.arange(6, dtype=torch.int16),
        }

    told: list[object] = []
    out = load_file(average(written(tmp_path, [state(0), state(1)]), tmp_path / "o.safetensors", report=told.append))
    assert out["w"].tolist() == [0.5] * 4
    for name, tensor in state(1).items():
        assert tensor.is_floating_point() or torch.equal(out[name], tensor)
    assert set(told[0].kept) == {name for name, tensor in state(1).items() if not tensor.is_floating_point()}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint16], ids=str)
def test_integers_that_differ_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    states = [{"w": torch.ones(3) * k, "t": torch.arange(5 + k)[k:].to(torch.int32).to(dtype)} for k in range(2)]
    paths = written(tmp_path, states)
    with pytest.raises(TitheError, match=r"1\.safetensors: found integers t .* with other values than in .*0\.safe"):
        average(paths, tmp_path / "out.safetensors")
    shared = [{**state, "t": states[0]["t"]} for state in states]
    average(written(tmp_path / "shared", shared), tmp_path / "out.safetensors")
    floats = [{**state, "t": state["t"].int().float()} for state in states]
    assert load_file(average(written(tmp_path / "float", floats), tmp_path / "o.safetensors"))["t"][0] == 0.5


def test_a_checkpoint_that_does_not_count_may_differ(tmp_path: Path) -> None:
    states = [{"w": torch.ones(3) * k, "t": torch.arange(5) + k} for k in range(2)]
    out = load_file(average(written(tmp_path, states), tmp_path / "out.safetensors", [1.0, 0.0]))
    assert torch.equal(out["t"], states[0]["t"])


def test_masks_that_differ_are_refused(tmp_path: Path) -> None:
    states = [{"w": torch.ones(4), "mask": torch.arange(4) != k} for k in range(2)]
    with pytest.raises(TitheError, match=r"1\.safetensors: found a mask mask with other values"):
        average(written(tmp_path, states), tmp_path / "out.safetensors")
    plain = [{"w": state["w"] * state["mask"]} for state in states]
    out = load_file(average(written(tmp_path / "plain", plain), tmp_path / "out.safetensors"))
    assert out["w"].tolist() == [0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("differ", [True, False])
def test_pruned_weights_and_their_masks(differ: bool, tmp_path: Path) -> None:
    layers: list[nn.Module] = []
    for seed in range(2):
        torch.manual_seed(seed)
        layers.append(nn.Linear(6, 4))
        if differ:
            prune.l1_unstructured(layers[-1], "weight", 0.5)
        else:
            prune.custom_from_mask(layers[-1], "weight", torch.ones(4, 6).tril())
    effective = torch.stack([layer.weight.detach().clone() for layer in layers]).mean(0)
    paths = written(tmp_path, [dict(layer.state_dict()) for layer in layers])
    if differ:
        with pytest.raises(TitheError, match=r"that differ: weight_mask, weight_orig.*prune.remove"):
            average(paths, tmp_path / "out.safetensors")
        for layer in layers:
            prune.remove(layer, "weight")
        paths = written(tmp_path / "plain", [dict(layer.state_dict()) for layer in layers])
    out = load_file(average(paths, tmp_path / "out.safetensors"))
    found = out["weight"] if differ else out["weight_orig"] * out["weight_mask"]
    assert torch.allclose(found, effective)


# --- adapters


def _base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def _moved(model: nn.Module, seed: int) -> None:
    """What a run might do to what it trains."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.5 * torch.randn(weight.shape, generator=draw))


def _adapters(folder: Path, config: object, frozen: str = "") -> list[Path]:
    """Two adapters by peft, moved apart, but for what has `frozen` in its name."""
    from peft import get_peft_model

    paths: list[Path] = []
    for seed in range(2):
        torch.manual_seed(7)
        model = get_peft_model(_base(), config)  # type: ignore[arg-type]
        if frozen:
            for name, weight in model.named_parameters():
                if frozen in name:
                    weight.requires_grad_(False)
        _moved(model, seed)
        paths.append(folder / f"adapter-{seed}")
        model.save_pretrained(paths[-1])
    return paths


def _merged(path: Path) -> Mapping[str, Tensor]:
    from peft import PeftModel

    return PeftModel.from_pretrained(_base(), path).merge_and_unload().state_dict()


def _mean(paths: list[Path]) -> State:
    merged = [_merged(path) for path in paths]
    return {name: (merged[0][name] + merged[1][name]) / 2 for name in merged[0]}


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "loha", "lokr", "oft"])
def test_adapters_of_factors_are_refused_and_the_remedy_works(kind: str, tmp_path: Path) -> None:
    from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig

    targets = ["0", "2"]
    config = {
        "lora": lambda: LoraConfig(r=2, target_modules=targets),
        "dora": lambda: LoraConfig(r=2, target_modules=targets, use_dora=True),
        "rslora": lambda: LoraConfig(r=2, target_modules=targets, use_rslora=True),
        "loha": lambda: LoHaConfig(r=2, target_modules=targets),
        "lokr": lambda: LoKrConfig(r=2, target_modules=targets),
        "oft": lambda: OFTConfig(oft_block_size=3, target_modules=["0"]),
    }[kind]()
    paths = _adapters(tmp_path, config)
    for given in (paths, [path / "adapter_model.safetensors" for path in paths]):
        with pytest.raises(TitheError, match=r"adapter-1.*: found factors of one weight .*merge_and_unload"):
            average(given, tmp_path / "out")
    told = _mean(paths)
    whole = written(tmp_path / "merged", [{n: t.contiguous() for n, t in _merged(path).items()} for path in paths])
    out = load_file(average(whole, tmp_path / "out.safetensors"))
    assert all(torch.allclose(out[name], told[name], atol=1e-6) for name in told)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_adapters_that_share_a_factor_are_averaged(frozen: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    paths = _adapters(tmp_path, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False), frozen)
    out = average(paths, tmp_path / "out")
    assert (out / "adapter_config.json").read_bytes() == (paths[0] / "adapter_config.json").read_bytes()
    told, found = _mean(paths), _merged(out)
    assert all(torch.allclose(found[name], told[name], atol=1e-6) for name in told)


def test_adapters_that_scale_are_averaged(tmp_path: Path) -> None:
    from peft import IA3Config

    paths = _adapters(tmp_path, IA3Config(target_modules=["0", "2"], feedforward_modules=[]))
    told, found = _mean(paths), _merged(average(paths, tmp_path / "out"))
    assert all(torch.allclose(found[name], told[name], atol=1e-6) for name in told)


def test_an_unknown_kind_of_adapter_is_refused(tmp_path: Path) -> None:
    for number in range(2):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        save_file({"a.w": torch.ones(2) * number}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "NEWEST"}))
    with pytest.raises(TitheError, match="found an adapter of peft_type NEWEST"):
        average([tmp_path / "0", tmp_path / "1"], tmp_path / "out")


@pytest.mark.parametrize(
    "names",
    [
        ("unet.lora_down.weight", "unet.lora_up.weight"),
        ("p.to_q_lora.down.weight", "p.to_q_lora.up.weight"),
        ("model.q_proj.lora_A.default.weight", "model.q_proj.lora_B.default.weight"),
        ("blocks.0.lora_a", "blocks.0.lora_b"),
        ("q.lora_A_weight", "q.lora_B_weight"),
    ],
)
def test_factors_are_told_by_their_names(names: tuple[str, str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    states = [{name: torch.randn(2, 2) for name in names} | {"base.weight": torch.randn(2, 2)} for _ in range(2)]
    with pytest.raises(TitheError, match="found factors of one weight"):
        average(written(tmp_path, states), tmp_path / "out.safetensors")
