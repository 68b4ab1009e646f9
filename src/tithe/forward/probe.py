"""Remember what a network answers to numbers that anybody can draw again, to know the network by.

No data is kept: of each input tensor the dtype, the shape and the range; of each output a few sums.

    u ~ U[0, 1)  of a fixed generator        input = low + (high − low) u        sums_k = Σ_i ±1 output_i / √n
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor, nn

from tithe.batch import leaves
from tithe.forward.modes import evaluating
from tithe.forward.untouched import untouched

_DTYPES: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}
_MOST = 2**24
"""Input numbers from which on a network is not asked."""
_SUMS = 6
_LONG = 100
"""Characters from which on a string is no setting."""


class Unrecorded(Exception):
    """An input that is more than tensors, containers and settings."""


@dataclass(frozen=True)
class Probe:
    """A question to a network, and its answer.

    Args:
        inputs: of the model's forward pass, positional and by name, as plain data (`describe`).
        answers: of each floating-point output the shape, the root mean square and the sums; none where the network
            draws random numbers.
    """

    inputs: Any
    answers: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]

    def plain(self) -> dict[str, Any]:
        """Return it as data for JSON."""
        return {"inputs": self.inputs, "answers": [[list(shape), list(sums)] for shape, sums in self.answers]}

    @staticmethod
    def of(plain: Any) -> Probe:
        """Return the probe of that data.

        Raises:
            ValueError: when it is none, like TypeError, KeyError and AttributeError.
        """
        answers = [(tuple(map(int, shape)), tuple(map(float, sums))) for shape, sums in plain["answers"]]
        if not all(math.isfinite(number) for _, sums in answers for number in sums):
            raise ValueError("answers that are not finite")
        draw(plain["inputs"], torch.device("meta"))
        return Probe(plain["inputs"], tuple(answers))


def watch_call(model: nn.Module, run: Callable[[], object]) -> Any:
    """Run something, and return the inputs of the first forward pass of the model, described; None where they cannot.

    Args:
        model: any module.
        run: what calls it.
    """
    calls: list[Any] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not calls:
            calls.append([list(args), dict(kwargs)])

    handle = model.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    try:
        return describe(calls[0]) if calls else None
    except Unrecorded:
        return None


def describe(tree: Any) -> Any:
    """Return a tree of tensors as plain data: a tensor as its dtype, shape, lowest and highest value.

    Raises:
        Unrecorded: when the tree holds something else than dense tensors, containers, numbers and short strings.
    """
    if isinstance(tree, Tensor):
        name = str(tree.dtype).removeprefix("torch.")
        if tree.layout != torch.strided or name not in _DTYPES or tree.numel() > _MOST or type(tree) is not Tensor:
            raise Unrecorded
        ends = (float(tree.min()), float(tree.max())) if tree.numel() else (0.0, 0.0)
        if not all(math.isfinite(end) for end in ends):
            raise Unrecorded
        return {"tensor": [name, list(tree.shape), *ends]}
    if isinstance(tree, Mapping):
        items = cast("Mapping[Any, Any]", tree)
        if not all(isinstance(key, str) for key in items):
            raise Unrecorded
        return {"dict": {key: describe(value) for key, value in items.items()}}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [describe(value) for value in tree]}
    if tree is None or type(tree) in (bool, int) or (type(tree) is float and math.isfinite(tree)):
        return tree
    if type(tree) is str and len(tree) <= _LONG:
        return tree
    raise Unrecorded


def draw(plain: Any, device: torch.device, seeds: np.random.PCG64 | None = None) -> Any:
    """Return a tree of tensors of that description, the same numbers every time.

    Raises:
        ValueError: when it is no description, like TypeError and KeyError.
    """
    seeds = np.random.PCG64(0) if seeds is None else seeds
    if not isinstance(plain, dict):
        if plain is None or isinstance(plain, (bool, int, float, str)):
            return plain
        raise ValueError("no description")
    ((kind, content),) = cast("dict[str, Any]", plain).items()
    if kind == "tensor":
        name, shape, low, high = content
        return _numbers(name, shape, low, high, device, seeds)
    if kind == "dict":
        return {str(key): draw(value, device, seeds) for key, value in content.items()}
    values = [draw(value, device, seeds) for value in content]
    return {"list": values, "tuple": tuple(values)}[kind]


def _numbers(
    name: str, shape: Sequence[int], low: float, high: float, device: torch.device, seeds: np.random.PCG64
) -> Tensor:
    dtype, count = _DTYPES[name], math.prod(shape)
    sound = all(type(size) is int and size >= 0 for size in shape) and count <= _MOST
    if not sound or not math.isfinite(high - low) or low > high:
        raise ValueError("no tensor")
    if device.type == "meta":
        return torch.empty(list(shape), dtype=dtype, device=device)
    u = torch.from_numpy((seeds.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53)
    whole = not dtype.is_floating_point
    values = (low + (high - low + 1) * u).floor().clamp(max=high) if whole else low + (high - low) * u
    return values.reshape(list(shape)).to(dtype).to(device)


def ask(model: nn.Module, inputs: Any, *, seed: int = 0) -> list[Tensor]:
    """Return the floating-point outputs of a network for inputs of that description, in evaluation mode.

    Nothing of the network changes. An error in its forward pass is passed on.

    Args:
        model: any module.
        inputs: what `watch_call` returned.
        seed: of what the network draws itself.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    (args, kwargs) = draw(inputs, device)
    plain = torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()
    with torch.no_grad(), evaluating(model), untouched(model), plain, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are of the network, which its owner runs anyway
        torch.manual_seed(seed)
        return [tensor.detach() for tensor in leaves(model(*args, **kwargs)) if tensor.is_floating_point()]


