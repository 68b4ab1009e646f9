"""Three fine-tunings of one base merged into one model by TIES: `tithe.merge_tasks` beside mergekit, on the CPU.

Llama-like models of 33 million weights in float32, made for the purpose: every weight of a fine-tuning is moved by a
tenth of its spread. Each of the two merges them three times, in turns, in a process of its own. *Seconds* is the least
wall time of the merge, imports apart; *peak* is the highest resident size of that process (VmHWM), the interpreter and
torch included; *apart* counts the weights that the two write more than 1e-6 apart: changes of equal size at the edge of
what is trimmed, of which mergekit takes any and Tithe the first. Iso-C is measured too; mergekit has none.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.records import Record, Store, parse

TASKS, DENSITY, REPEATS = 3, 0.2, 3
CONFIG: dict[str, Any] = {
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
}

OURS = """
import sys, time
import tithe
base, *tuned, output, method, threads = sys.argv[1:]
import torch
torch.set_num_threads(int(threads))
start = time.perf_counter()
tithe.merge_tasks(base, tuned, output, method, density={density})
"""

MERGEKIT = """
import sys, time
import torch, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
base, *tuned, output, method, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
models = [dict(model=path, parameters=dict(weight=1.0, density={density})) for path in tuned]
config = dict(merge_method=method, base_model=base, models=models, dtype="float32", parameters=dict(normalize=True))
start = time.perf_counter()
run_merge(MergeConfiguration.model_validate(config), output, MergeOptions(copy_tokenizer=False, quiet=True))
"""

END = """
seconds = time.perf_counter() - start
peak = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(seconds, int(peak.split()[1]) * 1024)
"""


def make(folder: Path) -> list[Path]:
    """The base, and fine-tunings of it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    paths = [folder / name for name in ("base", *(f"task-{index}" for index in range(TASKS)))]
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for path in paths:
        model.save_pretrained(path)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name] + 0.1 * (start[name].std() + 0.01) * torch.randn_like(parameter))
    return paths


def merge(program: str, paths: list[Path], output: Path, method: str, threads: int) -> tuple[float, float]:
    """Seconds and peak bytes of one merge."""
    shutil.rmtree(output, ignore_errors=True)
    code = program.replace("{density}", str(DENSITY)) + END
    command = [sys.executable, "-c", code, *map(str, paths), str(output), method, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = map(float, done.stdout.splitlines()[-1].split())
    return seconds, peak


def apart(one: Path, other: Path) -> int:
    """How many weights of two models differ by more than rounding."""
    a, b = ({k: v for p in sorted(f.glob("*.safetensors")) for k, v in load_file(p).items()} for f in (one, other))
    assert a.keys() == b.keys()
    return sum(int(((a[name].double() - b[name].double()).abs() > 1e-6).sum()) for name in a)


def main(args: argparse.Namespace) -> None:
    """Measure what is missing."""
    store = Store(args.results / "merge_tasks.jsonl", key=("method", "who"))
    ways = {("ties", "mergekit"): MERGEKIT, ("ties", "tithe"): OURS, ("iso-c", "tithe"): OURS}
    if all(store.find(method=method, who=who) for method, who in ways):
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make(folder)
        size = sum(file.stat().st_size for path in paths for file in path.glob("*.safetensors"))
        outputs = {way: folder / "-".join(way) for way in ways}
        found: dict[tuple[str, str], list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(REPEATS):
            for way, program in ways.items():
                found[way].append(merge(program, paths, outputs[way], way[0], args.threads))
        differing = apart(outputs["ties", "mergekit"], outputs["ties", "tithe"])
        for (method, who), measured in found.items():
            record: Record = {
                "method": method,
                "who": who,
                "weights": size // len(paths) // 4,
                "tasks": TASKS,
                "seconds": min(seconds for seconds, _ in measured),
                "peak": max(peak for _, peak in measured),
                "apart": differing if method == "ties" else None,
                "config": json.dumps(CONFIG),
            }
            store.add(record)


if __name__ == "__main__":
    main(parse(__doc__ or ""))
