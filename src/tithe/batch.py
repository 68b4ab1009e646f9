"""A batch is any tree of tensors: dicts, `UserDict`s (Hugging Face's `BatchEncoding`), lists, tuples, dataclasses.

The first dimension of every tensor counts the samples. A value that is neither a tensor nor a container (a string, a
number, None) is passed along as it is.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, cast

from torch import Tensor

from tithe.errors import TitheError

__all__ = ["leaves", "map_batch", "num_samples", "slice_batch"]


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
    if isinstance(batch, Mapping):
        tree = cast("Mapping[Any, Any]", batch)
        items = {key: map_batch(fn, value) for key, value in tree.items()}
        if type(tree) is dict or not isinstance(tree, MutableMapping):
            return items
        new = copy.copy(tree)
        for key, value in items.items():
            new[key] = value
        return new
    if isinstance(batch, (list, tuple)):
        values = [map_batch(fn, value) for value in cast("list[Any]", batch)]
        kind = cast("type[Any]", type(batch))
        return kind(*values) if issubclass(kind, tuple) and "_fields" in vars(kind) else kind(values)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        new = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(new, field.name, map_batch(fn, getattr(batch, field.name)))
        return new
    return batch


def leaves(batch: Any) -> Iterator[Tensor]:
    """Yield every tensor of the tree, containers in their own order.

    Example:
        >>> import torch
        >>> [tuple(x.shape) for x in leaves({"x": torch.zeros(2, 3), "y": [torch.zeros(2)]})]
        [(2, 3), (2,)]
    """
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in cast("Mapping[Any, Any]", batch).values():
            yield from leaves(value)
    elif isinstance(batch, (list, tuple)):
        for value in cast("list[Any]", batch):
            yield from leaves(value)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from leaves(getattr(batch, field.name))


def num_samples(batch: Any) -> int:
    """Return the length that the first dimension of every tensor of the batch has.

    Raises:
        TitheError: when the batch has no tensor, a tensor without dimensions, or tensors of different lengths.

    Example:
        >>> import torch
        >>> num_samples({"x": torch.zeros(8, 3), "y": torch.zeros(8)})
        8
    """
    shapes = [tuple(leaf.shape) for leaf in leaves(batch)]
    if not shapes:
        raise TitheError(
            f"batch of type {type(batch).__name__}",
            found="no tensor in it",
            expected="tensors whose first dimension counts the samples",
            remedy="yield tensors, or dicts, lists, tuples or dataclasses of tensors",
        )
    lengths = {shape[:1] for shape in shapes}
    if len(lengths) > 1 or () in lengths:
        raise TitheError(
            f"batch of type {type(batch).__name__}",
            found="tensors of shapes " + ", ".join(map(str, shapes)),
            expected="the same first dimension in every tensor",
            remedy="keep what is not per sample out of the batch, for example in the loss function",
        )
    return shapes[0][0]


def slice_batch(batch: Any, start: int, stop: int) -> Any:
    """Return samples `start` to `stop` (exclusive) of every tensor, as views, in the structure of the batch.

    Raises:
        TitheError: as `num_samples`.

    Example:
        >>> import torch
        >>> slice_batch([torch.arange(4)], 1, 3)
        [tensor([1, 2])]
    """
    num_samples(batch)
    return map_batch(lambda leaf: leaf[start:stop], batch)
