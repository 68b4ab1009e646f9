"""The table of what can be priced: the baselines, and the rows of `tithe.app.methods`.

How a row is set up follows from the kind of plan that its method asks for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

import tithe
from tithe.app.dense import Dense
from tithe.app.methods import METHODS, PriceRow
from tithe.app.price.checkpointing import checkpoint
from tithe.app.price.four_bit import store_in_four_bits
from tithe.app.price.quote import FULL
from tithe.app.price.terms import OPTIMIZERS, Site, glob_names, model_bytes
from tithe.delta.size import delta_bytes, file_bytes, network_bytes
from tithe.errors import TitheError, TitheWarning
from tithe.ledger import Ledger
from tithe.plan.outlined import span


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
        weights: bytes of the model's parameters and buffers; None for what they are as it was built.
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
    weights: int | None = None
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
        on_request: whether it is priced only where it is named.
        like: key of an offer with the same figures.
        note: what to know about the row.
    """

    name: str
    prepare: Callable[[Site], Setup]
    budgeted: bool = False
    per_batch: bool = False
    on_request: bool = False
    like: str | None = None
    foreign: str | None = None
    note: str = ""


def _moving(model: nn.Module, trained: Collection[str]) -> set[str]:
    """Running statistics that training moves: of norms without weights of their own, or with a trained value."""
    names = {name.rpartition(".")[0] for name in trained}
    return {
        f"{path}.{key}" if path else key
        for path, module in model.named_modules()
        if isinstance(module, _NormBase) and (path in names or not module.affine)
        for key in module._buffers
    }


def _full(site: Site, *, lean: bool = False) -> Setup:
    names = [name for name, p in site.model.named_parameters() if torch.is_floating_point(p)]
    return _attached(site, lambda: Dense(site.model, names), lean=lean)


def _full_checkpointed(site: Site) -> Setup:
    undo = checkpoint(site.model)
    try:
        setup = _full(site)
    except BaseException:
        undo()
        raise
    before = setup.undo

    def give_back() -> None:
        before()
        undo()

    return dataclasses.replace(setup, undo=give_back)


def _head(site: Site) -> Setup:
    if not site.subject.head:
        raise TitheError("head", found="none", expected="a head of its own", remedy="name one, or leave this row out")
    return _attached(site, lambda: Dense(site.model, glob_names(site.model, site.subject.head)))


def _lora(
    site: Site, change: Callable[[nn.Module], Callable[[], None]] | None = None, *, four_bits: bool = False
) -> Setup:
    """Set up PEFT's adapters on a network of their own, which other rows use again.

    Args:
        site: where.
        change: what is done to the network that runs; it returns what undoes it.
        four_bits: whether the linear layers are stored in four bits.
    """
    key = "four bits" if four_bits else "adapters"
    if key not in site.shared:
        site.shared[key] = _adapted(site, four_bits=four_bits)
    setup: Setup = site.shared[key]
    return setup if change is None else dataclasses.replace(setup, undo=change(setup.model))


def _adapted(site: Site, *, four_bits: bool) -> Setup:
    if importlib.util.find_spec("peft") is None:
        raise TitheError("peft", found="no such package", expected="it installed", remedy="pip install peft")
    import peft

    model = site.copy()
    head = {name.rpartition(".")[0] for name in glob_names(model, site.subject.head)}
    weights = None
    if four_bits:
        if not store_in_four_bits(model, site.blank, but=head | _outputs(model)):
            raise TitheError(
                "4-bit", found="no linear layer but the head", expected="one to store", remedy="leave this row out"
            )
        weights = model_bytes(model)
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
    return Setup(model=inner, trained=trained, file=file, weights=weights)


def _outputs(model: nn.Module) -> set[str]:
    """The layers that give a language model's logits, which stay whole as in transformers' own loading in four bits."""
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    last = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    return {p for p, m in model.named_modules() if isinstance(m, nn.Linear) and id(m.weight) in tied} | set(last)


def _is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D is a linear layer stored the other way around; it is told by name to need no import.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _attached(site: Site, attach: Callable[[], tithe.Plan], *, lean: bool = False) -> Setup:
    """Set up a plan under which everything exists."""
    model, before = site.model, contextlib.ExitStack()
    state: dict[str, Tensor] = model.state_dict()
    before.callback(model.train)
    try:
        if lean:
            before.callback(tithe.lean(model).release)
        plan = attach()
        before.callback(plan.release)
        plan.train_mode()
        plan.bind(OPTIMIZERS[site.terms.optimizer].make(list(plan.parameters())), elementwise=True)
        selected = {name: selection.size for name, selection in plan.selections.items()}
        moving = _moving(model, [*selected, *plan.head]) & set(state)
        file = delta_bytes(state, selected, {*plan.head, *moving})
    except BaseException:
        before.close()
        raise
    return Setup(
        model=model,
        trained=[p for p in plan.parameters() if p.requires_grad],
        file=file,
        index=plan.index_bytes,
        link=plan.parameters,
        undo=before.close,
    )


