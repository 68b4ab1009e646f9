"""What a Trainer gives a plan to choose by: its own batches and its own loss, without a trace in the run."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from tithe.errors import TitheError
from tithe.forward import RandomStates, evaluating

Trainer = Any
"""`transformers.Trainer`, or what derives from it."""

_DATA = {"train_dataset", "eval_dataset"}


_EXAMPLES = "tithe_examples"
"""Where a batch that is not collated yet has its examples."""


@final
class Example:
    """One example of a dataset, to be collated when its loss is taken.

    Args:
        features: what the collator is given of it.
    """

    def __init__(self, features: Any) -> None:
        self.features = features


class _Uncollated:
    """A collator that leaves the examples of a batch apart."""

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        return {_EXAMPLES: [Example(each) for each in features]}


@final
class TrainerBatches:
    """The batches of a Trainer's own training loader, from its first on, as often as they are asked for.

    The loader is made by the Trainer, with its sampler, collator and removal of columns. Reading it draws random
    numbers of its own: the run's stay where they are. A sample is an example of the dataset. Where a collator makes of
    examples another number of rows (pairs of answers, several texts in one row), a batch is a list of examples, which
    `TrainerLoss` collates: a row alone would be something else than it is trained as.

    Args:
        trainer: the Trainer.
        samples: how many samples a choice is made by, all ranks together; 0 for any.
    """

    def __init__(self, trainer: Trainer, samples: int = 0) -> None:
        self._trainer, self._samples = trainer, samples
        self._loader: Any = None

    def __iter__(self) -> Generator[Any]:
        """Read batches, prepared as for a step.

        Raises:
            TitheError: when the data ends before there are enough samples to choose by.
        """
        count = 0
        own, iterator = RandomStates(), None
        while True:
            run = RandomStates()
            own.restore()
            try:
                if iterator is None:
                    self._loader = self._make() if self._loader is None else self._loader
                    iterator = _read(self._loader)
                batch = next(iterator, None)
                own = RandomStates()
            finally:
                run.restore()
            if batch is None:
                break
            examples = batch.get(_EXAMPLES)
            prepared = dict(self._trainer._prepare_inputs(batch)) if examples is None else examples
            count += num_rows(prepared) if examples is None else len(examples)
            yield prepared
        share = -(-self._samples // self._trainer.args.world_size)
        if count < share:
            raise TitheError(
                "train_dataset",
                found=f"{count} samples, after which it ends",
                expected=f"the {share} samples that the method is chosen by",
                remedy=f"write samples={count * self._trainer.args.world_size} in the method, or train on more data",
            )

    def _make(self) -> Any:
        """Make the loader, and another whose examples stay apart where rows are not what the collator was given."""
        trainer = self._trainer
        data = trainer.train_dataset
        if isinstance(data, IterableDataset) and iter(data) is iter(data):
            raise TitheError(
                "train_dataset",
                found=f"a {type(data).__name__} that can be read only once",
                expected="a dataset that begins anew each time, since what is scored is trained on too",
                remedy="return a new iterator from __iter__, as torch's IterableDataset and datasets' do",
            )
        loader = trainer.get_train_dataloader()
        first = next(_read(loader), None)
        size = trainer._train_batch_size
        if isinstance(data, Sized):
            size = min(size, len(data))
        if first is None or num_rows(first) == size:
            return loader
        with shadowed(trainer, data_collator=_Uncollated()):
            apart = trainer.get_train_dataloader()
        first = next(_read(apart), None)
        return loader if first is None or _EXAMPLES not in first else apart


def _read(loader: Any) -> Iterator[Any]:
    """Read a loader from its first epoch; accelerate's would count on from the last time it was read."""
    from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard

    ours = isinstance(loader, (DataLoaderShard, DataLoaderDispatcher))
    if ours:
        loader.set_epoch(0)
    try:
        yield from loader
    finally:
        # Left before its end, a loader would stay the one that accelerate takes for the loop's.
        if ours and any(loader is known for known in loader.gradient_state.dataloader_references):
            loader.end()


