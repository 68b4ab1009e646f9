"""A plan under which everything exists and the unselected part is frozen at its value."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tithe import delta, distributed, ledger
from tithe.errors import TitheError, TitheWarning
from tithe.method import Memory, SelectionContext, SparseMethod, Spending, first_batches
from tithe.plan.base import Plan, Settings
from tithe.plan.mount import Mount
from tithe.plan.optimizers import check_elementwise, num_states
from tithe.plan.selected import SelectedWeights
from tithe.plan.state import Buffers, PlanState
from tithe.plan.suggested_rate import Movable, Whole, scale_of
from tithe.rules import Binding, check_holds, theta_dtype
from tithe.rules.lean.model import Lean, lean
from tithe.scoring import check_loss
from tithe.selection import Channels, Selection

_CPU = torch.device("cpu")
_LONG_EPOCH = 1000
"""Steps without an end of an epoch that are worth a warning, where the length of the data is not known."""


class SparsePlan(Plan):
    """A model of which a selected part is trained while the rest keeps its bits. Made by `attach`."""

    def __init__(self, model: nn.Module, method: SparseMethod, settings: Settings) -> None:
        super().__init__(model, settings)
        self.method, split = method, self._split
        self._warned = False
        self._num_parameters = sum(p.numel() for p in split.floats.values())
        self._buffers = Buffers(model)
        if isinstance(settings.data, Iterator) and method.needs_data:
            self._data = first_batches(settings.data, method.samples)
        for name in (*split.head, *split.candidates):
            check_holds(name, split.floats[name].dtype, settings.dtype)
        # A head in half precision has a master copy too: a θ of which every entry is selected.
        kept = {name: p for name, p in split.head.items() if theta_dtype(p.dtype, settings.dtype) != p.dtype}
        self._head = {name: p for name, p in split.head.items() if name not in kept}
        bound = {name: p for name, p in split.floats.items() if name not in self._head}
        self._mount = Mount(model, bound, self._head, settings.outside, settings.dtype)
        self._candidates = [self._mount.bindings[name] for name in split.candidates]
        self._masters = {name: self._mount.bindings[name] for name in kept}
        changes = method.reselect is not None or method.warmup > 0
        self._selected = SelectedWeights(
            self._mount, self._candidates, self._optimizers.bound, list(self._masters.values()), changes=changes
        )
        self._chosen = False
        self._memory = Memory()
        self._num_states = 2 if method.optimizer_states is None else method.optimizer_states
        self._drawn_for: Tensor | None = None  # the limits of inputs that the present choice was priced for
        self._said_exceeded = False
        self._lean: Lean | None = lean(model) if method.lean and Lean.of(model) is None else None
        for parameter in self._head.values():
            parameter.requires_grad_(True)
        self._mount.still()
        split.warn_of_new_head()

    def _notes(self) -> list[str]:
        said = self._split.say_missing_head()
        return super()._notes() + ([said] if said else [])

    def start(self) -> None:
        """Make the first choice, or only check that it can be made when the method warms up first.

        Raises:
            TitheError: as `attach`.
        """
        context = self.context()
        if self.method.needs_data:
            context.require_data(f"for {type(self.method).__name__} to choose")
        if self._selected.changes:
            with self._mount.unwatched():
                self._selected.set_capacity(self.method.num_selected(context))
        if self.method.warmup == 0:
            self.reselect()
        elif not self.head:
            raise TitheError(
                "head",
                found=f"no head, and a warm-up of {self.method.warmup} steps",
                expected="parameters to train before the choice is made",
                remedy='pass head=["classifier.*"], or warmup=0',
            )

    @property
    def selections(self) -> dict[str, Selection]:
        """Return the selection of every tensor of which something is selected, by name, the head apart."""
        return {b.name: b.selection for b in self._candidates if b.selection.size}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over what the optimizer trains: always the same parameters, however often it is chosen.

        Where the choice is made once: θ of each tensor of which something is selected, by the model's own name. Where
        it is made again: one flat θ, called "theta". Then the head's parameters.
        """
        if not self._released:
            self._mount.check()
        yield from self._selected.named_parameters()
        yield from self._trained_head().items()

    def _trained_head(self) -> dict[str, nn.Parameter]:
        """What an optimizer trains of the head, by name: the model's own parameters, or θ that is their master."""
        masters = self._masters
        return {name: masters[name].theta if name in masters else self._head[name] for name in self.head}

    def _head_weights(self) -> dict[str, nn.Parameter]:
        """The model's own parameters of the head, by name."""
        masters = self._masters
        return {name: masters[name].weight if name in masters else self._head[name] for name in self.head}

    @property
    def attached_bytes(self) -> int:
        """Bytes that the plan keeps in memory beside the weights between two steps: θ and indices."""
        theta = sum(p.nbytes for name, p in self.named_parameters() if name not in self._head)
        return theta + self.index_bytes

    def known(self) -> set[int]:
        """Return the ids of the model's parameters and of what optimizers train, without a check of the model."""
        trained = [*self._selected.named_parameters(), *self._trained_head().items()]
        return {id(p) for p in self._floats.values()} | {id(p) for _, p in trained}

    @property
    def index_bytes(self) -> int:
        """Return the bytes of the tensors that say where the selected values belong."""
        return sum(b.index_bytes for b in self._candidates)

    @property
    def warmup(self) -> int:
        """How many steps train the head alone, before the first choice is made."""
        return self.method.warmup

    def predict(self, batch: Any) -> ledger.Ledger:
        """Return the price of one forward and backward pass on `batch`; nothing of that size is allocated.

        Raises:
            TitheError: when the plan has no loss, or the model cannot run on shapes alone.
        """
        self._check_live()
        if self._loss is None:
            raise TitheError("predict", found="no loss", expected="loss= at attach", remedy="attach(..., loss=loss_fn)")
        loss = self._loss
        self._mount.follow()
        found = ledger.predict(self.model, lambda shapes: loss(self.model, shapes), batch)
        size = sum(p.nbytes for p in self.parameters() if p.requires_grad)
        return dataclasses.replace(
            found, theta=size, gradients=size, optimizer=self._num_states * size, index=self.index_bytes
        )

    def _predict_stock(self, batch: Any) -> ledger.Ledger:
        """Price the same step with all weights trained by torch's own operations."""
        loss = self._loss
        assert loss is not None
        with self._mount.stock(), ExitStack() as inside:
            for handle in Lean.all_of(self.model):
                inside.enter_context(handle.paused())
            return ledger.predict(self.model, lambda shapes: loss(self.model, shapes), batch)

    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """Run `closure` (forward, returning the loss) and backward, as often as the method needs; returns the loss.

        Raises:
            TitheError: when the loss is not a scalar that a gradient flows through.
        """
        self._check_live()
        with distributed.telling("backward"):
            loss = check_loss(closure(), finite=False)
            try:
                loss.backward()
            except RuntimeError as error:
                if self._selected.resized and "invalid gradient" in str(error):
                    raise distributed.fixed_sizes_error() from error
                raise
        return loss

    @contextmanager
    def _movable(self) -> Generator[Movable]:
        self._mount.follow()
        leaves = [parameter for parameter in self.parameters() if parameter.numel()]
        bound = [binding for binding in self._owned() if binding.selection.size]
        before = [binding.selection.gather(binding.weight.detach()) for binding in bound]
        met = [(binding, binding.seen_positions, dict(binding.outlived)) for binding in bound]
        head = Whole(self._head.values())

        def move(step: float, directions: Sequence[Tensor]) -> None:
            """Write into the weights alone: θ, its version and what has moved stay as they are."""
            along = {id(leaf): direction for leaf, direction in zip(leaves, directions, strict=True)}
            for binding in bound:
                values = binding.values
                assert values is not None
                direction = binding.part(along[id(binding.parameter)])
                binding.selection.scatter_(binding.weight.data, values + step * direction)
            head.move(step, [along[id(parameter)] for parameter in head.parameters])

        weights = [*(binding.weight for binding in bound), *head.parameters]
        scale = scale_of([*before, *head.parameters], sum(leaf.numel() for leaf in leaves))
        try:
            with self._mount.unwatched():
                yield Movable(leaves, scale, {weight.dtype for weight in weights}, move)
        finally:
            for binding, values in zip(bound, before, strict=True):
                binding.selection.scatter_(binding.weight.data, values)
            head.restore()
            for binding, positions, outlived in met:
                binding.seen_positions, binding.outlived = positions, outlived

    def check_optimizer(self, optimizer: torch.optim.Optimizer, elementwise: bool | None) -> None:
        """Refuse an optimizer that is not elementwise, or keeps more state than the method's budget charges.

        One that treats a tensor as a whole may do so where whole channels are selected once: θ is a matrix there.
        """
        matrices = not self._selected.changes and all(isinstance(s, Channels) for s in self.selections.values())
        if not elementwise and not matrices:
            check_elementwise(optimizer)
        charged, kept = self.method.optimizer_states, num_states(optimizer)
        if charged is not None and kept > charged:
            raise TitheError(
                type(optimizer).__name__,
                found=f"{kept} tensors of θ's size in its state",
                expected=f"at most {charged}, for which the budget was shared out",
                remedy=f"write {type(self.method).__name__}(…, optimizer_states={kept})",
            )
        self._num_states = kept

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Compare the model with what it was, before it is too late."""
        self._mount.check()
        if self._mount.replaced:
            self._optimizers.check_holds()

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Write what the optimizer holds of θ into the weights, whatever kernel changed it."""
        self._selected.commit({id(p) for group in optimizer.param_groups for p in group["params"]})

    def finish_step(self) -> None:
        """Count a finished step, and choose where that is due."""
        self._check_ranks()
        self._selected.check_ranks()
        self.num_steps += 1
        if not self._chosen:
            self._changed |= self.num_steps >= self.method.warmup and self.reselect()
        elif self._due(step=self.num_steps) or self._outgrown():
            self._changed |= self.reselect()
        self._warn_of_epochs()

    def _outgrown(self) -> bool:
        """Whether the choice has to be made again for larger inputs; ranks follow at their next choice, together."""
        larger = self._selected.larger and distributed.world_size() == 1
        return larger and self._follow_inputs() and self.method.reselect is not None

    def _warn_of_epochs(self) -> None:
        """Say once that the choice is to change with epochs that nobody counts."""
        reselect = self.method.reselect
        if reselect is None or reselect.unit != "epochs" or self.num_epochs or self._warned:
            return
        data: Any = self._data
        # Data to choose by may be a part of an epoch: two lengths of it are rarely passed in one.
        length = max(2 * len(data), 10) if isinstance(data, Sized) else _LONG_EPOCH
        if self.num_steps > length:
            self._warned = True
            warnings.warn(
                f"{type(self.method).__name__} chooses again every {reselect.period} epochs, and plan.end_epoch() was"
                f" not called in {self.num_steps} steps; call it after each epoch, or the first choice stays",
                TitheWarning,
                stacklevel=2,
            )

    def take_weights(self) -> None:
        """Let θ follow weights that were written, where θ was written too."""
        self._check_live()
        self._mount.take_weights()

    def _commit(self) -> bool:
        return self._selected.commit()

    def end_epoch(self) -> bool:
        """Count a finished epoch, and choose where that is due; returns whether the choice changed."""
        self._catch_up()
        self._optimizers.finish()
        self.num_epochs += 1
        return self._chosen and self._due(epoch=self.num_epochs) and self.reselect()

    def reselect(self) -> bool:
        """Choose again now: stayers keep their optimizer state, leavers drop it, entrants start at zero.

        θ keeps its identity; under a global cut its size follows the new choice. Weights that leave keep their trained
        value. Returns whether anything changed.
        """
        self._catch_up()
        self._mount.follow()
        with distributed.together(f"choosing after {self.num_steps} steps"), self._mount.unwatched():
            return self._choose_again()

    def _choose_again(self) -> bool:
        self._follow_inputs()
        limits = self._memory.max_positions
        if limits is self._drawn_for:
            return self._take(self.method.choose(self.context()))
        try:
            chosen = self.method.choose(self.context())
        except TitheError:
            chosen = {}
        if any(selection.size for selection in chosen.values()):
            return self._take(chosen)
        # The budget is too small for such inputs, which was said: it is kept for those that were priced before.
        self._memory.max_positions = self._drawn_for
        changed = self._take(self.method.choose(self.context()))
        self._selected.limit(limits)
        return changed

    def _follow_inputs(self) -> bool:
        """Price what comes for the largest input that was met; returns whether the present choice exceeds its budget.

        Warns:
            TitheWarning: the first time that it does.
        """
        limits = self._memory.max_positions
        raised = None if limits is None or not self._chosen else self._selected.outgrown(limits)
        if raised is limits or raised is None:
            return False
        self._memory.max_positions = raised
        self._selected.limit(raised)
        try:
            spending = self.spending()
        except TitheError:  # such inputs leave nothing to choose
            spent = "more bytes than there are for any choice"
        else:
            if spending is None or spending.spent <= spending.limit:
                return False
            spent = f"{spending.spent:,.0f} bytes of {spending.limit:,.0f}"
        if not self._said_exceeded:
            self._said_exceeded = True
            again = "is priced for it" if self.method.reselect is not None else "stays"
            warnings.warn(
                f"{type(self.method).__name__}: a batch was larger than those that its budget was priced for, and a "
                f"step on it takes {spent}; the next choice {again}. "
                "Put the largest batch into data= at attach.",
                TitheWarning,
                stacklevel=3,
            )
        return True

    def _take(self, chosen: Mapping[str, Selection]) -> bool:
        first, self._chosen = not self._chosen, True
        self._drawn_for = self._memory.max_positions
        return self._selected.take(chosen, self._memory.max_positions) or first

    def context(self) -> SelectionContext:
        """Return what the method is handed when it chooses now."""
        return SelectionContext(
            self.model,
            self._candidates,
            num_parameters=self._num_parameters,
            head=self._trained_head(),
            loss=self._loss,
            batches=self._data,
            seed=self.seed,
            step=self.num_steps,
            epoch=self.num_epochs,
            num_states=self.method.optimizer_states or 0,
            capacity=self._selected.capacity,
            memory=self._memory,
        )

    def spending(self) -> Spending | None:
        """Return what the present choice costs under the method's budget; None where it has none."""
        self._check_live()
        return self.method.spending(self.context(), self.selections)

    def save(self, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
        """Write what training changed, atomically: every weight ever selected, the head, and buffers that changed.

        Args:
            path: the file.
            metadata: free strings for its header, beside the method, seed and steps.

        Raises:
            TitheError: when the file cannot be written.
        """
        self._catch_up()
        self._mount.follow()
        self._selected.count()
        selections = {b.name: b.moved for b in self._candidates if b.moved.size}
        dense = {**{name: p.detach() for name, p in self._head_weights().items()}, **self._buffers.changed(self.model)}
        told = {"method": repr(self.method), "seed": str(self.seed), "steps": str(self.num_steps), **(metadata or {})}
        delta.write_delta(path, self.model, selections, dense, metadata=told)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on from here on a freshly loaded base: compact, tensors and numbers only."""
        self._catch_up()
        self._mount.follow()
        self._selected.count()
        return PlanState(
            num_steps=self.num_steps,
            num_epochs=self.num_epochs,
            seed=self.seed,
            chosen=self._chosen,
            capacity=self._selected.capacity or 0,
            selected={b.name: b.selection.to(_CPU).state() for b in self._candidates},
            moved={b.name: b.moved.to(_CPU).state() for b in self._candidates},
            values={b.name: b.moved.gather(b.weight.detach()) for b in self._candidates},
            masters={b.name: b.masters for b in self._owned() if b.masters is not None},
            head={name: p.detach().clone() for name, p in self._head_weights().items()},
            buffers=self._buffers.changed(self.model),
            memory=dict(self._memory.tensors),
            max_positions=self._memory.max_positions,
        ).as_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `plan.state_dict()`; load the optimizer's own state after it.

        Raises:
            TitheError: when the state belongs to another model, head or place; the plan is left as it was.
        """
        self._check_live()
        found = PlanState.of(state)
        if self._selected.changes != (found.capacity > 0):
            once, again = "a plan that chooses once, before the first step", "a plan that chooses while it trains"
            raise TitheError(
                type(self.method).__name__,
                found=f"the state of {once if self._selected.changes else again}",
                expected=f"that of {again if self._selected.changes else once}",
                remedy="attach with the method that it was saved with: reselect= and warmup= as they were",
            )
        head = self._head_weights()
        selected, moved = found.read({b.name: b.moved for b in self._candidates}, head)
        for binding in self._owned():
            binding.check_masters(found.masters.get(binding.name))
        self._selected.commit()
        with torch.no_grad():
            for binding in self._candidates:
                moved[binding.name].scatter_(binding.weight, found.values[binding.name].to(binding.weight.device))
            for name, value in found.head.items():
                head[name].copy_(value)
            self._buffers.write(self.model, found.buffers)
        self.num_steps, self.num_epochs, self.seed = found.num_steps, found.num_epochs, found.seed
        self._chosen = found.chosen
        self._memory.tensors, self._memory.max_positions = dict(found.memory), found.max_positions
        self._drawn_for = found.max_positions
        self._selected.set_capacity(found.capacity)
        self._selected.take(selected, self._memory.max_positions, carry=False)
        for binding in self._candidates:
            binding.moved = moved[binding.name].to(binding.weight.device)
        for binding in self._owned():
            binding.restore(found.masters.get(binding.name))

    def _owned(self) -> list[Binding]:
        """The weights that have a θ: those to choose from, and the head's with a master."""
        return [*self._candidates, *self._masters.values()]

    def _let_go(self) -> None:
        self._mount.release()
        self._split.restore_left_out()
        if self._lean is not None:
            self._lean.release()
        for name, parameter in self._head.items():
            parameter.requires_grad_(self._frozen_head[name])

    def _due(self, *, step: int | None = None, epoch: int | None = None) -> bool:
        return self.method.reselect is not None and self.method.reselect.due(step=step, epoch=epoch)
