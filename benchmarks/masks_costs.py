"""What a step under each mask costs: bytes kept for backward, peak and CPU time, lean layers on, beside LoRA.

MiniLM with mean pooling, 16 sequences of 128 tokens of real SST-2 text, AdamW, gradients clipped at 1, no dropout.
Every method takes one step in turn, so that a busy machine slows all of them alike; medians, and ratios to LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from benchmarks import cells
from benchmarks.encoder import encoder
from benchmarks.masks_methods import METHODS, PAPER, UPPER, Mask
from benchmarks.methods import leaned
from benchmarks.records import Store
from benchmarks.text import TASKS, load, training_batches
from benchmarks.timing import Contestant, costs, cpu_seconds, packed_batch

ROUNDS = 5
PEER = "lora"
MASKS = (
    PAPER,
    Mask("random"),
    Mask("fisher", unit="column"),
    Mask("fisher", unit="column", times=4),
    Mask("fisher", unit="column", times=4, where=UPPER),
)
"""Of masks whose weights lie alike the costs are alike: these stand for the others."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every method once and append the rows; the masks and the peer with lean layers too."""
    parser = cells.options(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="steps of each method that are timed")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    store = Store(args.results / "masks_costs.jsonl", key=("method",))
    if store.find(method=PEER) is not None:
        return
    batches = training_batches(load(TASKS["sst2"], args.data).train, 16, seed=0, epoch=0)
    batch = packed_batch(args.data)

    def fresh() -> nn.Module:
        return encoder(seed=0, pooling="mean")

    lean = {m.name: m for m in map(leaned, (METHODS[PEER], *(mask.method() for mask in MASKS)))}
    plain = {name: METHODS[name] for name in ("full", "shira", PEER)}
    contestants = {name: Contestant(m.prepare(fresh(), batches, 0, 0)) for name, m in {**lean, **plain}.items()}
    seconds = cpu_seconds(contestants, batch, rounds=args.rounds, skip=min(1, args.rounds - 1))
    for name, contestant in contestants.items():  # the peer last: it says that all are there
        store.add({"method": name, **costs(contestant, batch, seconds[name])})


if __name__ == "__main__":
    main()
