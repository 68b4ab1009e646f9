"""The estimator of the structure step, against all masks of a small network: its mean, its variance, and REINFORCE's.

Two convolutions of six channels and a classifier, trained on the embedded digits 0 to 4 by the two steps of the method
(Adam for both, keep ½). The loss of each of the 4096 masks on one batch of training images makes every mean and
variance over independent Bernoulli draws an exact sum; only the mean of real draws is sampled.

    ours        (L_0 - L_1) / 2 · (z_0 - z_1)       two losses
    REINFORCE   L (m - s) / (s (1 - s))             one loss, no baseline
    the same, preconditioned by (s (1 - s))^½: L z
    controlled  ours, for the loss L - cᵀ m         c from the gradients of the weight steps so far

The control variate looks on while the network trains by our estimate, so that both are compared on the same networks.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tithe
from benchmarks.records import Record, Store, parse
from tithe.app.demo.digits import NUM_CLASSES, Batch, Task, tasks
from tithe.narrow.control import ControlVariate

WIDTH, NUM_UNITS = 6, 12
KEEP = 0.5
SEEDS = (0, 1, 2)
STEPS = (0, 200, 1000)
CONTROL_SEEDS, CONTROL_STEPS = (0, 1, 2, 3, 4), (50, 100, 200, 500, 1000)
ALPHAS = (0.25, 0.5, 1.0)
LIMITS = (0.5, 0.1, 0.01, 0.001, 0.9, 0.99, 0.999)
MIDWAY = 200
"""Steps after which the mean and the limits are looked at: most probabilities are still between 0 and 1."""
NUM_PAIRS, CHUNK = 200_000, 20_000
MASKS = torch.tensor(list(itertools.product([0, 1], repeat=NUM_UNITS)), dtype=torch.float64)
GROUP = torch.arange(NUM_UNITS) // WIDTH


class Small(nn.Module):
    """Two convolutions, any channel of which may be absent, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.head = nn.Linear(16 * WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) and a mask (12,) to logits."""
        first, second = mask.to(x.dtype)[:, None, None].split(WIDTH)
        x = F.relu(self.first(x)) * first
        return self.head((F.relu(self.second(x)) * second).flatten(1))


def gates(net: Small) -> Tensor:
    """∂L/∂m_i of a gate on each channel, from the gradients of the two layers that read them."""
    second, head = net.second.weight, net.head.weight
    assert second.grad is not None
    assert head.grad is not None
    read = (second * second.grad).sum((0, 2, 3)), (head * head.grad).sum(0).view(WIDTH, -1).sum(1)
    return torch.cat(read).detach()


def train(
    seed: int, epochs: Iterator[list[Batch]], at: tuple[int, ...]
) -> Iterator[tuple[int, Small, Tensor, ControlVariate]]:
    """The network, s and the control variate after these numbers of steps.

    A step is a draw, a weight step, a second loss, a structure step by our estimate.
    """
    torch.manual_seed(seed)
    net, s = Small(), nn.Parameter(torch.full((NUM_UNITS,), KEEP))
    generator = torch.Generator().manual_seed(seed)
    control = ControlVariate(NUM_UNITS)
    weights, structure = torch.optim.Adam(net.parameters(), lr=3e-3), torch.optim.Adam([s], lr=12e-3)
    batches = itertools.chain.from_iterable(epochs)
    for step in range(max(at) + 1):
        if step in at:
            yield step, copy.deepcopy(net), s.detach().clone(), control
        x, y = next(batches)
        mask_0, mask_1 = (tithe.select.bernoulli_masks.draw(s, GROUP, generator) for _ in range(2))
        loss_0 = F.cross_entropy(net(x, mask_0), y)
        with torch.no_grad():
            loss_1 = F.cross_entropy(net(x, mask_1), y)
        s.grad = tithe.select.bernoulli_masks.policy_gradient(s, mask_0, mask_1, loss_0, loss_1)
        weights.zero_grad()
        loss_0.backward()
        control.see(mask_0, mask_1, float(loss_0.detach() - loss_1))
        control.take(gates(net), mask_0)
        weights.step()
        structure.step()
        s.data = tithe.select.bernoulli_masks.project(s, KEEP * NUM_UNITS)


@torch.no_grad()
def losses_of(net: Small, batch: Batch) -> Tensor:
    """The loss of every mask, float64 (4096,)."""
    x, y = batch
    each = torch.func.vmap(lambda mask: F.cross_entropy(net(x, mask), y))
    return torch.cat([each(masks) for masks in MASKS.split(64)]).double()


def probability(s: Tensor) -> Tensor:
    """Of every mask, (4096,)."""
    return (MASKS * s + (1 - MASKS) * (1 - s)).prod(1)


def gradient(s: Tensor, losses: Tensor) -> Tensor:
    """∇F, F = E L, by differentiating the sum over all masks."""
    s = s.clone().requires_grad_()
    (found,) = torch.autograd.grad(probability(s) @ losses, s)
    return found


def variances(s: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one estimate of each unit, exactly: ours, preconditioned REINFORCE, REINFORCE. 0 < s < 1."""
    p, h = probability(s), s * (1 - s)
    mean = h.sqrt() * gradient(s, losses)
    present, absent = p[:, None] * MASKS, p[:, None] * (1 - MASKS)
    # Ours is not zero where one draw has the unit and the other has not: E over such pairs of (L_0 - L_1)² / 4h.
    one, square = losses[:, None], losses[:, None].square()
    apart = (present * square).sum(0) * absent.sum(0) + (absent * square).sum(0) * present.sum(0)
    apart = apart - 2 * (present * one).sum(0) * (absent * one).sum(0)
    ours = apart / (2 * h) - mean**2
    plain = (p[:, None] * square * (MASKS - s) ** 2).sum(0) / h - mean**2
    return ours, plain, plain / h


