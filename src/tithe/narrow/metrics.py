"""Measure units of a trained network by a metric, from which their probabilities start (`init=`).

    taylor   a_i = (Σ_parts c_i²)^½,   c_i = ∂L/∂m_i of a gate on the unit     a forward and backward pass of each part
    wanda    a_i = Σ_readers mean_o |W_oi| · ‖x_i‖₂                            a forward pass of each batch

With "taylor+wanda" the values of "taylor" say how much of each group to keep, and go to its units in the order of
"wanda": of a network that fits its data, gradients are little but noise within a group (`docs/benchmarks/pruning.md`).

In evaluation mode, with the whole network. Of a head, or of a channel with several positions, positions are summed.

References:
    P. Molchanov, A. Mallya, S. Tyree, I. Frosio, J. Kautz. Importance Estimation for Neural Network Pruning. CVPR 2019,
    arXiv 1906.10771, equation 8: the squared first-order estimate, averaged over mini-batches. Deviations: the gate is
    where the unit is read (`tithe.narrow.gates`), mini-batches are parts of a few samples, and the root is taken.
    M. Sun, Z. Liu, A. Bair, J. Z. Kolter. A Simple and Effective Pruning Approach for Large Language Models. ICLR 2024,
    arXiv 2306.11695: Wanda. Y. An, X. Zhao, T. Yu, M. Tang, J. Wang. Fluctuation-based Adaptive Structured Pruning for
    Large Language Models. AAAI 2024, arXiv 2312.11983, section 4.1: Wanda-sp, the same of whole channels.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tithe.batch import leaves, num_samples, slice_batch
from tithe.coupling import Coupling
from tithe.errors import TitheError
from tithe.forward import evaluating
from tithe.narrow.gates import gate_gradients
from tithe.narrow.stage import Stage

Loss = Callable[[Any, Any], Tensor]

_SAMPLES = 256
"""Samples of the data that are looked at."""
_PART = 32
"""Samples whose gradient is squared at once: of a network that fits its data the gradients of many cancel. Of a
pretrained ResNet-20 parts of 8 and of 64 choose equally good networks, and a pass of few samples costs more of each."""


def unit_metric(kind: str, stage: Stage, loss: Loss, data: Iterable[Any]) -> Tensor:
    """Return the metric of each unit over the first samples of the data, float64 (n,), not negative.

    The model, its gradients and the random states stay as they were. Metrics of several ranks may be added up.

    Args:
        kind: "taylor", "wanda", or "taylor+wanda".
        stage: of the model, whole.
        loss: `loss(model, batch)`.
        data: batches.

    Raises:
        TitheError: when there is no batch, a gate has no gradient that is finite, or a weight that "wanda" needs the
            inputs of is read by something else than a linear layer or a convolution.
    """
    with evaluating(stage.model), stage.untouched():
        if kind == "wanda":
            metric = _wanda(stage, loss, data)
        else:
            metric = _taylor(stage, loss, data)
            if kind == "taylor+wanda":
                metric = _in_order(metric, _wanda(stage, loss, data), stage.coupling)
    if not bool(metric.isfinite().all()):
        raise TitheError(
            "init",
            found=f"a metric {kind!r} that is not finite",
            expected="finite losses and activations on data=",
            remedy='check the model and its batches, or start with init="uniform"',
        )
    return metric


def _taylor(stage: Stage, loss: Loss, data: Iterable[Any]) -> Tensor:
    mask = torch.ones(stage.coupling.num_units, dtype=torch.bool)
    grids, names = stage.grids(mask), {name for name, _ in stage.model.named_parameters()}
    total = torch.zeros(len(mask), dtype=torch.float64)
    for part in _parts(data, _PART):
        live = {name: t.detach().requires_grad_(name in names) for name, t in stage.tensors.items()}
        with torch.enable_grad(), stage.run(grids, live, spare=True):
            weights = {name: tensor for name, tensor in live.items() if tensor.requires_grad}
            found = torch.autograd.grad(loss(stage.model, part), list(weights.values()), allow_unused=True)
        grads = {name: grad for name, grad in zip(weights, list[Tensor | None](found), strict=True) if grad is not None}
        total += gate_gradients(stage.coupling, grids, weights, grads).double().square()
    return total.sqrt()


def _in_order(values: Tensor, order: Tensor, coupling: Coupling) -> Tensor:
    """Each group's values, the larger for a unit of larger `order`; a group that has no order keeps its own."""
    found = values.clone()
    for group in coupling.groups:
        at = slice(group.start, group.stop)
        if bool((order[at] > 0).any()):
            found[at] = values[at].sort().values[order[at].argsort(stable=True).argsort()]
    return found


