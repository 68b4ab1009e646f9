"""A batch is any tree of tensors: dicts, `UserDict`s (Hugging Face's `BatchEncoding`), lists, tuples, dataclasses.

Samples lie along the first dimension of tensors, or are the items of lists (images of several sizes, one dict of boxes
for each). What is given by name and does not count samples (the bounds of packed sequences, a maximal length, a string,
None) is passed along as it is.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from tithe.errors import TitheError

_Part = slice | list[int]

__all__ = ["leaves", "map_batch", "num_samples", "slice_batch", "take_samples"]


def map_batch(fn: Callable[[Tensor], Any], batch: Any) -> Any:
    """Return a batch of the same structure with `fn` applied to each of its tensors.

    Args:
        fn: called once for each tensor, in the order of `leaves`.
        batch: any tree; it is not changed.

    Returns:
        A new tree of the same container types. A mapping that cannot be written to comes back as a dict.

    Example:
        >>> import torch
        >>> map_batch(lambda x: x + 1, {"x": torch.zeros(2), "name": "a"})
        {'x': tensor([1., 1.]), 'name': 'a'}
    """
    if isinstance(batch, Tensor):
        return fn(batch)
    if isinstance(batch, PackedSequence):  # its other tensors say how the first is packed
        return PackedSequence(fn(batch.data), *batch[1:])
    return _rebuilt(batch, lambda item: map_batch(fn, item))


def leaves(batch: Any) -> Iterator[Tensor]:
    """Yield every tensor of the tree, containers in their own order.

    Example:
        >>> import torch
        >>> [tuple(x.shape) for x in leaves({"x": torch.zeros(2, 3), "y": [torch.zeros(2)]})]
        [(2, 3), (2,)]
    """
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, PackedSequence):
        yield batch.data
    else:
        for item in _items(batch):
            yield from leaves(item)


def num_samples(batch: Any) -> int:
    """Return how many samples a batch holds.

    They are counted by the first dimension of its tensors, or by the length of lists whose items are samples: tensors
    of several sizes, dicts that do not agree in their first dimension, anything that is no tensor. Where named tensors
    disagree, most of them decide, those of two dimensions or more first; the others do not count samples.

    Raises:
        TitheError: when the batch has neither tensors nor a list of samples, or tensors without a name disagree.

    Example:
        >>> import torch
        >>> num_samples({"x": torch.zeros(8, 3), "y": torch.zeros(8), "classes": torch.zeros(5)})
        8
        >>> num_samples(([torch.zeros(3, 9, 7), torch.zeros(3, 8, 8)], [{"box": torch.zeros(4)}] * 2))
        2
    """
    return _layout(batch).count


def slice_batch(batch: Any, start: int, stop: int) -> Any:
    """Return samples `start` to `stop` (exclusive), tensors as views, in the structure of the batch.

    Raises:
        TitheError: as `num_samples`.

    Example:
        >>> import torch
        >>> slice_batch([torch.arange(4)], 1, 3)
        [tensor([1, 2])]
    """
    layout = _layout(batch)
    return batch if (start, stop) == (0, layout.count) else _cut(batch, layout, slice(start, stop))


def take_samples(batch: Any, samples: Sequence[int]) -> Any:
    """Return the samples with these numbers, in this order, in the structure of the batch.

    Raises:
        TitheError: as `num_samples`.

    Example:
        >>> import torch
        >>> take_samples({"x": torch.arange(4), "note": "four"}, [3, 0])
        {'x': tensor([3, 0]), 'note': 'four'}
    """
    first = samples[0] if samples else 0
    if list(samples) == list(range(first, first + len(samples))):
        return slice_batch(batch, first, first + len(samples))
    return _cut(batch, _layout(batch), list(samples))


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How samples lie in a batch.

    Args:
        count: N.
        listed: some list is known to hold samples, so that any other list of N items does.
    """

    count: int
    listed: bool


class _Found(NamedTuple):
    """A tensor that may count samples.

    Args:
        tensor: it.
        named: it is the value of a key or a field.
        nested: it lies in a list or a tuple inside the batch.
    """

    tensor: Tensor
    named: bool
    nested: bool


