"""The contracts: what a method may be, and what it is handed when it chooses. It never sees a module.

                  what is not selected …            a method says
SparseMethod      stays frozen at its value         num_selected, choose
NarrowMethod      does not exist in a step          keep; share, gradient
CutMethod         goes for good, in a few steps     keep, share; accumulate, worth
SubspaceMethod    moves with the rest, in a span    history

Everything else has a default. A method is a subclass, most simply a frozen dataclass; `tithe.attach` makes its plan:

    @dataclass(frozen=True)
    class Largest(tithe.SparseMethod):
        k: int

        def choose(self, context):
            picked = top_k(context.scores("magnitude"), self.k, context.sizes)
            return {name: tithe.Coordinates(context.shapes[name], at) for name, at in picked.items()}
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from tithe.averages import History
from tithe.batch import leaves, num_samples, take_samples
from tithe.errors import TitheError
from tithe.rules import Binding
from tithe.schedule import Schedule
from tithe.scoring import STATISTICS, Loss, Passes, channel_norms, price_channels
from tithe.select import bernoulli_masks, importance
from tithe.select.channel_costs import Layer
from tithe.select.topk import check_finite
from tithe.selection import Coordinates, Selection

Cost = Literal["channels", "flops", "params"]
Weights = Literal["trained", "frozen"]
Init = Literal["uniform", "taylor", "wanda", "taylor+wanda"]
Granularity = Literal["model", "tensor"]

DATA_FREE = ("magnitude", "random", "principal")
"""The scores that read no data."""

_ALIKE, _MOST = 256, 1 << 16
"""Samples of one size after which all are taken to be, and samples that are looked at in any case."""

SparseT = TypeVar("SparseT", covariant=True)
NarrowT = TypeVar("NarrowT", covariant=True)
SubspaceT = TypeVar("SubspaceT", covariant=True)


class PlanMaker(Protocol[SparseT, NarrowT, SubspaceT]):
    """Makes the plan of each kind of method; `tithe.attach` hands one to the method, which asks for its own kind."""

    def sparse(self, method: SparseMethod) -> SparseT:
        """Make a plan under which what is not selected stays frozen at its value."""
        ...

    def narrow(self, method: NarrowMethod) -> NarrowT:
        """Make a plan under which what is not drawn does not exist."""
        ...

    def cut(self, method: CutMethod) -> NarrowT:
        """Make a plan under which what is worth least goes for good, in a few steps."""
        ...

    def subspace(self, method: SubspaceMethod) -> SubspaceT:
        """Make a plan under which all weights move together in a span."""
        ...


class SparseMethod(ABC):
    """Selects what may move in each weight; the rest stays frozen at its value.

    A choice is a pure function of what the context offers: of scores, seed, step and epoch. The same on every rank.
    """

    samples: int = 1024
    """How many samples its scores are taken over, all ranks together."""
    warmup: int = 0
    """Steps that train the head alone before the first choice."""
    reselect: Schedule | None = None
    """When to choose again; None is once."""
    lean: bool = False
    """Whether the other layers are to keep for backward only what it needs, as under `tithe.lean`."""
    optimizer_states: int | None = None
    """How many tensors of θ's size the optimizer may keep, where the method's budget counts them; None where not."""

    @property
    def needs_data(self) -> bool:
        """Return whether choosing reads data: `attach` then asks for `loss=` and `data=` first."""
        return False

    @abstractmethod
    def choose(self, context: SelectionContext) -> Mapping[str, Selection]:
        """Choose a selection by parameter name; a tensor of the context that is not named stays frozen."""

    def num_selected(self, context: SelectionContext) -> int:
        """Say how many values it will select at most, which a plan that chooses again holds room for.

        By default it chooses, and counts.

        Raises:
            TitheError: when the budget leaves nothing to select.
        """
        return sum(selection.size for selection in self.choose(context).values())

    def spending(self, context: SelectionContext, selections: Mapping[str, Selection]) -> Spending | None:
        """Say what a choice costs under the method's budget; None where it has none."""
        return None

    def make_plan(self, maker: PlanMaker[SparseT, Any, Any]) -> SparseT:
        """Ask for a plan under which the rest is frozen."""
        return maker.sparse(self)


