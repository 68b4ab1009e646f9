"""What counts as a checkpoint: folders, links, copies, several models in one place; and what is said of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from tithe import History, TitheError, TitheWarning
from tithe.app.cli import app
from tithe.averages.average import Averaged, average

State = dict[str, Tensor]


def value(number: float, numel: int = 2) -> State:
    return {"w": torch.full((numel,), float(number))}


def reported(*arguments: Any, **options: Any) -> tuple[Path, Averaged]:
    told: list[Averaged] = []
    path = average(*arguments, **options, report=told.append)
    return path, told[0]


def said(*words: object) -> tuple[str, dict[str, Any]]:
    """What the command prints, and what it prints with --json into another place."""
    plain = CliRunner().invoke(app, ["average", *map(str, words)])
    assert plain.exit_code == 0, plain.output
    output = Path(str(words[list(words).index("-o") + 1]))
    output.rename(output.with_name("aside"))
    done = CliRunner().invoke(app, ["average", *map(str, words), "--json"])
    assert done.exit_code == 0, done.output
    return plain.stdout, json.loads(done.stdout)


# --- links and copies


def lightning(folder: Path, count: int = 3) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"epoch={number}.ckpt" for number in range(count)]
    for number, path in enumerate(paths):
        torch.save({"state_dict": value(number), "epoch": number}, path)
    return paths


def _symlink(origin: Path, link: Path) -> None:
    link.symlink_to(origin.name)


def _absolute(origin: Path, link: Path) -> None:
    link.symlink_to(origin.absolute())


def _saved_again(origin: Path, link: Path) -> None:
    """The same weights, and other things beside them."""
    torch.save({**torch.load(origin, weights_only=True), "saved_by": "last"}, link)


TWICE = [_symlink, _absolute, os.link, shutil.copyfile, _saved_again]
each_twice = pytest.mark.parametrize("twice", TWICE, ids=lambda twice: twice.__name__.strip("_"))


@each_twice
@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_a_checkpoint_counts_once(twice: Callable[[Path, Path], object], name: str, tmp_path: Path) -> None:
    paths = lightning(tmp_path / "run")
    twice(paths[2], tmp_path / "run" / name)
    for number, given in enumerate((tmp_path / "run", sorted((tmp_path / "run").iterdir()))):
        out, told = reported(given, tmp_path / f"{number}.ckpt")
        assert torch.load(out, weights_only=True)["state_dict"]["w"].tolist() == [1.0, 1.0]
        assert [path.name for path in told.checkpoints] == [path.name for path in paths]
        ((skipped, why),) = told.skipped.items()
        assert Path(skipped).name == name
        assert why.endswith(" of epoch=2.ckpt") or why == "a link to epoch=2.ckpt"


@each_twice
def test_the_command_says_which_one_was_left_out(twice: Callable[[Path, Path], object], tmp_path: Path) -> None:
    paths = lightning(tmp_path / "run")
    twice(paths[1], tmp_path / "run" / "best.ckpt")
    printed, told = said(tmp_path / "run", "-o", tmp_path / "out.ckpt", "--method", "ema", "--decay", "0.5")
    assert "averaged 3 checkpoints: epoch=0.ckpt, epoch=1.ckpt, epoch=2.ckpt\n" in printed
    assert "left out: best.ckpt (a " in printed
    assert "of epoch=1.ckpt)" in printed or "to epoch=1.ckpt)" in printed
    assert "kept from the last: epoch\n" in printed
    assert told["weights"] == [0.25, 0.25, 0.5]
    assert [Path(path).name for path in told["skipped"]] == ["best.ckpt"]


def test_weights_say_how_much_a_copy_counts(tmp_path: Path) -> None:
    paths = lightning(tmp_path / "run")
    shutil.copyfile(paths[2], tmp_path / "run" / "last.ckpt")

    def found(given: Any, weights: list[float], name: str) -> float:
        return torch.load(average(given, tmp_path / name, weights), weights_only=True)["state_dict"]["w"][0].item()

    assert found(tmp_path / "run", [0.5, 0.25, 0.25], "a.ckpt") == 0.75
    assert found(tmp_path / "run", [0.25, 0.25, 0.25, 0.25], "b.ckpt") == 1.25
    assert found([paths[0], paths[2], paths[2]], [0.5, 0.25, 0.25], "c.ckpt") == 1.0
    with pytest.raises(TitheError, match="2 weights for 3 checkpoints"):
        average(tmp_path / "run", tmp_path / "d.ckpt", [0.5, 0.5])


def test_the_same_path_twice_is_no_wish_without_weights(tmp_path: Path) -> None:
    paths = lightning(tmp_path / "run")
    with pytest.raises(TitheError, match=r"epoch=0.ckpt: found the same path 2 times; .*weights="):
        average([paths[0], paths[1], paths[0]], tmp_path / "out.ckpt")
    done = CliRunner().invoke(app, ["average", *map(str, [paths[0]] * 2), "-o", str(tmp_path / "out.ckpt")])
    assert done.exit_code == 2
    assert "the same path 2 times" in done.stderr


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    lightning(tmp_path / "run")
    (tmp_path / "run" / "last.ckpt").symlink_to("epoch=9.ckpt")
    with pytest.raises(TitheError, match=r"last.ckpt: found no such file"):
        average(tmp_path / "run", tmp_path / "out.ckpt")
    with pytest.warns(TitheWarning, match=r"left out: .*last.ckpt"):
        average(tmp_path / "run", tmp_path / "out.ckpt", skip_damaged=True)


def test_a_folder_that_is_linked_counts_once(tmp_path: Path) -> None:
    for number in range(3):
        folder(tmp_path / "run" / f"checkpoint-{number}", number)
    (tmp_path / "run" / "checkpoint-last").symlink_to("checkpoint-2", target_is_directory=True)
    shutil.copytree(tmp_path / "run" / "checkpoint-0", tmp_path / "run" / "best")
    out, told = reported(tmp_path / "run", tmp_path / "out")
    assert load_file(out / "model.safetensors")["w"].tolist() == [1.0, 1.0]
    assert sorted(Path(path).name for path in told.skipped) == ["best", "checkpoint-last"]
    assert [path.name for path in History(tmp_path / "run").rows.paths][-3:] == [f"checkpoint-{k}" for k in range(3)]


def test_checkpoints_that_only_nearly_agree_all_count(tmp_path: Path) -> None:
    """Large tensors that differ in their last entry, which no sample looks at."""
    paths: list[Path] = []
    for number in range(3):
        state = {"w": torch.zeros(100_000), "v": torch.ones(50)}
        state["w"][-1] = number
        paths.append(tmp_path / f"{number}.safetensors")
        save_file(state, paths[-1])
    out = load_file(average(paths, tmp_path / "out.safetensors"))
    assert out["w"][-1] == 1.0


# --- folders


def folder(path: Path, number: float, *, name: str = "model.safetensors", **others: State) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text(f"of {number:g}")
    save_file(value(number), path / name)
    for stem, state in others.items():
        save_file(state, path / f"{stem}.safetensors")
    return path


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_pytorch_model.safetensors",
        "adapter_model.safetensors",
        "anything.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
    ],
)
def test_a_folder_comes_out_of_folders(name: str, tmp_path: Path) -> None:
    for number in range(2):
        folder(tmp_path / f"{number}", number, name=name)
    out = average([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == sorted(["config.json", "tokenizer.json", name])
    assert load_file(out / name)["w"].tolist() == [0.5, 0.5]
    assert len(History(tmp_path / "0")) == 1


def test_several_models_in_a_folder_are_each_averaged(tmp_path: Path) -> None:
    """As accelerate writes them: the names of their tensors may be the same."""
    for number in range(2):
        path = folder(tmp_path / f"{number}", number, model_1=value(10 + number), ema=value(20 + number))
        folder(path / "2_Dense", 30 + number)
        torch.save({"state": {}}, path / "optimizer.bin")
        torch.save({"state": {}}, path / "optimizer_1.bin")
        for junk in ("random_states_0.pkl", "scheduler.bin", "sampler.bin", "custom_checkpoint_0.pkl", "scaler.pt"):
            (path / junk).write_bytes(b"never opened")
    out, told = reported([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    names = ["2_Dense", "config.json", "ema.safetensors", "model.safetensors", "model_1.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    for place, wanted in (("model", 0.5), ("model_1", 10.5), ("ema", 20.5), ("2_Dense/model", 30.5)):
        assert load_file(out / f"{place}.safetensors")["w"].tolist() == [wanted] * 2
    assert sorted(told.models) == ["2_Dense/model.safetensors", "ema.safetensors", "model_1.safetensors"]
    assert {"config.json", "tokenizer.json", "2_Dense/config.json"} <= set(told.copied)
    assert told.skipped["optimizer_1.bin"] == "state of a run, no weights"
    assert len(told.skipped) == 7
    printed, as_json = said(tmp_path / "0", tmp_path / "1", "-o", tmp_path / "again")
    assert "other models in them, averaged too: " in printed
    assert sorted(as_json["models"]) == sorted(told.models)


def test_pickled_models_of_accelerate(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}").mkdir()
        for name, add in (("pytorch_model.bin", 0), ("pytorch_model_1.bin", 10)):
            torch.save(value(number + add), tmp_path / f"{number}" / name)
        torch.save({"state": {}}, tmp_path / f"{number}" / "optimizer.bin")
    out = average([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["pytorch_model.bin", "pytorch_model_1.bin"]
    assert torch.load(out / "pytorch_model_1.bin", weights_only=True)["w"].tolist() == [10.5, 10.5]


def test_folders_with_other_models_than_the_first(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "0", 0, model_1=value(1)), folder(tmp_path / "1", 1)
    for given in ([one, two], [two, one]):
        with pytest.raises(TitheError, match=r"model_1.safetensors is in one of the two alone"):
            average(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    files = [path / "model.safetensors" for path in (one, two)]
    assert load_file(average(files, tmp_path / "out.safetensors"))["w"].tolist() == [0.5, 0.5]


def test_an_index_and_a_file_that_it_does_not_list(tmp_path: Path) -> None:
    for number in range(2):
        path = folder(tmp_path / f"{number}", number, name="model-00001-of-00001.safetensors", stray=value(5 + number))
        weights = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
        (path / "model.safetensors.index.json").write_text(json.dumps(weights))
    out, told = reported([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert told.models == ("stray.safetensors",)
    assert load_file(out / "stray.safetensors")["w"].tolist() == [5.5, 5.5]
    assert load_file(out / "model-00001-of-00001.safetensors")["w"].tolist() == [0.5, 0.5]
    assert (out / "model.safetensors.index.json").is_file()


def test_the_same_weights_in_other_formats_are_left_out(tmp_path: Path) -> None:
    for number in range(2):
        path = folder(tmp_path / f"{number}", number)
        torch.save(value(number), path / "pytorch_model.bin")
        (path / "tf_model.h5").write_bytes(b"other")
        (path / "onnx").mkdir()
        (path / "onnx" / "model.onnx").write_bytes(b"other")
    out, told = reported([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(told.skipped) == ["onnx/model.onnx", "pytorch_model.bin", "tf_model.h5"]


def pipeline(path: Path, number: float) -> Path:
    path.mkdir(parents=True)
    (path / "model_index.json").write_text('{"_class_name": "P"}')
    folder(path / "unet", number, name="diffusion_pytorch_model.safetensors")
    folder(path / "vae", 7, name="diffusion_pytorch_model.safetensors")
    folder(path / "text_encoder", 10 + number)
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text("{}")
    return path


def test_pipelines_are_averaged_model_by_model(tmp_path: Path) -> None:
    paths = [pipeline(tmp_path / "run" / f"{number}", number) for number in range(2)]
    for given, name in ((paths, "one"), (tmp_path / "run", "two")):
        out, told = reported(given, tmp_path / name)
        assert load_file(out / "unet" / "diffusion_pytorch_model.safetensors")["w"].tolist() == [0.5, 0.5]
        assert load_file(out / "vae" / "diffusion_pytorch_model.safetensors")["w"].tolist() == [7.0, 7.0]
        assert load_file(out / "text_encoder" / "model.safetensors")["w"].tolist() == [10.5, 10.5]
        for place in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"):
            assert (out / place).read_bytes() == (paths[0] / place).read_bytes()
        assert told.models == ("text_encoder", "unet", "vae")
    with pytest.raises(TitheError, match=r"a pipeline of several models \(text_encoder, unet, vae\)"):
        History(paths)
    shutil.rmtree(paths[1] / "vae")
    with pytest.raises(TitheError, match=r"found no vae; expected the models of"):
        average(paths, tmp_path / "three")
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize(
    ("key", "values"),
    [("num_attention_heads", (4, 8)), ("model_type", ("bert", "roberta")), ("hidden_act", ("relu", "gelu"))],
)
def test_configurations_that_mean_other_functions(key: str, values: tuple[object, object], tmp_path: Path) -> None:
    for number, told in enumerate(values):
        path = folder(tmp_path / f"{number}", number)
        (path / "config.json").write_text(json.dumps({key: told, "transformers_version": f"{number}"}))
    with pytest.raises(TitheError, match=rf"/1: found {key} = {values[1]!r} in config.json; expected {values[0]!r}"):
        average([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    (tmp_path / "1" / "config.json").write_text(json.dumps({key: values[0], "transformers_version": "9"}))
    average([tmp_path / "0", tmp_path / "1"], tmp_path / "out")


def test_states_of_a_run_beside_checkpoints_are_said(tmp_path: Path) -> None:
    for number in range(2):
        torch.save(value(number), tmp_path / f"{number}.pt")
    (tmp_path / "optimizer.pt").write_bytes(b"never opened")
    _, told = reported(tmp_path, tmp_path / "out.pt")
    assert told.skipped == {str(tmp_path / "optimizer.pt"): "state of a run, no weights"}


# --- names of files


@pytest.mark.parametrize("name", ["best.pth.tar", "model.pt.tar", "checkpoint", "best.0", "model.ckpt", "m.bin"])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_files_of_torch_save_whatever_they_are_called(name: str, old: bool, tmp_path: Path) -> None:
    paths: list[Path] = []
    for number in range(2):
        paths.append(tmp_path / f"{number}" / name)
        paths[-1].parent.mkdir()
        torch.save({"state_dict": value(number)}, paths[-1], _use_new_zipfile_serialization=not old)
    out = average(paths, tmp_path / f"out{paths[0].suffix}")
    assert torch.load(out, weights_only=True)["state_dict"]["w"].tolist() == [0.5, 0.5]
    if name != "best.0":
        assert len(History(paths[0].parent)) == 1


@pytest.mark.parametrize("name", ["model", "model.st", "model.bin", "model.pt"])
def test_files_of_safetensors_whatever_they_are_called(name: str, tmp_path: Path) -> None:
    paths: list[Path] = []
    for number in range(2):
        paths.append(tmp_path / f"{number}" / name)
        paths[-1].parent.mkdir()
        save_file(value(number), paths[-1])
    assert load_file(average(paths, tmp_path / "out.safetensors"))["w"].tolist() == [0.5, 0.5]


# --- several models in one file


def test_every_model_in_a_file_is_averaged(tmp_path: Path) -> None:
    def content(number: int) -> dict[str, Any]:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        return {
            "epoch": number,
            "state_dict": value(number),
            "state_dict_ema": value(10 + number),
            "target_network": {"w": torch.full((3,), 20.0 + number)},
            "ema": {"decay": 0.9, "shadow_params": [torch.full((2,), 30.0 + number)]},
            "callbacks": {"EMA": {"weights": value(40 + number)}, "Stop": {"best": torch.tensor(float(number))}},
            "optimizer": optimizer.state_dict(),
            "opt": optimizer.state_dict(),
            "losses": torch.arange(3.0 + number),
            "hyper_parameters": {"class_weights": torch.tensor([1.0, number])},
        }

    for number in range(2):
        torch.save(content(number), tmp_path / f"{number}.ckpt")
    out, told = reported(tmp_path, tmp_path / "out.ckpt")
    found = torch.load(out, weights_only=True)
    assert found["state_dict"]["w"].tolist() == [0.5, 0.5]
    assert found["state_dict_ema"]["w"].tolist() == [10.5, 10.5]
    assert found["target_network"]["w"].tolist() == [20.5] * 3
    assert found["ema"]["shadow_params"][0].tolist() == [30.5, 30.5]
    assert found["callbacks"]["EMA"]["weights"]["w"].tolist() == [40.5, 40.5]
    assert found["callbacks"]["Stop"]["best"] == 1.0
    assert found["epoch"] == 1
    last = torch.load(tmp_path / "1.ckpt", weights_only=True)
    assert torch.equal(found["opt"]["state"][0]["exp_avg"], last["opt"]["state"][0]["exp_avg"])
    assert sorted(told.models) == ["callbacks.EMA.weights", "ema.shadow_params", "state_dict_ema", "target_network"]
    assert told.kept == ("epoch", "optimizer", "opt", "losses", "hyper_parameters")


def test_networks_under_names_of_their_own(tmp_path: Path) -> None:
    for number in range(2):
        content = {"generator": value(number), "discriminator": value(10 + number), "loss": torch.tensor(1.0)}
        torch.save(content, tmp_path / f"{number}.pt")
    out, told = reported(tmp_path, tmp_path / "out.pt")
    found = torch.load(out, weights_only=True)
    assert found["generator"]["w"].tolist() == [0.5, 0.5]
    assert found["discriminator"]["w"].tolist() == [10.5, 10.5]
    assert told.models == ("discriminator",)
    assert History(tmp_path / "0.pt")[0]["w"].tolist() == [0.0, 0.0]


def test_a_model_that_one_file_alone_has(tmp_path: Path) -> None:
    torch.save({"state_dict": value(0)}, tmp_path / "0.ckpt")
    torch.save({"state_dict": value(1), "ema": value(2)}, tmp_path / "1.ckpt")
    with pytest.raises(TitheError, match=r"1.ckpt: found other models .*ema.* is in one of the two alone"):
        average(tmp_path, tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()


def test_ddp_and_nested_prefixes_keep_their_names(tmp_path: Path) -> None:
    for number in range(2):
        torch.save({"model": {"module": {"module.w": torch.ones(2) * number}}}, tmp_path / f"{number}.pt")
    out = torch.load(average(tmp_path, tmp_path / "out.pt"), weights_only=True)
    assert out["model"]["module"]["module.w"].tolist() == [0.5, 0.5]


def test_a_model_beside_the_first_has_to_have_an_average_too(tmp_path: Path) -> None:
    for number in range(2):
        codes = {"w": torch.arange(4, dtype=torch.int8) + number, "w_scale": torch.ones(1)}
        folder(tmp_path / f"{number}", number, model_1=codes)
        torch.save({"state_dict": value(number), "ema": codes}, tmp_path / f"{number}.ckpt")
        torch.save({"state_dict": value(number), "ema": value(number, 3 + number)}, tmp_path / f"shape{number}.ckpt")
    with pytest.raises(TitheError, match=r"model_1.safetensors: found quantised weights: w"):
        average([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    with pytest.raises(TitheError, match=r"1.ckpt: found quantised weights: w"):
        average([tmp_path / "0.ckpt", tmp_path / "1.ckpt"], tmp_path / "out")
    with pytest.raises(TitheError, match=r"shape1.ckpt: found float32 of shape \[4\] for w; expected .* \[3\]"):
        average([tmp_path / "shape0.ckpt", tmp_path / "shape1.ckpt"], tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_folder_with_a_link_to_itself(tmp_path: Path) -> None:
    for number in range(2):
        path = folder(tmp_path / f"{number}", number)
        (path / "self").symlink_to(path, target_is_directory=True)
    out, told = reported([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert told.skipped == {"self": "a link to a folder"}
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
