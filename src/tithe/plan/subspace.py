"""A plan under which weights move together, in the span of the checkpoints of a history."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tithe import delta, distributed, ledger
from tithe.averages import Basis, History, TensorColumns, orthonormal, strips
from tithe.errors import TitheError, TitheWarning
from tithe.forward import estimate_statistics, tracked, training
from tithe.method import SubspaceMethod
from tithe.plan.align import find_places, start_weights
from tithe.plan.base import Plan, Settings
from tithe.plan.mount import Mount
from tithe.plan.optimizers import num_states
from tithe.plan.rank_means import mean_gradients, mean_statistics
from tithe.plan.shared_theta import ThetaSharing, in_order
from tithe.plan.suggested_rate import Movable, Whole, scale_of
from tithe.rules import SharedTheta
from tithe.scoring import check_loss
from tithe.selection import Coordinates, Selection, Span

FORMAT = 1


class SubspacePlan(Plan):
    """A model whose weights are coordinates in the span of checkpoints. Made by `attach`.

    On several ranks each holds an equal part of the columns of all checkpoints, and gradients are averaged by
    `backward`: the model is not to be wrapped in DistributedDataParallel.
    """

    averages_gradients = True
    shares_work = True

    def __init__(self, model: nn.Module, method: SubspaceMethod, settings: Settings) -> None:
        super().__init__(model, settings)
        self.method, split = method, self._split
        split.check_memory("moves, or takes the checkpoints' values")
        split.warn_of_half(split.head, "the head of such a plan is trained as it is")
        self._dtype = _theta_dtype(settings.dtype, next(iter(self._floats.values())).dtype)
        self.history = method.history if isinstance(method.history, History) else History(method.history)
        found = find_places(self.history, model, split)
        weights = start_weights(self.history, method.start)
        self._mixed = torch.tensor(weights, dtype=torch.float64)
        self._required = {name: p.requires_grad for name, p in split.floats.items()}
        order = in_order({name: split.floats[name].numel() for name in found.moving})
        moving = {name: split.floats[name] for name in order}
        columns = strips(found.rows, [found.moving[name] for name in order])
        total, world = columns[-1].stop, distributed.world_size()
        each = -(-total // world)
        first = min(distributed.rank() * each, total)
        device = next(iter(moving.values())).device
        bits = method.bits if method.bits is not None else self.history.bits
        blocks = (first, first + each) if world > 1 else None
        self.basis = Basis(found.rows, columns, bits=bits, start=weights, blocks=blocks, device=device)
        values = {name: found.start(name, weights) for name in found.rest}  # all, before any is written
        with torch.no_grad():
            for name, tensor in found.rest.items():
                tensor.copy_(values[name].view(tensor.shape))
        self._rest = tuple(found.rest)
        self._mount = Mount(model, moving, self._head, settings.outside)
        self.theta, spans = self._spans(found.places, {name: tuple(p.shape) for name, p in moving.items()})
        shared = SharedTheta(self.theta, list(moving))
        bindings = [self._mount.bindings[name] for name in moving]
        for binding in bindings:
            binding.common = shared
        self._mount.show_root(self.theta)
        self._sharing = ThetaSharing(shared, bindings, spans, self.basis)
        self._handle: Any = model.register_forward_pre_hook(self._sharing)
        for name, parameter in split.floats.items():
            parameter.requires_grad_(name in self._head)
        self._sharing.commit(force=True)
        with training(model):
            self._norms = len(tracked(model))
        self._stale = self._norms > 0
        self._spans_by_name = dict(zip(moving, spans, strict=True))

    def _spans(
        self, places: Mapping[str, Tensor | None], shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[nn.Parameter, list[Span]]:
        """θ at its start, and the selection of every weight."""
        basis = self.basis
        device = basis.device
        columns = [TensorColumns(basis, strip) for strip in basis.columns]
        distributed.meet("the products of checkpoints")
        self._gram, squares, offsets = (
            distributed.sum_(t.to(device)).cpu() for t in (basis.gram, basis.squares, basis.offsets)
        )
        if self.method.granularity == "model":
            mix = distributed.first(orthonormal(self._gram).to(device)).cpu()
            origins = [mix.T @ offsets] * len(columns)
            mixes, start = [mix] * len(columns), origins[0]
        else:
            lengths = squares.sqrt()
            scales = torch.where(lengths > 1e-12 * lengths.max(), 1 / lengths, 0.0)
            mixes = [torch.diag(row) for row in scales]
            start = torch.zeros_like(squares)
            origins = list(start)
        theta = nn.Parameter(start.to(device, self._dtype, copy=True))  # its rows are the origins
        origins = [theta.detach().cpu().double().clone()] * len(columns) if theta.dim() == 1 else origins
        spans = [
            Span(shape, column, mix, origin, places[name])
            for (name, shape), column, mix, origin in zip(shapes.items(), columns, mixes, origins, strict=True)
        ]
        return theta, spans

    @property
    def selections(self) -> dict[str, Selection]:
        """Return the span of every weight that moves, by name, the head apart."""
        return dict(self._spans_by_name)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over θ, called "span", then the head's parameters by the model's own names."""
        yield "span", self.theta
        yield from self._head.items()

    @property
    def index_bytes(self) -> int:
        """Return the bytes of the basis that this process holds: on the CPU in a mapped file."""
        return self.basis.nbytes

    @property
    def attached_bytes(self) -> int:
        """Bytes of θ, and of the gradients of small weights, which wait to be projected together."""
        kept = self._sharing.kept
        return self.theta.nbytes + (0 if kept is None else kept.waiting.nbytes)

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the basis, which each step reads."""
        return self.index_bytes

    def _moving_whole(self) -> Iterable[str]:
        return self._spans_by_name

    def predict(self, batch: Any) -> ledger.Ledger:
        """Return the price of one forward and backward pass on `batch`; nothing of that size is allocated.

        What is kept for backward is exact. The peak leaves out what a projection holds for a moment, a few MB of codes.
        `index` is the basis, which on a CPU is a file.

        Raises:
            TitheError: when the plan has no loss, or the model cannot run on shapes alone.
        """
        self._check_live()
        if self._loss is None:
            raise TitheError("predict", found="no loss", expected="loss= at attach", remedy="attach(..., loss=loss_fn)")
        loss = self._loss
        self._write()
        found = ledger.predict(self.model, lambda shapes: loss(self.model, shapes), batch)
        size = sum(p.nbytes for p in self.parameters())
        states = max((num_states(optimizer) for optimizer in self._optimizers.bound), default=2)
        return dataclasses.replace(
            found, theta=self.theta.nbytes, gradients=size, optimizer=states * size, index=self.index_bytes
        )

    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """Run `closure` (forward, returning the loss) and backward; each layer's gradient is projected as it comes.

        Raises:
            TitheError: when the loss is not a scalar that a gradient flows through.
        """
        self._check_live()
        place = f"backward of step {self.num_steps + 1}"
        with distributed.telling(place):
            loss = check_loss(closure(), finite=False)
            loss.backward()
            if self._head:
                mean_gradients(f"{place}: the head", list(self._head.values()))
        return loss

    @contextmanager
    def _movable(self) -> Generator[Movable]:
        self._mount.follow()
        whole = Whole(self.parameters())

        def move(step: float, directions: Sequence[Tensor]) -> None:
            whole.move(step, directions)
            self._sharing.commit(force=True)

        weights = [*(binding.weight for binding in self._mount.bindings.values()), *self._head.values()]
        scale = scale_of(weights, sum(parameter.numel() for parameter in whole.parameters))
        try:
            yield Movable(whole.parameters, scale, {self.basis.dtype, *(weight.dtype for weight in weights)}, move)
        finally:
            whole.restore()
            self._sharing.commit(force=True)

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Compare the model with what it was, before it is too late."""
        self._mount.check()
        if self._mount.replaced:
            self._optimizers.check_holds()

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the weights where an optimizer moved θ."""
        self._write(force=True)

    def end_epoch(self) -> bool:
        """Count a finished epoch; nothing is chosen again, so it returns False."""
        self._catch_up()
        self._optimizers.finish()
        self.num_epochs += 1
        return False

    def reselect(self) -> bool:
        """Do nothing, since the span is that of the history; returns False."""
        self._catch_up()
        return False

    def refresh_statistics(self, batches: Iterable[Any] | None = None) -> int:
        """Forget the running statistics of norms and set them to their means over batches of training data.

        Weights that were averaged have never seen a batch, so that the checkpoints' statistics are not theirs.
        `save` and `release` do it by themselves where the plan has data and this was not called since weights moved.
        On several ranks all of them call it, each with its own batches, and the means are over all; `save` and
        `release` never wait for another rank, and take their own rank's batches alone.

        Args:
            batches: training data; None takes the `data=` of `attach`.

        Returns:
            How many batches were run: 0 for a model whose norms keep no statistics.

        Raises:
            TitheError: when there is none.
        """
        self._check_live()
        batches = self._data if batches is None else batches
        if batches is None:
            raise TitheError(
                "refresh_statistics", found="no data", expected="batches of training data", remedy="pass a loader"
            )
        with distributed.together(f"refresh_statistics after {self.num_steps} steps"):
            self._commit()
            count = estimate_statistics(self.model, self._loss or _forward, batches)
            with training(self.model):
                norms = tracked(self.model)
            mean_statistics(norms, count)
        self._stale = False
        return count

    def coefficients(self) -> dict[str, Tensor]:
        """Return the mixing coefficients of the checkpoints, by tensor, (n,) float64 each; they sum to one.

        With granularity "model" there is one row, under "span". What a coded basis rounds is left out.
        """
        n = self.basis.num_vectors
        rows = (
            {"span": self.theta} if self.theta.dim() == 1 else dict(zip(self._spans_by_name, self.theta, strict=True))
        )
        found: dict[str, Tensor] = {}
        for (name, values), span in zip(rows.items(), self._spans_by_name.values(), strict=False):
            moved = span.weights(values)
            found[name] = self._mixed + moved - moved.sum() / n
        return found

    def save(self, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
        """Write all weights and buffers, atomically; `tithe.apply` puts them onto a model of the same architecture.

        Over a history of deltas only what they change is written, and the base is needed as for each of them.

        Raises:
            TitheError: when the file cannot be written.
        """
        self._catch_up()
        self._settle()
        state = delta.state_tensors(self.model)
        places = {n: Coordinates(s.shape, s.places) for n, s in self._spans_by_name.items() if s.places is not None}
        if self.history.partial:  # of a delta, what it changes
            state = {name: state[name] for name in (*self._spans_by_name, *self._rest, *self._head)}
        aliases = {name for name, origin in self._alias.items() if name != origin}
        dense = {name: tensor for name, tensor in state.items() if name not in aliases and name not in places}
        told = {"method": type(self.method).__name__, "steps": str(self.num_steps), **(metadata or {})}
        delta.write_delta(path, self.model, places, dense, metadata=told)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on: θ, the head, buffers, counters; the history is attached again."""
        self._catch_up()
        return {
            "format": FORMAT,
            "span": self.theta.detach().clone(),
            "gram": self._gram.clone(),
            "start": self._mixed.clone(),
            "head": {name: p.detach().clone() for name, p in self._head.items()},
            "buffers": {name: b.detach().clone() for name, b in self.model.named_buffers()},
            "num_steps": self.num_steps,
            "num_epochs": self.num_epochs,
            "seed": self.seed,
            "stale": self._stale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `plan.state_dict()`; load the optimizer's own state after it.

        Raises:
            TitheError: when the state is of another history, basis or head.
        """
        self._check_live()
        same = state.get("format") == FORMAT and {"span", "gram", "head"} <= set(state)
        same = same and state["span"].shape == self.theta.shape and state["gram"].shape == self._gram.shape
        scale = float(self._gram.abs().max())
        if not same or not torch.allclose(state["gram"], self._gram, rtol=1e-6, atol=1e-9 * scale):
            raise TitheError(
                "plan state",
                found="what was saved with another history, bits or granularity",
                expected="the settings and checkpoints of the saved run",
                remedy="attach with the same history and method, then load",
            )
        mixed = state.get("start", self._mixed)  # states of earlier versions do not say
        if not torch.allclose(mixed, self._mixed, rtol=1e-6, atol=1e-9):
            raise TitheError(
                "plan state",
                found="what was saved with another start",
                expected=f"start={self.method.start!r}, of which θ says how far the weights are",
                remedy="attach with the start of the saved run, then load",
            )
        if set(state["head"]) != set(self._head):
            raise TitheError(
                "plan state", found="another head", expected=", ".join(self._head) or "none", remedy="same head="
            )
        with torch.no_grad():
            self.theta.copy_(state["span"])
            for name, value in state["head"].items():
                self._head[name].copy_(value)
            for name, buffer in self.model.named_buffers():
                if name in state["buffers"]:
                    buffer.copy_(state["buffers"][name])
        self.num_steps, self.num_epochs, self.seed = state["num_steps"], state["num_epochs"], state["seed"]
        self._sharing.commit(force=True)
        self._stale = state["stale"]

    def _let_go(self) -> None:
        self._settle()
        self._handle.remove()
        self._mount.release()
        self._split.restore_left_out()
        for name, required in self._required.items():
            self._floats[name].requires_grad_(required)

    def finish_step(self) -> None:
        """Count a finished step, after which ranks have to agree still."""
        self._check_ranks()
        super().finish_step()

    def _commit(self) -> bool:
        return self._write()

    def _write(self, *, force: bool = False) -> bool:
        written = self._sharing.commit(force=force)
        if written:
            self._stale = self._norms > 0
        return written

    def _settle(self) -> None:
        """What leaves the plan has statistics of its own weights, or a warning says that it has not.

        No rank waits for another here: one may save alone.
        """
        if distributed.world_size() > 1 and self._sharing.is_due:
            raise TitheError(
                "plan",
                found="a step that is not in the weights yet, which all ranks write together",
                expected="the weights of the last step",
                remedy="call plan.step() on every rank after optimizer.step(), or plan.bind(optimizer) once",
            )
        self._sharing.follow()
        self._commit()
        if not self._stale:
            return
        if self._data is not None and not isinstance(self._data, Iterator):
            estimate_statistics(self.model, self._loss or _forward, self._data)
            self._stale = False
            return
        self._stale = False
        warnings.warn(
            f"the running statistics of {self._norms} norms are the checkpoints', not those of the averaged weights;"
            " call plan.refresh_statistics(loader) before plan.save or plan.release",
            TitheWarning,
            stacklevel=3,
        )


def _theta_dtype(given: torch.dtype | None, weight: torch.dtype) -> torch.dtype:
    """The dtype of the coefficients: that which is given, else the weights', but float32 at least."""
    if given in (torch.float16, torch.bfloat16):
        raise TitheError(
            "dtype",
            found=f"{given} for θ",
            expected="float32 at least: θ is the mixing coefficients, a few numbers that all weights are made from",
            remedy="leave dtype= out, or write dtype=torch.float64",
        )
    return given or torch.promote_types(weight, torch.float32)


def _forward(model: nn.Module, batch: Any) -> Any:
    """One forward pass, where no loss says how: of a mapping by name, of a sequence its first item."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)