class NarrowMethod(ABC):
    """Draws which channels, hidden units and heads exist in each step; the rest is not computed."""

    keep: float
    """The share of the cost that is kept, in (0, 1]."""
    cost: Cost = "channels"
    """What is counted: units, the forward pass's operations, or parameters."""
    structure_lr: float = 12e-3
    """Adam's step for the probabilities, where the optimizer's learning rate is at its highest."""
    weights: Weights = "trained"
    """Whether the weights of the drawn network are trained too, or, until it is fixed, the structure alone."""
    init: Init = "uniform"
    """What the probabilities start from: one for all, or a metric of the units (`tithe.narrow.metrics`)."""
    hold: int = 1
    """For how many steps a draw is kept; the probabilities learn in the first of them."""
    control_variate: bool = False
    """Whether the estimate is handed a forecast of the difference: then `controlled_gradient` is asked."""

    def share(self, step: int) -> float:
        """Say which share of the cost is kept after `step` finished steps; by default always `keep`."""
        return self.keep

    def gradient(self, s: Tensor, mask_0: Tensor, mask_1: Tensor, difference: float) -> Tensor:
        """Estimate the expected loss's gradient in s, (n,); by default `tithe.select.policy_gradient`.

        Args:
            s: probabilities (n,).
            mask_0: the draw that the weights were trained with, bool (n,).
            mask_1: the other draw.
            difference: loss with the first less the loss with the second, on the same batch.
        """
        return bernoulli_masks.policy_gradient(s, mask_0, mask_1, difference, 0.0)

    def controlled_gradient(
        self, s: Tensor, mask_0: Tensor, mask_1: Tensor, difference: float, control: Tensor
    ) -> Tensor:
        """Estimate the same where `control_variate` is set; by default `policy_gradient` with that control.

        Args:
            s: probabilities (n,).
            mask_0: the draw that the weights were trained with, bool (n,).
            mask_1: the other draw; it may be the same.
            difference: loss with the first less the loss with the second, on the same batch.
            control: what each unit was seen to add to the loss in earlier steps, (n,).
        """
        return bernoulli_masks.policy_gradient(s, mask_0, mask_1, difference, 0.0, control=control)

    def make_plan(self, maker: PlanMaker[Any, NarrowT, Any]) -> NarrowT:
        """Ask for a plan under which the rest does not exist."""
        return maker.narrow(self)


class CutMethod(ABC):
    """Lets channels, hidden units and heads go for good, in a few steps; what is left is always computed and trained.

    What a unit is worth follows from the weights' own gradients, so that a step costs what an ordinary one does. A
    choice is a pure function of them: nothing is drawn.

    The units of least worth go. Of fresh weights, worth only says how many units of each group go: the one of most
    worth stays, and then those whose gate gradients of the last steps are least like those of the units that stay
    already (`tithe.select.cut_order.unlike_first`). Weights that lose inputs then keep the norm with which they read.
    """

    keep: float
    """The share of the cost that is kept in the end, in (0, 1]."""
    cost: Cost = "flops"
    """What is counted: units, the forward pass's operations, or parameters."""
    floor: float = 0.0
    """No group gets below this part of the width that it would have if all were equally narrow, in [0, 1]."""
    fresh: bool = False
    """Whether training starts from fresh weights, whose units are alike at first, and whose sums get small when cut."""

    @abstractmethod
    def share(self, step: int) -> float:
        """Say which share of the cost is kept after `step` finished steps: units go in each step in which it falls.

        Below `keep` it does not fall, and where it gets there, the structure is fixed.
        """

    def accumulate(self, scores: Tensor, gates: Tensor) -> Tensor:
        """Take a step's gate gradients into the scores; by default Σ c² over the steps so far.

        Args:
            scores: float64 (n,), zero before the first step.
            gates: c_i = ∂L/∂m_i of a gate m_i = 1 on unit i's output, float64 (n,).
        """
        return scores + gates.square()

    def worth(self, scores: Tensor, prices: Tensor) -> Tensor:
        """Say what units are worth at a cut, (n,); those of least worth go; by default scores over prices.

        Args:
            scores: float64 (n,).
            prices: of each unit, in the measure of `cost`, beside neighbours as wide as they are, float64 (n,).
        """
        return scores / prices

    def make_plan(self, maker: PlanMaker[Any, NarrowT, Any]) -> NarrowT:
        """Ask for a plan under which units go for good."""
        return maker.cut(self)


class SubspaceMethod(ABC):
    """Moves all weights together, in the span of the checkpoints of a history."""

    history: History | str | Path | Sequence[str | Path]
    """The checkpoints, or where they are."""
    bits: int | None = None
    """Bits a weight of the basis: 8, 4, 1; None takes the history's."""
    granularity: Granularity = "model"
    """Whether coefficients are shared by all weights, or each weight has its own."""
    start: str | Sequence[float] = "mean"
    """Which point of the span training starts from: "mean", "last", "best", what `History.weights` knows, or the
    weight of each checkpoint."""

    def make_plan(self, maker: PlanMaker[Any, Any, SubspaceT]) -> SubspaceT:
        """Ask for a plan under which θ is shared."""
        return maker.subspace(self)


