"""What the library must agree with, written the slow and obvious way; and a method whose choice is given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tithe
from models import Batch, Case, samples
from tithe import Schedule
from tithe.method import SelectionContext, SparseMethod
from tithe.selection import Coordinates, Selection

Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


def adamw(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def gradients(model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> dict[str, Tensor]:
    """Dense gradients by autograd on a copy of a model that was never attached; absent where there is none."""
    model = copy.deepcopy(model)
    model.zero_grad()
    loss(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def parts(plan: tithe.Plan, flat: Tensor) -> dict[str, Tensor]:
    """The parts of a tensor like the flat θ of a plan that chooses again: one for each tensor it selects of."""
    selections = {name: selection for name, selection in plan.selections.items() if selection.size}
    sizes = [selection.size for selection in selections.values()]
    values = flat[: sum(sizes)].split(sizes)
    return {name: part.view(s.theta_shape) for (name, s), part in zip(selections.items(), values, strict=True)}


def thetas(plan: tithe.Plan) -> dict[str, Tensor]:
    """Name → θ with its gradient, the head's parameters too: of a flat θ the parts, which share its memory."""
    found: dict[str, Tensor] = {}
    for name, parameter in plan.named_parameters():
        if name != "theta":
            found[name] = parameter
            continue
        grads = {} if parameter.grad is None else parts(plan, parameter.grad)
        for key, part in parts(plan, parameter.detach()).items():
            found[key] = part
            found[key].grad = grads.get(key)
    return found


def train(model: nn.Module, case: Case, optimizer: Optimizer, batches: Sequence[Batch]) -> list[float]:
    """Ordinary training, a step a batch; the losses."""
    opt = optimizer(model.parameters())
    losses: list[float] = []
    torch.manual_seed(7)
    for batch in batches:
        opt.zero_grad()
        loss = case.loss(model, batch)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def empirical_fisher(model: nn.Module, case: Case, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Mean over the samples of the squared gradient of each sample's own loss, one backward a sample."""
    model = copy.deepcopy(model).eval()
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    count = 0
    for batch in batches:
        for sample in samples(batch):
            model.zero_grad()
            case.loss(model, sample).backward()
            count += 1
            for name, p in model.named_parameters():
                if p.grad is not None:
                    totals[name] += p.grad.square()
    return {name: total / count for name, total in totals.items()}


def true_fisher(model: nn.Module, case: Case, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Mean over the samples of Σ_c p(c|x) (∂ log p(c|x) / ∂w)²: one backward a sample and class, in evaluation mode."""
    assert case.logits is not None
    model = copy.deepcopy(model).eval()
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    count = 0
    for batch in batches:
        for sample in samples(batch):
            log_p = case.logits(model, sample).log_softmax(-1)[0]
            count += 1
            for c in range(len(log_p)):
                model.zero_grad()
                log_p[c].backward(retain_graph=True)
                for name, p in model.named_parameters():
                    if p.grad is not None:
                        totals[name] += log_p[c].exp().detach() * p.grad.square()
    return {name: total / count for name, total in totals.items()}


def mean_gradient(model: nn.Module, case: Case, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """|mean over the samples of the gradient|, in evaluation mode."""
    model = copy.deepcopy(model).eval()
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    count = 0
    for batch in batches:
        for sample in samples(batch):
            model.zero_grad()
            case.loss(model, sample).backward()
            count += 1
            for name, p in model.named_parameters():
                if p.grad is not None:
                    totals[name] += p.grad
    return {name: (total / count).abs() for name, total in totals.items()}


def largest(scores: dict[str, Tensor], k: int) -> dict[str, list[int]]:
    """The k largest over all tensors; ties go to the tensor, then the index, that comes first."""
    ranked = sorted(
        (-value, at, index)
        for at, score in enumerate(scores.values())
        for index, value in enumerate(score.flatten().tolist())
    )[:k]
    names = list(scores)
    chosen: dict[str, list[int]] = {name: [] for name in names}
    for _, at, index in ranked:
        chosen[names[at]].append(index)
    return {name: sorted(indices) for name, indices in chosen.items()}


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything a model would save."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The keys whose tensors differ in any bit."""
    assert list(a) == list(b)
    return [key for key in a if not torch.equal(a[key], b[key])]


@dataclass(frozen=True)
class Given(SparseMethod):
    """A stranger's method: selections, or flat int64 indices, are given by name; nothing else is selected."""

    chosen: Mapping[str, Selection | Tensor]
    warmup: int = 0
    reselect: Schedule | None = None
    needs_data: bool = False
    samples: int = 1
    lean: bool = False

    def num_selected(self, context: SelectionContext) -> int:
        return sum(selection.size for selection in self.choose(context).values())

    def choose(self, context: SelectionContext) -> dict[str, Selection]:
        return {
            name: Coordinates(context.shapes[name], given) if isinstance(given, Tensor) else given
            for name, given in self.chosen.items()
        }
