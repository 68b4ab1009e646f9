"""A recipe's model and data, made ready to try averages: put weights in, estimate statistics, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

import tithe
from tithe import History, TitheError
from tithe.app.train.data import Batches, Samples, chunks, epoch_order, even_chunks, read_examples
from tithe.app.train.fitting import check_fits
from tithe.app.train.models import answer, build, find_model, score
from tithe.app.train.recipe import Recipe
from tithe.app.train.setup import make_accelerator
from tithe.app.train.tasks import task_of
from tithe.app.train.terms import merit
from tithe.forward import estimate_statistics, tracked, training

TUNING: Final = 0.5
"""The part of the validation split that TWA-v trains on; everything is chosen by the rest."""

_STATISTICS: Final = 64
"""Batches that statistics are estimated on, at most."""

_FORWARD, _STEP = 1.0, 3.0
"""What an example costs, in forward passes."""


class Bench:
    """A network of a recipe, into which checkpoints and their averages are put.

    Args:
        recipe: model, data, metrics, batch sizes, seed and device; its method is not used.
        history: the checkpoints.
        progress: called with the examples done, counted in forward passes, and how many there will be.

    Raises:
        TitheError: when data or model are not as the recipe says, or the checkpoints are of another model.
    """

    def __init__(self, recipe: Recipe, history: History, progress: Callable[[float, float], None]) -> None:
        find_model(recipe)
        self.recipe, self.history, self._progress = recipe, history, progress
        self._examples = read_examples(recipe)
        self._accelerator = make_accelerator(recipe)
        if self._accelerator.num_processes > 1:
            raise TitheError(
                "average", found="several processes", expected="one", remedy="run it without torchrun or accelerate"
            )
        self.device = self._accelerator.device
        set_seed(recipe.run.seed)
        network = build(recipe, self._examples)
        self.model = network.model.to(self.device)
        self.task = task_of(recipe)
        self.loss = self.task.loss
        self.samples = {
            name: Samples(rows, self._examples.targets[name], network.encoder)
            for name, rows in self._examples.splits.items()
        }
        told = [f"{name}: {note}" for name, samples in self.samples.items() for note in samples.notes]
        self.notes = [*self._examples.notes, *network.notes, *told]
        check_fits(recipe, network, self.samples, len(self._examples.labels), self.device)
        order = epoch_order(len(self.samples["validation"]), seed=recipe.data.split_seed, epoch=0)
        cut = round(TUNING * len(order))
        if not 0 < cut < len(order):
            raise TitheError(
                recipe.place("data", "validation"),
                found=f"{len(order)} validation examples",
                expected="at least two: one part trains TWA-v, the other is what everything is chosen by",
                remedy="give a larger validation split, or raise validation_fraction",
            )
        self.tuning, self.selection = sorted(order[:cut]), sorted(order[cut:])
        run = recipe.run
        rows = epoch_order(len(self.samples["train"]), seed=run.seed, epoch=-1)[: _STATISTICS * run.batch_size]
        self.statistics = Batches(self.samples["train"], even_chunks(rows, run.batch_size), self.device)
        self._fit_history()
        with training(self.model):
            self.has_statistics = bool(tracked(self.model))
        self._done = self._planned = 0.0

    def _fit_history(self) -> None:
        """Find the model's tensors that checkpoints have, and what deltas leave alone."""
        history, first = self.history, self.history.rows.paths[0]
        if first.is_file() and first.suffix == ".safetensors" and not history.partial and _is_delta(first):
            tithe.apply(self.model, first)  # a narrow network: the model becomes one
        state = _state(self.model)
        self.base = {name: tensor.detach().clone() for name, tensor in state.items()} if history.partial else None
        self.rows = history if self.base is None else history.on(self.base)
        forms, places = self.rows.rows.forms, self.rows.rows.places
        own = {_storage(tensor) for name, tensor in state.items() if name in forms}
        lacking = [name for name, tensor in state.items() if name not in forms and _storage(tensor) not in own]
        if lacking and not history.partial:
            raise _other(lacking[0], "no such tensor in the checkpoints", f"one, as in the model ({len(lacking)} lack)")
        for name, form in forms.items():
            if name not in state:
                raise _other(name, "no such tensor in the model", f"one, as in {first}")
            shape = (places[name].numel(),) if name in places else tuple(state[name].shape)
            if form.shape != shape:
                raise _other(name, f"shape {list(form.shape)} in {first}", f"{list(shape)}, as in the model")
        self.tensors = {name: state[name] for name in forms}

    # ------------------------------------------------------------------------------------------------------ weights

    def put(self, values: Callable[[str], Tensor]) -> None:
        """Write weights and buffers into the model.

        Args:
            values: name in the history → its values; of a delta those at its places.
        """
        self.restore()
        places = self.rows.rows.places
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                if name in places:
                    flat = tensor.reshape(-1)
                    flat[places[name].to(tensor.device)] = values(name).to(tensor)
                    tensor.copy_(flat.view(tensor.shape))
                else:
                    tensor.copy_(values(name).view(tensor.shape))

    def put_average(self, weights: Sequence[float]) -> None:
        """Write the weighted sum of checkpoints."""
        self.put(lambda name: self.rows.average_tensor(name, weights))

    def put_checkpoint(self, index: int) -> None:
        """Write one checkpoint into the model."""
        self.put(lambda name: self.rows.rows.tensor(index, name))

    def restore(self) -> None:
        """Of deltas, go back to the base."""
        if self.base is not None:
            state = _state(self.model)
            with torch.no_grad():
                for name, tensor in self.base.items():
                    state[name].copy_(tensor)

    def snapshot(self) -> dict[str, Tensor]:
        """All of the model's tensors, copied to the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in _state(self.model).items()}

    def estimate(self) -> None:
        """Estimate running statistics anew, on training batches; nothing where norms keep none."""
        if self.has_statistics:
            estimate_statistics(self.model, self.loss, self.statistics)
            self.advance(self.estimate_cost)

    # ------------------------------------------------------------------------------------------------------- scores

    def evaluate(self, split: str, rows: Sequence[int] | None = None) -> dict[str, float]:
        """The recipe's metrics, in evaluation mode.

        Args:
            split: "train", "validation" or "test".
            rows: of it; None for all.
        """
        samples, run = self.samples[split], self.recipe.run
        rows = range(len(samples)) if rows is None else rows
        batches, mode = (
            Batches(samples, chunks(rows, self.recipe.evaluated_at_once), self.device, run.workers),
            self.model.training,
        )
        with self.autocast():
            answers = answer(self.task, self.model, batches, progress=lambda done: self.advance(_FORWARD * done))
        self.model.train(mode)
        return score(self.recipe, answers, self._examples.labels)

    def select(self) -> dict[str, float]:
        """The metrics on the rows that everything is chosen by."""
        return self.evaluate("validation", self.selection)

    def merit(self) -> float:
        """The first metric on those rows, as a number of which more is better."""
        return merit(*next(iter(self.select().items())))

    def test(self) -> dict[str, float]:
        """The metrics on the test split; empty where there is none."""
        return self.evaluate("test") if "test" in self.samples else {}

    def autocast(self) -> Any:
        """Compute in the recipe's precision inside the block."""
        return self._accelerator.autocast()

    # ----------------------------------------------------------------------------------------------------- progress

    @property
    def estimate_cost(self) -> float:
        """What estimating statistics costs."""
        return _FORWARD * sum(map(len, self.statistics.rows)) * self.has_statistics

    @property
    def select_cost(self) -> float:
        """What a look at the selection rows costs."""
        return _FORWARD * len(self.selection)

    @property
    def test_cost(self) -> float:
        """What a look at the test split costs."""
        return _FORWARD * len(self.samples["test"]) if "test" in self.samples else 0.0

    def step_cost(self, num_examples: int) -> float:
        """Say what training on so many examples costs."""
        return _STEP * num_examples

    def plan(self, cost: float) -> None:
        """Say what is still to come, in forward passes of one example."""
        self._planned = self._done + cost

    def advance(self, cost: float) -> None:
        """Say that so much is done."""
        self._done += cost
        self._progress(self._done, self._planned)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state, sharing its memory."""
    state: dict[str, object] = dict(model.state_dict())
    return {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}


def _is_delta(path: Path) -> bool:
    try:
        tithe.inspect(path)
    except TitheError:
        return False
    return True


def _storage(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


def _other(name: str, found: str, expected: str) -> TitheError:
    return TitheError(name, found=found, expected=expected, remedy="name the recipe that the checkpoints are of")


def split_sizes(bench: Bench) -> Mapping[str, int]:
    """How many examples each part of the data has."""
    sizes = {"train": len(bench.samples["train"]), "tuning": len(bench.tuning), "selection": len(bench.selection)}
    return sizes | ({"test": len(bench.samples["test"])} if "test" in bench.samples else {})