def make_probe(model: nn.Module, inputs: Any) -> Probe | None:
    """Ask a network, and return question and answer; None where it has no answer to such numbers.

    Args:
        model: any module.
        inputs: what `watch_call` returned.
    """
    if inputs is None:
        return None
    try:
        one, other = (_sums(ask(model, inputs, seed=seed)) for seed in (0, 1))
    except Exception:
        return None
    if not all(math.isfinite(number) for _, sums in one for number in sums):
        return None
    return Probe(inputs, tuple(one) if one == other else ())


def differs(model: nn.Module, probe: Probe) -> str | None:
    """Say what a network answers otherwise than the probe tells, beyond rounding; None where it does not.

    An error in its forward pass is passed on.
    """
    outputs = ask(model, probe.inputs)
    if not probe.answers:
        return None
    found = _sums(outputs)
    if [shape for shape, _ in found] != [shape for shape, _ in probe.answers]:
        return f"outputs of shapes {[list(shape) for shape, _ in found][:3]}"
    exact = all(parameter.device.type == "cpu" for parameter in model.parameters())
    parameters = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    eps = max(torch.finfo(dtype).eps for dtype in (*parameters, *(output.dtype for output in outputs)))
    tolerance = max(1e-3 if exact else 1e-2, 20 * eps)
    for (_, sums), (_, expected) in zip(found, probe.answers, strict=True):
        scale = max(sums[0], expected[0])
        worst = max(abs(one - other) for one, other in zip(sums, expected, strict=True))
        if not worst <= tolerance * scale:
            return f"outputs that are off by {worst / scale:.2g} of their size" if scale else "other outputs"
    return None


def _sums(outputs: Sequence[Tensor]) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Of each tensor the shape, and the root mean square with sums under fixed signs, to six digits."""
    found: list[tuple[tuple[int, ...], tuple[float, ...]]] = []
    for output in outputs:
        flat = output.double().flatten()[:_MOST].cpu()
        bits = np.random.PCG64(1).random_raw(math.ceil(flat.numel() * _SUMS / 64)).view(np.uint8)
        signs = torch.from_numpy(np.unpackbits(bits)[: flat.numel() * _SUMS].astype(np.float64)) * 2 - 1
        numbers = [float(flat.square().mean().sqrt()) if flat.numel() else 0.0]
        numbers += (signs.view(_SUMS, -1) @ flat / math.sqrt(max(flat.numel(), 1))).tolist()
        found.append((tuple(output.shape), tuple(float(f"{number:.6g}") for number in numbers)))
    return found
