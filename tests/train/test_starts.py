"""What a run begins with: fresh weights, a file of weights, and models of timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tithe import TitheError
from tithe.app.train import parse_recipe, read_recipe
from tithe.app.train.loop import Run
from tithe.app.train.predicting import predict
from workplace import assert_equal, quiet, run

NET = """
from torch import nn

def make(num_labels):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, num_labels))
"""
RECIPE = """
[model]
callable = "start_net:make"
head = ["5.*"]
[data]
task = "image-classification"
npz = "{images}"
[method]
name = "full"
[optimizer]
lr = 0.01
[run]
steps = 2
batch_size = 8
output = "out"
device = "cpu"
"""


@pytest.fixture
def path(images: Path, tmp_path: Path) -> Path:
    """A recipe about three classes of images."""
    (tmp_path / "start_net.py").write_text(NET)
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(images=images))
    return path


def make(path: Path, *settings: str) -> Run:
    return Run(read_recipe(path, settings), resume=False, console=quiet())


def _state(path: Path) -> dict[str, Any]:
    return {name: torch.randn(value.shape).to(value.dtype) for name, value in make(path).model.state_dict().items()}


@pytest.mark.parametrize("kind", ["a.safetensors", "a.pt", "wrapped.pt"])
def test_a_run_begins_with_a_file_of_weights(kind: str, path: Path, tmp_path: Path) -> None:
    state = _state(path)
    if kind == "a.safetensors":
        save_file(state, tmp_path / kind)
    else:
        torch.save({"state_dict": state, "epoch": 3} if kind == "wrapped.pt" else state, tmp_path / kind)
    assert_equal(dict(make(path, f"model.weights={kind}").model.state_dict()), state)
    result = run(path, f"model.weights={kind}")
    found = predict(tmp_path / "out", Path(result["recipe"]["data"]["npz"]))
    assert found.metrics == result["metrics"]["test"]


def test_a_head_of_another_shape_begins_afresh_and_says_so(path: Path, tmp_path: Path) -> None:
    state = _state(path)
    state["5.weight"], state["extra"] = torch.randn(7, 8), torch.zeros(1)
    del state["5.bias"]
    save_file(state, tmp_path / "a.safetensors")
    one = make(path, "model.weights=a.safetensors")
    assert torch.equal(one.model.state_dict()["0.weight"], state["0.weight"])
    assert "weights: 5.weight, 5.bias of the head begin afresh" in one.notes
    assert any("1 tensors of a.safetensors are not in the model, such as extra" in note for note in one.notes)


def test_weights_that_do_not_fit_are_refused(path: Path, tmp_path: Path) -> None:
    def refused(*settings: str) -> TitheError:
        with pytest.raises(TitheError) as error:
            make(path, *settings)
        return error.value

    state = _state(path)
    assert "no file" in refused("model.weights=nowhere.pt").found
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    assert "b.safetensors" in refused("model.weights=b.safetensors").found
    (tmp_path / "b.pt").write_bytes(b"nothing")
    assert "[model] weights" in refused("model.weights=b.pt").place
    torch.save([1, 2], tmp_path / "c.pt")
    assert "not in the file" in refused("model.weights=c.pt").found
    save_file({name: value for name, value in state.items() if name != "0.bias"}, tmp_path / "d.safetensors")
    assert "0.bias not in the file" in refused("model.weights=d.safetensors").found
    with pytest.raises(TitheError, match="weights beside pretrained"):
        parse_recipe({"model": {"pretrained": "a", "weights": "b.pt"}})


# -------------------------------------------------------------------------------------------------------------- timm


@pytest.fixture
def timm(path: Path) -> Path:
    """The same recipe with a model of timm from scratch."""
    pytest.importorskip("timm")
    text = path.read_text().replace('callable = "start_net:make"\nhead = ["5.*"]', 'timm = "test_vit"\nscratch = true')
    path.write_text(text.replace("[data]", "[data]\nimage_size = 160"))
    return path


def test_a_model_of_timm_is_trained_from_scratch_and_left_whole(timm: Path, tmp_path: Path) -> None:
    result = run(timm)
    assert result["steps"] == 2
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    one, other = (make(timm, "run.output=x", f"run.seed={seed}").model.state_dict() for seed in (0, 1))
    assert any(not torch.equal(value, other[name]) for name, value in one.items())
    weights = "model.weights=out/model/model.safetensors"
    warm = make(timm, "run.output=x", weights, "model.scratch=false").model.state_dict()
    from safetensors.torch import load_file

    assert_equal(dict(warm), {name: load_file(tmp_path / "out" / "model" / "model.safetensors")[name] for name in warm})


def test_a_model_of_timm_runs_its_blocks_again(timm: Path) -> None:
    kept = [
        run(timm, f"run.gradient_checkpointing={on}", f"run.output=out-{on}")["bytes"]["kept_for_backward"]
        for on in ("true", "false")
    ]
    assert kept[0] < 0.7 * kept[1]
