"""Store the recorder's events, and replay them once the work is done.

Storages die at any time, also in the middle of a Python statement when the garbage collector runs, so nothing is summed
while recording: events are appended (which cannot be interrupted) and added up afterwards.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tithe.ledger.table import Ledger

__all__ = ["Block", "Event", "replay"]


@dataclass(slots=True, eq=False)
class Block:
    """A storage created during the work; it holds no reference, so it keeps nothing alive.

    Attributes:
        num_bytes: its size at the last look.
        cuda: the index of its GPU, or None.
        gradient: True once it was seen as the `.grad` of a leaf.
    """

    num_bytes: int
    cuda: int | None
    gradient: bool = False


class Event(NamedTuple):
    """A change of `block` by `change` bytes (born, resized, died), or its first keeping for backward in a `module`."""

    block: Block
    change: int
    module: str | None


def replay(events: Sequence[Event]) -> Ledger:
    """Return the highest sums over the life of the log, and their parts.

    `peak` is the maximum over time of Σ size; `kept` the same over the blocks that have been kept by then.
    The first module to save a block owns it.

    Args:
        events: in the order in which they happened.

    Example:
        >>> block = Block(num_bytes=8, cuda=None)
        >>> replay([Event(block, 8, None), Event(block, 0, "fc"), Event(block, -8, None)]).kept_by_module
        {'fc': 8}
    """
    total, peak, at_peak = 0, 0, -1
    kept, kept_peak, at_kept_peak = 0, 0, -1
    size: Counter[Block] = Counter()
    owner: dict[Block, str] = {}
    for i, (block, change, module) in enumerate(events):
        total += change
        size[block] += change
        if module is None:
            kept += change if block in owner else 0
        elif block not in owner:
            owner[block] = module
            kept += size[block]
        if total > peak:
            peak, at_peak = total, i
        if kept > kept_peak:
            kept_peak, at_kept_peak = kept, i

    size, owner = _state(events[: at_kept_peak + 1])
    by_module: Counter[str] = Counter()
    for block, module in owner.items():
        by_module[module] += size[block]

    size, owner = _state(events[: at_peak + 1])
    by_kind = {"kept": 0, "gradients": 0, "other": 0}
    for block, num_bytes in size.items():
        by_kind["gradients" if block.gradient else "kept" if block in owner else "other"] += num_bytes
    by_module = Counter({path: num_bytes for path, num_bytes in by_module.items() if num_bytes})
    return Ledger(peak=peak, kept=kept_peak, kept_by_module=dict(by_module), by_kind=by_kind)


def _state(events: Sequence[Event]) -> tuple[Counter[Block], dict[Block, str]]:
    size: Counter[Block] = Counter()
    owner: dict[Block, str] = {}
    for block, change, module in events:
        size[block] += change
        if module is not None:
            owner.setdefault(block, module)
    return size, owner
