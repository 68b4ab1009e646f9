"""The size of a delta beside the dense checkpoint: MiniLM, 0.5 %, fp32, after a few steps of training on SST-2."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import tithe
from benchmarks.encoder import encoder
from benchmarks.methods import Mask
from benchmarks.records import Store, parse
from benchmarks.text import TASKS, load, training_batches
from benchmarks.timing import Contestant

STEPS = 8


def main(args: argparse.Namespace) -> None:
    """Train a little, save both ways, apply the delta to a fresh model and compare every weight."""
    torch.set_num_threads(args.threads)
    store = Store(args.results / "delta.jsonl", key=("method",))
    mask = Mask("fisher", "global")
    if store.find(method=mask.name) is not None:
        return
    batches = training_batches(load(TASKS["sst2"], args.data).train, 16, seed=0, epoch=0)
    model = encoder(seed=0)
    contestant = Contestant(mask.prepare(model, batches, 0, 0))
    for batch in batches[:STEPS]:
        contestant.step(batch)
    plan = contestant.prepared.plan
    assert plan is not None
    with tempfile.TemporaryDirectory() as folder:
        delta, dense = Path(folder, "delta.safetensors"), Path(folder, "dense.safetensors")
        plan.save(delta)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, dense)
        again = encoder(seed=0)
        tithe.apply(again, delta)
        same = all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
        sizes = {"delta_bytes": delta.stat().st_size, "dense_bytes": dense.stat().st_size}
    store.add({"method": mask.name, "trained": contestant.prepared.num_trained, **sizes, "applied_is_equal": same})


if __name__ == "__main__":
    main(parse(__doc__ or ""))