def _layout(batch: Any) -> _Layout:
    lists: list[int] = []
    found: list[_Found] = []
    _search(batch, lists, found, named=False, depth=0)
    outside = [f for f in found if not f.nested] or found
    counts = Counter(f.tensor.shape[0] for f in outside if f.tensor.dim())
    if lists:
        known = [n for n in lists if n in counts] or lists
        if len(set(known)) == 1:
            return _Layout(known[0], True)
    if not counts:
        raise _unreadable(batch, "lists of different lengths" if lists else "no tensor in it, and no list of samples")
    wide = [f.tensor.shape[0] for f in outside if f.tensor.dim() > 1] or list(counts)
    count = max(wide, key=lambda n: counts[n])  # the first of those that are counted most often
    if any(f.tensor.shape[:1] != (count,) for f in outside if not f.named and not f.nested):
        raise _unreadable(batch, "tensors of shapes " + ", ".join(str(tuple(f.tensor.shape)) for f in found))
    return _Layout(count, False)


def _unreadable(batch: Any, found: str) -> TitheError:
    return TitheError(
        f"batch of type {type(batch).__name__}",
        found=found,
        expected="the same first dimension in every tensor, which counts the samples, or a list of single samples",
        remedy="give what is not per sample under a key of a dict, or yield lists of samples, each a dict or a tuple",
    )


def _search(node: Any, lists: list[int], found: list[_Found], *, named: bool, depth: int) -> None:
    """Collect the lengths of lists that are known to hold samples, and the tensors outside of those."""
    if isinstance(node, Tensor):
        found.append(_Found(node, named, depth > 1))
    elif isinstance(node, PackedSequence):
        lists.append(int(node.batch_sizes[0]))
    elif _is_list(node):
        if _holds_samples(node, alone=depth == 0):
            lists.append(len(node))
            return
        for item in node:
            _search(item, lists, found, named=named and depth > 0, depth=depth + 1)
    else:
        for item in _items(node):
            _search(item, lists, found, named=True, depth=max(depth, 1))


def _holds_samples(items: Any, *, alone: bool = False) -> bool:
    """Whether what a list holds cannot be columns of a batch: the items are alike, and each is a sample.

    Args:
        items: the list.
        alone: it is the whole batch, so that items without a tensor are samples too. Vectors of numbers are not: they
            are columns that do not agree.
    """
    if not len(items) or len({_signature(item) for item in items}) > 1:
        return False
    if isinstance(items[0], Tensor):
        vectors = alone and items[0].dim() < 2 and items[0].is_floating_point()
        return not vectors and (not items[0].dim() or _unlike_columns(items))
    if not _is_container(items[0]):
        return alone
    inner = [list(leaves(item)) for item in items]
    if not any(inner):
        return alone
    alike = _is_list(items[0]) and len({_signature(item) for item in items[0]}) == 1
    if alike and (isinstance(items[0], list) or len(items) <= len(items[0])):
        return False  # (images, masks): a list of columns, each a list of samples
    if any(isinstance(value, (int, float, str)) for item in items for value in _items(item)):
        return True
    dims = {leaf.shape[:1] for each in inner for leaf in each}
    if len(dims) > 1 or () in dims or any(_unlike_columns(same) for same in zip(*inner, strict=False)):
        return True
    return isinstance(items[0], Mapping) and any(leaf.dim() < 2 for leaf in inner[0])


def _unlike_columns(tensors: Any) -> bool:
    """Whether tensors of one kind differ as columns do not: in their first dimension, or in sizes as images do."""
    shapes = {tuple(tensor.shape) for tensor in tensors}
    return len({shape[:1] for shape in shapes}) > 1 or (len(shapes) > 1 and all(len(shape) > 2 for shape in shapes))


def _signature(node: Any) -> Any:
    """What makes items alike: the type, of tensors also dtype and number of dimensions, of lists what they hold."""
    if isinstance(node, Tensor):
        return node.dtype, node.dim()
    if not isinstance(node, (list, tuple)):
        return type(node)
    inner = [_signature(item) for item in cast("list[Any]", node)]
    return type(node), inner[0] if len(set(inner)) == 1 else tuple(inner)


