"""What a Trainer cannot be trained with under a plan, said before any time is spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
import transformers
from torch import nn

from tithe import Coordinates, Selection, SelectionContext, SparseMethod, attach
from tithe.errors import TitheError

SAVES = ("both", "delta")
"""What `tithe_save` may be."""


_OVERRIDDEN = (
    *("_inner_training_loop", "create_optimizer", "get_decay_parameter_names", "training_step", "log"),
    *("_clip_grad_norm", "_get_grad_norm", "_save", "create_model_card", "_load_from_checkpoint"),
    *("_load_callback_state", "_load_best_model"),
)
"""Methods of a Trainer that do something else under a plan: where one is missing, another does it, unseen."""


def check_release(trainer: type) -> None:
    """Check that a Trainer has the methods that a plan has to come between.

    Raises:
        TitheError: when it lacks one, as those of other releases of transformers do.
    """
    missing = [name for name in _OVERRIDDEN if not callable(getattr(trainer, name, None))]
    if missing:
        raise TitheError(
            trainer.__name__,
            found=f"transformers {transformers.__version__}, whose Trainer has no {', '.join(missing)}",
            expected="a Trainer that does its work in these methods, as that of 5.23 does",
            remedy="pip install transformers==5.23, or call tithe.attach yourself before you make a stock Trainer",
        )


def check_arguments(arguments: Mapping[str, Any], save: str) -> None:
    """Check what a Trainer is about to be made with.

    Args:
        arguments: of its constructor, by name.
        save: `tithe_save`.

    Raises:
        TitheError: naming the argument.
    """
    if save not in SAVES:
        raise TitheError(
            "tithe_save", found=repr(save), expected=" or ".join(map(repr, SAVES)), remedy="choose one of them"
        )
    optimizer, scheduler = arguments.get("optimizers") or (None, None)
    if optimizer is not None or scheduler is not None:
        raise TitheError(
            "optimizers",
            found="an optimizer or a schedule made before anything was chosen",
            expected="one made over what the method chooses, when training begins",
            remedy="name it in TrainingArguments(optim=…), pass optimizer_cls_and_kwargs=(torch.optim.SGD, {…}), or "
            "call tithe.attach yourself and give a stock Trainer an optimizer over plan.parameters()",
        )
    args = arguments.get("args")
    if args is None:
        return
    if getattr(args, "deepspeed", None):
        raise _sharded("TrainingArguments(deepspeed=…)")
    if getattr(args, "fsdp", None):
        raise _sharded("TrainingArguments(fsdp=…)")
    if args.n_gpu > 1:
        raise TitheError(
            "TrainingArguments",
            found=f"{args.n_gpu} GPUs in one process, over which the Trainer copies the model (DataParallel)",
            expected="one process for each GPU",
            remedy="start it with torchrun --nproc-per-node, or set CUDA_VISIBLE_DEVICES=0",
        )
    if save == "delta" and args.load_best_model_at_end:
        raise TitheError(
            "tithe_save",
            found="'delta', and load_best_model_at_end",
            expected="checkpoints that can be put into a model that was trained on",
            remedy='write tithe_save="both", or load the best delta into a new model with tithe.apply',
        )


def _sharded(what: str) -> TitheError:
    return TitheError(
        what,
        found="a model that is sharded or wrapped by another engine",
        expected="whole weights on every rank",
        remedy="leave it out and start with torchrun: gradients and optimizer state of what is trained are small, so "
        "that there is little left to shard",
    )


def check_engine(trainer: Any) -> None:
    """Check how a Trainer will run its model, whatever asked for that: arguments, environment, a loaded model.

    Raises:
        TitheError: when the model is to be sharded.
    """
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    parts = 1 if parallel is None else parallel.total_size // max(parallel.dp_replicate_size, 1)
    for there, what in (
        (trainer.is_deepspeed_enabled, "DeepSpeed"),
        (trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled, "FullyShardedDataParallel"),
        (trainer.is_distributed_loading_by_transformers, "a model that was sharded when it was loaded"),
        (parts > 1, "a parallelism_config that divides the model"),
        (trainer.is_model_parallel, "a model on several devices"),
    ):
        if there:
            raise _sharded(what)


@final
class _Some(SparseMethod):
    """Selects four entries of a matrix of six: what an optimizer is tried on."""

    def choose(self, context: SelectionContext) -> dict[str, Selection]:
        """Choose them."""
        return {name: Coordinates(shape, torch.arange(4)) for name, shape in context.shapes.items()}


def check_optimizer(trainer: Any) -> None:
    """Check, before scores are taken, that the optimizer that the arguments name is elementwise.

    Raises:
        TitheError: when it is not, or cannot be made over a list of values.
    """
    given = trainer.optimizer_cls_and_kwargs
    kind, settings = given or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    name = kind.__name__ if given else f"TrainingArguments(optim={str(trainer.args.optim.value)!r})"
    remedy = "use adamw_torch, sgd, rmsprop or adagrad"
    if {"params", "model", "optimizer_dict"} & set(settings):
        raise TitheError(name, found="an optimizer of a whole model", expected="one of single values", remedy=remedy)
    states = torch.get_rng_state()
    plan = attach(nn.Linear(3, 2, bias=False), _Some())
    try:
        plan.bind(kind(plan.parameters(), **settings))
    except TitheError as error:
        raise TitheError(name, found=error.found, expected=error.expected, remedy=remedy) from error
    except TypeError as error:
        raise TitheError(
            name,
            found=f"an optimizer that cannot be made over a list of values ({error})",
            expected="an elementwise optimizer",
            remedy=remedy,
        ) from error
    finally:
        plan.release()
        torch.set_rng_state(states)


def check_callback(callbacks: Sequence[object], kind: type) -> None:
    """Check that the callback that ends the plan's epochs is there, once, and before all others.

    Args:
        callbacks: of the Trainer, in order.
        kind: of the callback.

    Raises:
        TitheError: when it is not.
    """
    there = [type(each) for each in callbacks]
    if there.count(kind) != 1:
        raise TitheError(
            "callbacks",
            found=f"{there.count(kind) or 'no'} {kind.__name__}",
            expected="one, which ends the plan's epochs",
            remedy="leave it in its place: pass yours as callbacks=[…], and take off single ones with remove_callback",
        )
    early = [each.__name__ for each in there[: there.index(kind)]]
    if early:
        raise TitheError(
            "callbacks",
            found=f"{', '.join(early)} before {kind.__name__}",
            expected="yours after it, so that they see an epoch that has ended",
            remedy="pass them as callbacks=[…] or with add_callback, which put them behind it",
        )


def check_plan(plan: Any, trainer: Any) -> None:
    """Check that what the arguments ask for goes with the plan that was made.

    Raises:
        TitheError: when nothing would ever be chosen, or the best network cannot be had back.
    """
    steps = trainer.state.max_steps
    if plan.num_steps < plan.warmup and plan.warmup >= steps:
        raise TitheError(
            "max_steps",
            found=f"{steps} steps in all, and a warm-up of {plan.warmup}",
            expected="steps after the warm-up, in which the choice is trained",
            remedy=f"train for more than {plan.warmup} steps, or lower warmup=",
        )
    if trainer.args.load_best_model_at_end and plan.narrowing() is not None:
        raise TitheError(
            "load_best_model_at_end",
            found="a network that gets narrower for good",
            expected="a model that can have an earlier checkpoint's weights back",
            remedy="leave it out, and load the best checkpoint's delta.safetensors into a new model with tithe.apply",
        )
