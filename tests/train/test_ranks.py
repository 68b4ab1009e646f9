"""Runs on two processes: one run on gloo where there is no GPU, refused together where the processes differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tithe import TitheError
from workplace import run

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# By address: the name of a machine need not lead to it.
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]

# What rank 1 alone changes, and the key that every rank has to name. Each trial starts a run in the same processes.
OTHER = {
    "run.seed=7": "[run] seed 0 on rank 0, 7 on rank 1",
    "optimizer.lr=0.5": "[optimizer] lr 0.01 on rank 0, 0.5 on rank 1",
    "run.epochs=3": "[run] epochs 2 on rank 0, 3 on rank 1",
    "run.batch_size=4": "[run] batch_size 8 on rank 0, 4 on rank 1",
    "method.density=0.1": "[method] density 0.2 on rank 0, 0.1 on rank 1",
    'method.where=["*attention*"]': "[method] where",
    'data.train="other.tsv"': "[data] train train.tsv on rank 0, other.tsv on rank 1",
    'data.train="missing.tsv"': "missing.tsv",
}

SCRIPT = """
import json, os, sys
from tithe import TitheError
from tithe.app.train import read_recipe, train

path, rank, others = sys.argv[1], int(os.environ["RANK"]), json.loads(sys.argv[2])
told = []
for other in others:
    try:
        train(read_recipe(path, [other] if rank == 1 else []))
        told.append("trained")
    except TitheError as error:
        told.append(str(error))
if rank == 1:  # the same file by name, with other rows in it
    os.makedirs("elsewhere")
    for name in ("test.tsv", "train.tsv"):
        with open(name) as file, open(f"elsewhere/{name}", "w") as copy:
            copy.write("".join(line.replace("good", "bad") for line in file))
try:
    train(read_recipe(path, [f"data.folder={os.path.abspath('elsewhere')}"] if rank == 1 else []))
except TitheError as error:
    told.append(str(error))
with open(f"told-{rank}.json", "w") as file:
    json.dump(told, file)
"""


def test_processes_that_differ_are_told_so_before_the_first_step(edit: Callable[..., Path], workplace: Path) -> None:
    path = edit(('device = "cpu"\n', ""))  # as the documentation writes it: whatever there is
    (workplace / "other.tsv").write_text((workplace / "test.tsv").read_text())
    script = workplace / "differ.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *LAUNCH, str(script), str(path), json.dumps(list(OTHER))]
    done = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, cwd=workplace, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        told = json.loads((workplace / f"told-{rank}.json").read_text())
        assert len(told) == len(OTHER) + 1
        for words, text in zip([*OTHER.values(), "data "], told, strict=True):
            assert words in text, (rank, words, text)
    assert not (workplace / "out").exists()


def test_processes_that_make_no_group_are_refused(
    edit: Callable[..., Path], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = edit(("epochs = 2", "steps = 1"))
    monkeypatch.setattr(os, "environ", {**os.environ, "WORLD_SIZE": "2"})  # and no rank; accelerate adds to it
    with pytest.raises(TitheError, match=r"2 processes launched, and as their group (none|one of 1)") as caught:
        run(path)
    assert "unset WORLD_SIZE" in caught.value.remedy
    monkeypatch.undo()
    assert run(path)["processes"] == 1
