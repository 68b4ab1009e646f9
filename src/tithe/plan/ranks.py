"""What ranks have to have in common for a plan: compared when attaching, kept an eye on in the steps.

attach     one comparison: versions, method, seed, model, state; weights that differ become rank 0's
forward    a wrapper made before the plan, a sharded weight: refused by name
step 1     the world that was attached in; θ is the same on every rank
2, 4, 8 …  θ again, without waiting: what a rank has posted is read when it is there
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from tithe import distributed
from tithe.averages import History
from tithe.errors import TitheError
from tithe.method import SubspaceMethod
from tithe.plan.base import Settings
from tithe.plan.watch import PlanHook
from tithe.rules import theta_key

_WHOLE_FILE = 8 << 20
"""Bytes up to which a file is compared whole; of a larger one, parts that lie evenly in it."""
_PARTS, _PART = 64, 64 << 10
_WORDS = 1 << 20
_GOLDEN = 0.6180339887498949
_TOLERANCE = {torch.float64: 1e-12}
"""How far θ may lie apart, against its length: what rounding on unlike processors does, and no update does."""
_GRADIENT, _GRADIENT_TOLERANCE = "gradient of", 1e-4
"""Gradients part by far more where none are averaged, also where a learning rate that warms up moves nothing yet."""


def _facts(model: nn.Module, method: Any, settings: Settings, state: Mapping[str, Any] | None) -> dict[str, str]:
    """What has to be the same on every rank, as an error shows it; data is each rank's own."""
    kind = type(method)
    facts = {
        "version": f"tithe {sys.modules['tithe'].__version__}, torch {torch.__version__}",
        "method": f"{kind.__module__}.{kind.__qualname__}",
    }
    fields = [f.name for f in dataclasses.fields(method)] if dataclasses.is_dataclass(method) else list(vars(method))
    for name in fields:
        value = getattr(method, name)
        facts[f"method.{name}"] = _told(value)
        if name == "history" and isinstance(method, SubspaceMethod):
            history = value if isinstance(value, History) else History(value)
            files = [_told(path) for path in history.rows.paths]
            facts[f"method.{name}"] = f"{len(files)} checkpoints, {_short_hash(' '.join(files))}"
    facts |= {
        "where": _told(settings.where),
        "head": _told(settings.head),
        "seed": _told(settings.seed),
        "dtype": str(settings.dtype),
        "loss": "none" if settings.loss is None else "given",
        "data": "none" if settings.data is None else "given",
        "state": "none" if state is None else "given",
        "model": type(model).__qualname__,
    }
    # Running statistics in a state are each rank's own where no wrapper shares them; they become rank 0's.
    facts |= {f"state.{key}": _told(value) for key, value in (state or {}).items() if key != "buffers"}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        trained = "trained" if parameter.requires_grad else "frozen"
        facts[f"model.{name}"] = f"{tuple(parameter.shape)} {parameter.dtype} on {parameter.device.type}, {trained}"
    for name, buffer in model.named_buffers():
        facts[f"model.{name}"] = f"{tuple(buffer.shape)} {buffer.dtype} on {buffer.device.type}"
    return facts


