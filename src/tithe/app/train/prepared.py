"""What a run consists of: its data, model, method and optimizer, how they are evaluated, saved and taken up again."""

from __future__ import annotations

import gc
from typing import Any, cast

import torch
from accelerate.utils import gather_object, set_seed
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tithe
from tithe.app.train.averaging import TrainingBatches, attach_average, courses
from tithe.app.train.checkpoints import Checkpoints, random_state, set_random_state
from tithe.app.train.data import ChoosingBatches, Samples, chunks, read_examples, to_device
from tithe.app.train.method import FishMethod, TradyMethod
from tithe.app.train.metrics import chosen_metrics, score
from tithe.app.train.models import build, classification_loss, find_model, logits, regression_loss
from tithe.app.train.position import Position
from tithe.app.train.recipe import Recipe
from tithe.app.train.recording import Recording
from tithe.app.train.setup import StopSignals, check_output, load_state, make_accelerator
from tithe.app.train.trainee import (
    attach,
    find_method,
    load_optimizer_state,
    make_optimizer,
    optimizer_bytes,
    optimizer_state,
    train_mode,
    trained_counts,
)


class Prepared:
    """A recipe made ready: data read, model loaded, method attached.

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
        if not resume:
            check_output(recipe, steps)
        find_model(recipe)
        find_method(recipe)
        self.examples = read_examples(recipe)
        self.accelerator = make_accelerator(recipe)
        world = self.accelerator.num_processes
        state = load_state(recipe, self.examples, self.checkpoints, steps[-1], world) if steps else None
        self.console = console if self.accelerator.is_main_process else None
        self.loss = regression_loss if recipe.data.task == "text-regression" else classification_loss
        self.position = Position() if state is None else Position(**state["position"])
        self._signals = StopSignals()
        self._share = (self.accelerator.process_index, world)
        self._courses = courses(recipe, self.examples, self._share)
        self.total_steps = self._courses[-1].total_steps
        self._recording: Recording | None = None
        if recipe.history is not None and self.accelerator.is_main_process:
            self._recording = Recording(recipe, self.position.step, self.position.recorded)
        self._attach(state)
        self._begin()
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
        self.course = self._courses[self.position.average is not None]
        self.num_weights = sum(parameter.numel() for parameter in self.model.parameters())
        self._choosing = ChoosingBatches(
            samples=self.samples["train"],
            batch_size=recipe.run.batch_size,
            seed=recipe.run.seed,
            share=self._share,
            device=accelerator.device,
            priced=isinstance(recipe.method, TradyMethod),
        )
        chosen, began = None if state is None else state["trainee"], self.position.average
        if began is None:
            self.trainee = attach(
                recipe, self.network, self.loss, self._choosing, chosen, structure_steps=self.course.fixed_from
            )
        else:
            data = TrainingBatches(self.samples["train"], recipe.run.batch_size, self._share, accelerator.device)
            narrow = began["narrow"] is not None
            self.trainee = attach_average(recipe, self.network, self.loss, data, chosen, narrow=narrow)
        self.wrapped: nn.Module = self.model
        train_mode(self.model, self.trainee)

    def _begin(self) -> None:
        """Make the optimizer of what was attached, and start the random draws of training."""
        self.optimizer = make_optimizer(self.course.optimizer, self.trainee.parameters())
        self.trainee.bind(self.optimizer)
        method = self.recipe.method
        # Not before: a budget charged with the optimizer's state leaves θ smaller than it was attached.
        # While a warm-up lasts, nothing but the head gets a gradient.
        self._wrap(waits=isinstance(method, FishMethod) and method.warmup > 0)
        set_seed(self.recipe.run.seed + 1 + self._share[0])

    def _wrap(self, *, waits: bool) -> None:
        """On several processes, let DistributedDataParallel see what is trained now.

        A network that is another in every step has no fixed gradients to see, and one whose weights move together no
        gradients of its own: their plans average what they learn from.
        """
        self.wrapped = self.model
        alone = isinstance(self.trainee, (tithe.NarrowPlan, tithe.SubspacePlan))
        if self.accelerator.num_processes > 1 and not alone:
            # The wrapper before has hooks on the same parameters, and it is part of a cycle.
            gc.collect()
            devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.model, device_ids=devices, find_unused_parameters=waits)

    def _go_back(self, step: int) -> None:
        """Take an earlier checkpoint; on a fresh base, where choices since then may have moved other weights."""
        state = self.checkpoints.load(step)
        if isinstance(self.trainee, tithe.SubspacePlan):
            self.trainee.load_state_dict(state["trainee"])
            return
        self.wrapped = self.model  # lets the wrapper go
        self.trainee.release()
        self._attach(state)

    def _changed(self, changed: bool) -> None:
        """Wrap the model again where a choice has changed how many values a tensor trains."""
        if changed and self.accelerator.num_processes > 1:
            self._wrap(waits=False)

    @property
    def _scaler(self) -> Any:
        """The gradient scaler of fp16, or None."""
        return self.accelerator.scaler

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

    def scores(self) -> dict[str, dict[str, float]]:
        """The metrics on validation and, where there is one, test."""
        return {split: self.evaluate(split) for split in ("validation", "test") if split in self.samples}

    def accounts(self) -> dict[str, Any]:
        """What is trained, in numbers, and the bytes of the optimizer's state."""
        trained = trained_counts(self.trainee, self.network.head, self.num_weights)
        return {"trainable": trained, "optimizer": optimizer_bytes(self.optimizer)}

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
        set_random_state(state["random"][self.accelerator.process_index])
