"""Two pretrained networks for small devices, and the usual MobileNetV2, as ordinary modules.

MobileNetV2 of width 0.35 and MCUNet (5 frames a second), for 128² images, trained on ImageNet and published as 8-bit
integers by Lin, Zhu, Chen, Wang, Gan, Han (*On-Device Training Under 256KB Memory*, NeurIPS 2022;
mit-han-lab/tiny-training, MIT licence). Their batch norms are folded into the convolutions, and every convolution is
followed by a clamp to the range that its 8 bits could hold, which is the ReLU6 of the expansion and depthwise ones:
both are kept, in float32.

`python -m benchmarks.vision --data DIR` compares both networks with the reference forward pass DIR/networks.py.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from benchmarks.records import parse

HEAD = "classifier.*"
SIDE = 128  # pixels, both sides


@dataclass(frozen=True)
class Scheme:
    """A sparse update: which convolutions, in the order of the forward pass, train what share of their input channels.

    Args:
        convolutions: indices, the first convolution being 0.
        ratios: shares of their input channels; 0 trains the bias alone.
        num_biases: how many of the last biases are trained, the classifier's included.
    """

    convolutions: tuple[int, ...]
    ratios: tuple[float, ...]
    num_biases: int


@dataclass(frozen=True)
class Network:
    """A pretrained network, with the memory budgets in elements that the TraDy paper takes from sparse-update schemes.

    The tight schemes are the ones of 50 KB in scripts of public copies of tiny-training (run_dir sparse_50kb): MCUNet's
    comes to its budget exactly; MobileNetV2's to 28,282, since the budget seems to count one weight instead of nine for
    each of the 42 channels of the depthwise convolution 49 (42 · 8 = 336 elements fewer).
    """

    name: str
    file: str
    budgets: dict[str, int]
    scheme: Scheme


NETWORKS = {
    n.name: n
    for n in (
        Network(
            "mbv2-w0.35",
            "imagenet_mbv2_w0p35_int8.safetensors",
            {"tight": 27_946, "middle": 66_592, "loose": 93_696},
            Scheme((36, 39, 40, 41, 42, 45, 48, 49), (1, 1, 0, 1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 8), 16),
        ),
        Network(
            "mcunet-5fps",
            "imagenet_mcunet_5fps_int8.safetensors",
            {"tight": 15_936, "middle": 64_832, "loose": 112_640},
            Scheme((23, 24, 27, 30, 33, 39), (0, 1 / 4, 1 / 2, 1 / 2, 0, 0), 20),
        ),
    )
}


class Block(nn.Module):
    """Up to three convolutions (expand, depthwise, project), each with its clamp, and the input added where asked."""

    def __init__(self, layers: dict[str, dict[str, Any]], *, residual: bool) -> None:
        super().__init__()
        self.names = tuple(layers)
        self.residual = residual
        for name, setting in layers.items():
            self.add_module(name, convolution(setting))
        self.clamps = nn.ModuleDict({name: clamp(setting) for name, setting in layers.items()})

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for name in self.names:
            y = self.clamps[name](self.get_submodule(name)(y))
        return x + y if self.residual else y


class Folded(nn.Module):
    """A network of such blocks; its parameters carry the names of the file's layers, the head is `classifier`."""

    def __init__(self, layers: dict[str, dict[str, Any]], num_blocks: int, num_classes: int) -> None:
        super().__init__()
        self.first_conv = convolution(layers["first_conv"])
        self.first_clamp = clamp(layers["first_conv"])
        self.blocks = nn.Sequential(*(block(layers, f"blocks.{i}.") for i in range(num_blocks)))
        self.classifier = nn.Linear(layers["classifier"]["in_channel"], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.first_clamp(self.first_conv(x))).mean((2, 3)))