def _wanda(stage: Stage, loss: Loss, data: Iterable[Any]) -> Tensor:
    coupling = stage.coupling
    squares: dict[tuple[str, int], Tensor] = {}
    whole = stage.grids(torch.ones(coupling.num_units, dtype=torch.bool))
    with torch.no_grad(), stage.run(whole, stage.tensors, spare=True), _inputs(stage, squares) as seen:
        for batch in _parts(data, None):
            loss(stage.model, batch)
    unseen = min((name for name, _ in squares if name not in seen), default=None)
    if unseen is not None:
        raise _untold(unseen, "a weight whose module was never called, as when its weight is used by itself")
    total = torch.zeros(coupling.num_units + 1, dtype=torch.float64)
    for (name, axis), square in squares.items():
        weight = stage.tensors[name].detach()
        others = [dim for dim in range(weight.dim()) if dim != axis]
        sizes = weight.abs().sum(others, dtype=torch.float64).cpu() / weight.shape[1 - axis]
        units = coupling.axes[coupling.places[name][axis]]
        total.index_add_(0, units % (coupling.num_units + 1), sizes * square.sqrt())  # what always exists comes last
    return total[:-1]


@contextmanager
def _inputs(stage: Stage, squares: dict[tuple[str, int], Tensor]) -> Generator[set[str]]:
    """While inside, Σ x² of each input channel of each weight that reads units is added up, float64 on the CPU.

    Yields:
        The names of the weights whose inputs have been seen.
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in stage.model.modules():
        for tensor in module._parameters.values():
            owners.setdefault(id(tensor), []).append(module)
    handles: list[Any] = []
    seen: set[str] = set()
    try:
        for name, axis in sorted(stage.coupling.reads):
            weight = stage.tensors[name]
            if id(weight) not in owners:
                raise _untold(name, "no parameter of a module")
            squares[name, axis] = torch.zeros(weight.shape[axis], dtype=torch.float64)
            add = _adds(name, weight.dim(), squares[name, axis], seen)
            handles += [module.register_forward_pre_hook(add) for module in owners[id(weight)]]
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _untold(name: str, found: str) -> TitheError:
    return TitheError(
        name,
        found=found,
        expected="weights read by linear layers and convolutions",
        remedy='start with init="taylor", which looks at gradients alone',
    )


def _adds(name: str, num_dims: int, square: Tensor, seen: set[str]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = next(leaves(list(args)), None)
        dim = -1 if num_dims == 2 else 1
        if x is not None and not x.is_floating_point():
            return  # a table looked up by number, which is tied to a layer
        if x is None or x.dim() < 2 or x.shape[dim] != len(square):
            raise _untold(name, f"a {type(module).__name__} whose input does not tell the channels that it reads")
        others = [d for d in range(x.dim()) if d != dim % x.dim()]
        square.add_(x.detach().double().square().sum(others).cpu())
        seen.add(name)

    return add


def _parts(data: Iterable[Any], size: int | None) -> Iterator[Any]:
    """Parts of the first samples of the data: of `size` samples, or whole batches; batches that cannot be cut as well.

    Raises:
        TitheError: when there is none.
    """
    seen = 0
    for batch in data:
        try:
            count = num_samples(batch)
        except TitheError:
            count = None
        if size is None or count is None:
            yield batch
        else:
            for start in range(0, count, size):
                yield slice_batch(batch, start, min(start + size, count))
        seen += count or 1
        if seen >= _SAMPLES:
            break
    if not seen:
        raise TitheError("attach", found="no batch in data=", expected="at least one", remedy="pass batches")
