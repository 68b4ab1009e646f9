"""Hugging Face's Trainer, and what derives from it, trains what a method chooses.

    Trainer.train ──> create_optimizer: the model is known, and not wrapped yet
                          │  data = the Trainer's own loader, loss = its own compute_loss
                          v
                      tithe.attach ──> args.optim over plan.named_parameters() ──> accelerate wraps, loads, trains
    checkpoint ──> optimizer.pt holds the plan's state: attached with it again, nothing is scored

Written for transformers 5.23 and trl 1.16, whose own methods do everything that is not said here.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast, final

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import tithe
from tithe.errors import TitheError, TitheWarning
from tithe.forward import RandomStates
from tithe.integrations.transformers import checks, files
from tithe.integrations.transformers.callback import TitheCallback
from tithe.integrations.transformers.data import TrainerBatches, TrainerLoss, check_loss, shadowed, undisturbed

if TYPE_CHECKING:
    _Trainer = Any  # the class that it is put over
else:
    _Trainer = object

TrainerT = TypeVar("TrainerT")


@functools.cache
def with_tithe(trainer: type[TrainerT]) -> type[TrainerT]:
    """Return a subclass of a Trainer that trains what a method chooses.

    Its constructor also takes these, by name:

    - `tithe`: the method.
    - `tithe_head`, `tithe_where`: globs over parameter names, as in `tithe.attach`.
    - `tithe_loss`: `loss(model, batch)` to choose by; None is the Trainer's own `compute_loss`.
    - `tithe_save`: "both" writes `delta.safetensors` beside the weights wherever the Trainer saves; "delta" writes it
      without them.

    Its `plan` is None until training begins, and stays attached afterwards; `trainer.plan.release()` ends it.

    Args:
        trainer: `transformers.Trainer`, `Seq2SeqTrainer`, TRL's `SFTTrainer`, `DPOTrainer`, or a class of your own that
            derives from one of them.

    Returns:
        The subclass; the same one each time.

    Raises:
        TitheError: when it is no Trainer's class, or one of a release of transformers that works otherwise.

    Example:
        >>> from transformers import Trainer
        >>> issubclass(with_tithe(Trainer), Trainer)
        True
    """
    kind: Any = trainer
    if not (isinstance(kind, type) and issubclass(kind, transformers.Trainer)):
        raise TitheError(
            "with_tithe",
            found=repr(trainer),
            expected="transformers.Trainer or a class that derives from it",
            remedy="write with_tithe(Trainer)(model=…, args=…, tithe=method)",
        )
    if issubclass(kind, _WithTithe):
        return trainer
    checks.check_release(kind)
    return cast("type[TrainerT]", type(f"Tithe{trainer.__name__}", (_WithTithe, trainer), {"_of": trainer}))


@dataclass(frozen=True)
class _Choice:
    """What the constructor is told about the choice."""

    method: Any
    head: str | Sequence[str]
    where: str | Sequence[str]
    loss: Callable[[Any, Any], Tensor] | None
    save: str


@final
class _Trained:
    """A model as a Trainer's `create_optimizer` and clipping look at it: its parameters are those of the plan."""

    def __init__(self, model: nn.Module, plan: tithe.Plan) -> None:
        self._model, self._plan = model, plan

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        """Iterate over what the plan trains, by its names."""
        return self._plan.named_parameters()

    def parameters(self, *_: Any, **__: Any) -> Any:
        """Iterate over what the plan trains."""
        return self._plan.parameters()