def convolution(setting: dict[str, Any]) -> nn.Conv2d:
    """The convolution of a layer's setting."""
    kernel: tuple[int, int] = tuple(setting["kernel_size"])
    return nn.Conv2d(
        setting["in_channel"],
        setting["out_channel"],
        kernel,
        setting["stride"],
        (kernel[0] // 2, kernel[1] // 2),
        groups=setting["groups"],
    )


def clamp(setting: dict[str, Any]) -> nn.Hardtanh:
    """The range of a layer's 8-bit output."""
    low, high = ((bound - setting["y_zero"]) * setting["y_scale"] for bound in (-128, 127))
    return nn.Hardtanh(low, high)


def block(layers: dict[str, dict[str, Any]], prefix: str) -> Block:
    """The block whose layers' names begin with the prefix."""
    names = [k for k in ("pointwise1", "depthwise", "pointwise2") if prefix + k in layers]
    return Block({k: layers[prefix + k] for k in names}, residual=prefix + "residual" in layers)


def load(network: Network, data: Path, *, num_classes: int | None = None, seed: int = 0) -> Folded:
    """The pretrained network.

    Args:
        network: one of NETWORKS.
        data: folder that holds `weights/`.
        num_classes: classes of a new head, drawn from `seed`; None keeps ImageNet's 1000.
    """
    with safe_open(data / "weights" / network.file, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        layers: dict[str, dict[str, Any]] = json.loads(file.metadata()["layers"])
        num_blocks = int(file.metadata()["n_blocks"])
    torch.manual_seed(seed)
    model = Folded(layers, num_blocks, 1000 if num_classes is None else num_classes)
    with torch.no_grad():
        for name, module in model.named_modules():
            if not isinstance(module, nn.Conv2d | nn.Linear) or (name == "classifier" and num_classes is not None):
                continue
            scale = stored[name + ".w_scales"].double()
            weight = stored[name + ".weight"].double() * scale.view(-1, 1, 1, 1)
            module.weight.copy_(weight.reshape(module.weight.shape))
            assert module.bias is not None
            module.bias.copy_(stored[name + ".bias"].double() * scale * layers[name]["x_scale"])
    return model


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions by name, in the order of the forward pass."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def sparse_update(model: nn.Module, scheme: Scheme) -> tuple[dict[str, float], list[str]]:
    """The scheme in names of parameters: share of the input channels by weight, and the biases that are trained."""
    names = list(convolutions(model))
    weights = {names[i] + ".weight": ratio for i, ratio in zip(scheme.convolutions, scheme.ratios, strict=True)}
    biases = [name + ".bias" for name in names[len(names) + 1 - scheme.num_biases :]]
    return {name: ratio for name, ratio in weights.items() if ratio}, biases


@torch.no_grad()
def positions(model: nn.Module, x: Tensor) -> dict[str, tuple[int, int]]:
    """H·W of every convolution's input and of its output."""
    sizes: dict[str, tuple[int, int]] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            sizes[name] = inputs[0].shape[2:].numel(), output.shape[2:].numel()

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in convolutions(model).items()]
    model(x)
    for handle in handles:
        handle.remove()
    return sizes


def channel_cost(module: nn.Conv2d, input_size: int) -> int:
    """Elements of one input channel in the paper's count: C'·D² weights (D² where depthwise), and H·W activations."""
    weights = module.weight[0].numel() if module.groups > 1 else module.weight[:, 0].numel()
    return weights + input_size


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, and ReLU6 unless it is the projection."""

    def __init__(self, c: int, d: int, kernel: int, stride: int = 1, groups: int = 1, *, relu: bool = True) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(c, d, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(d),
        ]
        super().__init__(*layers, *([nn.ReLU6(inplace=True)] if relu else []))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; the input is added where the shapes agree."""

    def __init__(self, c: int, d: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = c * expansion
        expand = [ConvNorm(c, wide, 1)] if expansion > 1 else []
        self.body = nn.Sequential(*expand, ConvNorm(wide, wide, 3, stride, wide), ConvNorm(wide, d, 1, relu=False))
        self.residual = stride == 1 and c == d

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1.0 (Sandler, Howard, Zhu, Zhmoginov, Chen, CVPR 2018, Table 2) without dropout."""

    TABLE = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [ConvNorm(3, 32, 3, 2)]
        c = 32
        for expansion, d, repeats, stride in self.TABLE:
            for i in range(repeats):
                layers.append(InvertedResidual(c, d, stride if i == 0 else 1, expansion))
                c = d
        self.features = nn.Sequential(*layers, ConvNorm(c, 1280, 1))
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def mobilenet_v2(*, num_classes: int = 1000, seed: int = 0) -> MobileNetV2:
    """The usual MobileNetV2 with random weights: for bytes and seconds, at 224² as a rule."""
    torch.manual_seed(seed)
    return MobileNetV2(num_classes)


@torch.no_grad()
def difference(network: Network, data: Path) -> float:
    """Largest difference between the network's logits and those of the reference in the data folder, on noise."""
    spec = importlib.util.spec_from_file_location("reference", data / "networks.py")
    assert spec is not None
    assert spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    x = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    parameters, layers, num_blocks = reference.mcu_float(str(data / "weights" / network.file))
    expected = reference.mcu_forward(x, parameters, layers, num_blocks)
    return float((clamp(layers["classifier"])(load(network, data)(x)) - expected).abs().max())


def main() -> None:
    """Compare with the reference, and count elements as the paper does."""
    data: Path = parse(__doc__ or "").data
    for network in NETWORKS.values():
        gap = difference(network, data)
        assert gap < 1e-4, (network.name, gap)
        model = load(network, data)
        sizes = {name: size for name, (size, _) in positions(model, torch.zeros(1, 3, SIDE, SIDE)).items()}
        named = convolutions(model)
        weights = sum(m.weight.numel() for m in named.values())
        inputs = sum(m.in_channels * sizes[name] for name, m in named.items())
        ratios, _ = sparse_update(model, network.scheme)
        spent = 0
        for name, ratio in ratios.items():
            module = named[name.removesuffix(".weight")]
            channels = max(1, int(ratio * module.in_channels))
            spent += channels * channel_cost(module, sizes[name.removesuffix(".weight")])
        print(
            f"{network.name}: largest difference {gap:.1e} · {len(named)} convolutions, {weights:,} weights, "
            f"{inputs:,} inputs · sparse update {spent:,} elements, budget {network.budgets['tight']:,}"
        )


if __name__ == "__main__":
    main()
