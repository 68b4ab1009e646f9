"""What torchrun runs on each rank, or one process alone: a Trainer with each method, from the start and resumed."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tithe
from loops import record
from trainers import HEAD, ROWS, bert, ours, quietly, same, weights

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def methods(folder: Path) -> dict[str, Any]:
    return {
        "FISH": tithe.FISH(density=0.05, samples=ROWS),
        "FISH, again": tithe.FISH(k=120, samples=ROWS, reselect=tithe.every(2)),
        "FISH, warm-up": tithe.FISH(k=120, samples=ROWS, warmup=2),
        "TraDy": tithe.TraDy(tithe.Budget(fraction=0.05), samples=ROWS),
        "VR-PGE": tithe.VRPGE(0.6),
        "TWA": tithe.TWA(folder / "history"),
    }


def run(folder: Path, name: str, *, resume: int | None = None) -> Any:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # ranks draw other masks than one process
    settings = dict(optim="sgd", learning_rate=0.1, per_device_train_batch_size=4 // WORLD, save_strategy="steps")
    # The model takes the mean over its labels, whatever their number over ranks: the Trainer would scale it by two.
    settings |= dict(save_steps=1, max_steps=4, average_tokens_across_devices=False)
    head = () if name in ("VR-PGE", "TWA") else HEAD
    method = methods(folder)[name]
    if name == "TraDy":
        method = tithe.TraDy(tithe.Budget(fraction=0.05), samples=ROWS, optimizer_states=1)
    place = folder / f"{name}-{WORLD}"
    trainer = ours(place, method=method, model=bert(**quiet), tithe_head=head, settings=settings)
    checkpoint = None if resume is None else str(place / f"checkpoint-{resume}")
    quietly(lambda: trainer.train(resume_from_checkpoint=checkpoint))
    return trainer


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    if WORLD == 1:
        record(folder / "history", bert)
    found: dict[str, Any] = {}
    for name in methods(folder):
        whole = run(folder, name)
        found[name] = {
            "weights": weights(whole),
            "resumed": same(weights(run(folder, name, resume=2)), weights(whole)),
            "wrapped": type(whole.model_wrapped).__name__,
            "figures": whole._figures(),
        }
    torch.save(found, folder / f"found-{WORLD}-{RANK}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
