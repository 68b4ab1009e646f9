"""What every plan offers, whatever the unselected part of the network does meanwhile."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tithe import distributed
from tithe.errors import TitheError
from tithe.forward import RandomStates
from tithe.ledger import Ledger, human
from tithe.method import Narrowing, Spending
from tithe.plan.parameters import check_recorded, split_parameters
from tithe.plan.suggested_rate import Movable, Whole, in_steps, suggest_rate
from tithe.plan.watch import BeforeForward, Optimizers
from tithe.scoring import Loss
from tithe.selection import Coordinates, Selection


class RankChecks(Protocol):
    """Looks whether ranks still agree; see `tithe.plan.ranks.Ranks`."""

    def after_step(self, named: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """Check after an optimizer's step; `named` gives what was trained."""

    def close(self) -> None:
        """Take off what looks at the model."""


@dataclass(frozen=True)
class Settings:
    """The arguments of `attach` besides the model and the method, and the modules outside that hold its weights."""

    loss: Loss | None = None
    data: Iterable[Any] | None = None
    where: str | Sequence[str] = "*"
    head: str | Sequence[str] = ()
    seed: int = 0
    outside: Sequence[nn.Module] = ()
    dtype: torch.dtype | None = None


class Plan(ABC):
    """A model of which a selected part is trained. Made by `attach`.

    A training loop asks a plan what it needs, never which plan it is: `needs_backward`, `averages_gradients`,
    `warmup`, `settled`, `narrowing`, `spending`, `attached_bytes`.

    Args:
        model: the model.
        settings: of `attach`.
        frozen: whether the weights to choose from stay as they are.
    """

    method: Any
    """The method that asked for the plan, of the contract that belongs to the plan's kind."""
    averages_gradients: ClassVar[bool] = False
    """Whether `plan.backward` averages over ranks itself, so that the model is not to be wrapped."""
    shares_work: ClassVar[bool] = False
    """Whether the ranks there are when attaching share something out."""
    ranks: RankChecks | None = None
    """What `attach` looks at the ranks with: told after each step, closed by `release`."""

    def __init__(self, model: nn.Module, settings: Settings, *, frozen: bool = False) -> None:
        self.model, self.seed = model, settings.seed
        self._loss, self._data = settings.loss, settings.data
        self._split = split_parameters(model, where=settings.where, head=settings.head, frozen=frozen)
        self._alias, self._floats, self._head = self._split.alias, self._split.floats, self._split.head
        self._frozen_head = {name: p.requires_grad for name, p in self._head.items()}
        self.num_steps = self.num_epochs = 0
        self._released = self._changed = self._forward_began = False
        self._optimizers = Optimizers(self)
        self._watching: Any = None

    def __repr__(self) -> str:
        trained = sum(parameter.numel() for parameter in self.parameters())
        total = sum(parameter.numel() for parameter in self._floats.values())
        head = sum(parameter.numel() for parameter in self._split.head.values())
        of_head = f", {head:,} of them the head" if head else ""
        return (
            f"{type(self).__name__} of {type(self.model).__name__} by {type(self.method).__name__}:"
            f" trains {trained:,} of {total:,} parameters ({trained / total:.2%}){of_head}"
        )

    def __str__(self) -> str:
        """Say what is trained, what a step keeps for backward, and what full training would keep.

        The bytes are predicted on the shapes of the first batch of `data`. They are left out where the plan has no
        loss or data, or the model cannot run on shapes alone. Random states stay as they were.
        """
        if self._released:
            return f"{type(self).__name__} of {type(self.model).__name__}, released"
        states = RandomStates()
        try:
            prices = self._prices()
        finally:
            states.restore()
        return "\n".join([repr(self), *(f"  {note}" for note in self._notes()), *prices])

    def _notes(self) -> list[str]:
        """Return sentences about what is not trained, for `print(plan)`."""
        said = self._split.say_left_out()
        return [said] if said else []

    def _prices(self) -> list[str]:
        if self._loss is None or self._data is None or isinstance(self._data, Iterator):
            return []
        batch = next(iter(self._data), None)
        if batch is None:
            return []
        try:
            found, stock = self.predict(batch), self._predict_stock(batch)
        except TitheError:
            return []
        against = "" if stock is None else f"; full training keeps {human(stock.kept)}"
        state = human(found.gradients + found.optimizer)
        return [
            f"  keeps {human(found.kept)} for backward in a step on the first batch{against}",
            f"  gradients and optimizer state take {state}",
        ]

    def _predict_stock(self, batch: Any) -> Ledger | None:
        """Price the same step with all weights trained by torch's own operations; None where the plan cannot tell."""
        return None

    def set_aside(self) -> None:
        """Freeze the weights that no plan can select from until `release`, and name them once.

        Warns:
            TitheWarning: when there are any.
        """
        self._split.freeze_left_out()

    def watch(self) -> None:
        """Follow the model and whatever optimizer trains it from now on."""
        before = BeforeForward(self._before_forward)  # first of all: a state is loaded before the weights are compared
        self._watching = self.model.register_forward_pre_hook(before, prepend=True)
        self._optimizers.start()

    def start(self) -> None:
        """Make the first choice, where there is no earlier state to go on from.

        Raises:
            TitheError: as `attach`.
        """
        self._check_live()

    @property
    def needs_backward(self) -> bool:
        """Return whether a step has to go through `plan.backward`: the method needs more than one forward pass."""
        return False

    @property
    def released(self) -> bool:
        """Return whether `release` was called."""
        return self._released

    @property
    def head(self) -> tuple[str, ...]:
        """Return the names of the parameters that are trained whole."""
        return tuple(self._split.head)

    @property
    @abstractmethod
    def selections(self) -> dict[str, Selection]:
        """Return the selection of every tensor of which something is selected, by name, the head apart."""

    def selected(self, name: str) -> Tensor:
        """Return the sorted flat int64 indices of the selected entries of `name`; empty where it is frozen.

        Raises:
            TitheError: when the model has no floating-point parameter of that name, or it belongs to the head.
        """
        origin = self._alias.get(name, name)
        if origin not in self._floats or origin in self._split.head:
            raise TitheError(
                name,
                found="the head" if origin in self._split.head else "no such parameter",
                expected="a floating-point parameter outside the head",
                remedy="use a name of model.named_parameters()",
            )
        nothing = Coordinates.nothing(tuple(self._floats[origin].shape))
        return self.selections.get(origin, nothing).indices

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over what the optimizer trains: θ of each selected tensor, then the head's parameters."""
        return (parameter for _, parameter in self.named_parameters())

    @abstractmethod
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over the same with the model's own names; tensors chosen later are there, still empty."""

    @property
    @abstractmethod
    def index_bytes(self) -> int:
        """Return the bytes of the tensors that say where the selected values belong."""

    @property
    def attached_bytes(self) -> int:
        """Bytes that the plan keeps in memory beside the weights between two steps: θ and indices."""
        theta = sum(p.nbytes for name, p in self.named_parameters() if name not in self._head)
        return theta + self.index_bytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes of a mapped file that each step reads."""
        return 0

    @property
    def warmup(self) -> int:
        """How many steps train the head alone, before anything else is."""
        return 0

    def train_mode(self) -> None:
        """Put the model in training mode; norms that are not trained keep their statistics."""
        self.model.train()
        moving = self._moving_whole()
        if moving is None:
            return
        names = set(moving)
        for path, module in self.model.named_modules():
            own = {f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
            if isinstance(module, _NormBase) and own and not own & names:
                module.eval()

    def _moving_whole(self) -> Iterable[str] | None:
        """Names of the weights that move whole; None where the plan itself sees to the norms of what is frozen."""
        return None

    @abstractmethod
    def predict(self, batch: Any) -> Ledger:
        """Return the price of one forward and backward pass on `batch`; nothing of that size is allocated.

        Raises:
            TitheError: when the plan has no loss, or the model cannot run on shapes alone.
        """

    def suggest_lr(self, batch: Any, *more: Any, accumulate: int = 1) -> float:
        """Return a learning rate for an Adam-like optimizer, from what it would train now, the head included.

            g_b = ∇L_b(θ)    s_b = sign g_b    c_b = s_bᵀ H_b s_b ≈ (∇L_b(θ + ε s_b) − g_b) · s_b / ε
            η = Σ|mean g_b| / mean c_b

        Adam, AdamW and their like move each value by about the learning rate: the first step is −η s, and by the
        second derivatives of one batch's loss this η lowers it most. Of several batches, the slope is that of the mean
        gradient, which they agree on; the curvature is what steps along the signs of a single one meet. A mask of large
        curvature therefore gets a small rate, one drawn at random a large one. It is meant as the highest rate of a
        schedule that decays to zero. It says nothing of SGD, whose rate has another unit.

        Of one batch its noise passes for slope, and the rate is larger. Give a few as large as those of training: four
        gave the rates of the table in docs/benchmarks/rates.md.

        Where the loss does not curve upwards at θ, or so little that it would have to fall below zero, the curvature is
        that over the distance 2 L / Σ|g| along −s, beyond which no parabola above zero has its minimum; this distance
        is the most that it gives, unless the loss is negative there, and what it gives without any curvature.

        It costs two forward and backward passes of each batch, in such a case four, in training mode and with the same
        random draws. Weights, gradients, buffers, random states, optimizers and the plan stay as they were, bit by bit.
        On several ranks all of them call it, each with its own batches, and get the same rate. Under a method that
        draws networks it is the rate of the network that is drawn now; while a warm-up trains the head alone, that of
        the head: call it again when the choice is made.

        Args:
            batch: training data as the `loss=` of `attach` takes it. Call it under the autocast of training, if there
                is one.
            more: further batches, as many on each rank; memory is that of one.
            accumulate: how many of them, one after the other, make a step's gradient, which is the mean of theirs: the
                micro-batches of gradient accumulation.

        Returns:
            The rate: by how much a value of θ moves in a step, in the unit of the weights.

        Raises:
            TitheError: when the plan has no loss or trains nothing now, loss or gradient is not finite, the gradient is
                zero, the loss is negative and linear along its signs, so that nothing bounds a step, or the batches are
                no multiple of `accumulate`.

        References:
            The minimum of the quadratic model of the loss along the first step of Adam (Kingma and Ba, "Adam", ICLR
            2015, algorithm 1). That sparse masks need rates which follow their curvature: Xu and Zhang, "Random
            Masking", ICML 2024.

            Deviations: Hs is a forward difference, with ε = √(precision) · ‖w‖ / √(values of θ), where w is what is
            selected, in a span all weights, and the precision that of the coarsest numbers between θ and the loss. Lean
            layers keep nothing in codes meanwhile.
        """
        self._check_live()
        if self._loss is None:
            raise TitheError(
                "suggest_lr", found="no loss", expected="loss= at attach", remedy="attach(..., loss=loss_fn)"
            )
        check_recorded("suggest_lr")
        losses = in_steps([partial(self._loss, self.model, one) for one in (batch, *more)], accumulate)
        self._catch_up()
        self._optimizers.finish()  # as the forward passes would, in the middle
        began = self._forward_began
        with distributed.together(f"suggest_lr after {self.num_steps} steps"):
            try:
                with self._movable() as movable:
                    return suggest_rate(self.model, movable, losses)
            finally:
                self._forward_began = began

    def _movable(self) -> AbstractContextManager[Movable]:
        """Make what an optimizer moves ready for a trial, inside; afterwards the network has θ again, bit by bit."""
        return Whole(self.parameters()).movable()

    @abstractmethod
    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """Run `closure` (forward, returning the loss) and backward, as often as the method needs; returns the loss.

        Raises:
            TitheError: when the loss is not a scalar that a gradient flows through.
        """

    def bind(self, optimizer: torch.optim.Optimizer, *, elementwise: bool | None = None) -> None:
        """Check an optimizer now, rather than at its first step; from then on the plan follows it either way.

        After each step of it θ is in the weights, and the step is counted. Its state follows a new choice, and its
        `state_dict()` holds the plan's state too: loading that into a bound optimizer, or binding one that has loaded
        it, goes on from there.

        Args:
            optimizer: any elementwise optimizer over `plan.parameters()`, unmodified.
            elementwise: None tries it out on a few numbers; True takes your word for it.

        Raises:
            TitheError: when the optimizer lacks a parameter of the plan, or treats a tensor as a whole (Adafactor,
                Muon, LARS, L-BFGS …), which means nothing on a part of a tensor.
        """
        self._check_live()
        self._optimizers.bind(optimizer, elementwise=elementwise)

    def step(self) -> bool:
        """Return whether the choice changed in the step that ended; a loop may leave this call out.

        Steps are counted by the optimizer's own. Where there is no torch optimizer, or its step is compiled so that
        torch calls no hook, this call counts the updates.
        """
        self._check_live()
        self._optimizers.finish()
        if not self._optimizers.seen:
            self._search_optimizers()
            updated = self._commit()
            if updated or not self._optimizers.bound:
                self.finish_step()
        changed, self._changed = self._changed, False
        return changed

    def _search_optimizers(self) -> None:
        """Look among the objects of this process for the optimizers of a loop that bound none."""
        self._optimizers.search()

    def take_weights(self) -> None:  # noqa: B027 - where θ is the weights, or a span's, there is nothing to do
        """Let θ follow weights that were written, where θ was written too: an average of all parameters writes both.

        Of a θ that was chosen again in the meantime an average means nothing; that of the weights does.
        """

    def _commit(self) -> bool:
        """Write into the weights what an optimizer made of θ; returns whether θ had changed."""
        return False

    def finish_step(self) -> None:
        """Count a step in which every optimizer had its turn, and choose where that is due."""
        self.num_steps += 1

    def known(self) -> set[int]:
        """Return the ids of the model's parameters and of what optimizers train, without a check of the model."""
        return {id(p) for p in self._floats.values()} | {id(p) for p in self.parameters()}

    def check_optimizer(  # noqa: B027 - a plan may have nothing to check
        self, optimizer: torch.optim.Optimizer, elementwise: bool | None
    ) -> None:
        """Refuse an optimizer that the plan cannot be trained with; see `bind`."""

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Get ready for an optimizer's step.

        Raises:
            TitheError: when the step would not train what the plan trains.
        """

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Take over what an optimizer's step changed."""

    def _before_forward(self) -> None:
        """Before the first forward pass that makes gradients: an optimizer may have loaded the plan's state."""
        if torch.is_grad_enabled():
            self._optimizers.finish()
        if not self._forward_began and torch.is_grad_enabled() and self.model.training:
            self._forward_began = True
            self._optimizers.search(loaded=True)

    @abstractmethod
    def end_epoch(self) -> bool:
        """Count a finished epoch, and choose where that is due; returns whether the choice changed."""

    @abstractmethod
    def reselect(self) -> bool:
        """Choose again now; returns whether anything changed."""

    @property
    def settled(self) -> bool:
        """Return whether the structure of the network is fixed: always, where everything exists."""
        return True

    def settle(self, batches: Iterable[Any] | None = None, *, draws: int = 10) -> float | None:
        """Fix the structure, and train its weights alone from now on; returns its loss, or None where it is fixed."""
        return None

    def narrowing(self) -> Narrowing | None:
        """Say how narrow the network is now; None where everything exists."""
        return None

    def widths(self) -> dict[str, dict[str, int]] | None:
        """Module path → attribute → number, of every number that follows a width; None where all widths are full."""
        return None

    def refresh_statistics(self, batches: Iterable[Any] | None = None) -> int:
        """Estimate running statistics anew where weights were averaged; returns how many batches that took.

        Elsewhere training keeps them up, and nothing is done.
        """
        return 0

    def spending(self) -> Spending | None:
        """Return what the present choice costs under the method's budget; None where it has none."""
        return None

    def structure_parameters(self) -> list[nn.Parameter]:
        """Return the probabilities of what may be absent, one tensor a group; none where everything exists."""
        return []

    def export(self, example: Any = None) -> nn.Module:
        """Return the narrow network as a plain module, where a plan has one.

        Raises:
            TitheError: when everything exists: the model itself is the network.
        """
        raise TitheError(
            "export",
            found="a plan under which every channel exists",
            expected="one under which some are absent",
            remedy="call plan.release(): the model is then plain, with the trained weights",
        )

    @abstractmethod
    def save(self, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
        """Write what is shipped, atomically; `tithe.apply` puts it onto a freshly loaded base.

        Args:
            path: the file.
            metadata: free strings for its header, beside the method, seed and steps.

        Raises:
            TitheError: when the file cannot be written.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on from here on a freshly loaded base: compact, tensors and numbers only."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `plan.state_dict()`; load the optimizer's own state after it.

        Raises:
            TitheError: when the state belongs to another model, head or place; the plan is left as it was.
        """

    def release(self) -> None:
        """Give the model back: trained values stay, no attribute, hook or flag does. A second call does nothing."""
        if self._released:
            return
        self._leave_ranks()
        self._let_go()
        self._optimizers.stop()
        if self._watching is not None:
            self._watching.remove()
        self._released = True

    @abstractmethod
    def _let_go(self) -> None:
        """Commit, and take everything off the model."""

    def _check_ranks(self, named: Callable[[], Iterable[tuple[str, Tensor]]] | None = None) -> None:
        """Have it checked after an optimizer's step that ranks still agree.

        Args:
            named: gives what has to be the same; the default is what is trained.
        """
        if self.ranks is not None:
            self.ranks.after_step(named or self.named_parameters)

    def _leave_ranks(self) -> None:
        if self.ranks is not None:
            self.ranks.close()

    def _catch_up(self) -> None:
        """Before the plan's state is read or counted: an optimizer that has not stepped yet may have loaded another."""
        self._check_live()
        if self._watching is not None and not self._forward_began:
            self._optimizers.search(loaded=True)

    def _check_live(self) -> None:
        if self._released:
            raise TitheError("plan", found="a released plan", expected="an attached one", remedy="attach again")
