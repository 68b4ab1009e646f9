from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from tithe.batch import leaves, map_batch, num_samples, slice_batch
from tithe.errors import TitheError

Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Sample:
    x: Tensor
    name: str


def trees() -> list[Any]:
    x, y = torch.arange(12.0).view(4, 3), torch.arange(4)
    return [
        x,
        [x, y],
        (x, {"y": y}),
        Pair(x, y),
        {"x": x, "note": "four", "none": None},
        UserDict(x=x, y=y),
        MappingProxyType({"x": x}),
        Sample(x, "four"),
    ]


@pytest.mark.parametrize("batch", trees(), ids=lambda batch: type(batch).__name__)
def test_slices_keep_the_structure_and_are_views(batch: Any) -> None:
    part = slice_batch(batch, 1, 3)
    assert num_samples(batch) == 4
    assert num_samples(part) == 2
    assert isinstance(part, dict if isinstance(batch, MappingProxyType) else type(batch))
    for whole, piece in zip(leaves(batch), leaves(part), strict=True):
        assert torch.equal(piece, whole[1:3])
        assert piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_the_batch_itself_is_not_changed() -> None:
    batch = UserDict(x=torch.ones(2), rest=[torch.ones(2), "a"])
    doubled = map_batch(lambda x: 2 * x, batch)
    assert [leaf.sum().item() for leaf in leaves(batch)] == [2.0, 2.0]
    assert [leaf.sum().item() for leaf in leaves(doubled)] == [4.0, 4.0]
    assert doubled["rest"][1] == "a"


def test_a_hugging_face_encoding_stays_one() -> None:
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding({"input_ids": torch.zeros(4, 2, dtype=torch.long)})
    part = slice_batch(batch, 0, 1)
    assert isinstance(part, transformers.BatchEncoding)
    assert part.input_ids.shape == (1, 2)
    assert batch.input_ids.shape == (4, 2)


@pytest.mark.parametrize("batch", [{}, ["a", 1], [torch.ones(2), torch.ones(3)], [torch.ones(2), torch.tensor(1.0)]])
def test_a_batch_without_one_number_of_samples_is_refused(batch: Any) -> None:
    with pytest.raises(TitheError, match=r"batch of type .* expected .*first dimension"):
        num_samples(batch)
    with pytest.raises(TitheError):
        slice_batch(batch, 0, 1)


def _boxes(count: int) -> dict[str, Tensor]:
    return {"boxes": torch.rand(count, 4), "labels": torch.arange(count)}