@final
@dataclass(frozen=True)
class _Maker:
    """Sets up what a method asks for, as `tithe.attach` makes its plan.

    Args:
        site: where.
        lean: whether all layers are made lean first.
    """

    site: Site
    lean: bool

    def sparse(self, method: tithe.SparseMethod) -> Setup:
        """Set up a plan under which what is not selected stays frozen."""
        subject, model = self.site.subject, self.site.model
        batch = subject.draw(self.site.blank, self.site.num_samples)
        return _attached(
            self.site,
            lambda: tithe.attach(model, method, loss=subject.loss, data=[batch], head=subject.head),
            lean=self.lean,
        )

    def narrow(self, method: tithe.NarrowMethod) -> Setup:
        """Set up the networks of a first step, drawn where every unit is as likely as any other."""
        return self._absent(method, lambda plan: plan.structure.draw(plan.seed, plan.num_steps)[0])

    def cut(self, method: tithe.CutMethod) -> Setup:
        """Set up the network before the first cut; its file is what the last one leaves where scores are even."""

        def left(plan: tithe.NarrowPlan) -> Tensor:
            units = plan.stage.coupling.num_units
            whole = torch.ones(units, dtype=torch.bool)
            plan.structure.remember(whole, whole, None, torch.ones(units))
            return plan.structure.candidates(plan.seed, plan.num_steps, 0)[0]

        return self._absent(method, left)

    def _absent(
        self, method: tithe.NarrowMethod | tithe.CutMethod, written: Callable[[tithe.NarrowPlan], Tensor]
    ) -> Setup:
        """Set up a plan under which units are absent; `written` says which of them are in its file."""
        subject, model = self.site.subject, self.site.model
        state: dict[str, Tensor] = model.state_dict()

        def loss(model: nn.Module, batch: Any) -> Tensor:
            found = subject.loss(model, batch)
            # What has no gradient is compared: that two networks give one loss. Without data all losses are alike.
            return found if torch.is_grad_enabled() else torch.zeros(())

        batch = subject.draw(self.site.blank, self.site.num_samples)
        with warnings.catch_warnings():  # half precision, which is asked for here, is no news
            warnings.filterwarnings("ignore", message=".*rounds small updates away", category=TitheWarning)
            plan = tithe.attach(model, method, loss=loss, data=[batch], head=subject.head)
        shapes = {name: grid.theta_shape for name, grid in plan.stage.grids(written(plan)).items()}
        return Setup(
            model=model,
            trained=list(plan.parameters()),
            file=network_bytes(state, shapes, plan.widths()),
            index=plan.index_bytes,
            predict=plan.predict,
            undo=plan.release,
        )

    def subspace(self, method: tithe.SubspaceMethod) -> Setup:
        """Set up every weight in the span of checkpoints of the whole network, the head's among them."""
        model, terms = self.site.model, self.site.terms
        state: dict[str, Tensor] = model.state_dict()
        found = span(model, self.site.blank, num_vectors=terms.checkpoints, bits=method.bits or terms.bits)
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


def _offer(row: PriceRow) -> Offer:
    return Offer(
        name=row.name,
        prepare=lambda site: row.make(site).make_plan(_Maker(site, row.lean)),
        budgeted=row.budgeted,
        per_batch=row.per_batch,
        on_request=row.on_request,
        like=row.like,
        note=row.note,
    )


_CHECKPOINT_NOTE = (
    "ckpt is the model's own gradient checkpointing: each layer's input is kept, and the layer runs again in backward, "
    "which input ∇ counts."
)
_FOUR_BITS_NOTE = (
    "QLoRA assumes linear layers stored in NF4, one float32 scale for 64 weights (4.5 bits a weight), made whole one "
    "at a time in forward and backward; head, output layer, embeddings and norms keep their dtype."
)


OFFERS: Mapping[str, Offer] = {
    "full": Offer(name=FULL, prepare=_full),
    "full+lean": Offer(name="full + lean", prepare=lambda site: _full(site, lean=True)),
    "full+ckpt": Offer(name="full + ckpt", prepare=_full_checkpointed, note=_CHECKPOINT_NOTE),
    "head": Offer(name="head only", prepare=_head),
    "lora": Offer(name="LoRA", prepare=_lora, foreign="peft"),
    "lora+lean": Offer(
        name="LoRA + lean", prepare=lambda site: _lora(site, lambda model: tithe.lean(model).release), foreign="peft"
    ),
    "lora+ckpt": Offer(
        name="LoRA + ckpt", prepare=lambda site: _lora(site, checkpoint), foreign="peft", note=_CHECKPOINT_NOTE
    ),
    "qlora": Offer(
        name="QLoRA", prepare=lambda site: _lora(site, four_bits=True), foreign="peft", note=_FOUR_BITS_NOTE
    ),
    **{row.key: _offer(row) for entry in METHODS for row in entry.prices},
}

USUAL = tuple(key for key, offer in OFFERS.items() if not offer.on_request)
"""What is priced where no method is named."""
