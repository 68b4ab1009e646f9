"""One training run: steps, evaluations and checkpoints, on whatever accelerate finds."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import math
import signal
import time
from typing import Any, cast, final

import torch
from accelerate.utils import gather_object, set_seed
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tithe
from tithe import distributed
from tithe.app.terminal import Bar
from tithe.app.train.averaging import attach_average, courses, leave
from tithe.app.train.checkpoints import Checkpoints, random_state, set_random_state
from tithe.app.train.data import Batches, choosing_rows, chunks, even_chunks, make_samples, read_examples, to_device
from tithe.app.train.fitting import check_fits
from tithe.app.train.models import answer, build, checkpoint_gradients, find_model, score
from tithe.app.train.optimizer import (
    SUGGESTED_BY,
    load_optimizer_state,
    make_optimizer,
    optimizer_bytes,
    optimizer_state,
    trained_counts,
)
from tithe.app.train.position import Position, bill, drawn
from tithe.app.train.progress import Reporter
from tithe.app.train.recipe import Recipe
from tithe.app.train.recording import Recording, recorded_steps
from tithe.app.train.rows import Batch
from tithe.app.train.setup import (
    attach,
    check_output,
    check_writable,
    compare_ranks,
    find_method,
    load_state,
    make_accelerator,
)
from tithe.app.train.signals import Interrupted, StopSignals
from tithe.app.train.tasks import task_of
from tithe.app.train.terms import merit
from tithe.app.train.trackers import find_trackers
from tithe.errors import TitheError


def describe_failure(error: Exception) -> str:
    """Say in one line what went wrong."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


class NotFiniteError(TitheError):
    """A loss or gradient that is NaN or infinite: the run stopped before it could reach the weights."""


