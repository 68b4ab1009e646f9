"""One training run: steps, evaluations and checkpoints, on whatever accelerate finds."""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import time
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate.utils import gather_object, set_seed
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tithe
from tithe.errors import TitheError
from tithe.train.checkpoints import Checkpoints, random_state, set_random_state
from tithe.train.course import Course
from tithe.train.data import Batch, ChoosingBatches, Samples, chunks, read_examples, to_device
from tithe.train.method import FishMethod, TradyMethod, VrpgeMethod
from tithe.train.metrics import chosen_metrics, score
from tithe.train.models import build, classification_loss, find_model, logits, regression_loss
from tithe.train.narrowing import narrowing, settling_batches
from tithe.train.progress import Reporter
from tithe.train.recipe import Recipe
from tithe.train.setup import StopSignals, load_state, make_accelerator
from tithe.train.spending import spending
from tithe.train.trainee import (
    attach,
    find_method,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    train_mode,
)


class Interrupted(Exception):
    """A run that was asked to stop, has saved, and can be resumed."""


class NotFiniteError(TitheError):
    """A loss or gradient that is NaN or infinite: the run stopped before it could reach the weights."""


@dataclass
class Position:
    """Where a run is, and what it has found so far: everything of its state that is not a tensor."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best_step: int | None = None
    best_value: float = -math.inf
    seconds: float = 0.0
    ledger: dict[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    draws: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    widths: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


class Run:
    """A recipe made ready: data read, model loaded, method attached; `fit` trains it.

    Args:
        recipe: what to do.
        resume: go on from the last checkpoint in the recipe's output folder.
        console: where to show progress.

    Raises:
        TitheError: the data, the model or the method is not as the recipe says, or the checkpoint is of another recipe.
    """

    def __init__(self, recipe: Recipe, *, resume: bool, console: Console) -> None:
        self.recipe = recipe
        self.checkpoints = Checkpoints(recipe.output / "checkpoints")
        steps = self.checkpoints.steps()
        if steps and not resume:
            raise TitheError(
                recipe.place("run", "output"),
                found=f"a checkpoint of step {steps[-1]} in {recipe.output}",
                expected="a new folder, or --resume",
                remedy="add --resume to go on, or choose another output",
            )
        find_model(recipe)
        find_method(recipe)
        self.examples = read_examples(recipe)
        self.accelerator = make_accelerator(recipe)
        world = self.accelerator.num_processes
        state = load_state(recipe, self.examples, self.checkpoints, steps[-1], world) if steps else None
        self.console = console if self.accelerator.is_main_process else None
        self.loss = regression_loss if recipe.data.task == "text-regression" else classification_loss
        self.position = Position()
        self._signals = StopSignals()
        self._attach(state)
        self.optimizer = make_optimizer(recipe.optimizer, self.trainee.parameters())
        self.trainee.bind(self.optimizer)
        # Not before: a budget charged with the optimizer's state leaves θ smaller than it was attached.
        # While a warm-up lasts, nothing but the head gets a gradient.
        self._wrap(waits=isinstance(recipe.method, FishMethod) and recipe.method.warmup > 0)
        set_seed(recipe.run.seed + 1 + self.accelerator.process_index)
        if state is not None:
            self._restore(state)

    def _attach(self, state: dict[str, Any] | None) -> None:
        """Load the base and put the method on it, with the choice and the values of a state where there is one."""
        recipe, accelerator = self.recipe, self.accelerator
        set_seed(recipe.run.seed)
        self.network = build(recipe, self.examples)
        self.model = self.network.model.to(accelerator.device)
        self.samples = {
            name: Samples(rows, self.examples.targets[name], self.network.encoder)
            for name, rows in self.examples.splits.items()
        }
        share = (accelerator.process_index, accelerator.num_processes)
        self.course = Course(recipe, len(self.samples["train"]), share)
        self.num_weights = sum(parameter.numel() for parameter in self.model.parameters())
        self._choosing = ChoosingBatches(
            samples=self.samples["train"],
            batch_size=recipe.run.batch_size,
            seed=recipe.run.seed,
            share=share,
            device=accelerator.device,
            priced=isinstance(recipe.method, TradyMethod),
        )
        chosen = None if state is None else state["trainee"]
        self.trainee = attach(
            recipe, self.network, self.loss, self._choosing, chosen, structure_steps=self.course.fixed_from
        )
        self.wrapped: nn.Module = self.model
        train_mode(self.model, self.trainee)

    def _wrap(self, *, waits: bool) -> None:
        """On several processes, let DistributedDataParallel see what is trained now.

        A network that is another in every step has no fixed gradients to see: its plan averages them itself.
        """
        self.wrapped = self.model
        if self.accelerator.num_processes > 1 and not isinstance(self.trainee, tithe.AbsentPlan):
            # The wrapper before has hooks on the same parameters, and it is part of a cycle.
            gc.collect()
            devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.model, device_ids=devices, find_unused_parameters=waits)

    # --------------------------------------------------------------------------------------------------- training

    def fit(self) -> None:
        """Train to the end, then go back to the best checkpoint.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the state is saved.
            NotFiniteError: the loss or the gradient was not finite; nothing was saved after it.
        """
        at, run = self.position, self.recipe.run
        reporter = Reporter(
            self.recipe.output,
            total=self.course.total_steps,
            done=at.step,
            every=run.log_every,
            device=self.accelerator.device,
            console=self.console,
        )
        with reporter, self._signals.caught():
            self._show_draw(reporter, new=at.step == 0)
            if at.step == 0:
                self._narrow(reporter, ended=True)
            while at.step < self.course.total_steps:
                self._epoch(reporter)
            if at.best_step is not None and at.best_step != at.step:
                self._go_back(at.best_step)

    def _go_back(self, step: int) -> None:
        """Take an earlier checkpoint on a freshly loaded base: choices since then may have moved other weights."""
        self.wrapped = self.model  # lets the wrapper go
        self.trainee.release()
        self._attach(self.checkpoints.load(step))

    def _epoch(self, reporter: Reporter) -> None:
        at, started = self.position, time.monotonic()
        parts = self.course.parts(at.epoch)[at.step_in_epoch :]
        batches = self.samples["train"].batches([rows for part in parts for rows, _ in part], self.recipe.run.workers)
        for part in parts:
            weighted = [(to_device(next(batches), self.accelerator.device), weight) for _, weight in part]
            values = self._measured_step(weighted)
            at.step, at.step_in_epoch = at.step + 1, at.step_in_epoch + 1
            self._changed(self.trainee.step())
            ended = at.step_in_epoch == self.course.steps_per_epoch
            if ended:
                at.epoch, at.step_in_epoch = at.epoch + 1, 0
                changed = self.trainee.end_epoch()
                self._changed(changed)
                if changed and at.step < self.course.total_steps:
                    self._show_draw(reporter, new=True)
            self._narrow(reporter, ended=ended)
            at.seconds += time.monotonic() - started
            reporter.step(at.step, values)
            self._pause(reporter, ended)
            started = time.monotonic()
            if at.step == self.course.total_steps:
                return

    def _measured_step(self, batches: list[tuple[Batch, float]]) -> dict[str, float]:
        """A step; the first one that trains all it will train is measured."""
        at, method = self.position, self.recipe.method
        first = method.warmup + 1 if isinstance(method, FishMethod) else 1
        if at.ledger is not None or at.step + 1 < min(first, self.course.total_steps):
            return self._step(batches)
        values: list[dict[str, float]] = []
        ledger = tithe.measure(lambda: values.append(self._step(batches)), model=self.model)
        at.ledger = ledger.as_dict()
        return values[0]

    def _step(self, batches: list[tuple[Batch, float]]) -> dict[str, float]:
        lr = self.course.rate(self.position.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        mean = torch.zeros((), device=self.accelerator.device)
        for number, (batch, weight) in enumerate(batches, start=1):
            is_last = number == len(batches)
            with contextlib.nullcontext() if is_last else self._alone():
                mean += self._backward(batch, weight)
        if self.accelerator.num_processes > 1:
            mean = cast(Tensor, self.accelerator.reduce(mean, reduction="mean"))
        loss = float(mean)
        self._check(loss, "loss")
        norm = self._clip()
        scaler = self._scaler
        if scaler is None:
            self._check(norm, "gradient norm")
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss, "lr": lr, "gradient_norm": norm}

    def _backward(self, batch: Batch, weight: float) -> Tensor:
        losses: list[Tensor] = []

        def closure() -> Tensor:
            with self.accelerator.autocast():
                loss = self.loss(self.wrapped, batch) * weight
            losses.append(loss.detach())
            return loss if self._scaler is None else self._scaler.scale(loss)

        self.trainee.backward(closure)
        return losses[-1]

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """Inside, gradients stay on their process: another micro-batch of the step follows."""
        if isinstance(self.wrapped, DistributedDataParallel):
            return cast("contextlib.AbstractContextManager[None]", self.wrapped.no_sync())
        return contextlib.nullcontext()

    def _clip(self) -> float:
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        limit = self.recipe.optimizer.clip
        return float(nn.utils.clip_grad_norm_(self.trainee.parameters(), math.inf if limit is None else limit))

    @property
    def _scaler(self) -> Any:
        """The gradient scaler of fp16, or None."""
        return self.accelerator.scaler

    def _check(self, value: float, name: str) -> None:
        if math.isfinite(value):
            return
        steps = self.checkpoints.steps()
        last = (
            f"the last good checkpoint is {self.checkpoints.path(steps[-1])}" if steps else "no checkpoint was due yet"
        )
        lr = self.recipe.place("optimizer", "lr")
        raise NotFiniteError(
            f"step {self.position.step + 1}",
            found=f"{name} {value}",
            expected="a finite number",
            remedy=f"lower lr ({lr}), add [optimizer] clip or warmup_steps, or look for bad values in the data; {last}",
        )

    def _show_draw(self, reporter: Reporter, *, new: bool) -> None:
        """Say what was drawn under a budget; a draw that a resumed run goes on with is in the log already."""
        spent = spending(self.trainee, self._choosing)
        if spent is None:
            return
        if new:
            self.position.draws.append({"step": self.position.step, **spent.as_dict()})
            reporter.log("draw", self.position.step, spent.as_dict())
        reporter.say(f"step {self.position.step}/{self.course.total_steps}  draw: {spent}")

    def _narrow(self, reporter: Reporter, *, ended: bool) -> None:
        """Fix the widths of a network that gets narrower when it is time, and say how narrow it is."""
        at, plan, method, last = self.position, self.trainee, self.recipe.method, self.course.fixed_from
        if not isinstance(plan, tithe.AbsentPlan) or not isinstance(method, VrpgeMethod) or at.step > last:
            return
        if at.step == last:
            samples, size = self.samples["held_out"], self.recipe.run.batch_size
            plan.settle(settling_batches(samples, size, self.accelerator.device), draws=method.draws)
        if ended or at.step == last:
            found = narrowing(plan)
            at.widths.append({"step": at.step, **found.as_dict()})
            reporter.log("widths", at.step, found.as_dict())
            state = "fixed" if at.step == last else "network"
            reporter.say(f"step {at.step}/{self.course.total_steps}  {state}: {found}")

    def _changed(self, changed: bool) -> None:
        """Wrap the model again where a choice has changed how many values a tensor trains."""
        if changed and self.accelerator.num_processes > 1:
            self._wrap(waits=False)

    # -------------------------------------------------------------------------------------- evaluating and saving

    def evaluate(self, split: str) -> dict[str, float]:
        """The recipe's metrics on one split, in evaluation mode; every process takes its share."""
        samples, world, rank = self.samples[split], self.accelerator.num_processes, self.accelerator.process_index
        rows = list(range(rank, len(samples), world))
        outputs: list[Tensor] = []
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            for batch in samples.batches(chunks(rows, self.recipe.run.eval_batch_size), self.recipe.run.workers):
                outputs.append(logits(self.model, to_device(batch, self.accelerator.device)).float().cpu())
        train_mode(self.model, self.trainee)
        answers = torch.cat(outputs) if outputs else torch.empty(0)
        if world > 1:
            shares = cast(list[Tensor], gather_object([answers]))
            answers = torch.empty(len(samples), shares[0].shape[-1])
            for other, share in enumerate(shares):
                answers[other::world] = share
        return score(chosen_metrics(self.recipe), answers, self.examples.targets[split])

    def _pause(self, reporter: Reporter, ended: bool) -> None:
        """After a step: evaluate and save where it is due, and stop where that was asked for."""
        at, run, last = self.position, self.recipe.run, self.position.step == self.course.total_steps
        improved = False
        if last or (ended if run.evaluate_every is None else at.step % run.evaluate_every == 0):
            values = self.evaluate("validation")
            reporter.evaluation(at.step, "validation", values)
            at.evaluations.append({"step": at.step, **values})
            improved = at.step >= self.course.fixed_from and next(iter(values.values())) > at.best_value
            if improved:
                at.best_step, at.best_value = at.step, next(iter(values.values()))
        stop = self._asked_to_stop()
        due = ended if run.checkpoint_every is None else at.step % run.checkpoint_every == 0
        if last or improved or due or stop is not None:
            self.save()
        if stop is not None and not last:
            raise Interrupted(f"{stop.name} at step {at.step} of {self.course.total_steps}: saved")

    def save(self) -> None:
        """Write a checkpoint of the compact state: what is trained, the optimizer, the generators, the position."""
        world, mine = self.accelerator.num_processes, random_state()
        everyone = cast(list[Any], gather_object([mine])) if world > 1 else [mine]
        if self.accelerator.is_main_process:
            state = {
                "recipe": self.recipe.settings(),
                "data": self.examples.fingerprint(),
                "processes": world,
                "position": dict(vars(self.position)),
                "trainee": self.trainee.state_dict(),
                "optimizer": optimizer_state(self.optimizer, self.trainee),
                "scaler": None if self._scaler is None else self._scaler.state_dict(),
                "random": everyone,
            }
            self.checkpoints.save(self.position.step, state, self.position.best_step)
        self.accelerator.wait_for_everyone()

    def _restore(self, state: dict[str, Any]) -> None:
        load_optimizer_state(self.optimizer, self.trainee, state["optimizer"])
        if self._scaler is not None and state["scaler"] is not None:
            self._scaler.load_state_dict(state["scaler"])
        self.position = Position(**state["position"])
        set_random_state(state["random"][self.accelerator.process_index])

    def _asked_to_stop(self) -> signal.Signals | None:
        if self.accelerator.num_processes == 1:
            return self._signals.received
        # All processes stop after the same step, whichever of them got the signal.
        asked = cast(list[int], gather_object([int(self._signals.received or 0)]))
        return signal.Signals(max(asked)) if any(asked) else None
