"""Under torchrun two ranks give what one gives, and go on from a checkpoint to the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_ranks.py")
TESTS = Path(__file__).parents[1]


def launch(folder: Path, *launcher: str) -> None:
    path = os.pathsep.join([str(TESTS), *sys.path])
    command = [sys.executable, *launcher, str(SCRIPT), str(folder)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path) -> None:
    launch(tmp_path)
    launch(tmp_path, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    one, *two = (torch.load(tmp_path / f"found-{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name, alone in one.items():
        assert alone["resumed"], name
        for rank in two:
            assert rank[name]["resumed"], name
            for key, value in alone["weights"].items():
                torch.testing.assert_close(rank[name]["weights"][key], value, rtol=1e-4, atol=1e-5, msg=f"{name} {key}")
        wrapped = "BertForSequenceClassification" if name in ("VR-PGE", "TWA") else "DistributedDataParallel"
        assert {rank[name]["wrapped"] for rank in two} == {wrapped}
        assert two[0][name]["figures"]["tithe_draws"] == alone["figures"]["tithe_draws"]
