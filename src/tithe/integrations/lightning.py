"""A Lightning callback that attaches a method when `fit` begins, before the optimizers are made and DDP wraps.

setup("fit") ──> attach: scores by the trainer's own batches, through training_step or a loss
             ──> a checkpoint's state, if there is one ──> configure_optimizers, DDP ──> bound
each step    ──> plans follow the optimizers by themselves; the module is called as DDP calls it, so that hooks run
epoch's end  ──> plan.end_epoch()
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import random
import sys
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import Any, cast, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import tithe
from tithe.errors import TitheError
from tithe.forward import RandomStates, tracked, untouched

_FAMILIES = ("lightning.pytorch", "pytorch_lightning")
"""The two packages of the same library; each has classes of its own."""


def _callback_classes() -> list[type[Any]]:
    """The callbacks' class of each package in use. The other is not imported: it takes over the first one's logs."""
    used = [family for family in _FAMILIES if family in sys.modules]
    installed = [family for family in _FAMILIES if importlib.util.find_spec(family.partition(".")[0]) is not None]
    return [importlib.import_module(family).Callback for family in used or installed[:1] or _FAMILIES[:1]]


@final
class Tithe(*_callback_classes()):  # pyright: ignore[reportUntypedBaseClass]
    """Trains the part of a LightningModule that a method chooses.

    The method is attached when `fit` begins: in `setup`, or right after the module's own `setup` and
    `configure_model` where it has them. `configure_optimizers` may use `self.parameters()`. After `fit` the plan stays
    attached: `plan.save` writes the delta, another `fit` goes on, `plan.release()` gives the module back. Checkpoints
    have the module's own keys; the plan's state is in the callback's.

    Args:
        method: the method, for example `tithe.FISH(density=0.005)`.
        loss: `loss(module, batch)` → mean loss, for scores; None takes what `training_step` returns.
        head: globs over the module's parameter names, trained whole.
        where: globs over the module's parameter names to choose from.

    Example:
        >>> from torch import nn
        >>> import lightning
        >>> callback = Tithe(tithe.FISH(k=3, score="magnitude"))
        >>> trainer = lightning.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        method: Any,
        *,
        loss: Any = None,
        head: str | Sequence[str] = (),
        where: str | Sequence[str] = "*",
    ) -> None:
        super().__init__()
        self.method, self.head, self.where = method, head, where
        self._loss = loss
        self._plan: tithe.Plan | None = None
        self._first_epoch: int | None = None
        self._trainer: Any = None
        self._called: _Called | None = None

    @property
    def plan(self) -> tithe.Plan:
        """Return the plan that `fit` made.

        Raises:
            TitheError: before `fit`.
        """
        if self._plan is None:
            raise TitheError("Tithe", found="no plan yet", expected="a trainer that fits", remedy="call trainer.fit()")
        return self._plan

    # ------------------------------------------------------------------------------------------------------ attaching

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Attach when `fit` begins, or where the module makes layers or data later, right after that.

        Raises:
            TitheError: as `tithe.attach`, and for a strategy that shards weights.
        """
        if stage != "fit":
            return
        if trainer.strategy.restore_checkpoint_after_setup:
            raise TitheError(
                "Trainer(strategy=…)",
                found=type(trainer.strategy).__name__,
                expected="whole weights on every rank",
                remedy='Trainer(strategy="ddp"): gradients and optimizer state of θ are small',
            )
        self._trainer = trainer
        if self._plan is not None and self._plan.model is pl_module and not self._plan.released:
            self._first_epoch = None
            self._batches.renew(trainer)
            return
        base = _of_family(trainer, "").LightningModule
        if all(getattr(type(pl_module), name) is getattr(base, name) for name in ("setup", "configure_model")):
            self._attach(pl_module)
            return

        def configure_model() -> None:
            vars(pl_module).pop("configure_model")
            pl_module.configure_model()
            with torch.device("cpu"):  # Lightning makes the tensors of this hook on the device of training
                self._attach(pl_module)

        pl_module.configure_model = configure_model

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave nothing on a module that was not attached."""
        vars(pl_module).pop("configure_model", None)

    def _attach(self, pl_module: Any) -> None:
        trainer = self._trainer
        trainer.precision_plugin.convert_module(pl_module)
        pl_module.to(trainer.strategy.root_device)
        self._batches = _Batches(trainer)
        states = RandomStates()
        try:
            plan = tithe.attach(
                pl_module,
                self.method,
                loss=self._batch_loss,
                data=self._batches,
                where=self.where,
                head=self.head,
            )
        except TitheError:
            raise
        except Exception as error:
            if self._loss is not None:
                raise
            raise TitheError(
                "training_step",
                found=f"{type(error).__name__} when it was run to choose, before training: {error}",
                expected="a step that runs on a batch of the training data",
                remedy="give Tithe a loss of its own: Tithe(method, loss=lambda module, batch: …)",
            ) from error
        finally:
            states.restore()
        if plan.needs_backward and pl_module.automatic_optimization:
            plan.release()
            raise TitheError(
                type(pl_module).__name__,
                found=f"automatic optimization, and {type(self.method).__name__}, which runs two forward passes a step",
                expected="manual optimization",
                remedy=_MANUAL,
            )
        self._plan, self._first_epoch = plan, None

    def _batch_loss(self, pl_module: Any, batch: Any) -> Tensor:
        """The loss of a batch for scores and prices, in the trainer's precision; nothing of it is logged or kept."""
        trainer = self._trainer
        plugin = trainer.precision_plugin
        # In float16 gradients of a loss that nothing scales would vanish.
        precision = nullcontext() if trainer.precision == "16-mixed" else plugin.train_step_context()
        with precision:
            if self._loss is not None:
                return self._loss(pl_module, batch)
            # Norms follow where statistics are estimated again; scores run in evaluation mode.
            with _muted(trainer, pl_module), untouched(pl_module, but=tracked(pl_module)):
                return _run_training_step(pl_module, batch)

    # ------------------------------------------------------------------------------------------------------- training

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check and follow the optimizers.

        Raises:
            TitheError: when they lack a parameter of the plan, or another callback holds a copy of the module that was
                made before.
        """
        _check_copies(trainer, pl_module)
        _check_wrapper(trainer.strategy.model, self.plan)
        trained = {id(parameter) for parameter in self.plan.parameters()}
        holding = [
            optimizer
            for optimizer in trainer.optimizers
            if any(id(p) in trained for group in optimizer.param_groups for p in group["params"])
        ]
        for optimizer in holding or trainer.optimizers[:1]:
            try:
                self.plan.bind(optimizer)
            except TitheError as error:
                if "plan.parameters()" not in error.remedy:
                    raise
                in_module = trained <= {id(parameter) for parameter in pl_module.parameters()}
                parameters = "self.parameters()" if in_module else "callback.plan.parameters()"
                raise TitheError(
                    error.place,
                    found=error.found,
                    expected=f"an optimizer over {parameters}",
                    remedy=f"return torch.optim.AdamW({parameters}, lr=…) from configure_optimizers",
                ) from error

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Remember which epoch of the plan is the trainer's first."""
        if self._first_epoch is None:
            self._first_epoch = self.plan.num_epochs - trainer.current_epoch

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Count the epoch, and choose again where that is due."""
        self._count_epochs(trainer.current_epoch + 1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Count the last epoch, where a checkpoint was written between its last batch and its end."""
        self._count_epochs(trainer.current_epoch)

    def _count_epochs(self, finished: int) -> None:
        """Lightning does not say that an epoch ends where it goes on from a checkpoint after the last batch."""
        while self.plan.num_epochs < finished + (self._first_epoch or 0):
            self.plan.end_epoch()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Have `training_step` run inside a call of the module, unless `plan.backward` calls the loss itself."""
        self._count_epochs(trainer.current_epoch)
        self._begin(trainer, pl_module, batch_idx, called=not self.plan.needs_backward)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Have `validation_step` run inside a call of the module."""
        self._begin(trainer, pl_module, batch_idx)

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Have `test_step` run inside a call of the module."""
        self._begin(trainer, pl_module, batch_idx)

    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Have `predict_step` run inside a call of the module."""
        self._begin(trainer, pl_module, batch_idx)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the trainer its own view of the module back."""
        self._take_weights()
        self._call_module(trainer, pl_module, False)

    def _begin(self, trainer: Any, pl_module: Any, batch_idx: int, *, called: bool = True) -> None:
        if batch_idx == 0:
            self._take_weights()
        self._call_module(trainer, pl_module, called)

    def _take_weights(self) -> None:
        """Callbacks that average write all parameters of the module at once, θ and the weights behind it."""
        if self._plan is not None and not self._plan.released:
            self._plan.take_weights()

    def _call_module(self, trainer: Any, pl_module: Any, called: bool) -> None:
        """Lightning calls a step directly where nothing wraps the module: the plan's hooks would not run."""
        strategy = trainer.strategy
        if called and strategy.model is pl_module and self._plan is not None:
            strategy.model = self._called = _Called(pl_module)
        elif not called and self._called is not None and strategy.model is self._called:
            strategy.model = pl_module

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return the plan's state, for a checkpoint: tensors and numbers only."""
        if self._plan is None or self._plan.released:
            return {}
        self._take_weights()
        return {"plan": self._plan.state_dict(), "first_epoch": self._first_epoch or 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        if self._plan is not None and not self._plan.released:
            self._plan.load_state_dict(state_dict["plan"])
            self._first_epoch = state_dict["first_epoch"]


_MANUAL = """optimize by hand, with Tithe(method, loss=loss_fn):

    self.automatic_optimization = False                        # in __init__

    def configure_optimizers(self):
        return torch.optim.AdamW(callback.plan.parameters(), lr=1e-3)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = callback.plan.backward(lambda: loss_fn(self, batch))
        optimizer.step()
        optimizer.zero_grad()
"""


class _Called(nn.Module):
    """Stands where DistributedDataParallel would: Lightning then runs a step inside a call of the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _of_family(trainer: Any, name: str) -> Any:
    """A module of the package that the trainer is of."""
    family = next(
        kind.__module__.partition(".trainer")[0] for kind in type(trainer).__mro__ if kind.__name__ == "Trainer"
    )
    return importlib.import_module(f"{family}{name}")


def _run_training_step(pl_module: Any, batch: Any) -> Tensor:
    """The loss that `training_step` returns.

    Raises:
        TitheError: when the step cannot be run by itself.
    """
    names = list(inspect.signature(pl_module.training_step).parameters)
    if not pl_module.automatic_optimization or "dataloader_iter" in names:
        raise TitheError(
            "training_step",
            found="manual optimization" if not pl_module.automatic_optimization else "a dataloader_iter",
            expected="a step that returns the loss of a batch, or a loss",
            remedy="pass Tithe(method, loss=lambda module, batch: …)",
        )
    found: Any = pl_module.training_step(batch, 0) if len(names) > 1 else pl_module.training_step(batch)
    return found["loss"] if isinstance(found, Mapping) and "loss" in found else found  # pyright: ignore


@contextmanager
def _muted(trainer: Any, pl_module: Any) -> Generator[None]:
    """Let `self.log` and loggers take nothing in."""
    dummy = _of_family(trainer, ".loggers.logger").DummyLogger
    loggers, names = trainer.loggers, ("log", "log_dict")
    before = {name: vars(pl_module)[name] for name in names if name in vars(pl_module)}
    trainer.loggers = [dummy() for _ in loggers]
    for name in names:
        vars(pl_module)[name] = lambda *args, **kwargs: None  # pyright: ignore[reportUnknownLambdaType]
    try:
        yield
    finally:
        trainer.loggers = loggers
        for name in names:
            del vars(pl_module)[name]
        vars(pl_module).update(before)


def _check_copies(trainer: Any, pl_module: Any) -> None:
    """Refuse a copy of the module that another callback made before the plan was attached.

    An average of weights goes through the parameters of both, in order.
    """
    shapes = [tuple(parameter.shape) for parameter in pl_module.parameters()]
    for callback in trainer.callbacks:
        for value in vars(callback).values():
            for module in value.modules() if isinstance(value, nn.Module) else ():
                if type(module) is not type(pl_module) or module is pl_module:
                    continue
                if [tuple(parameter.shape) for parameter in module.parameters()] != shapes:
                    raise TitheError(
                        type(callback).__name__,
                        found="a copy of the module that was made before the plan was attached",
                        expected="a copy that has θ",
                        remedy=f"put Tithe before {type(callback).__name__} in callbacks=, and make layers and data in"
                        " __init__ or in a LightningDataModule",
                    )


def _check_wrapper(wrapper: Any, plan: tithe.Plan) -> None:
    """Refuse a DistributedDataParallel that waits for a θ which warm-up steps do not train."""
    waiting = isinstance(wrapper, DistributedDataParallel) and not cast(Any, wrapper).find_unused_parameters
    if waiting and plan.num_steps < plan.warmup:
        raise TitheError(
            "Trainer(strategy=…)",
            found=f"DistributedDataParallel, which waits for every parameter, and a warm-up of {plan.warmup} steps",
            expected="one that lets parameters go unused",
            remedy='Trainer(strategy="ddp_find_unused_parameters_true")',
        )


class _Batches:
    """The trainer's training batches, on its device, as often as they are asked for.

    They are drawn in random states of their own, always the same, so that neither training nor a later choice depends
    on how often it was chosen. Ranks take turns, unless their samplers deal samples out already.

    Args:
        trainer: whose loaders, or the module's hooks that make them, are asked once, before anything is read.
    """

    def __init__(self, trainer: Any) -> None:
        self.renew(trainer)

    def renew(self, trainer: Any) -> None:
        """Use the loaders of this trainer from now on."""
        self._trainer = trainer
        self._combined = _of_family(trainer, ".utilities.combined_loader").CombinedLoader
        with _States([]).own():
            self._loader = self._combine(trainer.fit_loop._data_source.dataloader())

    def __iter__(self) -> Iterator[Any]:
        trainer, pl_module = self._trainer, self._trainer.lightning_module
        loader = self._combine(self._loader)
        _check_readable(loader.flattened)
        states = _States([generator for each in loader.flattened for generator in _generators(each)])
        with states.own():
            batches = _limited(trainer, iter(loader), loader)
        dealt = any(isinstance(getattr(each, "sampler", None), DistributedSampler) for each in loader.flattened)
        turn, turns = (0, 1) if dealt else (trainer.global_rank, trainer.world_size)
        for number in itertools.count():
            with states.own():
                found = next(batches, None)
            if found is None:
                return
            if number % turns == turn:
                batch = trainer.precision_plugin.convert_input(found[0])
                batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
                device = next(pl_module.parameters()).device  # the CPU again once the trainer has ended
                yield trainer.strategy.batch_to_device(batch, device=device, dataloader_idx=0)

    def _combine(self, found: Any) -> Any:
        """Copies of one loader or several, as the trainer combines them."""
        given = (found.iterables, found._mode) if isinstance(found, self._combined) else (found, "max_size_cycle")
        with warnings.catch_warnings():
            # Lightning 2.6 flattens loaders by what torch 2.13 deprecates.
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            loader: Any = self._combined(*given)
            loader.flattened = [_apart(each) for each in loader.flattened]
        return loader


def _check_readable(loaders: Sequence[Any]) -> None:
    """Refuse an iterator, of which training would get what is left."""
    if any(isinstance(loader, Iterator) for loader in loaders):
        raise TitheError(
            "train_dataloader",
            found="an iterator, which can be read once",
            expected="a loader that can be read again, from its beginning",
            remedy="pass a DataLoader, or an object whose __iter__ begins anew",
        )


def _limited(trainer: Any, batches: Iterator[Any], loader: Any) -> Iterator[Any]:
    """As many batches as the trainer takes in an epoch."""
    limit = trainer.limit_train_batches
    if isinstance(limit, int):
        return itertools.islice(batches, limit)
    return batches if limit == 1.0 else itertools.islice(batches, int(limit * len(loader)))


def _apart(loader: Any) -> Any:
    """A copy of a loader, whose passes leave the loader and its samplers where they are in an epoch.

    It has no workers, which might be kept for the next pass.
    """
    apart = loader if isinstance(loader, Iterator) else copy(loader)
    if not isinstance(loader, DataLoader):
        return apart
    sampler, batch_sampler = copy(loader.sampler), copy(loader.batch_sampler)
    if getattr(batch_sampler, "sampler", None) is loader.sampler:
        vars(batch_sampler)["sampler"] = sampler
    # A DataLoader does not let these be set.
    vars(apart).update(sampler=sampler, batch_sampler=batch_sampler, _iterator=None, num_workers=0)
    vars(apart).update(persistent_workers=False, prefetch_factor=None, timeout=0)
    return apart


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that a loader and its samplers draw from."""
    sampler, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    holders = [loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


class _States:
    """Random states of a pass over data, which begin the same in each pass.

    Args:
        generators: that the pass draws from besides those of the process.
    """

    def __init__(self, generators: list[torch.Generator]) -> None:
        self._generators = generators
        self._inner: tuple[RandomStates, list[Tensor]] | None = None

    @contextmanager
    def own(self) -> Generator[None]:
        """Put them in place of the process's own for the block."""
        outer = self._now()
        if self._inner is None:
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            for generator in self._generators:
                generator.manual_seed(0)
        else:
            self._set(self._inner)
        try:
            yield
        finally:
            self._inner = self._now()
            self._set(outer)

    def _now(self) -> tuple[RandomStates, list[Tensor]]:
        return RandomStates(), [generator.get_state() for generator in self._generators]

    def _set(self, states: tuple[RandomStates, list[Tensor]]) -> None:
        states[0].restore()
        for generator, state in zip(self._generators, states[1], strict=True):
            generator.set_state(state)
