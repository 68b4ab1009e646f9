"""Ways to fine-tune MobileNetV2 of width 1.0, each prepared on fresh random weights, and one training step of each.

SGD without momentum for all, the recipe of TraDy: it has no state, which favours full fine-tuning most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tithe
from benchmarks.vision import convolutions, mobilenet_v2

Batch = tuple[Tensor, Tensor]

CLASSES = 1000
HEAD = "classifier.*"
RANK = 4
MICRO = (1, 2)
RANKING = Path(__file__).parent / "results" / "mobilenetv2-ranking.json"


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def images(size: int, side: int, *, seed: int = 0) -> Batch:
    """A batch of random images and classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, side, side, generator=generator)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def shapes(size: int, side: int) -> Batch:
    """A batch that has the shape of one and the memory of one number: what a price list is made for."""
    return torch.zeros(1).expand(size, 3, side, side), torch.zeros(1, dtype=torch.long).expand(size)


@dataclass
class Trainee:
    """A model ready to train, with its optimizer.

    Args:
        model: the network.
        plan: of Tithe, or None.
        micro: samples of a micro-batch, whose gradients are added up; None takes the batch at once.
    """

    model: nn.Module
    plan: tithe.Plan | None = None
    micro: int | None = None
    parameters: list[nn.Parameter] = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        if self.plan is not None:
            self.parameters = list(self.plan.parameters())
        else:
            self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-3)
        if self.plan is not None:
            self.plan.bind(self.optimizer)

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        return loss_of(self.model, batch)

    def backward(self, batch: Batch) -> None:
        """Forward and backward, micro-batch by micro-batch: the gradient is that of the whole batch's mean loss."""
        size = len(batch[1])
        for x, y in zip(*(t.split(self.micro or size) for t in batch), strict=True):

            def part(x: Tensor = x, y: Tensor = y) -> Tensor:
                loss = self.loss((x, y))
                return loss if len(y) == size else loss * (len(y) / size)

            if self.plan is not None:
                self.plan.backward(part)
            else:
                part().backward()

    def step(self, batch: Batch) -> None:
        """Forward, backward, optimizer, zero_grad."""
        self.backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self, batch: Batch) -> list[Tensor]:
        """The gradient of every trained parameter that has one, as the optimizer would find it."""
        self.backward(batch)
        if self.plan is not None:
            list(self.plan.parameters())  # shows each θ its part of the flat gradient
        found = [p.grad.clone() for p in self.parameters if p.grad is not None]
        self.optimizer.zero_grad()
        return found

    def predict(self, batch: Batch) -> tithe.Ledger:
        """The price of a step's forward and backward pass on shapes alone; of one micro-batch where there are such."""
        batch = (batch[0][: self.micro], batch[1][: self.micro])
        if self.plan is not None:
            return self.plan.predict(batch)
        return tithe.ledger.predict(self.model, self.loss, batch)

    @property
    def num_trained(self) -> int:
        """Numbers that the optimizer moves."""
        return sum(p.numel() for p in self.parameters)

    @property
    def num_channels(self) -> int | None:
        """Input channels that a plan selects."""
        if self.plan is None:
            return None
        return sum(s.items.numel() for s in self.plan.selections.values())

    def standing_bytes(self, batch: Batch) -> int:
        """Bytes that stay between steps: weights, buffers, θ, indices, gradients that are kept, optimizer state."""
        state = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        held = {t.untyped_storage() for t in [*self.model.parameters(), *self.model.buffers(), *state, *grads]}
        index = 0 if self.plan is None else self.plan.predict(batch).index
        return sum({s._cdata: s.nbytes() for s in held}.values()) + index


