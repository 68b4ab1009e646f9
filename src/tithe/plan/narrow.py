"""A plan under which the unselected part does not exist: every step trains a narrow network.

drawn: another network in each step, which `plan.backward` runs

step k ──> draw m_0, m_1 ~ s ──> loss of m_1, no gradient ──┐
                   │                                        ├─ (L_0 − L_1) ──> s ──> projected onto what is kept
                   └──> loss of m_0 and its gradient ───────┘
                             └──> θ.grad, of the live part ──> any torch.optim ──> the live part of the weights
epoch's end: what has probability 0 is dropped for good, weights and optimizer state with it

cut: all that is left, by an ordinary loop; the model's own parameters are θ

step k ──> any forward, any backward ──> gate gradients ──> scores      any torch.optim ──> all of the weights
at a cut:  what is worth least is dropped for good, weights, gradients and optimizer state with it
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tithe import delta, distributed, ledger
from tithe.coupling import Coupling
from tithe.errors import TitheError
from tithe.forward import estimate_statistics, tracked, training
from tithe.method import CutMethod, Narrowing, NarrowMethod
from tithe.narrow import (
    InferenceNetwork,
    LiveWeights,
    Stage,
    Structure,
    check_same_loss,
    check_state_shapes,
    copy_module,
    gate_gradients,
    gates_of_step,
    loss_without_gradient,
    make_stage,
    pick_best,
    shrink_parameter,
    sum_losses,
)
from tithe.narrow.state import FORMAT, check_state
from tithe.plan.base import Plan, Settings
from tithe.plan.follow import check_same, held_parameters
from tithe.plan.frozen import loss_of_frozen, loss_without_trace
from tithe.plan.optimizers import check_elementwise, num_states
from tithe.plan.rank_means import agreed_stage, mean_gradients, mean_statistics, summed_metric
from tithe.plan.suggested_rate import Movable, movable_network
from tithe.plan.ties import check_untied
from tithe.plan.watch import clear, loss_scale
from tithe.rules.lean.model import Lean
from tithe.scoring import check_loss
from tithe.selection import Grid, Selection


class NarrowPlan(Plan):
    """A model of which a drawn part exists and is trained in each step. Made by `attach`."""

    averages_gradients = True

    def __init__(
        self,
        model: nn.Module,
        method: NarrowMethod | CutMethod,
        settings: Settings,
        structure: Callable[[Coupling], Structure],
        *,
        frozen: bool = False,
    ) -> None:
        super().__init__(model, settings, frozen=frozen)
        self._frozen = frozen
        self.method, split = method, self._split
        loss, data = settings.loss, settings.data
        if loss is None or data is None:
            missing = " and ".join(n for n, v in (("loss", loss), ("data", data)) if v is None)
            raise TitheError(
                "attach",
                found=f"no {missing}",
                expected="loss= and data= to run the model once, which tells what channels belong together",
                remedy="pass attach(..., loss=loss_fn, data=batches)",
            )
        self._loss, self._data = loss, list(itertools.islice(data, 1)) if isinstance(data, Iterator) else data
        self._split.check_memory("may become narrow")
        trained = {name: p for name, p in split.candidates.items() if p.requires_grad} | split.head
        where = "such a plan trains the model's own tensors as they are"
        split.check_own_dtype(settings.dtype, trained, where)
        if settings.dtype is None:
            split.warn_of_half(trained, where, ", or write dtype={} to have it so")
        check_untied(model, settings.outside, "may become narrow")
        batch = next(iter(self._data), None)
        stage, self._inputs = make_stage(model, loss, batch, list(split.candidates), where=settings.where)
        self.stage = agreed_stage(stage)
        self.structure = structure(self.stage.coupling)
        self._alive = torch.ones(self.stage.coupling.num_units, dtype=torch.bool)
        self._settled = self.structure.fixed
        self._difference: float | None = None
        self._loss_scale = 1.0
        self._held = held_parameters(model)
        self._checked = self._ran = False
        for parameter in split.head.values():
            parameter.requires_grad_(True)
        drawn = self.stage.tensors if self.structure.draws else ()
        narrow = {name: split.floats[name] for name in drawn if name in split.floats}
        self._parts = LiveWeights(narrow)
        whole = {name: p for name, p in split.candidates.items() if name not in narrow and p.requires_grad}
        self._still = whole if frozen else {}
        self._freeze()
        self._age = 0
        self._gates: Tensor | None = None
        self._heard: dict[int, Tensor] = {}
        self._laid_out: Stage | None = None
        self._inference = InferenceNetwork(self.stage, self.structure)
        self._inference.hook()
        self._draw()

    @property
    def needs_backward(self) -> bool:
        """Return whether a step has to go through `plan.backward`: two drawn networks are compared."""
        return self.structure.draws

    @property
    def _searching(self) -> bool:
        """Whether the structure alone is learned, of weights that are frozen until it is fixed."""
        return self._frozen and not self._settled

    def _freeze(self) -> None:
        """Keep gradients from the weights that are always whole while the structure alone is learned."""
        for parameter in self._still.values():
            parameter.requires_grad_(not self._searching)

    def _notes(self) -> list[str]:
        return [*super()._notes(), *["the weights are frozen until plan.settle()"] * self._searching]

    def start(self) -> None:
        """Let the probabilities start from the method's metric of the units, over the data.

        Raises:
            TitheError: as `tithe.narrow.metrics.unit_metric`.
        """
        super().start()
        if self.structure.init != "uniform":
            metric = summed_metric(self.structure.init, self.stage, self._loss, self._data)
            self.structure.start_from(metric, between=self.structure.init != "wanda")
            self._draw()

    # ------------------------------------------------------------------------------------------------ what is trained

    @property
    def selections(self) -> dict[str, Selection]:
        """Return what of each tensor exists in the present step; all of what nothing can be absent from."""
        found: dict[str, Selection] = {}
        for name, parameter in self.named_parameters():
            if name not in self._head:
                found[name] = self._fit.grids.get(name, Grid(tuple(parameter.shape), {}))
        return found

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over what the optimizer trains, by the model's own names; whole tensors are the model's own."""
        for name, parameter in self._floats.items():
            part = self._parts.get(name)
            if part is not None and part.trained:
                yield name, part.theta
            elif part is None and (parameter.requires_grad or name in self._still):
                yield name, parameter

    def structure_parameters(self) -> list[nn.Parameter]:
        """Return the probability of each unit, one CPU tensor a group, which the plan itself trains; none of cuts."""
        return self.structure.by_group()

    @property
    def index_bytes(self) -> int:
        """Return the bytes of the maps from positions to units."""
        return sum(axis.nbytes for axis in self.stage.coupling.axes)

    @property
    def attached_bytes(self) -> int:
        """Bytes of the maps and of probabilities or scores: between steps θ is the weights' own memory."""
        return self.index_bytes + self.structure.nbytes

    def narrowing(self) -> Narrowing:
        """Say how narrow the network is now."""
        return Narrowing(
            cost=self.method.cost,
            spent=self.structure.spent(),
            units=self.structure.num_units,
            weights=sum(parameter.numel() for parameter in self.model.parameters()),
            widths={name: round(width, 2) for name, width in self.structure.widths().items()},
        )

    def widths(self) -> dict[str, dict[str, int]]:
        """Module path → attribute → number, of every number that follows a width."""
        return self.stage.numbers(self.model)

    # --------------------------------------------------------------------------------------------------------- a step

    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """Run `closure` on two drawn networks, and backward on the first; returns its loss.

        The second has no gradient, the same random draws (dropout, augmentation), and leaves running statistics alone.
        Where both draws are the same network it is left out, and in all but the first step in which draws are held.
        While weights are frozen the first has no gradient either, or none but the head's.
        Under cuts there is one network and one forward pass, which an ordinary loop does as well; on several ranks
        gradients are averaged here.

        Raises:
            TitheError: when the loss is not a scalar that a gradient flows through, or is not the same twice.
        """
        self._check_live()
        check_same(self._held)
        self._before_forward()  # in the narrow network it is too late to load a state
        if self._parts.received and all(parameter.grad is None for parameter in self.parameters()):
            self._difference = None  # cleared without a step, as after an overflow: the sum of losses starts anew
        other = None
        place = f"backward of step {self.num_steps + 1}"
        with distributed.telling(place):
            if self._age == 0 and not torch.equal(*self._masks):
                other = loss_without_gradient(self.stage, self._masks[1], closure, twice=not self._checked)
                self._checked = True
            if self._searching:
                loss = loss_of_frozen(self.stage, self._fit, closure, list(self._split.head.values()))
            else:
                loss = self._loss_and_gradient(closure)
            self._ran = True
            reached = list(self.parameters() if not self._searching else self._split.head.values())
            if reached:
                mean_gradients(place, reached, tracked(self.model))  # ranks draw the same network
        if self._settled:
            return loss
        if self._age == 0 and (other is not None or self.structure.control is not None):
            self._difference = (self._difference or 0.0) + (0.0 if other is None else float(loss.detach()) - other)
        self._gates = self._gate_gradients()
        return loss

    def _loss_and_gradient(self, closure: Callable[[], Tensor]) -> Tensor:
        live = self._parts.open(self.stage, self._fit)
        with self.stage.run(self._fit.read, live):
            loss = check_loss(closure(), finite=False)
            loss.backward()
        self._parts.receive(self.stage, self._fit, live)
        return loss

    def _gate_gradients(self) -> Tensor | None:
        """What the weight step so far says each drawn unit is worth, all micro-batches together."""
        if self._searching or self.structure.control is None:
            return None
        parts = {name: part.theta for name, part in self._parts.items()}
        gradients = {name: theta.grad for name, theta in parts.items() if theta.grad is not None}
        return gate_gradients(self.stage.coupling, self._fit.grids, parts, gradients)

    def _movable(self) -> AbstractContextManager[Movable]:
        if not self._parts:  # under cuts the model's own parameters are θ
            return super()._movable()
        named = self._split.head if self._searching else dict(self.named_parameters())
        whole = [parameter for name, parameter in named.items() if name not in self._parts]
        return movable_network(self.stage, self._fit.grids, [] if self._searching else self._parts.trained, whole)

    def check_optimizer(self, optimizer: torch.optim.Optimizer, elementwise: bool | None) -> None:
        """Refuse an optimizer that is not elementwise, where θ is another part of its tensors in each step."""
        if self.structure.draws and not elementwise:
            check_elementwise(optimizer)

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Show the optimizer what took part in the step.

        Raises:
            TitheError: when no part did, since backward ran without the plan.
        """
        if not self.structure.draws:
            self._hear(optimizer)
        elif not self._parts.received and not (self._searching and self._ran):
            raise TitheError(
                "plan",
                found="an optimizer's step after no plan.backward(...)",
                expected="gradients of the drawn network, which takes two forward passes",
                remedy="call loss = plan.backward(lambda: loss_fn(model, batch)) in place of loss.backward()",
            )
        self._parts.before_update(optimizer)
        self._loss_scale = loss_scale(optimizer)

    def _hear(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the gate gradients of the weights that an optimizer is about to move."""
        check_same(self._held)
        if not self._settled:
            named, coupling = dict(self.named_parameters()), self.stage.coupling
            self._heard[id(optimizer)] = gates_of_step(optimizer, named, coupling, self._fit.grids)

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer update what took part in the step, and nothing else."""
        self._parts.after_update(optimizer)
        if not self._settled:
            check_state_shapes({n: p for n, p in self.named_parameters() if n in self.stage.tensors}, optimizer)

    def _commit(self) -> bool:
        moved = self._parts.moved
        if moved:
            self._parts.close()
        return moved

    def _search_optimizers(self) -> None:
        if not self._searching:  # nothing needs one then, and to look for it takes longer than a small step
            super()._search_optimizers()

    def finish_step(self) -> None:
        """Count a finished step, learn from its two losses, and draw again."""
        self._parts.close()
        self._check_ranks(self._watched)
        if not self._settled:
            self._learn()
        self._difference, self._gates, self._ran = None, None, False
        self.num_steps += 1
        self._age += 1
        self._cut()
        before = self._masks[0]
        if self._age >= self.structure.hold or self._settled:
            self._draw()
        self._changed |= not torch.equal(before, self._masks[0])

    def _watched(self) -> Iterator[tuple[str, Tensor]]:
        """What has to be the same on every rank: all weights, and what decides which units exist."""
        yield from self.named_parameters()
        yield from self.structure.watched()

    def _learn(self) -> None:
        difference = None if self._difference is None else self._difference / self._loss_scale
        if difference is not None and distributed.world_size() > 1:
            distributed.meet(f"the end of step {self.num_steps + 1}")
            difference = distributed.mean_number(difference, next(self.model.parameters()).device)
        gates = None if self._gates is None else self._gates / self._loss_scale
        if self._heard:
            gates = torch.stack(list(self._heard.values())).sum(0)
            self._heard.clear()
        if difference is None or not math.isfinite(difference):
            self.structure.tighten(self.num_steps + 1)
        else:
            self.structure.learn(*self._masks, difference, step=self.num_steps, pace=self._pace())
        self.structure.remember(*self._masks, difference, gates)

    def _cut(self) -> None:
        """Let units go for good where that is due."""
        if self._settled or not self.structure.due(self.num_steps):
            return
        place = f"the cut after {self.num_steps} steps"
        with distributed.together(place):
            device = next(self.model.parameters()).device
            self.structure.agree(lambda scores: distributed.first(scores.to(device)).to(scores.device))
            alive = self.structure.stay(self.num_steps)
        if not bool(alive.all()):
            self._drop(alive)
            self._changed = True
        self._settled = self.structure.fixed

    def _pace(self) -> float:
        """The present learning rate as a share of the highest, as far as a scheduler tells."""
        groups = [group for optimizer in self._optimizers.bound for group in optimizer.param_groups]
        return max((g["lr"] / g["initial_lr"] for g in groups if g.get("initial_lr")), default=1.0)

    def _draw(self, masks: Tensor | None = None) -> None:
        """Draw the networks of the coming steps, or take those that were drawn before.

        Where all that is left exists, the network is the same until units go.
        """
        self._age = 0
        everything = self._settled or not self.structure.draws
        self._inference.follow(self.stage, None if everything else self.num_steps)
        if not everything:
            drawn = self.structure.draw(self.seed, self.num_steps) if masks is None else (masks[0], masks[1])
            self._masks, self._fit = drawn, self.stage.fit(drawn[0])
        elif self._laid_out is not self.stage:
            whole = torch.ones(self.stage.coupling.num_units, dtype=torch.bool)
            self._masks, self._fit, self._laid_out = (whole, whole), self.stage.fit(whole), self.stage

    def reselect(self) -> bool:
        """Do nothing, since every step draws; returns False."""
        self._catch_up()
        return False

    # ------------------------------------------------------------------------------------------------- what is dropped

    def end_epoch(self) -> bool:
        """Count a finished epoch, and drop what will never be drawn again; returns whether anything was.

        Weights, statistics and optimizer state get smaller for good. A group keeps its most probable unit.
        """
        self._catch_up()
        self._optimizers.finish()
        self._parts.close()
        self.num_epochs += 1
        if self._settled:
            return False
        alive = self.structure.possible()
        if bool(alive.all()):
            return False
        self._drop(alive)
        self._draw()
        return True

    @property
    def settled(self) -> bool:
        """Return whether `settle` was called."""
        return self._settled

    def settle(self, batches: Iterable[Any] | None = None, *, draws: int = 10) -> float:
        """Fix the structure to the best of some drawn networks; from now on its weights are trained, frozen ones too.

        The likeliest network takes part beside the draws. Losses are those of training (batch statistics, the same
        random draws for each); then running statistics are estimated anew, as means over the same batches.

        Args:
            batches: held-out *training* data; None takes the `data=` of `attach`.
            draws: how many networks are drawn.

        Returns:
            The mean loss of the network that was kept.

        On several ranks each gives its own batches, and all of them call: losses and statistics are over all.

        Raises:
            TitheError: when there is no batch.
        """
        self._catch_up()
        self._parts.close()
        with distributed.together(f"settle(draws={draws}) after {self.num_steps} steps"):
            batches = list(self._data if batches is None else batches)
            candidates = self.structure.candidates(self.seed, self.num_steps, draws)
            totals = sum_losses(self.stage, candidates, self._loss, batches)
            distributed.meet(f"the losses of {len(candidates)} networks")
            loss, best = pick_best(distributed.sum_(totals))
            self._drop(candidates[best])
            self.structure.fix()
            self._settled = True
            self._freeze()
            self._draw()
            # Inside, norms see that they are trained.
            with self.stage.run(self._fit.read, self._parts.open(self.stage, self._fit)):
                count = 0
                if batches:
                    count = estimate_statistics(self.model, self._loss, batches, also=self.stage.written)
                with training(self.model):
                    norms = tracked(self.model)
            self._parts.close()
            mean_statistics(norms, count)
        return loss

    def _drop(self, alive: Tensor) -> None:
        """Let units go for good: bool (n,) says which stay."""
        grids = self.stage.grids(alive)
        self.stage = self.stage.settle(alive, rescale=self.structure.fresh)
        for name, part in self._parts.items():
            part.shrink(grids[name], self._optimizers.bound)
        for name in (grids.keys() & self._floats.keys()) - self._parts.keys():
            weight = self._floats[name]
            shrink_parameter(weight, weight.data, grids[name], self._optimizers.bound)
        self.structure.shrink(self.stage.coupling, alive)
        self._alive[self._alive.nonzero().flatten()[~alive]] = False

    # ------------------------------------------------------------------------------------------- what goes out and in

    def predict(self, batch: Any) -> ledger.Ledger:
        """Return the price of the present step on `batch`, both forward passes and backward.

        Raises:
            TitheError: when the model cannot run on shapes alone.
        """
        self._check_live()
        self._parts.close()
        first = self._fit.fresh()
        again = not torch.equal(*self._masks)
        inside = contextlib.ExitStack()  # backward runs in the narrow network too
        received: list[Any] = []
        backward = not self._searching or bool(self._split.head)

        def both(shapes: Any) -> Tensor:
            if again:
                loss_without_trace(self.stage, self.stage.fit(self._masks[1]), self._loss, shapes)
            if not backward:
                return loss_without_trace(self.stage, first, self._loss, shapes)
            live = self.stage.filled(first) if self._searching else self._parts.open(self.stage, first)
            if not self._searching:
                inside.callback(lambda: received.append(self._parts.rehearse(self.stage, first, live)))
            inside.enter_context(self.stage.run(first.read, live))
            return self._loss(self.model, shapes)

        try:
            with self.stage.untouched():
                found = ledger.predict(self.model, both, batch, inside=inside, backward=backward)
        finally:
            for part in self._parts.values():
                part.forget()
        whole = {name: p for name, p in self.named_parameters() if not self._searching or name in self._head}
        live = {name: grid for name, grid in first.grids.items() if name in whole}
        size = sum(parameter.nbytes for parameter in whole.values())
        absent = sum((1 - grid.size / grid.num_weights) * whole[name].nbytes for name, grid in live.items())
        copied = sum(grid.size * whole[name].element_size() for name, grid in live.items() if not grid.full)
        states = max((num_states(optimizer) for optimizer in self._optimizers.bound), default=2)
        return dataclasses.replace(
            found, theta=copied, gradients=round(size - absent), optimizer=states * size, index=self.index_bytes
        )

    def export(self, example: Any = None) -> nn.Module:
        """Return the narrow network as a plain module of the same class, without a trace of the library.

        Before `settle` it is the likeliest network that costs no more than is kept; under cuts, what is left by now.

        Args:
            example: a batch; the copy gives the same loss on it as the attached model, which is checked. None skips
                the check.

        Raises:
            TitheError: when the losses differ.
        """
        self._catch_up()
        self._inference.unhook()
        try:
            network = copy_module(self.model)
        finally:
            self._inference.hook()
        clear(network)
        for handle in Lean.all_of(network):
            handle.release()
        for name, parameter in network.named_parameters():
            required = parameter.requires_grad or name in self._still
            parameter.requires_grad_(self._parts[name].trained if name in self._parts else required)
            parameter.grad = None
        if not self._settled:
            exported = self.structure.exported(self.num_steps)
            Stage(network, self.stage.coupling, self.stage.counts).settle(exported)
        if example is not None:
            check_same_loss(self.model, network, self._loss, example)
        return network

    def save(self, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
        """Write the narrow network that `export` gives, atomically; `tithe.apply` makes a freshly built model it."""
        network = self.export()
        told = {"method": repr(self.method), "seed": str(self.seed), "steps": str(self.num_steps), **(metadata or {})}
        delta.write_network(path, network, self.stage.numbers(network), metadata=told, inputs=self._inputs)

    @property
    def _kept(self) -> dict[str, Any]:
        """The settings that a state and the plan that goes on from it have in common."""
        weights = "frozen" if self._frozen else "trained"
        return {"keep": self.method.keep, "cost": self.method.cost, "weights": weights}

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on from here: tensors, probabilities, and which units are left."""
        self._catch_up()
        return {
            "format": FORMAT,
            **self._kept,
            "num_steps": self.num_steps,
            "num_epochs": self.num_epochs,
            "seed": self.seed,
            "settled": self._settled,
            "masks": torch.stack(self._masks),
            "age": self._age,
            "control": None if self.structure.control is None else self.structure.control.state(),
            "alive": self._alive.clone(),
            "probabilities": self.structure.state(),
            "tensors": {name: t.detach().clone() for name, t in delta.state_tensors(self.model).items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `plan.state_dict()`; load the optimizer's own state after it.

        Raises:
            TitheError: when the state is of another model, or of a method that keeps or counts otherwise.
        """
        self._check_live()
        tensors = delta.state_tensors(self.model)
        check_state(state, self._kept, self.structure.keys, self._alive, self.stage, tensors)
        self._parts.close()
        alive = state["alive"][self._alive]
        if not bool(alive.all()):
            self._drop(alive)
        self.model.load_state_dict(state["tensors"], strict=False)
        self.structure.load(state["probabilities"], state.get("control"))
        self.num_steps, self.num_epochs, self.seed = state["num_steps"], state["num_epochs"], state["seed"]
        self._settled, self._difference, self._checked = state["settled"], None, True
        self._freeze()
        self._draw(state.get("masks"))
        self._age = state.get("age", 0)

    def _let_go(self) -> None:
        self._inference.unhook()
        self._split.restore_left_out()
        self._parts.release()
        for parameter in self._still.values():
            parameter.requires_grad_(True)
        for name, required in self._frozen_head.items():
            self._floats[name].requires_grad_(required)
