"""The table of what can be priced: a new method is one entry."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

import tithe
from tithe.app.price.draw import Drawn
from tithe.app.price.files import delta_bytes, file_bytes, network_bytes
from tithe.app.price.spanned import span
from tithe.app.price.subject import Subject
from tithe.errors import TitheError
from tithe.ledger import Blank, Ledger


@dataclass(frozen=True)
class Optimizer:
    """An optimizer, as far as memory goes.

    Args:
        make: builds it over parameters.
        states: tensors of a parameter's size that it keeps.
        temporaries: tensors of a parameter's size that one of its steps makes on the way.
    """

    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    states: int
    temporaries: int


OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw": Optimizer(lambda trained: torch.optim.AdamW(trained, lr=1e-3), 2, 2),
    "adam": Optimizer(lambda trained: torch.optim.Adam(trained, lr=1e-3), 2, 2),
    "sgd": Optimizer(lambda trained: torch.optim.SGD(trained, lr=1e-3), 0, 0),
    "momentum": Optimizer(lambda trained: torch.optim.SGD(trained, lr=1e-3, momentum=0.9), 1, 0),
}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What is asked for, whatever the method.

    Args:
        budget: what a sparse method may train.
        rank: of LoRA's matrices.
        optimizer: a key of `OPTIMIZERS`.
        checkpoints: that TWA averages.
        bits: of a weight in TWA's basis: 8, 4 or 1.
    """

    budget: tithe.Budget = field(default_factory=lambda: tithe.Budget(fraction=0.01))
    rank: int = 8
    optimizer: str = "adamw"
    checkpoints: int = 100
    bits: int = 8

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise TitheError(
                "optimizer", found=repr(self.optimizer), expected=" or ".join(OPTIMIZERS), remedy="name one of them"
            )
        if self.rank < 1:
            raise TitheError("rank", found=str(self.rank), expected="at least 1", remedy="--rank 8")
        if self.checkpoints < 1:
            raise TitheError(
                "checkpoints", found=str(self.checkpoints), expected="at least 1", remedy="--checkpoints 100"
            )
        if self.bits not in (8, 4, 1):
            raise TitheError("bits", found=str(self.bits), expected="8, 4 or 1", remedy="--bits 8")