@dataclass(frozen=True)
class Spending:
    """The cost of a choice under a budget, and what it may cost.

    Args:
        spent: what it costs, in the budget's measure.
        limit: what it may cost.
        measure: "bytes", "elements" or "flops".
        channels: input channels selected.
        of_channels: there are.
        layers: layers with a selected channel.
        of_layers: layers with channels.
    """

    spent: float
    limit: float
    measure: Literal["bytes", "elements", "flops"]
    channels: int
    of_channels: int
    layers: int
    of_layers: int


@dataclass(frozen=True)
class Narrowing:
    """How narrow a network has become.

    Args:
        cost: what is counted: "channels", "flops" or "params".
        spent: the expected cost, as a share of the whole network's.
        units: that may still exist; one is a channel, a hidden unit or a head with all that belongs to it.
        weights: that are left.
        widths: group of units → how many of them exist, as an expectation.
    """

    cost: str
    spent: float
    units: int
    weights: int
    widths: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.spent:.3f} of the {self.cost}  {self.units:,} units  {self.weights:,} weights left"


def _no_tensors() -> dict[str, Tensor]:
    return {}


@dataclass
class Memory:
    """The part of a plan's choices that outlives each of them.

    Args:
        tensors: what a method remembers from one choice to the next; it is saved with the plan.
        layers: the price list of input channels, or None before it is asked for.
        max_positions: int64 (tensors,): for each tensor to choose from the values of an input channel that the choice
            was priced for, or -1 for any; None where inputs of any size are. It is saved with the plan.
    """

    tensors: dict[str, Tensor] = field(default_factory=_no_tensors)
    layers: dict[str, Layer] | None = None
    max_positions: Tensor | None = None