class _WithTithe(_Trainer):
    """What a Trainer does otherwise under a plan; put over the Trainer's class by `with_tithe`."""

    _of: ClassVar[type]

    def __init__(
        self,
        *args: Any,
        tithe: Any,
        tithe_head: str | Sequence[str] = (),
        tithe_where: str | Sequence[str] = "*",
        tithe_loss: Callable[[Any, Any], Tensor] | None = None,
        tithe_save: str = "both",
        **kwargs: Any,
    ) -> None:
        self.plan: Any = None
        self._choice = _Choice(tithe, tithe_head, tithe_where, tithe_loss, tithe_save)
        self._checkpoint: str | None = None
        self._optimizer_of: Any = None  # the plan that the present optimizer was made for
        self._num_weights = 0
        bound = inspect.signature(self._of.__init__).bind(self, *args, **kwargs)
        checks.check_arguments({**bound.arguments, **kwargs}, tithe_save)
        super().__init__(*args, **kwargs)
        checks.check_arguments({"args": self.args}, tithe_save)  # which a class of one's own may make itself
        checks.check_engine(self)
        self.callback_handler.callbacks.insert(0, TitheCallback())

    def __reduce__(self) -> Any:
        if self._live:
            raise TitheError(
                type(self).__name__,
                found="a plan that is attached to the model",
                expected="a Trainer before training, or after trainer.plan.release(), to pickle or copy",
                remedy="call trainer.plan.release() first, or pickle trainer.model, which is plain",
            )
        own = {} if self._optimizer_of is None else {"optimizer": None, "_optimizer_of": None}
        kind = self._of if type(self) is with_tithe(self._of) else type(self)
        return _blank, (kind,), {**vars(self), **own, "plan": None}

    # -------------------------------------------------------------------------------------------------- when it begins

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, and remember which checkpoint training goes on from: nothing else tells `create_optimizer`."""
        self._checkpoint = resume_from_checkpoint
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint's weights into the plain model.

        Raises:
            TitheError: when the checkpoint has no plan's state.
        """
        state = files.plan_state(resume_from_checkpoint)
        self._let_go()
        self._load_weights(resume_from_checkpoint, state, super()._load_from_checkpoint)

    def _load_weights(self, checkpoint: str, state: Mapping[str, Any], load: Callable[[str], None]) -> None:
        if "tensors" in state:
            return  # the plan's state is all of the model's, in the shapes that are left of it
        if not files.holds_weights(checkpoint):
            tithe.apply(self.model, Path(checkpoint) / files.DELTA)
        elif files.is_renamed(checkpoint, self.model):
            states = RandomStates()
            self.model.load_state_dict(type(self.model).from_pretrained(checkpoint).state_dict())
            states.restore()
        else:
            load(checkpoint)

    def _load_callback_state(self) -> None:
        """Restore callbacks, and put the plan's back in its place before all others."""
        super()._load_callback_state()
        self.callback_handler.callbacks.sort(key=lambda each: type(each) is not TitheCallback)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Attach, and make the optimizer that the arguments name over what the plan trains.

        Raises:
            TitheError: as `tithe.attach`; when something of the Trainer does not go with a plan.
        """
        goes_on = self._live and self.plan.model is self.model and not self._checkpoint
        if goes_on and self._optimizer_of is self.plan:
            return super().create_optimizer()  # train() again: both go on
        if self.optimizer is not None and self._optimizer_of is None:
            checks.check_arguments({"optimizers": (self.optimizer, None)}, self._choice.save)
        checks.check_callback(self.callback_handler.callbacks, TitheCallback)
        states = RandomStates()
        try:
            checks.check_optimizer(self)
            if not goes_on:  # else it is the plan of the best checkpoint
                self._let_go()
                self._attach(None if self._checkpoint is None else files.plan_state(self._checkpoint))
            self.optimizer, self._optimizer_of = None, self.plan
            with shadowed(self, model=_Trained(self.model, self.plan)):
                super().create_optimizer()
            self.plan.bind(self.optimizer)
        except BaseException:
            self._let_go()
            self.optimizer = self._optimizer_of = None
            raise
        finally:
            states.restore()
        self._wrap_nothing_that_averages()
        return cast("torch.optim.Optimizer", self.optimizer)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Return the names to decay; values that a plan keeps in one tensor for all weights decay too."""
        names = super().get_decay_parameter_names(model)
        if not self._live:
            return names
        known = {name for name, _ in self.plan.model.named_parameters()}
        return [*names, *(name for name, _ in self.plan.named_parameters() if name not in known)]

    @property
    def _live(self) -> bool:
        return self.plan is not None and not self.plan.released

    @property
    def _follower(self) -> TitheCallback:
        return next(each for each in self.callback_handler.callbacks if isinstance(each, TitheCallback))

    def _attach(self, state: Mapping[str, Any] | None) -> None:
        """Attach to the model as it is, or with the state of an earlier run.

        Raises:
            TitheError: when that is not possible.
        """
        choice, own = self._choice, TrainerLoss(self)
        method: Any = choice.method
        samples = method.samples if isinstance(method, tithe.SparseMethod) and method.needs_data else 0
        batches = TrainerBatches(self, samples)
        check_loss(self, batches, self.model)
        self._num_weights = sum(p.numel() for p in self.model.parameters() if p.is_floating_point())
        self.plan = tithe.attach(
            self.model,
            method,
            loss=choice.loss or own,
            data=batches,
            where=choice.where,
            head=choice.head,
            seed=self.args.seed,
            state=state,
        )
        checks.check_plan(self.plan, self)
        self.model_wrapped = self.model  # what was wrapped for an earlier plan does not know this one's values
        follower = self._follower
        follower.follow(self.plan, self._check_decay)
        follower.chosen_by = re.sub(r" at 0x\w+", "", repr(method))
        if state is None:
            follower.draws, follower.peak = int(self.plan.num_steps >= self.plan.warmup), 0
        else:
            told = self.state.stateful_callbacks.get(TitheCallback.__name__, {"args": {}})["args"]
            follower.draws, follower.peak = told.get("draws", 0), told.get("peak", 0)
            self._say_another(told.get("chosen_by", follower.chosen_by), follower.chosen_by)
        self._warned = False
        self._check_decay()

    def _say_another(self, saved: str, now: str) -> None:
        """Say that a checkpoint's choice goes on, where this method might have made another.

        Warns:
            TitheWarning: when it was saved with a method of other settings.
        """
        if saved != now:
            warnings.warn(
                f"the checkpoint's choice was made by {saved}, and goes on; {now} decides what is chosen from here on"
                " alone. To have it choose now, load the checkpoint's weights and train without"
                " resume_from_checkpoint",
                TitheWarning,
                stacklevel=2,
            )

    def _let_go(self) -> None:
        if self._live:
            self.plan.release()
        self.plan = None

    def _check_decay(self) -> None:
        """Say once that weights which the Trainer would not decay share one tensor with others that it does.

        Warns:
            TitheWarning: when they do.
        """
        plan = self.plan
        chosen, named = plan.selections, dict(plan.named_parameters())
        if self._warned or not self.args.weight_decay or chosen.keys() <= named.keys():
            return
        if sum(selection.size for selection in chosen.values()) > sum(values.numel() for values in named.values()):
            return  # coefficients that all weights share, none of which is a weight's own
        spared = sorted(chosen.keys() - set(super().get_decay_parameter_names(plan.model)))
        if spared:
            self._warned = True
            warnings.warn(
                f"{spared[0]} and {len(spared) - 1} more decay with the rest, since a plan that chooses again holds all"
                f' values in one parameter; leave them out with tithe_where=["*", "!{spared[0]}", …], or write'
                " weight_decay=0",
                TitheWarning,
                stacklevel=2,
            )

    def _wrap_nothing_that_averages(self) -> None:
        """Have accelerate prepare the model without a wrapper where the plan averages gradients over ranks itself."""
        vars(self.accelerator).pop("prepare_model", None)
        if self._by_plan:
            prepare = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
            vars(self.accelerator)["prepare_model"] = prepare

    # ---------------------------------------------------------------------------------------------------- in each step

    @property
    def _by_plan(self) -> bool:
        """Whether `plan.backward` has to run a step's backward pass."""
        return self._live and (self.plan.needs_backward or (self.plan.averages_gradients and self.args.world_size > 1))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward, as often as the method needs; the first step is measured."""
        step = functools.partial(super().training_step, *args, **kwargs)
        run = functools.partial(self._step_by_plan, step) if self._by_plan else step
        if not self._live or self._follower.peak or self.plan.num_steps < self.plan.warmup or self.args.torch_compile:
            return run()
        if any(parameter.grad is not None for parameter in self.plan.parameters()):
            return run()  # a micro-batch that is not the first of its step
        return self._measure(run)

    def _step_by_plan(self, step: Callable[[], Tensor]) -> Tensor:
        """Have the plan run the Trainer's step as its forward pass: what that would give to backward is the loss."""
        losses: list[Tensor] = []

        def closure() -> Tensor:
            given: list[Tensor] = []
            # Without gradients it is a second look at the batch, which the Trainer does not write down.
            aside = nullcontext() if torch.is_grad_enabled() else undisturbed(self)
            with aside, shadowed(self.accelerator, backward=lambda loss, **_: given.append(loss)):
                losses.append(step())
            loss = given[0] / self.accelerator.gradient_accumulation_steps
            scaler = self.accelerator.scaler
            return loss if scaler is None else scaler.scale(loss)

        self.plan.backward(closure)
        return losses[-1]

    def _measure(self, run: Callable[[], Tensor]) -> Tensor:
        found: list[Tensor] = []
        states = RandomStates()
        try:
            ledger = tithe.measure(lambda: found.append(run()))
        except TitheError:  # a transform of torch.func runs only while nobody looks; whatever else it is comes again
            self._follower.peak = -1
            states.restore()
            for parameter in self.plan.parameters():
                parameter.grad = None
            return run()
        self._follower.peak = ledger.allocator_peak or ledger.peak
        return found[0]

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the gradients of what the plan trains, which need not be parameters of the model."""
        return super()._clip_grad_norm(_Trained(model, self.plan) if self._live else model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm of the gradients of what the plan trains."""
        return super()._get_grad_norm(_Trained(model, self.plan) if self._live else model, grad_norm=grad_norm)

    # --------------------------------------------------------------------------------------------------- what it tells

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and in training also the trained share, the choices made, the budget spent and the measured peak."""
        if self._live and {"loss", "train_loss"} & set(logs):
            logs = {**logs, **self._figures()}
        super().log(logs, *args, **kwargs)

    def _figures(self) -> dict[str, float]:
        follower, spending, narrowing = self._follower, self.plan.spending(), self.plan.narrowing()
        trained = sum(parameter.numel() for parameter in self.plan.parameters())
        found: dict[str, float] = {"tithe_trained": trained / self._num_weights, "tithe_draws": follower.draws}
        if spending is not None:
            found["tithe_spent"] = spending.spent / spending.limit
        if narrowing is not None:
            found["tithe_spent"] = narrowing.spent
        if follower.peak > 0:
            found["tithe_peak"] = follower.peak
        return found

    # --------------------------------------------------------------------------------------------------- what it saves

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the checkpoint, plain, and the delta with its card beside it or alone."""
        folder = self.args.output_dir if output_dir is None else output_dir
        delta_alone = self._live and self._choice.save == "delta"
        super()._save(output_dir, {} if delta_alone else state_dict)
        if not self._live or not self.args.should_save:
            return
        if delta_alone:
            files.remove_weights(folder)
        with warnings.catch_warnings():
            if Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR):  # from which training goes on
                warnings.filterwarnings("ignore", "the network that is exported", TitheWarning)
            self.plan.save(Path(folder) / files.DELTA)
        self._write_card(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """Write the Trainer's card, and into it what was trained and measured."""
        made = super().create_model_card(*args, **kwargs)
        if self._live and self.is_world_process_zero() and (Path(self.args.output_dir) / "README.md").is_file():
            self._write_card(self.args.output_dir)
        return made

    def _write_card(self, folder: str) -> None:
        figures, method = self._figures(), self._choice.method
        rows = {
            "method": f"`{method!r}`",
            "trained": f"{figures['tithe_trained']:.3%} of {self._num_weights:,} weights",
        }
        rows["steps"] = f"{self.plan.num_steps:,}"
        rows["choices made"] = f"{figures['tithe_draws']:,}"
        if "tithe_spent" in figures:
            rows["budget spent"] = f"{figures['tithe_spent']:.1%}"
        if "tithe_peak" in figures:
            rows["peak of a step, beyond weights and batch"] = f"{figures['tithe_peak']:,} bytes"
        delta = Path(folder) / files.DELTA
        if delta.is_file():
            rows[f"`{files.DELTA}`"] = f"{delta.stat().st_size:,} bytes"
        files.write_card(folder, rows, alone=self._choice.save == "delta")

    def _load_best_model(self) -> None:
        """Load the best checkpoint; the plan is attached anew as it was there."""
        best, load = self.state.best_model_checkpoint, super()._load_best_model
        if not self._live or not (Path(best) / files.OPTIMIZER).is_file():
            self._load_weights(best, {}, lambda _: load())
            return
        state = files.plan_state(best)
        self._let_go()
        self._load_weights(best, state, lambda _: load())
        states = RandomStates()
        try:
            self._attach(state)
        finally:
            states.restore()


def _blank(trainer: type) -> Any:
    made = with_tithe(trainer)
    return made.__new__(made)
