"""Keep a run's checkpoints on disk, stream them by columns, and build the basis of their differences.

history    what a user records or opens      recorder     the files of a run, each written whole or not at all
checksums  damage to them is named           opened       checkpoints that are there
found      which files and folders count     copies       which are the same again
entry      one checkpoint                    formats, pickles  whoever wrote it
stacked    side by side, some columns        safetensors_ranges  a file by ranges of entries
quantize   8, 4 or 1 bits a weight           basis        the differences from the mean
averageable  what a mean stands for          weighted_sum  sums, a block at a time
average    an average in the format that came in
decay      weights that stand for a decay   tracks       moving averages of a model in training
power_ema  any width of them from two
task_vectors  fine-tunings of one base, merged
"""

from tithe.averages.average import Averaged, average, check_weights
from tithe.averages.basis import Basis, Strip, TensorColumns, orthonormal, strips
from tithe.averages.decay import DECAYS, EMA, ema_width
from tithe.averages.history import History
from tithe.averages.quantize import BLOCK
from tithe.averages.task_vectors import merge_tasks
from tithe.averages.tracks import check_widths

__all__ = [
    "BLOCK",
    "DECAYS",
    "EMA",
    "Averaged",
    "Basis",
    "History",
    "Strip",
    "TensorColumns",
    "average",
    "check_weights",
    "check_widths",
    "ema_width",
    "merge_tasks",
    "orthonormal",
    "strips",
]