def num_rows(batch: Mapping[str, Any]) -> int:
    """Return how many rows a collated batch has: the first dimension of most of its tensors."""
    sizes = [value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    return max(set(sizes), key=sizes.count) if sizes else 0


@final
class TrainerLoss:
    """The loss of a batch by a Trainer's own `compute_loss`, which leaves no trace in what the Trainer writes down.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __call__(self, model: nn.Module, batch: Mapping[str, Any] | list[Example]) -> Tensor:
        """Return the loss of the batch alone, as one number of this rank."""
        trainer = self._trainer
        inputs = self.collated(batch)
        given: dict[str, Any] = {}
        labels = inputs.get("labels")
        if trainer.compute_loss_func is not None and isinstance(labels, Tensor):  # which may divide by it
            given["num_items_in_batch"] = (labels != -100).sum()
        with undisturbed(trainer), alone(trainer.accelerator), trainer.accelerator.autocast():
            return trainer.compute_loss(model, inputs, **given)

    def collated(self, batch: Mapping[str, Any] | list[Example]) -> dict[str, Any]:
        """Return a batch as the model is given it; a copy, since a label smoother takes the labels out of it."""
        if isinstance(batch, Mapping):
            return dict(batch)
        states = RandomStates()
        try:
            return dict(self._trainer._prepare_inputs(self._trainer.data_collator([each.features for each in batch])))
        finally:
            states.restore()


@contextmanager
def undisturbed(trainer: Trainer) -> Generator[None]:
    """Undo what is written down inside in a Trainer's plain attributes: metrics and counts of tokens."""
    attributes = vars(trainer)
    before = {
        name: (value, copy.deepcopy(value))
        for name, value in attributes.items()
        if name not in _DATA and _is_plain(value)
    }
    try:
        yield
    finally:
        for name, (value, was) in before.items():
            if name in attributes and attributes[name] is value and value == was:
                continue
            attributes[name] = _put_back(value, was)


def _put_back(value: Any, was: Any) -> Any:
    """Return a container with what it held before, itself and those inside where they are still there."""
    if type(value) is not type(was) or value == was:
        return value if type(value) is type(was) else was
    if isinstance(value, dict):
        now = cast("dict[Any, Any]", value)
        found = {key: _put_back(now[key], item) if key in now else item for key, item in was.items()}
        now.clear()
        now.update(found)
        return now
    if isinstance(value, (list, deque)):
        items = cast("list[Any]", value)
        held = [_put_back(items[place], item) if place < len(items) else item for place, item in enumerate(was)]
        items.clear()
        items.extend(held)
        return items
    return was


def _is_plain(value: Any) -> bool:
    """Whether a value is numbers and strings, or a container of such."""
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, (list, deque, tuple, set)):
        return all(_is_plain(item) for item in cast("Iterable[Any]", value))
    return value is None or isinstance(value, (bool, int, float, str))


@contextmanager
def alone(accelerator: Any) -> Generator[None]:
    """Have nothing gathered over ranks inside: they need not compute the same losses at the same time."""
    with shadowed(accelerator, gather=_itself, gather_for_metrics=_itself, reduce=_itself):
        yield


def _itself(value: Any, *_: Any, **__: Any) -> Any:
    return value


@contextmanager
def shadowed(target: object, **attributes: Any) -> Generator[None]:
    """Give one object other methods for a while."""
    before = {name: vars(target)[name] for name in attributes if name in vars(target)}
    vars(target).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(target)[name]
        vars(target).update(before)


def check_loss(trainer: Trainer, batches: TrainerBatches, model: nn.Module) -> None:
    """Check on one batch, without a gradient, that the Trainer gets a loss for it.

    Args:
        trainer: the Trainer.
        batches: of the Trainer.
        model: its model.

    Raises:
        TitheError: when the collator gives no labels, or the model no loss.
    """
    found = next(iter(batches), None)
    if found is None:
        raise TitheError(
            "train_dataset", found="no batch", expected="data to train on", remedy="pass train_dataset= with samples"
        )
    loss = TrainerLoss(trainer)
    batch = loss.collated(found)
    names = list(trainer.label_names)
    unlabelled = bool(names) and not any(batch.get(name) is not None for name in names)
    try:
        with torch.no_grad(), evaluating(model):
            value: Any = loss(model, batch)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if unlabelled:
            raise _no_labels(trainer, batch, names) from error
        if "did not return a loss" in str(error):
            raise _no_loss(model, "an output without a loss", batch) from error
        raise
    except RuntimeError:
        return  # one that takes a gradient within itself; training says what else is wrong
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise _no_labels(trainer, batch, names) if unlabelled else _no_loss(model, what, batch)


def _no_labels(trainer: Trainer, batch: Mapping[str, Any], names: list[str]) -> TitheError:
    return TitheError(
        "data_collator",
        found=f"batches with {', '.join(batch) or 'nothing'}, and without {' or '.join(names)}",
        expected="labels to compute a loss from",
        remedy="give the dataset or the collator labels (DataCollatorForLanguageModeling(tokenizer, mlm=False) makes "
        "them from the text), or name yours in TrainingArguments(label_names=[…])",
    )


def _no_loss(model: nn.Module, what: str, batch: Mapping[str, Any]) -> TitheError:
    return TitheError(
        type(model).__name__,
        found=f"{what} from a batch with {', '.join(batch)}",
        expected="a loss, one number, which the Trainer reads from the output's loss or its first item",
        remedy="compute it in the model's forward, pass compute_loss_func=, or override compute_loss in the Trainer",
    )
