"""Plans under which channels are absent, as several tests make and run them, and the same training the slow way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tithe
from models import CASES, Batch, Case
from narrow_networks import NETWORKS
from slicing import zeroed
from tithe import VRPGE, NarrowPlan
from tithe.select import bernoulli_masks

Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def images(name: str) -> Case:
    """A network of `narrow_networks` on small images."""

    def draw(n: int, g: torch.Generator) -> Batch:
        return {"x": torch.randn(n, 3, 8, 8, generator=g), "y": torch.randint(3, (n,), generator=g)}

    def logits(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"])

    return Case(
        name, NETWORKS[name], draw, lambda model, batch: F.cross_entropy(logits(model, batch), batch["y"]), logits
    )


def decoder(name: str, **settings: object) -> Case:
    """Two keys for four queries, in the shapes of the zoo's llama."""

    def make() -> nn.Module:
        import transformers

        widths = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=30, pad_token_id=0)
        heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=16)
        config = getattr(transformers, f"{name}Config")(**widths, **heads, bos_token_id=1, eos_token_id=1, **settings)
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return Case(name, make, CASES["llama"].draw, CASES["llama"].loss)


_ZOO = (
    *("resnet_basic", "resnet_bottleneck", "mobilenet_v2", "vit", "bert", "gpt2", "gpt2_classifier", "llama"),
    *("mlp", "depthwise", "signal", "volume", "encoder", "convnext", "swin"),
)
FAMILIES: dict[str, Case] = {
    **{name: images(name) for name in NETWORKS},
    **{name: CASES[name] for name in _ZOO},
    "grouped_query": decoder("Llama"),
    "grouped_query_tied": decoder("Qwen3", tie_word_embeddings=True),
}
"""Every way in which channels are joined, by name."""

KINDS = ("vgg", "residual", "inverted", "dense", "resnet_bottleneck", "vit", "bert", "gpt2", "grouped_query")
"""One of each kind."""


def every(quick: Iterable[str] = KINDS) -> list[Any]:
    """All families as parameters of a test; it is slow for those that are not named."""
    quick = set(quick)
    marks = {name: () if name in quick else pytest.mark.slow for name in FAMILIES}
    return [pytest.param(case, id=name, marks=marks[name]) for name, case in FAMILIES.items()]


def attach(
    case: Case, model: nn.Module | None = None, method: VRPGE | None = None, *, keep: float = 0.5, **settings: Any
) -> NarrowPlan:
    """A plan on a fresh model of the case; data in the dtype of its weights."""
    model = case.model() if model is None else model
    dtype = next(model.parameters()).dtype
    given = {"loss": case.loss, "data": case.batches(2, dtype=dtype)} | settings
    return tithe.attach(model, VRPGE(keep) if method is None else method, **given)


def bound(plan: NarrowPlan, optimizer: Optimizer) -> torch.optim.Optimizer:
    """An optimizer over the plan, bound to it."""
    opt = optimizer(plan.parameters())
    plan.bind(opt)
    return opt


def step(plan: NarrowPlan, opt: torch.optim.Optimizer, case: Case, batch: Batch) -> float:
    """One step of the loop in the documentation; its loss."""
    loss = plan.backward(lambda: case.loss(plan.model, batch))
    opt.step()
    opt.zero_grad()
    plan.step()
    return loss.item()


def plain(plan: NarrowPlan, case: Case) -> nn.Module:
    """A model of the present values and full width that no plan is attached to."""
    fresh = case.model(dtype=next(plan.model.parameters()).dtype).train(plan.model.training)
    fresh.load_state_dict(plan.model.state_dict())
    return fresh


def drawn(plan: NarrowPlan) -> tuple[Tensor, Tensor]:
    """The two networks of the coming step, bool (n,)."""
    return plan.structure.draw(plan.seed, plan.num_steps)


def live_entries(plan: NarrowPlan, mask: Tensor) -> dict[str, Tensor]:
    """Name → bool, which entries of a parameter or buffer exist; the tensors that are always whole are left out."""
    found: dict[str, Tensor] = {}
    for name, grid in plan.stage.grids(mask).items():
        found[name] = torch.zeros(grid.shape, dtype=torch.bool)
        found[name].view(-1)[grid.indices] = True
    return found


