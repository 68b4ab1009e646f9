"""What is wrong with a delta is refused with a reason, and the model keeps every bit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltas import Tied, bits, net, pick, train
from tithe.delta import apply, write_delta
from tithe.delta.file import TensorFile
from tithe.delta.format import seal
from tithe.errors import TitheError
from tithe.selection import Coordinates


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    """A delta on `net()`: some weights of every tensor, a dense head, changed buffers."""
    model = net()
    selections = train(model, 0.2)
    head = {name: p.detach().add(1) for name, p in model.named_parameters() if name.startswith("3.")}
    path = tmp_path / "delta.safetensors"
    body = {name: s for name, s in selections.items() if not name.startswith("3.")}
    buffers = {"1.num_batches_tracked": torch.tensor(17), "1.running_mean": torch.ones(16)}
    write_delta(path, model, body, {**head, **buffers}, metadata={"method": "fish", "density": "0.2"})
    return path


def refused(path: Path, *parts: str, model: nn.Module | None = None) -> TitheError:
    base = net() if model is None else model
    before = bits(base)
    with pytest.raises(TitheError) as caught:
        apply(base, path)
    assert bits(base) == before
    for part in (*parts, "Remedy: "):
        assert part in str(caught.value)
    return caught.value


def edit(path: Path, change: Callable[[dict[str, Tensor], dict[str, object]], None]) -> Path:
    """The same delta with its tensors or header changed, and the header's own checksum made right again."""
    tensors = load_file(path)
    header = json.loads(TensorFile(path).metadata["tithe"])
    del header["checksum"]
    change(tensors, header)
    edited = path.with_name("edited.safetensors")
    save_file(tensors, edited, {"tithe": seal(json.dumps(header, separators=(",", ":")))})
    return edited


def test_truncated_anywhere(delta):
    whole = delta.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for size in {0, 1, 7, 8, 9, start - 1, start, start + 1, len(whole) // 2, len(whole) - 1}:
        delta.write_bytes(whole[:size])
        refused(delta, str(delta), "a complete safetensors file")


def test_longer_than_it_says(delta):
    delta.write_bytes(delta.read_bytes() + b"\0")
    refused(delta, "cannot be read")


def test_no_flipped_bit_goes_unnoticed(delta):
    whole = delta.read_bytes()
    generator = torch.Generator().manual_seed(1)
    model = net()
    before = bits(model)
    for place in torch.randperm(len(whole) * 8, generator=generator)[:500].tolist():
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        delta.write_bytes(flipped)
        with pytest.raises(TitheError):
            apply(model, delta)
        assert bits(model) == before


@pytest.mark.parametrize(
    ("indices", "parts"),
    [
        ([-1, 3, 5], ["indices from -1 to 5", "[0, 128)"]),
        ([2, 3, 128], ["indices from 2 to 128", "[0, 128)"]),
        ([5, 3, 7], ["unsorted", "strictly increasing"]),
        ([3, 3, 7], ["duplicate", "strictly increasing"]),
        ([2, 3, 7], ["do not match their checksum"]),
    ],
)
def test_tampered_indices(tmp_path, indices, parts):
    model = net()
    write_delta(tmp_path / "d", model, {"0.weight": Coordinates((16, 8), torch.tensor([1, 3, 5]))}, {}, metadata={})

    def change(tensors: dict[str, Tensor], header: object) -> None:
        tensors["0.weight#indices"] = torch.tensor(indices, dtype=torch.int32)

    refused(edit(tmp_path / "d", change), "0.weight", *parts)


def test_moved_index_where_the_base_is_zero(tmp_path):
    tuned, base = net(), net()
    nn.init.zeros_(tuned[0].bias)
    nn.init.zeros_(base[0].bias)
    chosen = Coordinates((16,), torch.tensor([4]))
    chosen.scatter_(tuned[0].bias.detach(), torch.ones(1))
    write_delta(tmp_path / "d", tuned, {"0.bias": chosen}, {}, metadata={})

    def change(tensors: dict[str, Tensor], header: object) -> None:
        tensors["0.bias#indices"] += 1

    refused(edit(tmp_path / "d", change), "0.bias", "checksum", model=base)


def _drop_values(tensors: dict[str, Tensor], header: dict) -> None:
    tensors["0.weight#values"] = tensors["0.weight#values"][1:].clone()


def _wide_indices(tensors: dict[str, Tensor], header: dict) -> None:
    tensors["0.weight#indices"] = tensors["0.weight#indices"].long()


def _two_dimensions(tensors: dict[str, Tensor], header: dict) -> None:
    tensors["0.weight#indices"] = tensors["0.weight#indices"][None]


def _half_values(tensors: dict[str, Tensor], header: dict) -> None:
    tensors["0.weight#values"] = tensors["0.weight#values"].half()


def _no_indices(tensors: dict[str, Tensor], header: dict) -> None:
    del tensors["0.weight#indices"]


def _stowaway(tensors: dict[str, Tensor], header: dict) -> None:
    tensors["9.weight#dense"] = torch.ones(3)


def _future(tensors: dict[str, Tensor], header: dict) -> None:
    header["version"] = 3


def _odd_version(tensors: dict[str, Tensor], header: dict) -> None:
    header["version"] = "1"


def _no_tensors(tensors: dict[str, Tensor], header: dict) -> None:
    del header["tensors"]


def _negative_shape(tensors: dict[str, Tensor], header: dict) -> None:
    header["tensors"]["0.weight"][1] = [-16, -8]


def _twice(tensors: dict[str, Tensor], header: dict) -> None:
    header["aliases"] = {"0.weight": ["0.bias"]}


def _other_digest(tensors: dict[str, Tensor], header: dict) -> None:
    header["tensors"]["1.running_var"][3] = "0" * 16


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (_drop_values, ["0.weight#values", "F32 of shape ["]),
        (_wide_indices, ["0.weight#indices", "I64 of shape", "expected I32"]),
        (_two_dimensions, ["'0.weight#indices' of shape [1, ", "one dimension"]),
        (_half_values, ["0.weight#values", "F16", "expected F32"]),
        (_no_indices, ["no tensor '0.weight#indices'", "exactly the tensors that the header announces"]),
        (_stowaway, ["an unannounced tensor '9.weight#dense'"]),
        (_future, ["format version 3", "up to 2", "upgrade tithe"]),
        (_odd_version, ["format version '1'"]),
        (_no_tensors, ["missing or malformed parts"]),
        (_negative_shape, ["missing or malformed parts"]),
        (_twice, ["names a tensor twice"]),
        (_other_digest, ["another base: 1 of 5 tensors differ, first '1.running_var' in 1"]),
    ],
)
def test_tampered_file(delta, change, parts):
    refused(edit(delta, change), *parts)