def parse_budget(text: str) -> tithe.Budget:
    """A budget as it is typed: "1%" or "0.01" of the network, "2MB", or a number of elements.

    Raises:
        TitheError: it is none of these.

    Example:
        >>> parse_budget("0.5%").fraction, parse_budget("2MB").bytes, parse_budget("27946").elements
        (0.005, 2000000, 27946)
    """
    plain = text.strip().replace("_", "").replace(",", "")
    try:
        if plain.endswith("%"):
            return tithe.Budget(fraction=float(plain[:-1]) / 100)
        return tithe.Budget(elements=int(plain)) if plain.isdecimal() else tithe.Budget(fraction=float(plain))
    except ValueError:
        return tithe.Budget(text)


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where an offer is set up.

    Args:
        subject: what is priced.
        terms: what is asked for.
        blank: the shapes-only place of all that meets.
        model: the network, as it was built.
        num_samples: of the batch.
    """

    subject: Subject
    terms: Terms
    blank: Blank
    model: nn.Module
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model ready to train.

    Args:
        model: the module to run.
        trained: what the optimizer holds.
        file: bytes of what is saved.
        index: bytes of indices.
        basis: bytes of a mapped file that each step reads.
        write: bytes that writing what was trained into the weights takes on the way.
        operations: of a step beside those of forward and backward, for the gradients of trained values.
        sent: bytes that data-parallel ranks exchange in a step; None for the gradients.
        link: called when gradients were put in place by hand.
        predict: what a step on a batch takes, of a method that does more in it than the loss's forward and backward.
        undo: gives the model back.
    """

    model: nn.Module
    trained: list[nn.Parameter]
    file: int
    index: int = 0
    basis: int = 0
    write: int = 0
    operations: int = 0
    sent: int | None = None
    link: Callable[[], object] = lambda: None
    predict: Callable[[Any], Ledger] | None = None
    undo: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One method, ready to be priced.

    Args:
        name: its row.
        prepare: sets it up; raises TitheError where the model, the budget or the machine does not allow it.
        budgeted: whether `Terms.budget` says how much it trains.
        per_batch: whether a budget in bytes makes its choice depend on the size of the batch.
        foreign: the package that changes the model's layers, when it is not this one.
    """

    name: str
    prepare: Callable[[Site], Setup]
    budgeted: bool = False
    per_batch: bool = False
    foreign: str | None = None


def _dense(site: Site, names: Collection[str]) -> Setup:
    """Ordinary training of these parameters; norms none of which is trained keep their statistics, as in a recipe."""
    model, before = site.model, {name: p.requires_grad for name, p in site.model.named_parameters()}
    whole = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in whole)
    still = [
        m for m in model.modules() if isinstance(m, _NormBase) and not any(p.requires_grad for p in m.parameters())
    ]
    still = [module for module in still if next(module.parameters(), None) is not None]
    for module in still:
        module.eval()

    def undo() -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
        for module in still:
            module.train()

    state: dict[str, Tensor] = model.state_dict()
    file = delta_bytes(state, {}, (whole | _moving(model, whole)) & set(state))
    return Setup(model=model, trained=[p for p in model.parameters() if p.requires_grad], file=file, undo=undo)


def _moving(model: nn.Module, trained: Collection[str]) -> set[str]:
    """Running statistics that training moves: of norms without weights of their own, or with a trained value."""
    names = {name.rpartition(".")[0] for name in trained}
    return {
        f"{path}.{key}" if path else key
        for path, module in model.named_modules()
        if isinstance(module, _NormBase) and (path in names or not module.affine)
        for key in module._buffers
    }


def _full(site: Site) -> Setup:
    return _dense(site, [name for name, p in site.model.named_parameters() if torch.is_floating_point(p)])


def _head(site: Site) -> Setup:
    if not site.subject.head:
        raise TitheError("head", found="none", expected="a head of its own", remedy="name one, or leave this row out")
    return _dense(site, _names(site.model, site.subject.head))


def _names(model: nn.Module, head: Collection[str]) -> set[str]:
    from fnmatch import fnmatchcase

    return {name for name, _ in model.named_parameters() if any(fnmatchcase(name, glob) for glob in head)}


def _lora(site: Site) -> Setup:
    if importlib.util.find_spec("peft") is None:
        raise TitheError("peft", found="no such package", expected="it installed", remedy="pip install peft")
    import peft

    model = site.subject.make(site.blank)  # adapters change the modules: a network of its own
    head = {name.rpartition(".")[0] for name in _names(model, site.subject.head)}
    targets = [
        path
        for path, module in model.named_modules()
        if path not in head and (_is_linear(module) or (isinstance(module, nn.Conv2d) and module.groups == 1))
    ]
    if not targets:
        raise TitheError("LoRA", found="no linear layer", expected="one to adapt", remedy="leave this row out")
    config = peft.LoraConfig(
        r=site.terms.rank, target_modules=targets, modules_to_save=sorted(head) or None, lora_dropout=0.0
    )
    before = set(model.parameters())
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()), site.blank:
        warnings.simplefilter("ignore")
        adapted: Any = peft.get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    inner: nn.Module = adapted.get_base_model().train()
    trained = [p for p in inner.parameters() if p.requires_grad]
    added = [(n, p.dtype, p.shape) for n, p in inner.named_parameters() if p.requires_grad and p not in before]
    file = file_bytes([(f"base_model.model.{name}", dtype, shape) for name, dtype, shape in added], {"format": "pt"})
    return Setup(model=inner, trained=trained, file=file)


def _is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D is a linear layer stored the other way around; it is told by name to need no import.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _plan(site: Site, method: Any, *, lean: bool) -> Setup:
    subject, model = site.subject, site.model
    batch = subject.draw(site.blank, site.num_samples)
    state: dict[str, Tensor] = model.state_dict()
    handle = tithe.lean(model) if lean else None
    try:
        plan = tithe.attach(model, method, loss=subject.loss, data=[batch], head=subject.head)
    except BaseException:
        if handle is not None:
            handle.release()
        raise

    def undo() -> None:
        plan.release()
        if handle is not None:
            handle.release()

    try:
        optimizer = OPTIMIZERS[site.terms.optimizer].make(list(plan.parameters()))
        plan.bind(optimizer, elementwise=True)
        selected = {name: selection.size for name, selection in plan.selections.items()}
        moving = _moving(model, [*selected, *plan.head]) & set(state)
        file = delta_bytes(state, selected, {*plan.head, *moving})
    except BaseException:
        undo()
        raise
    return Setup(
        model=model,
        trained=[p for p in plan.parameters() if p.requires_grad],
        file=file,
        index=plan.index_bytes,
        link=plan.parameters,
        undo=undo,
    )


def _fish(site: Site, *, lean: bool) -> Setup:
    budget, states = site.terms.budget, OPTIMIZERS[site.terms.optimizer].states
    if budget.fraction is not None:
        return _plan(site, Drawn(density=budget.fraction), lean=lean)
    if budget.flops is not None:
        raise TitheError("budget", found="FLOPs", expected="a fraction, elements or bytes", remedy="--budget 1%")
    k = budget.of(0)
    if budget.bytes is not None:
        head = sum(site.model.get_parameter(name).nbytes for name in _names(site.model, site.subject.head))
        # A value, its gradient and states, and an index of 8 bytes.
        each = (2 + states) * site.subject.dtype.itemsize + 8
        k = (budget.bytes - head * (1 + states)) // each
        if k < 1:
            raise TitheError(
                "budget",
                found=f"{budget.bytes:,} bytes",
                expected=f"more than the head's gradient and optimizer state, {head * (1 + states):,} bytes",
                remedy="raise the budget",
            )
    return _plan(site, Drawn(k=k), lean=lean)


def _trady(site: Site) -> Setup:
    return _plan(site, tithe.TraDy(site.terms.budget, layers="all", lean=True), lean=False)


def _vrpge(site: Site) -> Setup:
    """The networks of a first step, drawn where every unit is as likely as any other."""
    subject, model, keep = site.subject, site.model, site.terms.budget.fraction
    if keep is None:
        raise TitheError(
            "budget",
            found="an amount",
            expected="a fraction: what is kept of the operations of a forward pass",
            remedy="--budget 40%",
        )
    state: dict[str, Tensor] = model.state_dict()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = subject.loss(model, batch)
        # What has no gradient is compared: that two networks give one loss. Without data all losses are alike.
        return found if torch.is_grad_enabled() else torch.zeros(())

    batch = subject.draw(site.blank, site.num_samples)
    plan = tithe.attach(model, tithe.VRPGE(keep, cost="flops"), loss=loss, data=[batch], head=subject.head)
    drawn, _ = plan.probabilities.draw(plan.seed, plan.num_steps)
    shapes = {name: grid.theta_shape for name, grid in plan.stage.grids(drawn).items()}
    return Setup(
        model=model,
        trained=list(plan.parameters()),
        file=network_bytes(state, shapes, plan.stage.numbers(model)),
        index=plan.index_bytes,
        predict=plan.predict,
        undo=plan.release,
    )


def _twa(site: Site) -> Setup:
    """Every weight in the span of checkpoints of the whole network, the head's among them."""
    model, terms = site.model, site.terms
    state: dict[str, Tensor] = model.state_dict()
    found = span(model, site.blank, num_vectors=terms.checkpoints, bits=terms.bits)
    return Setup(
        model=model,
        trained=[found.theta],
        file=delta_bytes(state, {}, set(state)),
        index=found.index,
        basis=found.basis,
        write=found.write,
        operations=found.operations,
        sent=found.sent,
        undo=found.release,
    )


OFFERS: Mapping[str, Offer] = {
    "full": Offer(name="full", prepare=_full),
    "head": Offer(name="head only", prepare=_head),
    "lora": Offer(name="LoRA", prepare=_lora, foreign="peft"),
    "fish": Offer(name="FISH", prepare=lambda site: _fish(site, lean=False), budgeted=True),
    "fish+lean": Offer(name="FISH + lean", prepare=lambda site: _fish(site, lean=True), budgeted=True),
    "trady": Offer(name="TraDy + lean", prepare=_trady, budgeted=True, per_batch=True),
    "vrpge": Offer(name="VR-PGE", prepare=_vrpge, budgeted=True),
    "twa": Offer(name="TWA", prepare=_twa),
}
