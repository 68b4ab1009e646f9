"""The mean of eight checkpoints of 1.1 billion weights in bfloat16, made for the purpose: 17.6 GB on disk.

The read speed of the disk is measured with plain unbuffered reads of 16 MiB of all eight files; then another process
averages them. Before each the system is told to forget the files' pages. *Peak* is the highest resident size of that
process (VmHWM), the interpreter and torch included. A tensor of the result is compared with torch's mean in float64.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.records import Store, parse

COPIES, LAYERS, WIDTH, INNER, WORDS = 8, 22, 2048, 5632, 32_000
CHUNK = 16 << 20

CHILD = """
import sys, time
from pathlib import Path
import tithe
start = time.perf_counter()
tithe.average(sys.argv[2:], sys.argv[1])
seconds = time.perf_counter() - start
peak = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
print(seconds, int(peak.split()[1]) * 1024)
"""


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a language model of 1.1 billion weights."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH), "lm_head.weight": (WORDS, WIDTH)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        found |= {f"{at}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in ("q", "o")}
        found |= {f"{at}.self_attn.{name}_proj.weight": (WIDTH // 8, WIDTH) for name in ("k", "v")}
        found |= {f"{at}.mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        found |= {f"{at}.mlp.down_proj.weight": (WIDTH, INNER)}
        found |= {f"{at}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    return found


def make(folder: Path) -> list[Path]:
    """The files, those that are there left alone."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"copy-{i}.safetensors" for i in range(COPIES)]
    for seed, path in enumerate(paths):
        if not path.exists():
            torch.manual_seed(seed)
            tensors = {
                name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-1, 1) for name, shape in shapes().items()
            }
            save_file(tensors, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
    return paths


def forget(paths: list[Path]) -> None:
    """Tell the system that the pages of these files are not needed."""
    os.sync()
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(paths: list[Path]) -> float:
    """Seconds to read all files."""
    buffer = bytearray(CHUNK)
    start = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def error(paths: list[Path], output: Path, name: str) -> float:
    """The largest difference of a tensor of the result from the mean in float64, in units of bfloat16's rounding."""
    values: list[torch.Tensor] = []
    for path in [*paths, output]:
        with safe_open(path, framework="pt") as file:
            values.append(file.get_tensor(name).double())
    mean = torch.stack(values[:-1]).mean(0)
    return float(((values[-1] - mean).abs() / (mean.abs() * 2**-8).clamp_min(2**-16)).max())


def main(args: argparse.Namespace) -> None:
    """Measure, and take the files away."""
    store = Store(args.results / "average_streams.jsonl", key=("copies",))
    if store.find(copies=COPIES) is not None:
        return
    folder = args.results / "average_streams"
    paths, output = make(folder), folder / "mean.safetensors"
    size = sum(path.stat().st_size for path in paths)
    output.unlink(missing_ok=True)
    forget(paths)
    reading = read(paths)
    forget(paths)
    command = [sys.executable, "-c", CHILD, str(output), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = map(float, done.stdout.split())
    store.add(
        {
            "copies": COPIES,
            "weights": sum(torch.Size(shape).numel() for shape in shapes().values()),
            "bytes": size,
            "read GB/s": size / reading / 1e9,
            "average GB/s": size / seconds / 1e9,
            "share": reading / seconds,
            "peak GB": peak / 1e9,
            "error": error(paths, output, "model.layers.3.mlp.up_proj.weight"),
        }
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(parse(__doc__ or "", threads=2))
