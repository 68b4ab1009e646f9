"""Describe one traced operation: its arguments with their labels, and how they combine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tithe.coupling.labels import Classes, Label, Labels, aligned, always, moved, varying


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor in an operation: its shape, its labels, and the dimensions whose size never changes.

    Args:
        shape: its sizes.
        labels: which entries exist.
        stretched: dimensions that were expanded from size 1. Where the tensor does not depend on the parameters (a
            mask) they take the size of what they meet; keys that several query heads share do not.
        tensor: the values, for operations that index by them; None for an intermediate result.
        depends: whether the values depend on the model's parameters.
        loose: all sizes follow what the tensor meets: random noise, drawn in the shape of something else.
        weight: whether it is a parameter itself, at most cast or with its entries moved.
    """

    shape: tuple[int, ...]
    labels: Labels = ()
    stretched: frozenset[int] = frozenset()
    tensor: Tensor | None = None
    depends: bool = False
    loose: bool = False
    weight: bool = False

    @property
    def num_dims(self) -> int:
        """Return the number of dimensions of the tensor."""
        return len(self.shape)

    def fixed(self) -> Iterator[int]:
        """Return the dimensions on which no label depends and whose size never changes."""
        free = frozenset[int]().union(*map(varying, self.labels))
        bends = free if self.depends else free | self.stretched
        for dim, size in enumerate(self.shape):
            if size > 1 and dim not in bends and not self.loose:
                yield dim

    def with_labels(self, labels: Iterable[Label]) -> Operand:
        """Return the same tensor under other labels."""
        return replace(self, labels=tuple(labels))


@dataclass(frozen=True, eq=False)
class Work:
    """The operations of one product of tensors: `total` with nothing cut, in proportion to the width of each label."""

    total: float
    labels: Labels


@dataclass(eq=False)
class Call:
    """An operation, its arguments by name with each tensor as an `Operand`, and the shapes of its results.

    Args:
        name: of the operation, without overload and without the mark of writing in place.
        run: the operation with another first argument, for labels to go through it as the tensor did.
        arguments: by the names of the operation's schema, defaults filled in.
        shapes: of the tensors it returned.
        place: path of the module that runs.
        classes: which positions live and die together.
        work: what products cost, added to.
        made: labels of the outputs of products, added to: they name what makes a unit.
        read: labels of weights along what a product sums over, added to: they name what reads a unit.
    """

    name: str
    run: Callable[[Tensor], Any]
    arguments: Mapping[str, Any]
    shapes: Sequence[tuple[int, ...]]
    place: str
    classes: Classes
    work: list[Work] = field(default_factory=list)
    made: list[Label] = field(default_factory=list)
    read: list[Label] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def first(self) -> Operand:
        """Return the first tensor among the arguments."""
        return next(operands(self.arguments))

    def why(self, what: str) -> str:
        """Return a reason together with the place where it arose."""
        return f"{what} in {self.place}" if self.place else f"{what} outside of any module"

    def without(self, operand: Operand, dims: Iterable[int], what: str) -> Labels:
        """Return the labels when these dimensions stay whole: tied along them, and of size 1 there."""
        dims = [dim % operand.num_dims for dim in dims] if operand.num_dims else []
        tied = (self.classes.tie(label, dims, self.why(what)) for label in operand.labels)
        return tuple(label for label in tied if label is not None)

    def meet(self, shape: Sequence[int], *met: Operand) -> Labels:
        """Return the labels of an entrywise combination of `met`, broadcast to `shape`."""
        num_dims = len(shape)
        lifted = [[aligned(label, num_dims) for label in one.labels] for one in met]
        free = frozenset[int]().union(*(varying(label) for labels in lifted for label in labels))
        labels = [label for labels in lifted for label in labels]
        for one in met:
            shift = num_dims - one.num_dims
            labels += [always(d + shift, shape[d + shift], num_dims) for d in one.fixed() if d + shift in free]
        return self.classes.merge(labels, self.why("meets a tensor of fixed size"))

    def product(self, left: Operand, right: Operand, dims: str, total: float | None = None) -> Labels:
        """Return the labels of a product summed over the axes that only its two factors share, as in einsum.

        Args:
            left: first factor.
            right: second factor.
            dims: "mk,kn->mn".
            total: its operations with nothing cut; 2 · Π sizes where None.
        """
        inputs, result = dims.split("->")
        letters = sorted(set(inputs) - {","})
        sizes: dict[str, int] = {}
        labels: list[Label] = []
        always_there: list[tuple[str, int]] = []
        summed = {letter for letter in letters if letter not in result}
        reader, names = (right, inputs.split(",")[1]) if right.weight else (left, inputs.split(",")[0])
        if reader.weight:  # of two weights one is read, as activations are
            self.read += [label for label in reader.labels if any(names[k] in summed for k in varying(label))]
        for operand, names in zip((left, right), inputs.split(","), strict=True):
            sizes |= {name: size for name, size in zip(names, operand.shape, strict=True) if size != 1}
            order = [names.index(letter) if letter in names else None for letter in letters]
            for label in operand.labels:
                lifted = moved(label, order)
                over = [k for k in varying(lifted) if letters[k] in summed]
                if over and len(over) < len(varying(lifted)):  # summed entry by entry of something else: keep it whole
                    tied = self.classes.tie(lifted, over, self.why("summed over"))
                    always_there += [(letters[k], lifted.shape[k]) for k in over]
                    labels += [] if tied is None else [tied]
                else:
                    labels.append(lifted)
            always_there += [(names[dim], operand.shape[dim]) for dim in operand.fixed()]
        free = frozenset[int]().union(*map(varying, labels))
        labels += [always(k, size, len(letters)) for name, size in always_there if (k := letters.index(name)) in free]
        merged = self.classes.merge(labels, self.why("multiplied by a tensor of fixed size"))
        self.work.append(Work(2.0 * math.prod(sizes.values()) if total is None else total, merged))
        kept = [label for label in merged if not any(letters[k] in summed for k in varying(label))]
        self.made += kept
        return tuple(moved(label, [letters.index(letter) for letter in result]) for label in kept)


def operands(tree: Any) -> Iterator[Operand]:
    """Return every tensor among the arguments."""
    if isinstance(tree, Operand):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from operands(item)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from operands(item)