IMAGES = [torch.rand(3, 8, 9), torch.rand(3, 7, 5)]
ALIKE = [torch.rand(3, 8, 8) for _ in range(3)]
TOKENS = torch.arange(18).view(2, 9)
LISTS: dict[str, tuple[Any, int, Any]] = {
    "images and boxes": ((IMAGES, [_boxes(2), _boxes(1)]), 2, lambda b: (b[0][:1], b[1][:1])),
    "as many images as channels, as many boxes": ((ALIKE, [_boxes(3)] * 3), 3, lambda b: (b[0][:1], b[1][:1])),
    "one image, two boxes": (([torch.rand(3, 8, 8)], [_boxes(2)]), 1, lambda b: b),
    "lists of images and of masks": (
        ([torch.rand(3, 8, 8)] * 2, [torch.rand(1, 8, 8)] * 2, torch.arange(2)),
        2,
        lambda b: (b[0][:1], b[1][:1], b[2][:1]),
    ),
    "a list each": ([[torch.rand(3, 8, 8), 1]] * 2, 2, lambda b: b[:1]),
    "one image": (([torch.rand(3, 8, 8)], [_boxes(3)]), 1, lambda b: b),
    "images and a tensor of labels": ((ALIKE, torch.arange(3)), 3, lambda b: (b[0][:1], b[1][:1])),
    "stacked images, boxes in a list": (
        {"pixel_values": torch.rand(2, 3, 8, 8), "labels": [_boxes(2), _boxes(2)]},
        2,
        lambda b: {"pixel_values": b["pixel_values"][:1], "labels": b["labels"][:1]},
    ),
    "a dict each": ([{"image": x, "height": 8} for x in ALIKE[:2]], 2, lambda b: b[:1]),
    "a tuple each": ([(x, 1) for x in IMAGES], 2, lambda b: b[:1]),
    "a vector and a number each": ([(torch.rand(6), torch.tensor(1.0))] * 5, 5, lambda b: b[:1]),
    "texts": (["one", "two", "three"], 3, lambda b: b[:1]),
    "texts beside a tensor": (
        {"text": ["a", "b"], "y": torch.arange(2)},
        2,
        lambda b: {"text": ["a"], "y": b["y"][:1]},
    ),
    "lengths of sequences": ((torch.rand(3, 5), [5, 4, 2]), 3, lambda b: (b[0][:1], [5])),
    "sequences of several lengths": (
        ([torch.rand(5, 2), torch.rand(3, 2)], torch.arange(2)),
        2,
        lambda b: (b[0][:1], b[1][:1]),
    ),
    "columns, several to a list": (
        ([torch.rand(4, 5), torch.rand(4, 7)], [torch.rand(4), torch.rand(4)]),
        4,
        lambda b: ([x[:1] for x in b[0]], [y[:1] for y in b[1]]),
    ),
    "columns of tokens in dicts": (
        ([{"ids": TOKENS}, {"ids": TOKENS}], torch.rand(2)),
        2,
        lambda b: ([{"ids": column["ids"][:1]} for column in b[0]], b[1][:1]),
    ),
    "keys and values of a cache": (
        {"past": [(torch.rand(4, 2, 3, 5), torch.rand(4, 2, 3, 5))] * 2, "ids": torch.rand(4, 7)},
        4,
        lambda b: {"past": [(k[:1], v[:1]) for k, v in b["past"]], "ids": b["ids"][:1]},
    ),
}


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, dict):
        return list(one) == list(two) and all(_same(one[key], two[key]) for key in one)
    return bool(one == two)


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_samples_are_samples_and_lists_of_columns_columns(name: str) -> None:
    batch, count, first = LISTS[name]
    assert num_samples(batch) == count
    assert _same(slice_batch(batch, 0, 1), first(batch))
    assert _same(slice_batch(batch, 0, count), batch)


PACKED = {
    "ids": torch.zeros(1, 50),
    "cu_seq_lens_q": torch.arange(5),
    "cu_seq_lens_k": torch.arange(5),
    "max_length": 12,
}


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (PACKED, 1),
        (dict(reversed(PACKED.items())), 1),
        ({"x": torch.rand(8, 2), "y": torch.arange(8), "classes": torch.rand(5), "total": torch.tensor(3)}, 8),
        ({"x": torch.rand(8, 2), "size": (4, 4), "note": "eight", "none": None}, 8),
        ({"position_ids": torch.zeros(3, 2, 9), "ids": TOKENS, "labels": TOKENS}, 2),
        (Pair(torch.rand(8, 2), torch.rand(5)), 8),
        (Sample(torch.rand(8, 2), "eight"), 8),
    ],
    ids=lambda value: type(value).__name__,
)
def test_named_values_that_do_not_count_samples_pass_through(batch: Any, count: int) -> None:
    assert num_samples(batch) == count
    part = slice_batch(batch, count - 1, count)
    assert num_samples(part) == 1
    for whole, piece in zip(leaves(batch), leaves(part), strict=True):
        counted = whole.shape[:1] == (count,)
        assert torch.equal(piece, whole[count - 1 :] if counted else whole)


def test_packed_sequences_nested_and_sparse_tensors_are_cut_too() -> None:
    sequences = [torch.rand(n, 2) for n in (2, 5, 3)]
    packed = torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    part = slice_batch({"x": packed, "y": torch.arange(3)}, 1, 3)
    assert num_samples((packed, torch.arange(3))) == 3
    assert all(map(torch.equal, torch.nn.utils.rnn.unpack_sequence(part["x"]), sequences[1:]))
    assert map_batch(lambda x: 2 * x, packed).data.sum() == 2 * packed.data.sum()
    nested = torch.nested.nested_tensor(sequences, layout=torch.jagged)
    assert all(map(torch.equal, slice_batch(nested, 1, 3).unbind(), sequences[1:]))
    sparse = torch.eye(4).to_sparse()
    assert torch.equal(slice_batch(sparse, 1, 3).to_dense(), torch.eye(4)[1:3])