@final
class Ranks:
    """The ranks of one plan; on one process it costs a look at each parameter's identity in a forward pass.

    Args:
        method: what chooses.
        settings: of `attach`.
    """

    def __init__(self, method: Any, settings: Settings) -> None:
        self._method, self._settings = method, settings
        self._world = distributed.world_size()
        self._steps = 0
        self._forward: _Whole | None = None
        self._handle: Any = None
        self._model: nn.Module | None = None
        self._averages = self._shares = False

    def compare(self, model: nn.Module, state: Mapping[str, Any] | None) -> None:
        """Compare what the ranks start from, and give all of them rank 0's weights and buffers where those differ.

        Args:
            model: before anything is attached.
            state: to go on from, or None.

        Raises:
            TitheError: on every rank, naming what differs.
        """
        if self._world == 1:
            return
        distributed.compare("attach", _facts(model, self._method, self._settings, state))
        self._level([*model.parameters(), *model.buffers()])

    @staticmethod
    def _level(tensors: Sequence[Tensor]) -> None:
        """Give every rank rank 0's values where any differ."""
        tensors = [tensor.detach() for tensor in tensors if tensor.layout == torch.strided and tensor.numel()]
        digest = hashlib.blake2b(digest_size=16)
        for tensor in tensors:
            digest.update(str(_digest(tensor)).encode())
        if len(set(distributed.exchange("attach: weights", digest.hexdigest()))) > 1:
            distributed.first_all_(tensors)

    def watch(
        self, model: nn.Module, named: Iterable[tuple[str, Tensor]], *, averages_gradients: bool, shares: bool
    ) -> None:
        """Check that the same was chosen everywhere, and look at each forward pass of the model from now on.

        Args:
            model: with the plan on it.
            named: what an optimizer trains.
            averages_gradients: whether the plan does that itself.
            shares: whether the plan dealt something out over the ranks when it was attached.

        Raises:
            TitheError: on every rank, when what is trained differs.
        """
        self._model, self._averages, self._shares = model, averages_gradients, shares
        self._forward = _Whole(model, averages_gradients=averages_gradients)
        self._handle = model.register_forward_pre_hook(self._forward)
        if self._world > 1:
            self._level(list(model.buffers()))
            named = list(named)
            distributed.compare("attach: what is trained", {name: str(tuple(t.shape)) for name, t in named})
            self._check_theta("attach", named)

    def after_step(self, named: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """Check after an optimizer's step that ranks have not parted; call it once a step, on every rank.

        Args:
            named: gives what the optimizer trains, by name, with the step in it; asked for after the first step and
                after each whose number is a power of two. Ranks wait for each other there.

        Raises:
            TitheError: the process group is another than the plan was attached in and ranks differ, there is none
                where a launcher started several processes, a weight was sharded since, or θ is not the same
                everywhere: gradients are not averaged.
        """
        self._steps += 1
        if self._steps & (self._steps - 1) or (self._forward is not None and self._forward.joining):
            return
        if self._steps == 1:
            self._check_world()
        if distributed.world_size() == 1:
            return
        place = "the first step" if self._steps == 1 else f"the end of step {self._steps}"
        theta = list(named())
        gradients = {f"{_GRADIENT} {name}": tensor.grad for name, tensor in theta}
        self._check_theta(place, theta + [(name, grad) for name, grad in gradients.items() if grad is not None])

    def close(self) -> None:
        """Take off what looks at the model."""
        if self._handle is not None:
            self._handle.remove()
        self._model = None

    def _check_world(self) -> None:
        world, launched = distributed.world_size(), distributed.launched_size()
        if self._model is not None:
            distributed.check_whole(self._model, wrapped=True)
        if world == 1 and launched > 1:
            raise TitheError(
                "the first step",
                found=f"no process group, where {launched} processes were launched (WORLD_SIZE={launched})",
                expected="ranks that train together",
                remedy="call torch.distributed.init_process_group() before tithe.attach(); for runs that have nothing"
                ' to do with each other, del os.environ["WORLD_SIZE"]',
            )
        if world == self._world:
            return
        if self._shares:
            raise TitheError(
                "the first step",
                found=f"{world} ranks, and a plan attached on {self._world}",
                expected="a plan that shares its work out over the ranks",
                remedy="call torch.distributed.init_process_group() before tithe.attach()",
            )
        assert self._model is not None
        distributed.compare(
            "the first step",
            _facts(self._model, self._method, self._settings, None),
            remedy="call torch.distributed.init_process_group() before tithe.attach(), and give every rank the same",
        )

    def _check_theta(self, place: str, named: Sequence[tuple[str, Tensor]]) -> None:
        notes = distributed.exchange(f"{place}: θ", _sketches(named))
        found: list[dict[str, list[float]]] = [json.loads(note) for note in notes]
        for name in found[0]:  # a gradient that not every rank has left tells nothing
            values = [sketch[name] for sketch in found if name in sketch]
            if len(values) == len(found) and _apart(values):
                raise self._apart_error(place, name)

    def _apart_error(self, place: str, name: str) -> TitheError:
        late = self._world != distributed.world_size()
        wrappers = [] if self._model is None else distributed.wrappers_of(self._model)
        before = [w for w in wrappers if self._model is not None and not distributed.reduces(w, _thetas(self._model))]
        remedy = (
            "wrap the model in DistributedDataParallel after tithe.attach(), and call the wrapped model in the loss"
        )
        if place == "attach":
            cause, remedy = "θ starts elsewhere on each rank", "load the same weights on every rank"
        elif self._averages:
            cause = "gradients that only plan.backward(...) averages"
            remedy = "call plan.backward(lambda: loss_fn(model, batch)) in place of loss.backward()"
        elif before:
            cause = "DistributedDataParallel was wrapped before tithe.attach(): it does not know θ"
        elif wrappers:
            cause = "the DistributedDataParallel around the model did not average all gradients, or optimizers differ"
        else:
            cause = "no DistributedDataParallel averages the gradients"
        if late:
            cause += ", and the plan was attached before init_process_group()"
            remedy = f"call init_process_group() first; {remedy}"
        return TitheError(
            f"{place}, {name}",
            found=f"another θ on each rank: {cause}",
            expected="the same on every rank",
            remedy=remedy,
        )


class _Whole(PlanHook):
    """Before the root's forward pass: the model is not sharded, and its wrapper knows θ.

    An object rather than a closure, so that a deep copy of the model looks at its own weights.
    """

    def __init__(self, model: nn.Module, *, averages_gradients: bool) -> None:
        self.averages, self.seen, self.fresh = averages_gradients, 0, True
        self.joining = False
        """Whether ranks may run out of batches one by one, as `DistributedDataParallel.join` lets them."""
        self.places = self._places(model)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if distributed.is_replica(module):
            raise distributed.refuse_wrapper("model", "DataParallel")
        wrapper = distributed.active_wrapper()
        if wrapper is not None:
            self.joining = distributed.is_joining(wrapper)
            if id(wrapper) != self.seen:
                self._check_wrapper(module, wrapper)
                self.seen = id(wrapper)
        # The first forward pass looks at everything; FullyShardedDataParallel cuts the parameters that are there.
        moved = self.fresh or distributed.kind_of_module(module) is not None
        for parameters, key, parameter in self.places:
            moved = moved or parameters.get(key) is not parameter
        if moved:
            distributed.check_whole(module, wrapped=True)
            self.places, self.fresh = self._places(module), False

    def _check_wrapper(self, module: nn.Module, wrapper: nn.Module) -> None:
        if not any(inner is module for inner in wrapper.modules()):
            return
        thetas = _thetas(module)
        if distributed.reduces(wrapper, thetas) and (thetas or not self.averages):
            return
        if self.averages:
            raise TitheError(
                "DistributedDataParallel",
                found="a wrapper around a model whose plan averages gradients itself",
                expected="the model as it is",
                remedy="call the model itself: plan.backward(lambda: loss_fn(model, batch))",
            )
        raise TitheError(
            "DistributedDataParallel",
            found="a wrapper made before tithe.attach(), which does not know θ: ranks would part",
            expected="one made after it",
            remedy="call tithe.attach(model, …) first, then DistributedDataParallel(model)",
        )

    @staticmethod
    def _places(model: nn.Module) -> list[tuple[dict[str, Any], str, nn.Parameter]]:
        found = [(m._parameters, key, p) for m in model.modules() for key, p in m._parameters.items() if p is not None]
        return [(own, key, p) for own, key, p in found if not key.endswith(theta_key(""))]


def _thetas(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith(theta_key("")) and p.numel()]


def _sketches(named: Iterable[tuple[str, Tensor]]) -> str:
    """Of each tensor a sum that tells its entries apart, its length, and what may lie between two of them."""
    found: dict[str, list[float]] = {}
    for name, tensor in named:
        flat, total, square = tensor.detach().reshape(-1), 0.0, 0.0
        for start in range(0, flat.numel(), _WORDS):
            part = flat[start : start + _WORDS].double()
            place = torch.arange(start, start + part.numel(), dtype=torch.float64, device=part.device)
            total += float(part @ (place.mul_(_GOLDEN).frac_() - 0.5))
            square += float(part @ part)
        limit = _GRADIENT_TOLERANCE if name.startswith(_GRADIENT) else _TOLERANCE.get(tensor.dtype, 1e-6)
        found[name] = [total, math.sqrt(square), limit]
    return json.dumps(found)


def _apart(values: Sequence[Sequence[float]]) -> bool:
    totals, lengths, limits = zip(*values, strict=True)
    if not all(math.isfinite(total) for total in totals):
        return len({math.isfinite(total) for total in totals}) > 1
    return max(totals) - min(totals) > max(limits) * max(lengths)


def _digest(tensor: Tensor) -> int:
    """A number of a tensor's bits and their order; exact, so that it is the same on every device."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    data = nn.functional.pad(data, (0, -data.numel() % 8)) if data.numel() % 8 or data.data_ptr() % 8 else data
    words, found = data.view(torch.int64), 0
    for part in words.split(_WORDS):
        odd = torch.arange(1, 2 * part.numel(), 2, device=part.device)
        found = (found * 31 + int((part * odd).sum())) % (1 << 64)
    return found


def _told(value: Any) -> str:
    """A setting as text: files and tensors by what is in them, nothing by where it lies in memory."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} {_digest(value.detach()) if value.numel() else 0:x}"
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        text = "{" + ", ".join(f"{key!r}: {_told(inner)}" for key, inner in items) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(_told(inner) for inner in cast(Sequence[Any], value)) + "]"
    elif isinstance(value, str | Path) and 0 < len(str(value)) < 1024 and Path(value).is_file():
        text = f"a file of {Path(value).stat().st_size:,} bytes, {_file_digest(Path(value))}"
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        text = repr(value)
    elif callable(value):
        text = str(getattr(value, "__qualname__", type(value).__qualname__))
    else:
        text = repr(value)
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return text if len(text) < 200 else f"{text[:40]}… ({_short_hash(text)})"


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _file_digest(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        if size <= _WHOLE_FILE:
            digest.update(file.read())
        else:
            for part in range(_PARTS):
                file.seek(part * (size - _PART) // (_PARTS - 1))
                digest.update(file.read(_PART))
    return digest.hexdigest()
