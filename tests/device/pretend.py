"""Compile the pretend accelerator of `pretend.cpp`, and give it to torch as the device "hpu"."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("pretend.cpp")
WARNINGS_OFF = "-w"  # those are of torch's headers


class NoCompilerError(RuntimeError):
    """There is no C++ compiler on this machine."""


def load(folder: Path) -> torch.device:
    """Make the device exist, before any backward pass: autograd counts devices at the first one.

    Args:
        folder: where compiled libraries stay, one for each source, torch and compiler.

    Returns:
        The device.

    Raises:
        NoCompilerError: where there is none.
    """
    torch.ops.load_library(str(_compiled(folder)))
    torch._register_device_module("hpu", _module())
    torch._register_device_module("privateuseone", _seeds())  # torch.manual_seed seeds it, and no HPU
    return torch.device("hpu", 0)


def take_refusals() -> list[str]:
    """What operators refused since the last call, whoever caught the error."""
    return torch.ops.pretend.take_refusals()


def _compiled(folder: Path) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise NoCompilerError("no C++ compiler (g++, or one that CXX names)")
    arguments = ["-std=c++20", "-O1", WARNINGS_OFF, "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={int(_new_abi())}"]
    arguments += [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    key = hashlib.sha256(SOURCE.read_bytes())
    for part in (torch.__version__, sys.platform, compiler, *arguments):
        key.update(f"\n{part}".encode())
    library = folder / f"pretend-{key.hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            libraries = ["-ltorch_cpu", "-lc10"]
            run = [compiler, *arguments, str(SOURCE), *libraries, "-o", str(made)]
            subprocess.run(run, check=True)
            made.replace(library)  # another process may be compiling the same
    return library


def _new_abi() -> bool:
    return torch.compiled_with_cxx11_abi()


@contextmanager
def _device(index: object) -> Iterator[None]:
    yield


def _module() -> ModuleType:
    """What torch calls `torch.<device>`."""
    module = ModuleType("torch.hpu")
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda index: None,
        "device": _device,
        "synchronize": lambda device=None: None,
        "manual_seed": torch.ops.pretend.seed,
        "manual_seed_all": torch.ops.pretend.seed,
        "get_rng_state": lambda device=None: torch.ops.pretend.rng_state(),
        "set_rng_state": lambda state, device=None: torch.ops.pretend.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.ops.pretend.rng_state()],
        "set_rng_state_all": lambda states: torch.ops.pretend.set_rng_state(*states),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }
    for name, value in {**functions, "_initialized": True}.items():  # activation checkpointing reads the attribute
        setattr(module, name, value)
    return module


def _seeds() -> ModuleType:
    module = ModuleType("torch.privateuseone")
    for name, function in {"_is_in_bad_fork": lambda: False, "manual_seed_all": torch.ops.pretend.seed}.items():
        setattr(module, name, function)
    return module