@final
class Run:
    """A recipe made ready, data read, model loaded and method attached; `fit` trains it.

    Args:
        recipe: what to do.
        resume: go on from the last checkpoint in the recipe's output folder.
        console: where to show progress.

    Raises:
        TitheError: the data, the model or the method is not as the recipe says, or the checkpoint is of another recipe.
    """

    def __init__(self, recipe: Recipe, *, resume: bool, console: Console) -> None:
        self.recipe = recipe
        self.accelerator = make_accelerator(recipe)
        with distributed.together("the start of the run"):
            self._prepare(resume, console)

    def _prepare(self, resume: bool, console: Console) -> None:
        recipe = self.recipe
        check_writable(recipe)
        self.checkpoints = Checkpoints(recipe.output / "checkpoints")
        if not resume:
            check_output(recipe, self.checkpoints.steps())
        find_model(recipe)
        find_method(recipe)
        find_trackers(recipe)
        with Bar(console if self.accelerator.is_main_process else None, patience=2.0) as bar:
            self.examples = read_examples(recipe, bar.count)
            for note in self.examples.notes if self.accelerator.is_main_process else ():
                bar.say(note)
        world = self.accelerator.num_processes
        if self.accelerator.is_main_process:
            self.checkpoints.recover()
        distributed.meet("the checkpoints that are there")
        steps = self.checkpoints.steps()
        compare_ranks(recipe, self.examples, steps)
        state = load_state(recipe, self.examples, self.checkpoints, steps[-1], world) if steps else None
        self.console = console if self.accelerator.is_main_process else None
        self.task = task_of(recipe)
        self.loss = self.task.loss
        self.position = Position() if state is None else Position(**state["position"])
        self.failed: dict[str, str] = {}
        """The splits that could not be evaluated at the end, with the reason."""
        self._signals = StopSignals()
        self._share = (self.accelerator.process_index, world)
        self._load()
        for note in self.notes[len(self.examples.notes) :] if self.console is not None else ():
            console.print(note, markup=False, highlight=False)
        sizes = {name: len(samples) for name, samples in self.samples.items()}
        self._courses = courses(recipe, sizes, self._share)
        self.total_steps = self._courses[-1].total_steps
        self._recording: Recording | None = None
        if recipe.history is not None and self.accelerator.is_main_process:
            self._recording = Recording(recipe, self.position.step, self.position.recorded)
            self._recording.load_state_dict({} if state is None else state.get("history", {}))
        self._attach(state)
        told = None if state is not None else self._suggest()
        if told is not None and self.console is not None:
            console.print(told, markup=False, highlight=False)
        self._begin()
        if state is not None:
            self._restore(state)

    def _load(self) -> None:
        """Load the base, and make samples for it."""
        recipe, accelerator = self.recipe, self.accelerator
        set_seed(recipe.run.seed)
        self.network = build(recipe, self.examples)
        if recipe.run.gradient_checkpointing:
            checkpoint_gradients(recipe, self.network.model)
        self.model = self.network.model.to(accelerator.device)
        self.samples = make_samples(recipe, self.examples, self.network.encoder, world=accelerator.num_processes)
        check_fits(recipe, self.network, self.samples, len(self.examples.labels), accelerator.device)
        told = [f"{name}: {note}" for name, samples in self.samples.items() for note in samples.notes]
        self.notes = [*self.examples.notes, *self.network.notes, *told]

    def _attach(self, state: dict[str, Any] | None) -> None:
        """Put the method on the base, with the choice and the values of a state where there is one."""
        recipe, accelerator = self.recipe, self.accelerator
        self.course = self._courses[self.position.average is not None]
        self.num_weights = sum(parameter.numel() for parameter in self.model.parameters())
        train, run, (rank, world) = self.samples["train"], recipe.run, self._share
        rows = choosing_rows(
            train, run.batch_size, seed=run.seed, share=self._share, priced=recipe.method.prices_inputs
        )
        self._choosing = Batches(train, rows, accelerator.device)
        chosen, began = None if state is None else state["trainee"], self.position.average
        if began is None:
            self.trainee = attach(
                recipe, self.network, self.loss, self._choosing, chosen, structure_steps=self.course.fixed_from
            )
        else:
            rows = even_chunks(range(rank, len(train), world), run.batch_size)  # for the statistics of norms
            data = Batches(train, rows, accelerator.device)
            narrow = began["narrow"] is not None
            self.trainee = attach_average(recipe, self.network, self.loss, data, chosen, narrow=narrow)
        self.wrapped: nn.Module = self.model
        self.trainee.train_mode()

    def _suggest(self) -> str | None:
        """Find the highest learning rate by the coming batches, where the recipe names none; say it."""
        at, samples = self.position, self.samples["train"]
        if self.recipe.optimizer.lr is not None:
            return None
        steps = itertools.islice(self.course.parts(at.epoch, start=at.step_in_epoch), SUGGESTED_BY)
        rows = [[rows for rows, _ in step] for step in steps]
        size = len(rows[0])  # the last of an epoch may have fewer micro-batches
        whole = itertools.chain.from_iterable(step for step in rows if len(step) == size)
        batches = [to_device(batch, self.accelerator.device) for batch in samples.batches(list(whole))]
        with self.recipe.blamed("optimizer"), self.accelerator.autocast():
            at.lr = self.trainee.suggest_lr(*batches, accumulate=size)
        return f"learning rate {at.lr:.2g}, suggested for " + (
            "the head alone" if at.step < self.trainee.warmup else "what is trained"
        )

    def _begin(self) -> None:
        """Make the optimizer of what was attached, and start the random draws of training."""
        self.optimizer = make_optimizer(self.course.optimizer, self.trainee.parameters(), self.position.lr)
        self.trainee.bind(self.optimizer)
        # While a warm-up lasts, nothing but the head gets a gradient.
        self._wrap(waits=self.trainee.warmup > 0)
        set_seed(self.recipe.run.seed + 1 + self._share[0])

    def _wrap(self, *, waits: bool) -> None:
        """On several processes, let DistributedDataParallel see what is trained now.

        A network that is another in every step has no fixed gradients to see, and one whose weights move together no
        gradients of its own: their plans average what they learn from.
        """
        self.wrapped = self.model
        if self.accelerator.num_processes > 1 and not self.trainee.averages_gradients:
            # The wrapper before has hooks on the same parameters, and it is part of a cycle.
            gc.collect()
            devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.model, device_ids=devices, find_unused_parameters=waits)

    def _go_back(self, step: int) -> None:
        """Take an earlier checkpoint; on a fresh base, where choices since then may have moved other weights."""
        state = self.checkpoints.load(step)
        if self.position.average is not None:  # an average is made of the same weights throughout
            self.trainee.load_state_dict(state["trainee"])
            return
        self.wrapped = self.model  # lets the wrapper go
        self.trainee.release()
        self._load()
        self._attach(state)

    def _changed(self, changed: bool) -> None:
        """Wrap the model again where a choice has changed how many values a tensor trains."""
        if changed and self.accelerator.num_processes > 1:
            self._wrap(waits=False)

    @property
    def _scaler(self) -> Any:
        """The gradient scaler of fp16, or None."""
        return self.accelerator.scaler

    # --------------------------------------------------------------------------------------------------- training

    def fit(self) -> None:
        """Train to the end, average what was recorded where that was asked for, then go back to the best checkpoint.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the state is saved.
            NotFiniteError: the loss or the gradient was not finite; nothing was saved after it.
        """
        at = self.position
        reporter = Reporter(
            self.recipe,
            total=self.total_steps,
            done=at.step,
            lines=at.logged,
            device=self.accelerator.device,
            console=self.console,
        )
        self._reporter = reporter
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
        assert self.recipe.average is not None
        self._recording = None  # the history is complete; moving averages need not stay in memory
        at, own, last = self.position, self.accounts(), self.scores()
        started, seconds = time.monotonic(), at.seconds
        self.wrapped = self.model  # lets the wrapper go
        narrow = leave(self.trainee, self.recipe.output, is_main=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        at.average = {"step": at.step, "seconds": seconds, "narrow": narrow, "own": own, "last": last}
        at.epoch, at.step_in_epoch = at.epoch + (at.step_in_epoch > 0), 0
        at.best_step, at.best_value = None, -math.inf
        self._load()
        self._attach(None)
        self._begin()
        at.seconds += time.monotonic() - started
        self._refresh()
        mean, count = self.scores(), len(recorded_steps(self.recipe))
        at.average |= {"mean": mean, "checkpoints": count}
        at.judge(merit(*next(iter(mean["validation"].items()))))
        reporter.log("mean", at.step, mean["validation"])
        told = "  ".join(f"{name} {value:.4f}" for name, value in mean["validation"].items())
        name = self.recipe.average.name
        what = "mean" if name == "mean" else f"average like {name}"
        reporter.say(f"step {at.step}/{self.total_steps}  {what} of {count} checkpoints: {told}")
        self.save()

    def _steps(self, reporter: Reporter) -> None:
        while not self._done:
            self._epoch(reporter)

    @property
    def _done(self) -> bool:
        return self.position.step == self.course.total_steps or self.position.stopped is not None

    def _epoch(self, reporter: Reporter) -> None:
        at, started, samples = self.position, time.monotonic(), self.samples[self.course.split]
        parts = self.course.parts(at.epoch, samples.weight, start=at.step_in_epoch)
        for part in samples.steps(parts, self.recipe.run.workers):
            weighted = [(to_device(batch, self.accelerator.device), weight) for batch, weight in part]
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
            if at.step == self.trainee.warmup and (told := self._suggest()) is not None:  # of the choice, which is made
                reporter.say(f"step {at.step}/{self.total_steps}  {told}")
            self._narrow(reporter, ended=ended)
            self._record()
            at.seconds += time.monotonic() - started
            reporter.step(at.step, values)
            self._pause(reporter, ended)
            started = time.monotonic()
            if self._done:
                return

    def _measured_step(self, batches: list[tuple[Batch, float]]) -> dict[str, float]:
        """A step; the first one that trains all it will train is measured."""
        at = self.position
        if at.ledger is not None or at.step + 1 < min(self.trainee.warmup + 1, self.course.total_steps):
            return self._step(batches)
        values: list[dict[str, float]] = []
        ledger = tithe.measure(lambda: values.append(self._step(batches)), model=self.model)
        at.ledger = ledger.as_dict()
        return values[0]

    def _step(self, batches: list[tuple[Batch, float]]) -> dict[str, float]:
        lr = self.course.rate(self.position.step, self.position.lr)
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
        at, plan = self.position, self.trainee
        spent = plan.spending()
        if spent is None:
            return
        ledger = plan.predict(next(iter(self._choosing)))  # the batch that prices were made for
        draw = {
            **dataclasses.asdict(spent),
            "weights": sum(selection.size for selection in plan.selections.values()),
            "peak": ledger.peak + plan.attached_bytes + ledger.optimizer,
        }
        if new:
            at.draws.append({"step": at.step, **draw})
            reporter.log("draw", at.step, draw)
        reporter.say(f"step {at.step}/{self.total_steps}  draw: {bill(draw)}  {drawn(draw)}")

    def _narrow(self, reporter: Reporter, *, ended: bool) -> None:
        """Fix the widths of a network that gets narrower when it is time, and say how narrow it is."""
        at, plan, last = self.position, self.trainee, self.course.fixed_from
        if at.step > last:
            return
        if at.step == last and not plan.settled:
            samples, size = self.samples["held_out"], self.recipe.run.batch_size
            batches = Batches(samples, even_chunks(range(len(samples)), size), self.accelerator.device)
            plan.settle(batches, draws=self.recipe.method.num_draws)
        found = plan.narrowing()
        if found is not None and (ended or at.step == last):
            at.widths.append({"step": at.step, **dataclasses.asdict(found)})
            reporter.log("widths", at.step, dataclasses.asdict(found))
            state = "fixed" if at.step == last else "network"
            reporter.say(f"step {at.step}/{self.total_steps}  {state}: {found}")

    def _record(self) -> None:
        """Append the weights to the run's history where that is due, and follow them with its moving averages."""
        at = self.position
        if self._recording is None:
            return
        if self.course.follows(at.step):
            self._recording.follow(self.model, at.step)
        if not self.course.records(at.step):
            return
        if self._recording.record(self.trainee, self.model, at.step):
            at.recorded.append(at.step)

    def _refresh(self) -> None:
        """Weights that were averaged have never seen a batch: their norms get statistics of their own."""
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
            improved = at.step >= self.course.fixed_from and at.judge(merit(*next(iter(values.items()))))
            if run.patience is not None and at.stale >= run.patience and not last:
                at.stopped, last = at.step, True
                reporter.say(
                    f"step {at.step}/{self.total_steps}  ends here: {at.stale} evaluations without a better one"
                )
        stop = self._asked_to_stop()
        due = ended if run.checkpoint_every is None else at.step % run.checkpoint_every == 0
        if last or improved or due or stop is not None:
            self.save()
        if stop is not None and at.step < self.total_steps and at.stopped is None:  # an average may be to come
            raise Interrupted(f"{stop.name} at step {at.step} of {self.total_steps}: saved")

    def _asked_to_stop(self) -> signal.Signals | None:
        if self.accelerator.num_processes == 1:
            return self._signals.received
        # All processes stop after the same step, whichever of them got the signal.
        asked = cast(list[int], gather_object([int(self._signals.received or 0)]))
        return signal.Signals(max(asked)) if any(asked) else None

    # -------------------------------------------------------------------------------------- evaluating and saving

    def evaluate(self, split: str) -> dict[str, float]:
        """The recipe's metrics on one split, in evaluation mode; every process takes its share."""
        samples, world, rank = self.samples[split], self.accelerator.num_processes, self.accelerator.process_index
        rows, run = chunks(range(rank, len(samples), world), self.recipe.evaluated_at_once), self.recipe.run
        answers, failure = torch.empty(0), None
        try:
            with self.accelerator.autocast():
                answers = answer(self.task, self.model, Batches(samples, rows, self.accelerator.device, run.workers))
        except Exception as error:
            if world == 1:
                raise
            failure = describe_failure(error)  # the other processes wait for this one's answers
        finally:
            self.trainee.train_mode()
        if world > 1:
            shares = cast(list[tuple[Tensor, str | None]], gather_object([(answers, failure)]))
            for other, (_, said) in enumerate(shares):
                if said is not None:
                    raise TitheError(
                        f"{split}, process {other}",
                        found=said,
                        expected="answers to all examples",
                        remedy="look at what was found",
                    )
            answers = torch.empty(len(samples), shares[0][0].shape[-1], dtype=torch.float64)
            for other, (share, _) in enumerate(shares):
                answers[other::world] = share
        return score(self.recipe, answers, self.examples.labels)

    def scores(self, *, required: tuple[str, ...] = ("validation",)) -> dict[str, dict[str, float]]:
        """The metrics on validation and, where there is one, test.

        A split that cannot be evaluated, and is not `required`, is noted in `failed`: what was trained is not lost.
        """
        found: dict[str, dict[str, float]] = {}
        for split in ("validation", "test"):
            if split not in self.samples:
                continue
            try:
                found[split] = self.evaluate(split)
            except Exception as error:
                if split in required:
                    raise
                self.failed[split] = describe_failure(error)
        return found

    def accounts(self) -> dict[str, Any]:
        """What is trained, in numbers, and the bytes of the optimizer's state."""
        trained = trained_counts(self.trainee, self.network.head, self.num_weights)
        return {"trainable": trained, "optimizer": optimizer_bytes(self.optimizer)}

    def save(self) -> None:
        """Write a checkpoint of the compact state: what is trained, the optimizer, the generators, the position."""
        world, mine = self.accelerator.num_processes, random_state()
        everyone = cast(list[Any], gather_object([mine])) if world > 1 else [mine]
        if self.accelerator.is_main_process:
            self.position.logged = self._reporter.flushed()
            state = {
                "recipe": self.recipe.settings(),
                "data": self.examples.fingerprint(),
                "processes": world,
                "position": dict(vars(self.position)),
                "trainee": self.trainee.state_dict(),
                "optimizer": optimizer_state(self.optimizer, self.trainee),
                "scaler": None if self._scaler is None else self._scaler.state_dict(),
                "random": everyone,
                "history": {} if self._recording is None else self._recording.state_dict(),
            }
            self.checkpoints.save(self.position.step, state, self.position.best_step)
        self.accelerator.wait_for_everyone()

    def _restore(self, state: dict[str, Any]) -> None:
        load_optimizer_state(self.optimizer, self.trainee, state["optimizer"])
        if self._scaler is not None and state["scaler"] is not None:
            self._scaler.load_state_dict(state["scaler"])
        set_random_state(state["random"][self.accelerator.process_index])