def _cut(node: Any, layout: _Layout, part: _Part, depth: int = 0) -> Any:
    if isinstance(node, Tensor):
        return _rows(node, part) if node.dim() and node.shape[0] == layout.count else node
    if isinstance(node, PackedSequence):
        return pack_sequence(_picked(unpack_sequence(node), part), enforce_sorted=False)
    as_long = _is_list(node) and len(node) == layout.count
    if as_long and (_holds_samples(node, alone=depth == 0) or (depth > 0 and _is_column(node, layout))):
        values = _picked(node, part)
        return values if isinstance(node, list) else tuple(values)
    return _rebuilt(node, lambda item: _cut(item, layout, part, depth + 1))


def _is_column(items: Any, layout: _Layout) -> bool:
    """Whether a list of N items inside a batch, which might be anything by itself, has one for each sample."""
    inner = [leaf for item in items for leaf in leaves(item)]
    if not inner:  # strings, lengths; but a tuple of numbers is a size
        return not (isinstance(items, tuple) and all(isinstance(item, (int, float)) for item in items))
    if any(_is_list(item) and _holds_samples(item) for item in items):
        return False
    if layout.listed or any(leaf.shape[:1] != (layout.count,) for leaf in inner):
        return True
    images = all(isinstance(item, Tensor) and item.dim() == 3 and item.is_floating_point() for item in items)
    return images and len(items) > 2  # as many as an image has channels


def _picked(items: Any, part: _Part) -> list[Any]:
    return list(items)[part] if isinstance(part, slice) else [items[n] for n in part]


def _rows(tensor: Tensor, part: _Part) -> Tensor:
    """Rows of a tensor; those of a slice as a view where the layout has one."""
    if tensor.is_nested:
        return torch.nested.as_nested_tensor(_picked(tensor.unbind(), part), layout=tensor.layout)
    if tensor.layout is not torch.strided:
        rows = range(tensor.shape[0])[part] if isinstance(part, slice) else part
        return tensor.index_select(0, torch.tensor(list(rows), device=tensor.device))
    return tensor[part]


def _is_list(node: Any) -> bool:
    return isinstance(node, list) or (isinstance(node, tuple) and not _has_fields(node))


def _has_fields(node: Any) -> bool:
    return isinstance(node, tuple) and "_fields" in vars(type(node))


def _is_dataclass(node: Any) -> bool:
    return dataclasses.is_dataclass(node) and not isinstance(node, type)


def _is_container(node: Any) -> bool:
    return isinstance(node, (Mapping, list, tuple)) or _is_dataclass(node)


def _items(node: Any) -> list[Any]:
    """What a container holds, in its own order; nothing for anything else."""
    if isinstance(node, Mapping):
        return list(cast("Mapping[Any, Any]", node).values())
    if isinstance(node, (list, tuple)):
        return list(cast("list[Any]", node))
    return [getattr(node, field.name) for field in dataclasses.fields(node)] if _is_dataclass(node) else []


def _rebuilt(node: Any, fn: Callable[[Any], Any]) -> Any:
    """A container of the same type with `fn` of each of its items; anything else as it is."""
    if isinstance(node, Mapping):
        tree = cast("Mapping[Any, Any]", node)
        items = {key: fn(value) for key, value in tree.items()}
        if type(tree) is dict or not isinstance(tree, MutableMapping):
            return items
        new = copy.copy(tree)
        for key, value in items.items():
            new[key] = value
        return new
    if isinstance(node, (list, tuple)):
        values = [fn(value) for value in cast("list[Any]", node)]
        kind = cast("type[Any]", type(node))
        return kind(*values) if _has_fields(node) else kind(values)
    if _is_dataclass(node):
        new = copy.copy(node)
        for field in dataclasses.fields(node):
            object.__setattr__(new, field.name, fn(getattr(node, field.name)))
        return new
    return node
