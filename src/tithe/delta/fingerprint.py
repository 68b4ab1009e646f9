"""Digest the part of a base that a delta does not change, and find which names share one storage.

What applying a delta gives depends on the base's *unselected* entries only. Their digest is the same for the base
and for the tuned model, so a delta recognises both, and applying it twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tithe.delta.file import CODES
from tithe.errors import TitheError

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def words(name: str, tensor: Tensor) -> Tensor:
    """Return the bits of a tensor, row-major: 1-D integers of its item size, on the CPU, a view where possible.

    Raises:
        TitheError: when the tensor has no dense bits (sparse, quantised, on the meta device) or a dtype that
            safetensors cannot store.
    """
    plain = tensor.layout == torch.strided and not tensor.is_quantized
    if tensor.device.type == "meta" or tensor.dtype not in CODES or not plain:
        raise TitheError(
            name,
            found=f"a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}",
            expected="a dense tensor with values, of a dtype that safetensors stores",
            remedy="load the weights first, or convert the tensor",
        )
    flat = tensor.detach().cpu().resolve_neg().resolve_conj().contiguous().reshape(-1)
    return flat.view(_WORDS[flat.element_size()])


def _bytes(bits: Tensor) -> memoryview:
    return bits.view(torch.uint8).numpy().data


def digest(name: str, tensor: Tensor, without: Tensor | None = None) -> str:
    """Return blake2b (8 bytes, hex) of name, dtype, shape and bits, with the entries `without` set to zero.

    Args:
        name: what the tensor is called.
        tensor: any shape, dtype and device; one copy of it is alive meanwhile.
        without: flat int64 indices of the entries that do not count.
    """
    parts = _inside(tensor)
    if parts:
        hashed = blake2b(f"{name}\0{type(tensor).__name__}\0{list(tensor.shape)}\0".encode(), digest_size=8)
        for part in parts:
            hashed.update(digest(name, part).encode())
        return hashed.hexdigest()
    bits = words(name, tensor)
    if without is not None and without.numel():
        bits = bits.clone() if bits.data_ptr() == tensor.data_ptr() else bits
        bits[without.cpu()] = 0
    hashed = blake2b(f"{name}\0{CODES[tensor.dtype]}\0{list(tensor.shape)}\0".encode(), digest_size=8)
    hashed.update(_bytes(bits))
    return hashed.hexdigest()


def _inside(tensor: Tensor) -> list[Tensor]:
    """The dense tensors of which one without bits of its own is made: of a sparse layout, a quantisation, a wrapper."""
    if is_traceable_wrapper_subclass(tensor):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    if tensor.is_quantized:
        per_axis = tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
        scales = [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()] if per_axis else []
        return [tensor.int_repr(), *(scales or [torch.tensor([tensor.q_scale(), tensor.q_zero_point()])])]
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.detach().coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.detach().values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.detach().values()]
    return [tensor.to_dense()] if str(tensor.layout) == "torch._mkldnn" else []


def checksum(*tensors: Tensor) -> str:
    """Return blake2b (8 bytes, hex) of the bits of stored tensors, one after the other."""
    hashed = blake2b(digest_size=8)
    for tensor in tensors:
        hashed.update(_bytes(words("stored", tensor)))
    return hashed.hexdigest()


def storage_key(name: str, tensor: Tensor) -> tuple[object, ...]:
    """Return a key that two names share exactly when they are the same entries of the same memory."""
    if tensor.numel() == 0 or tensor.device.type == "meta" or _inside(tensor):
        return (name,)
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def ties(tensors: Mapping[str, Tensor], first: Iterable[str] = ()) -> dict[str, tuple[str, ...]]:
    """Return every storage once: its leading name and all its names.

    Args:
        tensors: name → tensor.
        first: names that lead, the earliest of them; without one, the earliest in `tensors` does.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(storage_key(name, tensor), []).append(name)
    rank = {name: place for place, name in enumerate(first)}
    ordered = (tuple(sorted(names, key=lambda name: rank.get(name, len(rank)))) for names in groups.values())
    return {names[0]: names for names in ordered}


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of `model.state_dict()`; other entries (extra state) are not part of a delta."""
    state: dict[str, object] = dict(model.state_dict())
    return {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}
