"""What a run trains, under one set of verbs: a `tithe.Plan`, or the ordinary fine-tuning it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import tithe
from tithe.app.train.data import Batch
from tithe.app.train.method import DenseMethod, TradyMethod, VrpgeMethod
from tithe.app.train.models import Network
from tithe.app.train.recipe import OptimizerSection, Recipe
from tithe.errors import TitheError

Loss = Callable[[nn.Module, Batch], Tensor]


class Trainee(Protocol):
    """The verbs of `tithe.Plan` that the loop uses."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """What the optimizer trains."""
        ...

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The same, with the model's names."""
        ...

    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """Run the closure and its backward; return the loss."""
        ...

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow an optimizer's steps."""
        ...

    def step(self) -> bool:
        """Count a step; True when what is trained has changed."""
        ...

    def end_epoch(self) -> bool:
        """Count an epoch; True when what is trained has changed."""
        ...

    def save(self, path: Path, *, metadata: Mapping[str, str]) -> None:
        """Write the delta."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that was trained, compact."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state."""
        ...

    def release(self) -> None:
        """Give the model back."""
        ...


class Dense:
    """Ordinary fine-tuning of some whole parameters, with the verbs of a plan.

    Args:
        model: the module; what is not trained gets `requires_grad` False.
        trained: names of the parameters to train.
    """

    def __init__(self, model: nn.Module, trained: Iterable[str]) -> None:
        names = set(trained)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        self.model = model
        self._names = [name for name, _ in model.named_parameters() if name in names]
        kept = {**dict(model.named_buffers()), **{name: model.get_parameter(name) for name in self._names}}
        stored = model.state_dict()
        self._start = {name: tensor.detach().clone() for name, tensor in kept.items() if name in stored}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters by name."""
        return ((name, self.model.get_parameter(name)) for name in self._names)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained parameters."""
        return (parameter for _, parameter in self.named_parameters())

    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """One forward and backward."""
        loss = closure()
        loss.backward()
        return loss

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing follows from a step here."""

    def step(self) -> bool:
        """What is trained never changes."""
        return False

    def end_epoch(self) -> bool:
        """What is trained never changes."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """The trained parameters and the buffers, whole."""
        state = self.model.state_dict()
        return {name: state[name] for name in self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Write them back."""
        own = self.model.state_dict()
        with torch.no_grad():
            for name in self._start:
                own[name].copy_(state[name])

    def save(self, path: Path, *, metadata: Mapping[str, str]) -> None:
        """Write what differs from the start."""
        tithe.diff({**self.model.state_dict(), **self._start}, self.model, path, metadata=metadata)

    def release(self) -> None:
        """Nothing was put on the model."""


def find_method(recipe: Recipe) -> None:
    """Check that what the method reads is there.

    Raises:
        TitheError: the ranking that the recipe names is missing or damaged.
    """
    if isinstance(recipe.method, TradyMethod):
        try:
            recipe.method.make(recipe.folder)
        except TitheError as error:
            place = f"{recipe.place('method', 'ranking')}: {error.place}"
            raise TitheError(place, found=error.found, expected=error.expected, remedy=error.remedy) from error


def attach(
    recipe: Recipe,
    network: Network,
    loss: Loss,
    data: Iterable[Batch],
    state: Mapping[str, Any] | None,
    *,
    structure_steps: int,
) -> Trainee:
    """Make the recipe's method ready to train.

    Args:
        recipe: the run.
        network: its model, on its device.
        loss: mean loss of a batch.
        data: batches to choose by.
        state: a `state_dict` of the same run; its choice is taken and nothing is scored.
        structure_steps: in which the network's widths are still being learned.
    """
    method = recipe.method
    if method.lean:
        # Before the choice is made, which then keeps no more than training does. It goes with the model.
        tithe.lean(network.model, method.lean_bits, exact=bool(method.lean_exact))
    if isinstance(method, DenseMethod):
        names = [name for name, _ in network.model.named_parameters()]
        dense = Dense(network.model, names if method.name == "full" else network.head)
        if state is not None:
            dense.load_state_dict(state)
        return dense
    try:
        plan = tithe.attach(
            network.model,
            method.make(structure_steps) if isinstance(method, VrpgeMethod) else method.make(recipe.folder),
            loss=loss,
            data=data,
            where=method.where,
            head=network.head,
            seed=recipe.run.seed,
            state=None if state is None else dict(state),
        )
    except TitheError as error:
        place = f"{recipe.place('method')}: {error.place}"
        raise TitheError(place, found=error.found, expected=error.expected, remedy=error.remedy) from error
    return plan


def make_optimizer(section: OptimizerSection, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimizer over these parameters."""
    trained = [{"params": list(parameters), "initial_lr": section.lr}]  # as torch's own schedulers note it
    if section.name == "sgd":
        return torch.optim.SGD(trained, section.lr, momentum=section.momentum, weight_decay=section.weight_decay)
    kind = torch.optim.AdamW if section.name == "adamw" else torch.optim.Adam
    return kind(trained, section.lr, weight_decay=section.weight_decay)


def optimizer_state(optimizer: torch.optim.Optimizer, trainee: Trainee) -> dict[str, dict[str, Any]]:
    """The optimizer's state by parameter name; its settings are the recipe's.

    By name and not by number: a plan that was resumed after its warm-up no longer lists the tensors it left out.
    """
    states = {id(parameter): dict(state) for parameter, state in optimizer.state.items()}
    return {name: states[id(parameter)] for name, parameter in trainee.named_parameters() if id(parameter) in states}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, trainee: Trainee, state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Undo `optimizer_state` on an optimizer that has not stepped yet."""
    names = {id(parameter): name for name, parameter in trainee.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    numbered = {number: dict(state[name]) for number, name in enumerate(order) if name in state}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def train_mode(model: nn.Module, trainee: Trainee) -> None:
    """Put the model in training mode; norms that are not trained keep their statistics.

    A plan under which the rest is frozen or absent sees to its own norms.
    """
    model.train()
    if isinstance(trainee, Dense):
        moving = {name for name, _ in trainee.named_parameters()}
    elif isinstance(trainee, tithe.SubspacePlan):
        moving = set(trainee.selections)
    else:
        return
    for path, module in model.named_modules():
        own = {f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
        if own and not own & moving:
            module.train(module.training and not isinstance(module, nn.modules.batchnorm._BatchNorm))  # pyright: ignore[reportPrivateUsage]


def trained_counts(trainee: Trainee, head: Iterable[str], num_weights: int) -> dict[str, Any]:
    """How many numbers are trained: in all, of the head, and as a share of the model's.

    Args:
        trainee: what is trained.
        head: names of the head's parameters.
        num_weights: of the model at full width.
    """
    counts = {name: parameter.numel() for name, parameter in trainee.named_parameters()}
    total, names = sum(counts.values()), set(head)
    return {
        "total": total,
        "head": sum(count for name, count in counts.items() if name in names),
        "model": num_weights,
        "fraction": total / num_weights,
    }


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors of an optimizer's state."""
    values = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.nbytes for value in values)