def freeze_norms(model: nn.Module) -> nn.Module:
    """Norms as fixed affine maps: running statistics, nothing of them trained."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model


def full(*, frozen_norms: bool = False, micro: int | None = None, num_classes: int = CLASSES) -> Trainee:
    """Every parameter, with or without those of the norms."""
    model = mobilenet_v2(num_classes=num_classes).train()
    return Trainee(freeze_norms(model) if frozen_norms else model, micro=micro)


def head_only(*, num_classes: int = CLASSES) -> Trainee:
    """The classifier on frozen features."""
    model = mobilenet_v2(num_classes=num_classes).requires_grad_(False).eval()
    model.classifier.requires_grad_()
    return Trainee(model)


def lora(*, frozen_norms: bool = False, micro: int | None = None, lean: bool = False) -> Trainee:
    """PEFT's LoRA on every 1×1 convolution that is no depthwise one, the head in full."""
    import peft  # takes seconds and megabytes, which are not for the others to pay

    model: Any = mobilenet_v2().train()
    ones = [name for name, module in convolutions(model).items() if module.kernel_size == (1, 1)]
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=ones, modules_to_save=["classifier"])
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config).train()
    if frozen_norms:
        freeze_norms(model)
    if lean:
        tithe.lean(model)
    return Trainee(model, micro=micro)


def ranking(path: Path = RANKING) -> tithe.Ranking:
    """The ranking of the layers for 224² images: of two batches of 8 random images, measured once and kept."""
    if not path.exists():
        batches = [images(8, 224, seed=seed) for seed in (1, 2)]
        tithe.Ranking.compute(mobilenet_v2(), loss=loss_of, data=batches, head=[HEAD], samples=16).save(path)
    return tithe.Ranking.load(path)


def attached(method: Any, size: int, side: int, *, micro: int | None = None, double: bool = False) -> Trainee:
    """A network with a plan, for batches of `size` images of `side`² taken at once or in micro-batches."""
    model, (x, y) = mobilenet_v2().train(), shapes(micro or size, side)
    if double:
        model, x = model.double(), x.double()
    plan = tithe.attach(model, method, loss=loss_of, data=[(x, y)], head=[HEAD], seed=0)
    return Trainee(model, plan, micro)


def num_channels() -> int:
    """Input channels of all convolutions."""
    return sum(module.in_channels for module in convolutions(mobilenet_v2()).values())


def budget_for(share: float, side: int) -> int:
    """Elements for which TraDy's draw of seed 0 holds `share` of the network's input channels, or just less."""
    wanted, low, high = share * num_channels(), 0, 1 << 24
    while high - low > max(low // 1000, 1):
        middle = (low + high) // 2
        try:
            found = attached(trady(middle), 1, side).num_channels or 0
        except tithe.TitheError:  # less than one channel
            found = 0
        low, high = (middle, high) if found <= wanted else (low, middle)
    return low


def trady(elements: int) -> tithe.TraDy:
    """The paper's recipe under a budget in its own count."""
    return tithe.TraDy(tithe.Budget(elements=elements), ranking=RANKING, optimizer_states=0)


def even(share: float) -> tithe.SparseUpdate:
    """The same share of the input channels of every convolution, at least one each: no layer is left out."""
    return tithe.SparseUpdate({f"{name}.weight": share for name in convolutions(mobilenet_v2())})


def prepared(size: int, side: int, budgets: Mapping[float, int]) -> dict[str, Callable[[], Trainee]]:
    """Every method by name, ready to be made.

    Args:
        size: images in a batch.
        side: pixels, both sides.
        budgets: share of the channels → elements.
    """
    found: dict[str, Callable[[], Trainee]] = {
        "full": full,
        "full, frozen norms": lambda: full(frozen_norms=True),
        "full, frozen norms, micro-batches of 1": lambda: full(frozen_norms=True, micro=1),
        f"LoRA r{RANK}": lora,
        f"LoRA r{RANK}, frozen norms, micro-batches of 1": lambda: lora(frozen_norms=True, micro=1),
        f"LoRA r{RANK}, tithe.lean": lambda: lora(frozen_norms=True, lean=True),
        "head only": head_only,
    }
    for share, elements in budgets.items():
        name, method = f"TraDy, {100 * share:g} %", trady(elements)
        found[name] = partial(attached, method, size, side)
        for micro in MICRO:
            found[f"{name}, micro-batches of {micro}"] = partial(attached, method, size, side, micro=micro)
    for share in budgets:
        found[f"every layer, {100 * share:g} %"] = partial(attached, even(share), size, side)
    return found