class SelectionContext:
    """The tensors that a method chooses from, in the model's order, with their scores and prices.

    `shapes` and `sizes` say by name what there is; `seed`, `step` and `epoch` are what a draw may depend on.

    Args:
        model: the attached model.
        bindings: the weights to choose from.
        num_parameters: floating-point parameters of the whole model.
        head: parameters trained whole, by name.
        loss: `loss(model, batch)`, or None.
        batches: the data, or None.
        seed: of the plan.
        step: finished steps; a choice is a pure function of scores, budget, seed, step and epoch.
        epoch: finished epochs.
        num_states: tensors of θ's size that the optimizer may keep, where the budget counts them.
        capacity: values that the plan's flat θ holds, or None where every choice is made to measure.
        memory: of the plan.
    """

    def __init__(
        self,
        model: nn.Module,
        bindings: Sequence[Binding],
        *,
        num_parameters: int,
        head: Mapping[str, nn.Parameter],
        loss: Loss | None,
        batches: Iterable[Any] | None,
        seed: int,
        step: int,
        epoch: int,
        num_states: int,
        capacity: int | None,
        memory: Memory,
    ) -> None:
        self._model, self._bindings, self._loss, self._batches = model, bindings, loss, batches
        self._head = head
        self.num_parameters, self.num_head = num_parameters, sum(p.numel() for p in head.values())
        self.head_bytes = sum(p.numel() * p.element_size() for p in head.values())
        self.seed, self.step, self.epoch, self.num_states, self.capacity = seed, step, epoch, num_states, capacity
        self._memory = memory
        self.shapes = {b.name: tuple(b.weight.shape) for b in bindings}
        self.sizes = {b.name: b.weight.numel() for b in bindings}

    def scores(
        self, kind: str, *, samples: int = 1024, fisher: str = "empirical", rank: int = 32, or_else: str = ""
    ) -> Iterator[tuple[str, Tensor]]:
        """Stream the name and the score of each tensor; tables of which few rows were touched come last.

        Args:
            kind: over the gradients g of single samples "fisher" (mean g²), "gradient" (|mean g|), "snr"
                (|mean g| / √(mean g²)), "saliency" (|w · mean g|); without data "magnitude" (|w|), "random" (uniform),
                "principal" (|low-rank part of w|, of `matrices` alone).
            samples: how many samples scores of gradients are taken over.
            fisher: "empirical", or for the score "fisher" also "true".
            rank: of the low-rank part.
            or_else: what could be done without gradients, as the error for scores that are all zero ends.

        Raises:
            TitheError: when there is no such score, when it needs data or a loss and there is none, when a weight gets
                no gradient from any of the data, or when every gradient is zero.
        """
        match kind:
            case "magnitude":
                return ((b.name, importance.magnitude(b.weight)) for b in self._bindings)
            case "random":
                generator = self._generator()
                return ((name, importance.random(shape, generator)) for name, shape in self.shapes.items())
            case "principal":
                return self._low_rank_parts(rank)
            case _ if kind not in STATISTICS:
                raise TitheError(
                    "scores",
                    found=f"the score {kind!r}",
                    expected="one of " + ", ".join(map(repr, (*STATISTICS, *DATA_FREE))),
                    remedy="change its name",
                )
            case _:
                pass
        if fisher == "true" and kind != "fisher":
            raise TitheError(
                "scores",
                found=f"the score {kind!r} over the model's own distribution, where the mean gradient is zero",
                expected='fisher="empirical"',
                remedy='leave fisher= out, or take the score "fisher"',
            )
        loss, batches = self.require_data(f"for the score {kind!r}", or_else=', or use score="magnitude" or "random"')
        passes = Passes(self._model, self._bindings, loss, batches, samples, fisher, self._head)
        return passes.scores(kind, or_else)

    def channel_scores(
        self, kind: str, *, samples: int = 1024, fisher: str = "empirical", rank: int = 32, or_else: str = ""
    ) -> dict[str, Tensor]:
        """Return the score of each input channel: the sum over its weights, (I,), by name, in the model's order.

        Args:
            kind: as of `scores`; "random" is one draw for each channel, times its weights.
            samples: as of `scores`.
            fisher: as of `scores`.
            rank: as of `scores`.
            or_else: as of `scores`.

        Raises:
            TitheError: as `scores`, as `layers`, or when a score is not finite.
        """
        layers = self.layers()
        if kind == "random":
            generator = self._generator()
            return {n: importance.random((v.num_channels,), generator) * v.weights for n, v in layers.items()}
        found: dict[str, Tensor] = {}
        for name, score in self.scores(kind, samples=samples, fisher=fisher, rank=rank, or_else=or_else):
            if name in layers:
                groups, transposed = layers[name].groups, layers[name].transposed
                found[name] = importance.channel_sums(check_finite(name, score), groups, transposed=transposed)
        return {name: found[name] for name in layers if name in found}

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)

    def _low_rank_parts(self, rank: int) -> Iterator[tuple[str, Tensor]]:
        generator = self._generator()
        for name, matrix in self._as_matrices():
            part = importance.principal(check_finite(name, matrix), rank, generator)
            yield name, part.view(self.shapes[name])

    def _as_matrices(self) -> Iterator[tuple[str, Tensor]]:
        kernels = {module._parameters["weight"] for module in self._model.modules() if isinstance(module, _ConvNd)}
        for binding in self._bindings:
            matrix = importance.as_matrix(binding.weight, convolution=binding.weight in kernels)
            if matrix is not None:
                yield binding.name, matrix

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name → (m, n) of each tensor that has a low-rank part: (O, I·kh·kw); biases and scales have none."""
        return {name: (matrix.shape[0], matrix.shape[1]) for name, matrix in self._as_matrices()}

    def layers(self, *, largest: bool = False) -> dict[str, Layer]:
        """Return the price list of input channels, for the shapes of the first batch or, where asked, of the largest.

        Args:
            largest: price the largest batch, and no less than the largest input that a step has met since. All of the
                data is looked through where its first batches differ in their samples' sizes.

        Raises:
            TitheError: when there is no loss or no data, or no tensor to choose from has input channels.
        """
        if self._memory.layers is None:
            loss, batches = self.require_data("to price input channels")
            batch = largest_batch(batches) if largest else next(iter(batches), None)
            if batch is not None:
                self._memory.layers = price_channels(self._model, self._bindings, loss, batch)
        if not self._memory.layers:
            raise TitheError(
                "where",
                found="no weight with input channels" if self._memory.layers is not None else "data without a batch",
                expected="weights of linear layers or convolutions, and a batch to price them for",
                remedy="widen where=, or pass data= an iterable of batches",
            )
        if not largest or self._memory.max_positions is None:
            return self._memory.layers
        seen = dict(zip(self.shapes, self._memory.max_positions.tolist(), strict=True))
        return {name: layer.for_positions(seen[name]) for name, layer in self._memory.layers.items()}

    def channel_norms(self, samples: int, *, or_else: str = "") -> dict[str, Tensor]:
        """Return Σ over batches of the norm of each input channel's gradient, by name (`tithe.scoring`).

        Args:
            samples: how many samples norms are taken over.
            or_else: what could be done without them, as the error for norms that are all zero ends.

        Raises:
            TitheError: when there is no loss or no data, or every gradient is zero.
        """
        loss, batches = self.require_data("for scores of gradients")
        return channel_norms(self._model, self._bindings, self.layers(), loss, batches, samples, or_else)

    def weight(self, name: str) -> Tensor:
        """Return the values of one tensor to choose from."""
        return next(b.weight.detach() for b in self._bindings if b.name == name)

    def selected(self, name: str) -> Tensor:
        """The flat indices of what is selected in one tensor now, sorted, int64; none before the first choice."""
        return next(b.selection.indices for b in self._bindings if b.name == name)

    def trained(self, name: str) -> Tensor:
        """Return θ of what is selected in one tensor now, in the order of `selected`; it may be wider than the weight.

        Of a weight in half precision it is the master copy, which shows what the rounded weight does not.
        """
        binding = next(b for b in self._bindings if b.name == name)
        values, selection = binding.values, binding.selection
        if values is None:
            return torch.empty(0, dtype=binding.dtype, device=binding.weight.device)
        if isinstance(selection, Coordinates):
            return values.clone()
        places = selection.gather(torch.arange(selection.num_weights, device=values.device).view(selection.shape))
        return values.reshape(-1)[places.reshape(-1).argsort()]

    def limit_inputs(self) -> None:
        """Watch, from now on, for inputs larger than those that the price list was made for."""
        layers = self.layers(largest=True)
        positions = [layers[name].positions if name in layers else -1 for name in self.shapes]
        self._memory.max_positions = torch.tensor(positions)

    def remember(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """Return what `make` returned when this key was first asked for, also after resuming."""
        if key not in self._memory.tensors:
            self._memory.tensors[key] = make()
        return self._memory.tensors[key]

    def note(self, key: str, value: Tensor) -> None:
        """Keep a tensor for the next choice, also in a run that goes on from here."""
        self._memory.tensors[key] = value

    def noted(self, key: str) -> Tensor | None:
        """What an earlier choice kept under this key."""
        return self._memory.tensors.get(key)

    def require_data(self, why: str, *, or_else: str = "") -> tuple[Loss, Iterable[Any]]:
        """Return the loss and the data of `attach`.

        Args:
            why: what they are needed for, as the error says.
            or_else: what could be done without them, as the error's remedy ends.

        Raises:
            TitheError: when one of them was not given.
        """
        if self._loss is None or self._batches is None:
            missing = " and ".join(n for n, v in (("loss", self._loss), ("data", self._batches)) if v is None)
            remedy = f"pass attach(..., loss=loss_fn, data=batches){or_else}"
            raise TitheError("attach", found=f"no {missing}", expected=f"loss= and data= {why}", remedy=remedy)
        return self._loss, self._batches


def first_batches(data: Iterator[Any], samples: int) -> list[Any]:
    """Return the batches that hold the first `samples` samples of data that can be read only once."""
    kept: list[Any] = []
    count = 0
    for batch in data:
        kept.append(batch)
        count += num_samples(batch)
        if count >= samples:
            break
    return kept


def largest_batch(data: Iterable[Any]) -> Any:
    """Return the batch with the most numbers, the first of those; None where there is no batch.

    A list is looked through; of other data only the first batches are read where all their samples are of one size.
    Such data may be dealt out in another order each time: where most batches hold as many samples, the largest sample
    may come in a batch of that many, all of its size.
    """
    found, most, seen = None, -1, 0
    longest, length = None, 0.0
    sizes: set[float] = set()
    counts: Counter[int] = Counter()
    for batch in data:
        size, count = sum(leaf.numel() for leaf in leaves(batch)), num_samples(batch)
        each = size / max(count, 1)
        if size > most:
            found, most = batch, size
        if each > length:
            longest, length = batch, each
        sizes.add(each)
        counts[count] += 1
        seen += count
        if not isinstance(data, Sequence) and seen >= (_ALIKE if len(sizes) == 1 else _MOST):
            break
    if isinstance(data, Sequence) or longest is None:
        return found
    usual, batches = counts.most_common(1)[0]
    if 2 * batches <= counts.total() or length * usual <= most:
        return found
    count = num_samples(longest)
    return take_samples(longest, [n % count for n in range(usual)])
