"""A plan under which everything exists and the unselected part is frozen at its value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tithe import delta, distributed, ledger
from tithe.errors import TitheError
from tithe.method import Memory, SelectionContext, SparseMethod, Spending, first_batches
from tithe.plan.base import Plan, Settings
from tithe.plan.mount import Mount
from tithe.plan.optimizers import check_elementwise, check_holds, inner_optimizer, num_states
from tithe.plan.selected import SelectedWeights
from tithe.plan.state import Buffers, PlanState
from tithe.rules.lean.model import Lean, lean
from tithe.scoring import check_loss
from tithe.selection import Channels, Selection

_CPU = torch.device("cpu")


class SparsePlan(Plan):
    """A model of which a selected part is trained while the rest keeps its bits. Made by `attach`."""

    def __init__(self, model: nn.Module, method: SparseMethod, settings: Settings) -> None:
        super().__init__(model, settings)
        self.method, split = method, self._split
        self._num_parameters = sum(p.numel() for p in split.floats.values())
        self._buffers = Buffers(model)
        if isinstance(settings.data, Iterator) and method.needs_data:
            self._data = first_batches(settings.data, method.samples)
        bound = {name: p for name, p in split.floats.items() if name not in split.head}
        self._mount = Mount(model, bound)
        self._candidates = [self._mount.bindings[name] for name in split.candidates]
        changes = method.reselect is not None or method.warmup > 0
        self._selected = SelectedWeights(self._mount, self._candidates, changes=changes)
        self._handles: list[Any] = []
        self._chosen = False
        self._committed = False  # whether a bound optimizer's step has written θ since the last `step`
        self._memory, self._num_states = Memory(), 0
        self._lean: Lean | None = lean(model) if method.lean and Lean.of(model) is None else None
        for parameter in self._head.values():
            parameter.requires_grad_(True)
        self._mount.still()

    def start(self) -> None:
        """Make the first choice, or only check that it can be made when the method warms up first.

        Raises:
            TitheError: as `attach`.
        """
        context = self.context()
        if self.method.needs_data:
            context.require_data(f"for {type(self.method).__name__} to choose")
        if self._selected.changes:
            self._selected.set_capacity(self.method.num_selected(context))
        if self.method.warmup == 0:
            self.reselect()
        elif not self._head:
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

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over what the optimizer trains: θ of each selected tensor, then the head's parameters."""
        self._link()
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over the same with the model's own names; tensors chosen later are there, still empty."""
        changes = self.method.reselect is not None or self.method.charges_state or not self._chosen
        for binding in self._candidates:
            if binding.selection.size or changes:
                yield binding.name, binding.theta
        yield from self._head.items()

    @property
    def index_bytes(self) -> int:
        """Return the bytes of the tensors that say where the selected values belong."""
        return sum(b.index_bytes for b in self._candidates)

    @property
    def attached_bytes(self) -> int:
        """Bytes that the plan keeps in memory beside the weights between two steps: θ, its unused slots, indices."""
        return super().attached_bytes + self._selected.unused_bytes

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
        grads = [(binding.theta, binding.theta.grad) for binding in self._candidates]
        try:
            found = ledger.predict(self.model, lambda shapes: loss(self.model, shapes), batch)
        finally:
            # The parts of a flat θ are no parameters of the model. One that kept a predicted gradient would not look
            # cleared, and the next backward would add to what the last one left.
            for theta, grad in grads:
                theta.grad = grad
        trained = [p for p in self.parameters() if p.requires_grad]
        size = sum(p.numel() * p.element_size() for p in trained)
        held = size + self._selected.unused_bytes
        states = self._num_states if self._selected.optimizers else 2
        return dataclasses.replace(found, theta=held, gradients=held, optimizer=states * size, index=self.index_bytes)

    def _predict_stock(self, batch: Any) -> ledger.Ledger:
        """Price the same step with all weights trained by torch's own operations."""
        loss = self._loss
        assert loss is not None
        handle = Lean.of(self.model)
        with self._mount.stock(), handle.paused() if handle is not None else nullcontext():
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

    def bind(self, optimizer: torch.optim.Optimizer, *, elementwise: bool | None = None) -> None:
        """Commit θ into the weights after each `optimizer.step()`, and carry its state when the choice changes.

        Args:
            optimizer: any elementwise optimizer over `plan.parameters()`, unmodified.
            elementwise: None tries it out on a few numbers; True takes your word for it.

        Raises:
            TitheError: when the optimizer lacks a parameter of the plan, or treats a tensor as a whole (Adafactor,
                Muon, LARS, L-BFGS …), which means nothing on a flat list of single weights.
        """
        self._check_live()
        optimizer = inner_optimizer(optimizer)
        check_holds(optimizer, self.named_parameters())
        if not elementwise and not all(isinstance(s, Channels) for s in self.selections.values()):
            check_elementwise(optimizer)
        self._selected.optimizers.append(optimizer)
        self._charge(num_states(optimizer))
        self._handles.append(optimizer.register_step_pre_hook(self._link))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def step(self) -> bool:
        """Count a finished step, commit, and choose where that is due; returns whether the choice changed."""
        self._check_live()
        if not self._committed:
            self._selected.commit()
        self._committed = False
        self.num_steps += 1
        if not self._chosen:
            return self.num_steps >= self.method.warmup and self.reselect()
        return self._due(step=self.num_steps) and self.reselect()

    def end_epoch(self) -> bool:
        """Count a finished epoch, and choose where that is due; returns whether the choice changed."""
        self._check_live()
        self.num_epochs += 1
        return self._chosen and self._due(epoch=self.num_epochs) and self.reselect()

    def reselect(self) -> bool:
        """Choose again now: stayers keep their optimizer state, leavers drop it, entrants start at zero.

        θ keeps its identity; under a global cut its size follows the new choice. Weights that leave keep their trained
        value. Returns whether anything changed.
        """
        self._check_live()
        self._selected.commit()
        with distributed.together(f"choosing after {self.num_steps} steps"):
            return self._take(self.method.choose(self.context()))

    def _take(self, chosen: Mapping[str, Selection]) -> bool:
        first, self._chosen = not self._chosen, True
        return self._selected.take(chosen, self._memory.max_positions) or first

    def context(self) -> SelectionContext:
        """Return what the method is handed when it chooses now."""
        return SelectionContext(
            self.model,
            self._candidates,
            num_parameters=self._num_parameters,
            head=self._head,
            loss=self._loss,
            batches=self._data,
            seed=self.seed,
            step=self.num_steps,
            epoch=self.num_epochs,
            num_states=self._num_states,
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
        self._check_live()
        self._selected.commit()
        selections = {b.name: b.moved for b in self._candidates if b.moved.size}
        dense = {**{name: p.detach() for name, p in self._head.items()}, **self._buffers.changed(self.model)}
        told = {"method": repr(self.method), "seed": str(self.seed), "steps": str(self.num_steps), **(metadata or {})}
        delta.write_delta(path, self.model, selections, dense, metadata=told)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on from here on a freshly loaded base: compact, tensors and numbers only."""
        self._check_live()
        self._selected.commit()
        return PlanState(
            num_steps=self.num_steps,
            num_epochs=self.num_epochs,
            seed=self.seed,
            chosen=self._chosen,
            capacity=self._selected.capacity or 0,
            num_states=self._num_states,
            selected={b.name: b.selection.to(_CPU).state() for b in self._candidates},
            moved={b.name: b.moved.to(_CPU).state() for b in self._candidates},
            values={b.name: b.moved.gather(b.weight.detach()) for b in self._candidates},
            head={name: p.detach().clone() for name, p in self._head.items()},
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
        selected, moved = found.read({b.name: b.moved for b in self._candidates}, self._head)
        self._selected.commit()
        with torch.no_grad():
            for binding in self._candidates:
                moved[binding.name].scatter_(binding.weight, found.values[binding.name].to(binding.weight.device))
            for name, value in found.head.items():
                self._head[name].copy_(value)
            self._buffers.write(self.model, found.buffers)
        self.num_steps, self.num_epochs, self.seed = found.num_steps, found.num_epochs, found.seed
        self._chosen, self._num_states = found.chosen, found.num_states
        self._memory.tensors, self._memory.max_positions = dict(found.memory), found.max_positions
        self._selected.set_capacity(found.capacity)
        self._selected.take(selected, self._memory.max_positions)
        for binding in self._candidates:
            binding.refresh()
            binding.moved = moved[binding.name].to(binding.weight.device)

    def release(self) -> None:
        """Give the model back: trained values stay, no attribute, hook or flag does. A second call does nothing."""
        if self._released:
            return
        self._leave_ranks()
        self._selected.commit()
        for handle in self._handles:
            handle.remove()
        self._mount.release()
        if self._lean is not None:
            self._lean.release()
        for name, parameter in self._head.items():
            parameter.requires_grad_(self._frozen_head[name])
        self._released = True

    def _due(self, *, step: int | None = None, epoch: int | None = None) -> bool:
        return self.method.reselect is not None and self.method.reselect.due(step=step, epoch=epoch)

    def _charge(self, states: int) -> None:
        """Choose again within the budget when the optimizer's state leaves less of it."""
        if states == self._num_states or not self.method.charges_state:
            self._num_states = states
            return
        self._num_states = states
        self._selected.commit()
        context = self.context()
        size = self.method.num_selected(context)
        context.capacity = None if context.capacity is None else size
        chosen = self.method.choose(context)  # before the capacity is another, while the present choice still runs
        self._selected.set_capacity(size)
        self._take(chosen)

    def _link(self, *_: Any) -> None:
        self._selected.link()

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._selected.commit()
        self._committed = True
        self._check_ranks()
        self._selected.check_ranks()
