"""A run's checkpoints on disk: recorded, coded, streamed by columns; and the basis that their differences span.

history   what a user records or opens      recorded  the files of a run, each written whole or not at all
opened    checkpoints that are there        entries   one checkpoint, whoever wrote it
rows      side by side, some columns        flat      safetensors by ranges of entries
packing   8, 4 or 1 bits a weight           basis     the differences from the mean
stream    sums, a block at a time           write     an average in the format that came in
spanning  what `attach` asks of a method that uses a history
"""

from tithe.history.basis import Basis, Strip, TensorColumns, orthonormal, strips
from tithe.history.history import History
from tithe.history.packing import BLOCK
from tithe.history.spanning import Granularity, Spanning, Start
from tithe.history.write import average

__all__ = [
    "BLOCK",
    "Basis",
    "Granularity",
    "History",
    "Spanning",
    "Start",
    "Strip",
    "TensorColumns",
    "average",
    "orthonormal",
    "strips",
]