class Masked:
    """VR-PGE with masks on dense tensors: zeros for what is absent, and what took no part gets its bits back.

    Args:
        plan: for its model's copy, its coupling, method and seed; read at once, never run.
        model: trained here, as yet equal to the plan's.
        case: of both.
        optimizer: of the weights.
    """

    def __init__(self, plan: NarrowPlan, model: nn.Module, case: Case, optimizer: Optimizer) -> None:
        self.model, self.case = model, case
        self.coupling, self.method, self.seed = plan.stage.coupling, plan.method, plan.seed
        self.live = lambda mask: live_entries(plan, mask)
        self.opt = optimizer(model.parameters())
        self.n = self.coupling.num_units
        self.group = torch.cat([torch.full((g.num_units,), k) for k, g in enumerate(self.coupling.groups)])
        self.s = torch.full((self.n,), self.method.share(0), dtype=torch.float64)
        self.moments = torch.zeros(2, self.n, dtype=torch.float64)
        self.num_steps = self.num_learned = 0
        self.gates: list[tuple[Tensor, Tensor]] = []
        self.pairs: list[tuple[float, float]] = []

    def step(self, parts: Sequence[Batch], *, clip: float | None = None, pace: float = 1.0) -> None:
        """One step on the mean of the micro-batches' losses."""
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + self.num_steps)
        first, second = (bernoulli_masks.draw(self.s, self.group, generator) for _ in range(2))
        live = self.live(first)
        masked, other = zeroed(self.model, self.coupling, first), zeroed(self.model, self.coupling, second)
        difference = 0.0
        for part in parts:
            with torch.no_grad():
                difference -= float(self.case.loss(other, part)) / len(parts)
            loss = self.case.loss(masked, part) / len(parts)
            loss.backward()
            difference += loss.item()
        gates = self._gates_of(masked, first)
        weights = dict(self.model.named_parameters())
        for name, parameter in masked.named_parameters():
            grad = parameter.grad
            weights[name].grad = grad if name not in live or grad is None else grad * live[name]
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self._update(live)
        for name, buffer in masked.named_buffers():
            here = self.model.get_buffer(name)
            here.copy_(torch.where(live[name], buffer, here) if name in live else buffer)
        self._learn(first, second, difference, pace)
        self.gates.append((first, gates))

    def _gates_of(self, masked: nn.Module, mask: Tensor) -> Tensor:
        """∂L/∂m_i of a gate on each unit: weight times gradient in the columns that read it."""
        found = torch.zeros(self.n + 1, dtype=torch.float64)
        for name, parameter in masked.named_parameters():
            for axis, at in self.coupling.places.get(name, {}).items():
                if (name, axis) in self.coupling.reads and parameter.grad is not None:
                    product = (parameter.detach() * parameter.grad).double().transpose(0, axis).flatten(1).sum(1)
                    found.index_add_(0, self.coupling.axes[at] % (self.n + 1), product)
        return torch.where(mask, found[:-1], 0.0)

    def _control(self) -> tuple[Tensor, float]:
        """What earlier steps say that units are worth, and by how much that is to be multiplied."""
        worth, count = torch.zeros(2, self.n, dtype=torch.float64)
        for mask, gates in self.gates:
            worth = torch.where(mask, 0.98 * worth + gates, worth)
            count = torch.where(mask, 0.98 * count + 1, count)
        x, y = torch.tensor(self.pairs, dtype=torch.float64).view(-1, 2).unbind(1)
        weight = 0.98 ** torch.arange(len(x) - 1, -1, -1, dtype=torch.float64)
        xy, xx, yy = ((weight * product).sum() for product in (x * y, x * x, y * y))
        scale = 0.0
        if len(x) > 1 and xy > 0:
            r2 = xy**2 / (xx * yy)
            scale = float(xy / xx * (1 - (1 - r2) / ((weight.sum() - 1) * r2)).clamp(min=0))
        return torch.where(count > 0, worth / count, 0.0), scale

    @torch.no_grad()
    def _update(self, live: dict[str, Tensor]) -> None:
        """A dense step of the optimizer; then every entry that is absent, of weights and state, is as before."""
        weights = {name: p for name, p in self.model.named_parameters() if name in live}
        before = {name: p.clone() for name, p in weights.items()}
        states = {
            name: {k: v.clone() for k, v in self.opt.state.get(p, {}).items() if isinstance(v, Tensor)}
            for name, p in weights.items()
        }
        self.opt.step()
        for name, parameter in weights.items():
            parameter.copy_(torch.where(live[name], parameter, before[name]))
            for key, value in self.opt.state[parameter].items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.copy_(torch.where(live[name], value, states[name].get(key, torch.zeros_like(value))))

    def _learn(self, first: Tensor, second: Tensor, difference: float, pace: float) -> None:
        """Adam, written out, and the projection; without control two draws of the same network teach nothing."""
        self.num_steps += 1
        moved = self.s
        if self.method.control_variate or not torch.equal(first, second):
            self.num_learned += 1
            h = self.s * (1 - self.s)
            z = [(mask.double() - self.s) / h ** (1 - self.method.alpha) for mask in (first, second)]
            worth, scale = self._control() if self.method.control_variate else (torch.zeros_like(self.s), 0.0)
            told = float(worth @ (first.double() - second.double()))
            g = (difference - scale * told) / 2 * (z[0] - z[1]) + scale * worth * h**self.method.alpha
            g = torch.where((self.s > 0) & (self.s < 1), g, 0.0)
            if not torch.equal(first, second):
                self.pairs.append((told, difference))
            self.moments[0].mul_(0.9).add_(0.1 * g)
            self.moments[1].mul_(0.999).add_(0.001 * g * g)
            mean, square = (m / (1 - b**self.num_learned) for m, b in zip(self.moments, (0.9, 0.999), strict=True))
            moved = self.s - self.method.structure_lr * pace * mean / (square.sqrt() + 1e-8)
        limit = self.method.share(self.num_steps) * self.n
        self.s = bernoulli_masks.project(torch.where(self.s > 0, moved, 0.0), limit)
