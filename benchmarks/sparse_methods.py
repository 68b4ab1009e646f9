"""Ways to train a network of a tenth or a third of the FLOPs, each from fresh weights to the end of its course.

Every method is a function of a course, an architecture and the FLOPs ratio; it gives back the trained network and the
part of the dense network's FLOPs that it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

import tithe
from benchmarks.course import Course, evaluate
from benchmarks.images import Images
from benchmarks.narrow_networks import Architecture, drawn, flops, loss_of, uniform
from benchmarks.small_images import Batch, apart, evaluation_batches
from tithe.coupling import Coupling, couple
from tithe.narrow import Probabilities

# Of the methods that learn a structure; chosen on validation images, VGG-7 at 36 %, first seed.
SETTLED = 0.3  # part of the course after which the structure is fixed
FALLEN = 0.9  # part of that part over which the share that is kept falls to the ratio
STRUCTURE_RATE = 0.05
DRAWS = 10  # masks among which the best is kept in the end
LAST_CUT = 300  # steps before the last of five cuts: about a sixth of a course
VIRTUAL = 10_000  # steps of a course that ends after some seconds, where a schedule asks for steps

Trained = tuple[nn.Module, float]  # a network, its FLOPs as a part of the dense network's


def started(architecture: Architecture, widths: Sequence[int], course: Course) -> nn.Module:
    """A network with the weights that the seed draws."""
    torch.manual_seed(course.seed)
    return architecture.build(widths).to(memory_format=torch.channels_last)


def dense(course: Course, architecture: Architecture, _: float) -> Trained:
    """The full network."""
    model = started(architecture, architecture.widths, course)
    course.train(model)
    return model, 1.0


def even(course: Course, architecture: Architecture, ratio: float) -> Trained:
    """Every layer narrower by the same factor."""
    widths = uniform(architecture, ratio)
    model = started(architecture, widths, course)
    course.train(model)
    return model, architecture.ratio(widths)


def random_channels(course: Course, architecture: Architecture, ratio: float) -> Trained:
    """A random mask that stays."""
    widths = drawn(architecture, ratio, course.seed)
    model = started(architecture, widths, course)
    course.train(model)
    return model, architecture.ratio(widths)


def magnitude(course: Course, architecture: Architecture, ratio: float) -> Trained:
    """Half the course dense; then the filters of smallest L1 norm go, as many as in `even`, and the rest trains on.

    Li, Kadav, Durdanovic, Samet, Graf, *Pruning Filters for Efficient ConvNets*, ICLR 2017. Channels that a residual
    sum joins go by the sum of their norms. The learning rate follows one cosine over both halves.
    """
    model = started(architecture, architecture.widths, course)
    course.train(model, until=0.5)
    with course.clock():
        coupling = coupled(model, course)
        norms = filter_norms(model, coupling)
        widths = uniform(architecture, ratio)
        mask = torch.zeros(coupling.num_units, dtype=torch.bool)
        for group, width in zip(coupling.groups, widths, strict=True):
            mask[group.start + norms[group.start : group.stop].topk(width).indices] = True
        narrow = narrowed(architecture, model, coupling, mask)
    course.train(narrow)
    return narrow, architecture.ratio(widths)


def coupled(model: nn.Module, course: Course) -> Coupling:
    """Which channels belong together, found on two images of zeros."""
    x = torch.zeros(2, *course.split.train.x.shape[1:])
    batch = x, torch.zeros(2, dtype=torch.long)
    names = {name for name, _ in model.named_parameters()}
    return couple(model, lambda: loss_of(model, batch), names, 2)


@torch.no_grad()
def filter_norms(model: nn.Module, coupling: Coupling) -> Tensor:
    """Of every unit the L1 norm of the filters that make it."""
    norms = torch.zeros(coupling.num_units)
    for group in coupling.groups:
        for name, axis in group.members:
            weight = model.state_dict()[name]
            if axis == 0 and weight.dim() > 1:
                norms[group.start : group.stop] += weight.abs().flatten(1).sum(1)
    return norms


def narrowed(architecture: Architecture, model: nn.Module, coupling: Coupling, mask: Tensor) -> nn.Module:
    """The network of the units that `mask` keeps, with their weights and statistics."""
    kept = coupling.kept(mask)
    state = model.state_dict()
    for name, axes in coupling.places.items():
        for axis, index in axes.items():
            state[name] = state[name].index_select(axis, kept[index])
    narrow = architecture.build([int(mask[group.start : group.stop].sum()) for group in coupling.groups])
    narrow.load_state_dict(state)
    return narrow.to(memory_format=torch.channels_last)


class Masked(nn.Module):
    """A network whose filters are multiplied by a mask of units; everything is computed."""

    def __init__(self, network: nn.Module, coupling: Coupling, mask: Tensor) -> None:
        super().__init__()
        self.network, self.coupling, self.mask = network, coupling, mask

    def forward(self, x: Tensor) -> Tensor:
        parameters = dict(self.network.named_parameters())
        filters = {
            name: parameters[name] * self.mask[group.start : group.stop].view(-1, 1, 1, 1)
            for group in self.coupling.groups
            for name, axis in group.members
            if axis == 0 and parameters.get(name, self.mask).dim() > 1
        }
        return functional_call(self.network, filters, x)


def masked(course: Course, architecture: Architecture, ratio: float) -> Trained:
    """The estimator as its authors run it: a step is two dense forward and two dense backward passes with masks.

    A mask multiplies filters, so a masked channel still emits its batch norm's β. What departs from the authors: their
    Σ s ≤ K is the same bound on FLOPs as ours, with one s for the channels that belong together, and the multiplier of
    the projection is exact instead of bisected.
    """
    model = started(architecture, architecture.widths, course)
    training, held = apart(course.split.train)
    with course.clock():
        coupling = coupled(model, course)
        chances = Probabilities(coupling, method(ratio, VIRTUAL))
        network = Masked(model, coupling, chances.likely(0))
    optimizer = course.sgd(model.parameters())
    for batch in course.batches(network, optimizer, until=SETTLED, images=training):
        masks = chances.draw(course.seed, course.steps)
        losses: list[Tensor] = []
        for network.mask in masks:
            losses.append(loss_of(network, batch))
        ((losses[0] + losses[1]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        difference = float(losses[0].detach() - losses[1].detach())
        step = round(VIRTUAL * course.progress)
        chances.learn(*masks, difference, step=step, pace=course.factor)
        network.mask = chances.likely(step)
    with course.clock():
        candidates = chances.candidates(course.seed, VIRTUAL, DRAWS)
        network.mask = min(candidates, key=lambda mask: held_loss(network, mask, held))
    for batch in course.batches(network, optimizer):
        loss_of(network, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    full = coupling.cost(coupling.flops, torch.ones(coupling.num_units))
    return network, float(coupling.cost(coupling.flops, network.mask.float()) / full)


def held_loss(network: Masked, mask: Tensor, images: Images) -> float:
    """The loss on these images with that mask."""
    network.mask = mask
    return evaluate(network, images)[1]


def method(ratio: float, num_steps: int) -> tithe.VRPGE:
    """What Tithe and the masks learn the structure with, in a course of so many steps."""
    fallen = round(FALLEN * SETTLED * num_steps)
    return tithe.VRPGE(keep=ratio, structure_lr=STRUCTURE_RATE, gradual=(0, fallen), cost="flops")


def ours(course: Course, architecture: Architecture, ratio: float) -> Trained:
    """Tithe: every step trains one narrow network, and runs a second one forward for the probabilities."""
    model = started(architecture, architecture.widths, course)
    training, held = apart(course.split.train)
    first = next(evaluation_batches(held, 2))
    with course.clock():
        assert course.epochs is not None
        structure = method(ratio, course.epochs * course.steps_per_epoch)
        plan = tithe.attach(model, structure, loss=loss_of, data=[first], seed=course.seed)
        optimizer = course.sgd(plan.parameters())
        plan.bind(optimizer)

    def train(batches: Iterable[Batch]) -> None:
        for batch in batches:
            plan.backward(lambda batch=batch: loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()
            plan.step()
            if (course.steps + 1) % course.steps_per_epoch == 0:
                plan.end_epoch()

    train(course.batches(model, optimizer, until=SETTLED, images=training))
    with course.clock():
        plan.settle(list(evaluation_batches(held, 128)), draws=DRAWS)
    train(course.batches(model, optimizer))
    narrow = plan.export(first)
    return narrow, flops(narrow, first[0][:1]) / architecture.flops(architecture.widths)


def cuts(course: Course, architecture: Architecture, ratio: float) -> Trained:
    """Tithe's cuts: the whole network for a few steps, then what is worth least goes, in five cuts."""
    model = started(architecture, architecture.widths, course)
    first = next(evaluation_batches(apart(course.split.train)[1], 2))
    with course.clock():
        structure = tithe.TaylorPruning(keep=ratio, stop=LAST_CUT, fresh=True)
        plan = tithe.attach(model, structure, loss=loss_of, data=[first], seed=course.seed)
    course.train(model)
    narrow = plan.export(first)
    return narrow, flops(narrow, first[0][:1]) / architecture.flops(architecture.widths)


@dataclass(frozen=True)
class Method:
    """A name, how it trains, and the learning rates that it may choose from."""

    name: str
    train: Callable[[Course, Architecture, float], Trained]
    rates: tuple[float, ...] = (0.1, 0.3)


METHODS = {
    m.name: m
    for m in (
        Method("dense", dense),
        Method("uniformly narrow", even),
        Method("random channels", random_channels),
        Method("L1 after dense", magnitude),
        Method("masks", masked),
        Method("Tithe", ours),
        Method("cuts", cuts),
    )
}