def test_header_edited_by_hand(delta):
    save_file(load_file(delta), delta, {"tithe": TensorFile(delta).metadata["tithe"].replace("fish", "sole")})
    refused(delta, "does not match its checksum")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"version":1}', "[" * 100_000])
def test_header_that_is_not_ours(delta, text):
    save_file(load_file(delta), delta, {"tithe": text})
    refused(delta, str(delta), "header")


def test_foreign_files(tmp_path):
    plain = tmp_path / "model.safetensors"
    save_file({"0.weight": torch.ones(2)}, plain)
    refused(plain, "without a tithe header", "plan.save")
    pickled = tmp_path / "model.pt"
    torch.save({"a": torch.ones(2)}, pickled)
    refused(pickled, "cannot be read")
    refused(tmp_path / "nowhere", "no such file")
    refused(tmp_path, "a folder")


def test_wrong_base(delta):
    other = net()
    with torch.no_grad():
        other[0].weight += 1e-6
        other[1].bias[0] += 1
    error = refused(delta, "another base: 2 of 5", "first '0.weight' in 0", "load that base", model=other)
    assert error.place == str(delta)


def test_other_shape_dtype_names(delta):
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    refused(delta, "3.weight: found shape [4, 16]; expected shape [3, 16]", model=wide)
    refused(delta, "0.weight: found dtype torch.bfloat16", "load the base in torch.float32", model=net().bfloat16())
    wrapped = nn.ModuleDict({"module": net()})
    refused(delta, "0.weight", "has the prefix 'module.'", "model.module under DDP", model=wrapped)
    refused(delta, "no such tensor in the model, as for 2", model=net()[:3])
    larger = net().append(nn.Linear(3, 3))
    refused(delta, "4.weight: found a tensor that", "does not know", model=larger)
    with torch.device("meta"):
        empty = net()
    with pytest.raises(TitheError, match="on meta"):
        apply(empty, delta)


def test_weights_tied_since(tmp_path):
    tuned = Tied(tied=False)
    base = Tied(tied=True)
    path = tmp_path / "d"
    write_delta(path, tuned, {"out.weight": pick(tuned.out.weight, 0.1)}, {}, metadata={})
    refused(path, "one storage for embed.weight and out.weight", "untie", model=base)


def test_state_dict_that_is_a_copy(delta):
    model = net()

    def copied(module: nn.Module, state: dict[str, Tensor], prefix: str, local: object) -> None:
        state.update({name: tensor.clone() for name, tensor in state.items()})

    model.register_state_dict_post_hook(copied)
    refused(delta, "a copy, not a parameter or buffer", model=model)
