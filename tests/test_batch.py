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