def sampled(
    s: Tensor, losses: Tensor, alpha: float, *, floor: bool, control: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean over NUM_PAIRS pairs of real draws, and its standard error, each (12,).

    Without the floor the units of a draw are one group, which has one more unit that is always there.
    """
    generator = torch.Generator().manual_seed(0)
    group = GROUP if floor else torch.zeros(NUM_UNITS + 1, dtype=torch.int64)
    units = s if floor else torch.cat([s, s.new_ones(1)])
    groups = (torch.arange(2 * CHUNK)[:, None] * (int(group[-1]) + 1) + group).flatten()
    place = 2 ** torch.arange(NUM_UNITS - 1, -1, -1)
    total, square = torch.zeros(2, NUM_UNITS, dtype=torch.float64)
    for _ in range(NUM_PAIRS // CHUNK):
        drawn = tithe.select.bernoulli_masks.draw(units.repeat(2 * CHUNK), groups, generator).view(2, CHUNK, -1)
        masks = drawn[..., :NUM_UNITS]
        loss = losses[(masks * place).sum(-1)][..., None]
        found = tithe.select.bernoulli_masks.policy_gradient(
            s, masks[0], masks[1], loss[0], loss[1], alpha, control=control
        )
        total, square = total + found.sum(0), square + found.square().sum(0)
    mean = total / NUM_PAIRS
    return mean, ((square / NUM_PAIRS - mean**2) / NUM_PAIRS).sqrt()


def means(s: Tensor, losses: Tensor) -> Iterator[Record]:
    """How far the sampled mean is from H^α ∇F, for each α; and once with the floor."""
    h = s * (1 - s)
    for alpha, floor in (*((alpha, False) for alpha in ALPHAS), (0.5, True)):
        mean, error = sampled(s, losses, alpha, floor=floor)
        exact = h**alpha * gradient(s, losses)
        yield {
            "alpha": alpha,
            "floor": floor,
            "pairs": NUM_PAIRS,
            "standard_errors": float(((mean - exact) / error).abs().max()),
            "relative_error": float((mean - exact).norm() / exact.norm()),
            "relative_standard_error": float(error.norm() / exact.norm()),
            "nothing_drawn": 1 - float((1 - (1 - s).view(-1, WIDTH).prod(1)).prod()),
        }


def spread(s: Tensor, losses: Tensor) -> Record:
    """Loss and variances at the s that training has brought, summed over the units that are not certain yet."""
    uncertain = (s > 0) & (s < 1)
    inner = s.clamp(1e-6, 1 - 1e-6)
    p, h = probability(s), inner * (1 - inner)
    ours, preconditioned, plain = (float(variance[uncertain].sum()) for variance in variances(inner, losses))
    slope = gradient(inner, losses)[uncertain].square()
    return {
        "mean_loss": float(p @ losses),
        "deviation_of_loss": float((p @ losses**2 - (p @ losses) ** 2).sqrt()),
        "uncertain": int(uncertain.sum()),
        "ours": ours,
        "preconditioned": preconditioned,
        "plain": plain,
        "squared_mean": float((h[uncertain] * slope).sum()),
        "squared_mean_plain": float(slope.sum()),
    }


def limit(s: Tensor, losses: Tensor, value: float) -> Record:
    """The largest variance of a unit at `value`, each in turn, the others where training had brought them."""
    turns = [variances(s.index_fill(0, torch.tensor(i), value), losses) for i in range(NUM_UNITS)]
    ours, preconditioned, plain = (max(float(turn[k][i]) for i, turn in enumerate(turns)) for k in range(3))
    bound = float(losses.max() - losses.min()) ** 2 / 2
    return {"ours": ours, "preconditioned": preconditioned, "plain": plain, "bound": bound}


def controlled(s: Tensor, losses: Tensor, control: ControlVariate) -> Record:
    """The variance without and with the control variate, summed as in `spread`."""
    uncertain = (s > 0) & (s < 1)
    inner, c = s.clamp(1e-6, 1 - 1e-6), control.vector
    ours, less = (float(variances(inner, left)[0][uncertain].sum()) for left in (losses, losses - MASKS @ c))
    return {"ours": ours, "controlled": less, "scale": control.scale}


def mean_controlled(s: Tensor, losses: Tensor, control: ControlVariate) -> Record:
    """How far the sampled mean is from H^½ ∇F, in standard errors, with the control variate and without: same draws."""
    exact, found = (s * (1 - s)).sqrt() * gradient(s, losses), list[float]()
    for c in (control.vector, None):
        mean, error = sampled(s, losses, 0.5, floor=False, control=c)
        found.append(float(((mean - exact) / error).abs().max()))
    return {"pairs": NUM_PAIRS, "standard_errors": found[0], "standard_errors_without": found[1]}


def measure_control(seed: int, task: Task) -> Iterator[Record]:
    """What the control variate takes off, while one network trains."""
    batch = (task.train[0][:128], task.train[1][:128])
    for steps, net, s, control in train(seed, task.epochs(64, seed), CONTROL_STEPS):
        key: Record = {"table": "control", "seed": seed, "steps": steps, "alpha": 0.5, "floor": False, "s": None}
        losses = losses_of(net, batch)
        record = controlled(s.double(), losses, control)
        if steps == MIDWAY:
            record |= mean_controlled(s.double().clamp(0.1, 0.9), losses, control)
        yield {**key, **record}


def measure(seed: int, task: Task) -> Iterator[Record]:
    """All that is recorded of one trained network."""
    batch = (task.train[0][:128], task.train[1][:128])
    for steps, net, found, _ in train(seed, task.epochs(64, seed), STEPS):
        s, losses = found.double(), losses_of(net, batch)
        key: Record = {"table": "trained", "seed": seed, "steps": steps, "alpha": 0.5, "floor": False, "s": None}
        yield {**key, **spread(s, losses)}
        if (seed, steps) == (SEEDS[0], MIDWAY):
            for record in means(s.clamp(0.1, 0.9), losses):
                yield {**key, "table": "mean", **record}
            for value in LIMITS:
                yield {**key, "table": "limit", "s": value, **limit(s.clamp(1e-6, 1 - 1e-6), losses, value)}


def main(args: argparse.Namespace) -> None:
    """Measure the seeds that are missing."""
    torch.set_num_threads(args.threads)
    store = Store(args.results / "estimator.jsonl", key=("table", "seed", "steps", "alpha", "floor", "s"))
    for seed in SEEDS:
        if store.find(table="trained", seed=seed, steps=STEPS[-1], alpha=0.5, floor=False, s=None) is None:
            for record in list(measure(seed, tasks()[0])):
                store.add(record)
    for seed in CONTROL_SEEDS:
        last = {"table": "control", "seed": seed, "steps": CONTROL_STEPS[-1], "alpha": 0.5, "floor": False, "s": None}
        if store.find(**last) is None:
            for record in list(measure_control(seed, tasks()[0])):
                store.add(record)


if __name__ == "__main__":
    main(parse(__doc__ or ""))
