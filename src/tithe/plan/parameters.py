"""Which parameters a plan may choose from, which it trains whole: globs over parameter names.

A plan selects entries of dense floating-point tensors. Weights that hold something else (complex numbers, codes of a
quantisation, a sparse layout, a subclass with operations of its own) are left out: they stay as they are while the plan
is attached. Parameters without values (lazy ones, those on the meta device) are refused.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedTensorMixin  # pyright: ignore[reportAttributeAccessIssue]

from tithe.delta.file import CODES
from tithe.errors import TitheError, TitheWarning

TRAINABLE = frozenset([torch.float16, torch.bfloat16, torch.float32, torch.float64])
"""The dtypes of which entries can be selected."""


@dataclass(frozen=True)
class Split:
    """The parameters of a model by their part in a plan; each distinct tensor once, under its first name.

    Args:
        floats: every parameter that is a dense floating-point tensor: those that a density refers to.
        head: those trained whole.
        candidates: those to choose from.
        alias: every name, those of tied tensors included → its first name.
        left_out: those of which no entry can be selected, and what they are.
    """

    floats: dict[str, nn.Parameter]
    head: dict[str, nn.Parameter]
    candidates: dict[str, nn.Parameter]
    alias: dict[str, str]
    left_out: dict[str, LeftOut] = field(default_factory=dict[str, "LeftOut"])

    def freeze_left_out(self) -> None:
        """Freeze what is left out until `restore_left_out`, and name it once.

        Warns:
            TitheWarning: naming what would have been trained, or is a code of other weights.
        """
        for out in self.left_out.values():
            out.parameter.requires_grad_(False)
            out.parameter.grad = None
        said = self.say_left_out()
        if said:
            warnings.warn(said, TitheWarning, stacklevel=4)

    def restore_left_out(self) -> None:
        """Give what was left out its flags back."""
        for out in self.left_out.values():
            out.parameter.requires_grad_(out.required)

    def check_memory(self, purpose: str) -> None:
        """Check that what is left out is at least a dense tensor, where all of the model is worked on.

        Args:
            purpose: what is done with all of the model.

        Raises:
            TitheError: naming the first that is not.
        """
        for name, out in self.left_out.items():
            p = out.parameter
            if p.layout != torch.strided or p.is_quantized or "subclass" in out.kind or p.is_neg() or _overlaps(p):
                raise TitheError(
                    name,
                    found=out.kind,
                    expected=f"a model of dense tensors, all of which {purpose}",
                    remedy="make it a plain nn.Parameter (to_dense(), dequantize(), clone()), or choose FISH",
                )

    def say_left_out(self) -> str:
        """One sentence that names what is left out; "" where nothing is."""
        if not self.left_out:
            return ""
        named = [f"{name} ({out.kind})" for name, out in self.left_out.items()]
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        return (
            f"left out: {', '.join(named[:3])}{more}; no entry of such a weight can be selected, and it stays as it is."
            f" A density refers to the {sum(p.numel() for p in self.floats.values()):,} other parameters"
        )

    def say_missing_head(self) -> str:
        """One sentence about the last layer where nothing is trained whole; "" where something is."""
        path = list(self.floats)[-1].rpartition(".")[0]
        if self.head or not path:
            return ""
        return f'no head: nothing is trained whole; if {path} is a new layer, pass head="{path}.*"'

    def warn_of_new_head(self) -> None:
        """Warn where nothing is trained whole, and the last layers look new in a network that is trained.

        A new layer has a bias of zeros, as Hugging Face and timm start it; a trained one has not.

        Warns:
            TitheWarning: naming the layers.
        """
        biases = [name.removesuffix(".bias") for name in self.floats if name.endswith(".bias")]
        new: list[str] = []
        while biases and not self.head and self._looks_new(biases[-1]):
            new.insert(0, biases.pop())
        if not new or len(biases) < 2 or not all(bool(self.floats[f"{path}.bias"].any()) for path in biases):
            return
        globs = dict.fromkeys(self._around(path, new) for path in new)
        head = ", ".join(f'"{glob}"' for glob in globs)
        warnings.warn(
            f"the bias of {', '.join(new)} is zero, as in a new layer, and nothing is trained whole: to train"
            f" {'it' if len(new) == 1 else 'them'}, pass head={head if len(globs) == 1 else f'[{head}]'} to attach",
            TitheWarning,
            stacklevel=5,
        )

    def check_own_dtype(self, dtype: torch.dtype | None, trained: Mapping[str, nn.Parameter], where: str) -> None:
        """Check that a dtype that is given for θ is the weights' own.

        Args:
            dtype: that was given, or None.
            trained: the weights, by name.
            where: what trains them as they are, as the sentence says.

        Raises:
            TitheError: naming the first weight of another.
        """
        for name, parameter in trained.items():
            if dtype is not None and parameter.dtype != dtype:
                raise TitheError(
                    name,
                    found=f"a weight of {parameter.dtype}, and dtype={dtype} for θ",
                    expected=f"the weight's own dtype: {where}",
                    remedy=f"leave dtype= out, or call model.to({dtype}) before attach",
                )

    def warn_of_half(self, trained: Mapping[str, nn.Parameter], where: str, otherwise: str = "") -> None:
        """Warn where weights in half precision are trained as they are.

        Args:
            trained: the weights, by name.
            where: what trains them so, as the sentence says.
            otherwise: how to have it so without a warning, as the sentence ends.

        Warns:
            TitheWarning: naming the first of them.
        """
        half = {name: p.dtype for name, p in trained.items() if p.dtype in (torch.float16, torch.bfloat16)}
        if not half:
            return
        first, dtype = next(iter(half.items()))
        warnings.warn(
            f"{first}{f' and {len(half) - 1} more' if len(half) > 1 else ''}: {where}, and"
            f" {str(dtype).removeprefix('torch.')} rounds small updates away. Load the model in float32, under"
            f" torch.autocast if you like{otherwise.format(dtype)}",
            TitheWarning,
            stacklevel=6,
        )

    def _looks_new(self, path: str) -> bool:
        weight, bias = self.floats.get(f"{path}.weight"), self.floats[f"{path}.bias"]
        if weight is None or weight.dim() < 2 or f"{path}.weight" not in self.candidates:
            return False
        known = not bias.is_meta and not isinstance(bias, FakeTensor)
        return known and not bool(bias.any()) and bool(weight.any())

    def _around(self, path: str, new: Sequence[str]) -> str:
        """The glob of a new layer: that of the whole part of the model around it where all of that is new."""
        part = path.partition(".")[0]
        inside = [name for name in self.floats if name.startswith(f"{part}.")]
        return f"{part}.*" if all(name.rpartition(".")[0] in new for name in inside) else f"{path}.*"


@dataclass(frozen=True)
class LeftOut:
    """A parameter of which no entry can be selected.

    Args:
        parameter: the parameter.
        kind: what it is, in a word or two.
        required: whether it asked for a gradient.
    """

    parameter: nn.Parameter
    kind: str
    required: bool


def split_parameters(
    model: nn.Module, *, where: str | Sequence[str], head: str | Sequence[str], frozen: bool = False
) -> Split:
    """Sort a model's parameters into head, candidates and the rest.

    Args:
        model: the model.
        where: globs of what may be chosen from.
        head: globs of what is trained whole.
        frozen: take parameters that require no gradient as candidates, too: none of them will be trained.

    Raises:
        TitheError: when the model has nothing trainable, a glob matches nothing, nothing is left to choose from, or a
            parameter has no values to train: it is lazy, on the meta device, or made under inference mode.
    """
    _check_values(model)
    named = list(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    alias = {name: first.setdefault(id(p), name) for name, p in named}
    kinds = {name: _kind(p) for name, p in model.named_parameters()}
    floats = {name: p for name, p in model.named_parameters() if p.dtype in TRAINABLE and not kinds[name]}
    left_out = {name: LeftOut(p, kinds[name], p.requires_grad) for name, p in model.named_parameters() if kinds[name]}
    for name, out in left_out.items():
        if out.parameter.dtype not in CODES:
            raise TitheError(
                name,
                found=out.kind,
                expected="weights of a dtype that a file of weights can name",
                remedy="convert it, to torch.complex64 say, or dequantize() it",
            )
    trainable = {name: p for name, p in floats.items() if p.requires_grad or frozen}
    if not trainable:
        others = ", ".join(f"{name}: {out.kind}" for name, out in list(left_out.items())[:3])
        raise TitheError(
            type(model).__name__,
            found=f"no floating-point parameter that requires a gradient among {len(alias)}"
            + (f" ({others})" if others else ""),
            expected="at least one",
            remedy="load the model in a floating-point dtype, or call model.requires_grad_(True)",
        )
    _check_overlap(floats)
    names_by_first: dict[str, list[str]] = {}
    for name, origin in alias.items():
        names_by_first.setdefault(origin, []).append(name)
    in_head = _matching("head", _patterns(head), floats, left_out, names_by_first)
    in_where = _matching("where", _patterns(where), floats, left_out, names_by_first)
    candidates = {name: p for name, p in trainable.items() if name in in_where and name not in in_head}
    if not candidates:
        raise TitheError(
            "where",
            found="only parameters that belong to the head or require no gradient",
            expected="at least one parameter to choose from",
            remedy="widen where=, or narrow head=",
        )
    return Split(floats, {name: floats[name] for name in floats if name in in_head}, candidates, alias, left_out)


def _check_values(model: nn.Module) -> None:
    """Check that every parameter has values that may be trained.

    Raises:
        TitheError: naming the first that is lazy, on the meta device, or made under inference mode.
    """
    for name, parameter in model.named_parameters():
        found = expected = remedy = ""
        if isinstance(parameter, UninitializedTensorMixin):
            found, expected = "a parameter of a lazy module, which has no shape yet", "parameters with values"
            remedy = "run the model once on a batch before attach"
        elif parameter.is_meta and not isinstance(parameter, FakeTensor):
            found, expected = "a parameter on the meta device, without values", "parameters with values"
            remedy = "load the weights before attach, and offload none of them"
        elif parameter.is_inference():
            found, expected = (
                "a parameter made under torch.inference_mode(), which torch never trains",
                "one made outside",
            )
            remedy = "build or load the model outside of torch.inference_mode()"
        if found:
            raise TitheError(name, found=found, expected=expected, remedy=remedy)


def check_recorded(call: str) -> None:
    """Check that autograd records, or may be told to.

    Raises:
        TitheError: inside of torch.inference_mode().
    """
    if torch.is_inference_mode_enabled():
        raise TitheError(
            call,
            found="torch.inference_mode(), inside of which torch makes tensors that it never trains",
            expected="a call outside of it",
            remedy="leave inference_mode for this call; inside of torch.no_grad() it works",
        )


def _kind(parameter: Tensor) -> str:
    """What keeps a plan from selecting entries of a parameter; "" for an ordinary one, and for whole numbers."""
    dtype = str(parameter.dtype).removeprefix("torch.")
    kind = type(parameter)
    if kind.__torch_function__ is not nn.Parameter.__torch_function__ or _dispatches(kind):
        return "" if isinstance(parameter, FakeTensor) else f"{kind.__name__}, a tensor subclass"
    if parameter.layout != torch.strided:
        return str(parameter.layout).removeprefix("torch.").lstrip("_")
    if parameter.is_nested:
        return "nested"
    if parameter.is_complex():
        return dtype
    if parameter.dtype not in TRAINABLE:
        code = parameter.is_quantized or parameter.is_floating_point() or parameter.dtype.itemsize == 1
        return f"quantised, {dtype}" if code and parameter.dtype != torch.bool else ""
    if parameter.is_neg():
        return "a view that negates"
    if _overlaps(parameter):
        return "expanded, several entries in one place of memory"
    return ""


def _overlaps(parameter: Tensor) -> bool:
    return any(step == 0 and size > 1 for step, size in zip(parameter.stride(), parameter.shape, strict=True))


def _dispatches(kind: type[Tensor]) -> bool:
    """Whether a subclass has operations of its own below autograd, as quantised and sharded ones do."""
    found = next(vars(base)["__torch_dispatch__"] for base in kind.__mro__ if "__torch_dispatch__" in vars(base))
    return found is not vars(Tensor)["__torch_dispatch__"]


def _patterns(globs: str | Sequence[str]) -> list[str]:
    return [globs] if isinstance(globs, str) else list(globs)


def _matching(
    setting: str,
    patterns: Iterable[str],
    floats: Mapping[str, nn.Parameter],
    left_out: Mapping[str, LeftOut],
    spelled: Mapping[str, Iterable[str]],
) -> set[str]:
    """First names matched by any pattern and by no "!" pattern; only "!" patterns mean all but those."""
    patterns = list(patterns)
    wanted = [p for p in patterns if not p.startswith("!")]
    unwanted = [p[1:] for p in patterns if p.startswith("!")]
    matched: dict[str, set[str]] = {
        pattern: {name for name in floats if any(fnmatchcase(other, pattern) for other in spelled[name])}
        for pattern in [*wanted, *unwanted]
    }
    for pattern, found in matched.items():
        if not found:
            raise _unmatched(setting, pattern, floats, left_out, spelled)
    base = set[str]().union(*(matched[p] for p in wanted)) if wanted or not unwanted else set(floats)
    return base.difference(*(matched[p] for p in unwanted))


def _unmatched(
    setting: str,
    pattern: str,
    floats: Mapping[str, nn.Parameter],
    left_out: Mapping[str, LeftOut],
    spelled: Mapping[str, Iterable[str]],
) -> TitheError:
    """What to say of a glob that matches nothing: the closest one that does."""
    for name, out in left_out.items():
        if any(fnmatchcase(other, pattern) for other in spelled[name]):
            return TitheError(
                f"{setting}={pattern!r}",
                found=f"{name}, which is {out.kind}",
                expected="dense parameters of float16, bfloat16, float32 or float64",
                remedy=f"leave it out of {setting}=: it stays as it is while the plan is attached",
            )
    names = [other for name in floats for other in spelled[name]]
    closest = _closest(pattern, names)
    close = [name for name in names if closest is not None and fnmatchcase(name, closest)] or names
    return TitheError(
        f"{setting}={pattern!r}",
        found="no floating-point parameter of that name",
        expected="a glob over names such as " + ", ".join(close[:3]),
        remedy="print([name for name, _ in model.named_parameters()]) shows them all"
        if closest is None
        else f'write {setting}="{closest}"',
    )


def _closest(pattern: str, names: Sequence[str]) -> str | None:
    """The glob nearest to a pattern that matches any of `names`: of a module's path, of a part of one, of a typo."""
    bare = pattern.strip("*.")
    for glob in (f"{bare}.*", f"*.{bare}.*", f"*.{bare}", f"*{bare}*"):
        if bare and any(fnmatchcase(name, glob) for name in names):
            return glob
    paths = [path for path in dict.fromkeys(name.rpartition(".")[0] for name in names) if path]
    parts = {path.rpartition(".")[2]: path for path in paths}
    near = difflib.get_close_matches(bare, parts, n=1) or difflib.get_close_matches(bare, paths, n=1)
    return f"{parts.get(near[0], near[0])}.*" if near else None


def _check_overlap(floats: Mapping[str, nn.Parameter]) -> None:
    """Refuse two parameters over the same memory: one would change without the other's selection knowing."""
    seen: dict[tuple[object, int], str] = {}
    for name, parameter in floats.items():
        if parameter.is_meta or isinstance(parameter, FakeTensor) or not parameter.numel():
            continue
        other = seen.setdefault((parameter.device, parameter.data_ptr()), name)
        if other != name:
            raise TitheError(
                name,
                found=f"memory shared with {other} through another Parameter",
                expected="tied weights to be one Parameter",
                remedy=f"assign the same nn.Parameter object to both, as {other} = {name} does",
            )
