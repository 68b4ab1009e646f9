"""One training run: steps, evaluations and checkpoints, on whatever accelerate finds."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from typing import cast, final

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tithe
from tithe.app.train.averaging import leave
from tithe.app.train.data import Batch, to_device
from tithe.app.train.method import FishMethod, VrpgeMethod
from tithe.app.train.narrowing import narrowing, settling_batches
from tithe.app.train.prepared import Prepared
from tithe.app.train.progress import Reporter
from tithe.app.train.spending import spending
from tithe.errors import TitheError


class Interrupted(Exception):
    """A run that was asked to stop, has saved, and can be resumed."""


class NotFiniteError(TitheError):
    """A loss or gradient that is NaN or infinite: the run stopped before it could reach the weights."""


@final
class Run(Prepared):
    """A recipe made ready; `fit` trains it. Built as `Prepared`."""

    # --------------------------------------------------------------------------------------------------- training

    def fit(self) -> None:
        """Train to the end, average what was recorded where that was asked for, then go back to the best checkpoint.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the state is saved.
            NotFiniteError: the loss or the gradient was not finite; nothing was saved after it.
        """
        at, run = self.position, self.recipe.run
        reporter = Reporter(
            self.recipe.output,
            total=self.total_steps,
            done=at.step,
            every=run.log_every,
            device=self.accelerator.device,
            console=self.console,
        )
        with reporter, self._signals.caught():
            self._show_draw(reporter, new=at.step == 0)
            if at.step == 0:
                self._narrow(reporter, ended=True)
                self._record()
            self._steps(reporter)
            if self.recipe.average is not None and at.average is None:
                self._average(reporter)
                self._steps(reporter)
            if at.best_step is not None and at.best_step != at.step:
                self._go_back(at.best_step)

    def _average(self, reporter: Reporter) -> None:
        """Leave the run's own steps for the mean of what was recorded, on a fresh model, which further steps train."""
        at, own, last = self.position, self.accounts(), self.scores()
        started, seconds = time.monotonic(), at.seconds
        self.wrapped = self.model  # lets the wrapper go
        narrow = leave(self.trainee, self.recipe.output, is_main=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        at.average = {"step": at.step, "seconds": seconds, "narrow": narrow, "own": own, "last": last}
        at.epoch, at.step_in_epoch = at.epoch + (at.step_in_epoch > 0), 0
        at.best_step, at.best_value = None, -math.inf
        self._attach(None)
        self._begin()
        at.seconds += time.monotonic() - started
        assert isinstance(self.trainee, tithe.SubspacePlan)
        self._refresh()
        mean, count = self.scores(), len(self.trainee.history)
        at.average |= {"mean": mean, "checkpoints": count}
        at.judge(next(iter(mean["validation"].values())))
        reporter.log("mean", at.step, mean["validation"])
        told = "  ".join(f"{name} {value:.4f}" for name, value in mean["validation"].items())
        reporter.say(f"step {at.step}/{self.total_steps}  mean of {count} checkpoints: {told}")
        self.save()

    def _steps(self, reporter: Reporter) -> None:
        while self.position.step < self.course.total_steps:
            self._epoch(reporter)

    def _epoch(self, reporter: Reporter) -> None:
        at, started, samples = self.position, time.monotonic(), self.samples[self.course.split]
        parts = self.course.parts(at.epoch)[at.step_in_epoch :]
        batches = samples.batches([rows for part in parts for rows, _ in part], self.recipe.run.workers)
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
            self._record()
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
        limit = self.course.optimizer.clip
        return float(nn.utils.clip_grad_norm_(self.trainee.parameters(), math.inf if limit is None else limit))

    def _check(self, value: float, name: str) -> None:
        if math.isfinite(value):
            return
        steps = self.checkpoints.steps()
        last = (
            f"the last good checkpoint is {self.checkpoints.path(steps[-1])}" if steps else "no checkpoint was due yet"
        )
        raise NotFiniteError(
            f"step {self.position.step + 1}",
            found=f"{name} {value}",
            expected="a finite number",
            remedy=f"{self.course.calmer}, or look for bad values in the data; {last}",
        )

    def _show_draw(self, reporter: Reporter, *, new: bool) -> None:
        """Say what was drawn under a budget; a draw that a resumed run goes on with is in the log already."""
        spent = spending(self.trainee, self._choosing)
        if spent is None:
            return
        if new:
            self.position.draws.append({"step": self.position.step, **spent.as_dict()})
            reporter.log("draw", self.position.step, spent.as_dict())
        reporter.say(f"step {self.position.step}/{self.total_steps}  draw: {spent}")

    def _narrow(self, reporter: Reporter, *, ended: bool) -> None:
        """Fix the widths of a network that gets narrower when it is time, and say how narrow it is."""
        at, plan, method, last = self.position, self.trainee, self.recipe.method, self.course.fixed_from
        if not isinstance(plan, tithe.NarrowPlan) or not isinstance(method, VrpgeMethod) or at.step > last:
            return
        if at.step == last:
            samples, size = self.samples["held_out"], self.recipe.run.batch_size
            plan.settle(settling_batches(samples, size, self.accelerator.device), draws=method.draws)
        if ended or at.step == last:
            found = narrowing(plan)
            at.widths.append({"step": at.step, **found.as_dict()})
            reporter.log("widths", at.step, found.as_dict())
            state = "fixed" if at.step == last else "network"
            reporter.say(f"step {at.step}/{self.total_steps}  {state}: {found}")

    def _record(self) -> None:
        """Append the weights to the run's history where that is due."""
        at = self.position
        if self._recording is None or not self.course.records(at.step):
            return
        if self._recording.record(self.trainee, self.model, at.step):
            at.recorded.append(at.step)

    def _refresh(self) -> None:
        """Weights that were averaged have never seen a batch: their norms get statistics of their own."""
        if isinstance(self.trainee, tithe.SubspacePlan):
            started = time.monotonic()
            self.trainee.refresh_statistics()
            self.position.seconds += time.monotonic() - started

    # -------------------------------------------------------------------------------------- evaluating and saving

    def _pause(self, reporter: Reporter, ended: bool) -> None:
        """After a step: evaluate and save where it is due, and stop where that was asked for."""
        at, run, last = self.position, self.recipe.run, self.position.step == self.course.total_steps
        improved = False
        if last or (ended if run.evaluate_every is None else at.step % run.evaluate_every == 0):
            self._refresh()
            values = self.evaluate("validation")
            reporter.evaluation(at.step, "validation", values)
            at.evaluations.append({"step": at.step, **values})
            improved = at.step >= self.course.fixed_from and at.judge(next(iter(values.values())))
        stop = self._asked_to_stop()
        due = ended if run.checkpoint_every is None else at.step % run.checkpoint_every == 0
        if last or improved or due or stop is not None:
            self.save()
        if stop is not None and at.step < self.total_steps:
            raise Interrupted(f"{stop.name} at step {at.step} of {self.total_steps}: saved")

    def _asked_to_stop(self) -> signal.Signals | None:
        if self.accelerator.num_processes == 1:
            return self._signals.received
        # All processes stop after the same step, whichever of them got the signal.
        asked = cast(list[int], gather_object([int(self._signals.received or 0)]))
        return signal.Signals(max(asked)) if any(asked) else None
