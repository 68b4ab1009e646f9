"""The examples of this folder's libraries run, on fewer steps."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import tithe

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_vision_transformer_by_the_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(EXAMPLES / "hf_trainer.py"))
    found = script["main"](tmp_path, 3)
    assert found["after"] > found["before"] + 0.1
    assert "trains 1,968 of 39,365 parameters" in capsys.readouterr().out


def test_a_language_model_by_the_sft_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl", reason="the example is of its trainer")
    script = runpy.run_path(str(EXAMPLES / "sft_packing.py"))
    before, after = script["main"](Path(tithe.__file__).parent / "delta", tmp_path, 15)
    assert after < before - 0.5
    assert not (tmp_path / "model.safetensors").exists()
    assert "bytes to ship" in capsys.readouterr().out
