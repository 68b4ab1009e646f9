"""The demonstration: what it embeds, what it measures, what it writes."""

import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import tithe
from tithe.app.demo import digits, run
from tithe.app.demo.averaged import Averaged, averaging_steps, num_checkpoints, opening_steps
from tithe.app.demo.contestants import BUDGET, CONTESTANTS, DENSITY
from tithe.app.demo.network import WIDTH, Digits
from tithe.app.demo.race import FULL, RATES
from tithe.app.demo.trainee import Course, optimizer_bytes, trained_weights
from tithe.app.terminal import Bar
from tithe.errors import TitheError


class Page(Console):
    """A console of 80 columns that nobody watches."""

    def __init__(self, interrupt_at: str = "nowhere") -> None:
        super().__init__(file=io.StringIO(), width=80)
        self.interrupt_at = interrupt_at

    def print(self, *objects: Any, **options: Any) -> None:
        if objects and str(objects[0]).startswith(self.interrupt_at):
            raise KeyboardInterrupt
        super().print(*objects, **options)

    @property
    def text(self) -> str:
        assert isinstance(self.file, io.StringIO)
        return self.file.getvalue()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    page = Page()
    outcome = run(folder, quick=True, console=page)
    return folder, outcome, page.text


def test_the_digits_are_those_that_were_published() -> None:
    images, labels = digits.images_and_labels()
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == ((1797, 8, 8), np.uint8, (1797,), np.uint8)
    assert (images.min(), images.max()) == (0, 16)
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_the_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = digits.images_and_labels()
    published = datasets.load_digits()
    assert np.array_equal(images, published.images)
    assert np.array_equal(labels, published.target)


def test_the_attribution_lies_beside_the_data() -> None:
    text = Path(digits.__file__).with_name("digits.txt").read_text(encoding="utf-8")
    for part in ("E. Alpaydin", "C. Kaynak", "10.24432/C50P49", "CC BY 4.0", "Changes made"):
        assert part in text


def test_changed_data_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "SHA256", "0" * 64)
    with pytest.raises(TitheError, match=r"digits\.npz.*install tithe again"):
        digits.images_and_labels()


def test_no_image_is_in_two_parts() -> None:
    first, second = digits.tasks()
    for task, sizes in ((first, [672, 64, 165]), (second, [320, 160, 416])):
        parts = (task.train, task.validation, task.test)
        assert [len(images) for images, _ in parts] == sizes
        for images, labels in parts:
            assert images.shape[1:] == (1, 8, 8)
            assert labels.unique().tolist() == [0, 1, 2, 3, 4]
    everything = torch.cat([part[0] for part in (second.train, second.validation, second.test)])
    original, labels = digits.images_and_labels()
    assert torch.equal(everything[:, 0] * 16, torch.from_numpy(original[labels >= 5]).float())


def test_batches_are_full_shuffled_and_repeatable() -> None:
    _, second = digits.tasks()
    (one, two), again = (next(epochs) for epochs in [second.epochs(64, 3)] * 2), next(second.epochs(64, 3))
    assert [len(labels) for _, labels in one] == [64] * 5
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0][0], two[0][0])


def test_every_file_is_there_and_nothing_else(shown: tuple[Path, dict[str, Any], str]) -> None:
    folder, outcome, _ = shown
    deltas = [f"{contestant.slug}.safetensors" for contestant in CONTESTANTS]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["base.safetensors", "demo.png", "result.json", *deltas]
    )
    assert json.loads((folder / "result.json").read_text(encoding="utf-8")) == outcome
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert [row["file"] for row in outcome["rows"]] == deltas
    for row in outcome["rows"]:
        assert row["file_bytes"] == (folder / row["file"]).stat().st_size


def test_the_table_fits_80_columns_and_cuts_nothing(shown: tuple[Path, dict[str, Any], str]) -> None:
    _, outcome, text = shown
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for row in outcome["rows"]:
        line = next(line for line in text.splitlines() if re.match(re.escape(row["name"]) + r"  +\d", line))
        assert f"{row['accuracy']:.1%}" in line
        trained = row["trainable_weights"] if not row["opening_steps"] else outcome["rows"][0]["trainable_weights"]
        assert f"{trained:,}" in line
    assert "mean nothing" in text


def test_numbers_are_measured_and_agree_with_arithmetic(shown: tuple[Path, dict[str, Any], str]) -> None:
    _, outcome, _ = shown
    rows = {row["name"]: row for row in outcome["rows"]}
    model = Digits()
    weights = sum(parameter.numel() for parameter in model.parameters())
    head = sum(parameter.numel() for parameter in model.head.parameters())
    tensors = len(list(model.parameters()))
    full, fish, random, alone = (rows[name] for name in ("full fine-tuning", "FISH", "random mask", "head only"))
    lean, trady = rows["FISH + lean"], rows["TraDy"]
    assert (full["trainable_weights"], alone["trainable_weights"]) == (weights, head)
    assert fish["trainable_weights"] == random["trainable_weights"] == int(DENSITY * weights)
    assert full["optimizer_bytes"] == 8 * weights + 4 * tensors
    assert alone["optimizer_bytes"] == 8 * head + 4 * 2
    for row in (fish, lean, random):
        assert 0 < row["optimizer_bytes"] - 8 * row["trainable_weights"] <= 4 * tensors
        assert row["file_bytes"] < full["file_bytes"] / 10
    for row in rows.values():
        assert row["peak_bytes"] > row["kept_bytes_at_peak"] + row["gradient_bytes_at_peak"]
        assert row["peak_bytes"] > row["optimizer_bytes"]
        assert row["seconds_per_step"] > 0
        assert 0 <= row["accuracy"] <= 1
    assert alone["peak_bytes"] < lean["peak_bytes"] < fish["peak_bytes"] < full["peak_bytes"]
    assert lean["kept_bytes_at_peak"] < 0.8 * fish["kept_bytes_at_peak"]
    assert trady["peak_bytes"] < lean["peak_bytes"]
    # A value that is drawn is paid for four times: θ, its gradient and two moments.
    assert 0 < 16 * trady["trainable_weights"] < tithe.Budget(BUDGET).of(0)
    # Every weight may still be drawn; what a step holds is the drawn network's.
    assert (rows["VR-PGE"]["trainable_weights"], rows["VR-PGE"]["optimizer_bytes"]) == (
        weights,
        8 * weights + 4 * tensors,
    )
    assert rows["VR-PGE"]["peak_bytes"] < 0.8 * full["peak_bytes"]


def test_a_run_of_two_parts_says_what_each_takes(shown: tuple[Path, dict[str, Any], str]) -> None:
    _, outcome, text = shown
    full, twa = outcome["rows"][:2]
    assert (full["name"], twa["name"]) == ("full fine-tuning", "full, then TWA")
    assert (full["opening_steps"], full["steps"]) == (0, outcome["tuning_steps"])
    assert (twa["opening_steps"], twa["steps"]) == (2, 1)
    assert twa["trainable_weights"] == outcome["checkpoints"] == 1
    assert twa["optimizer_bytes"] == 0
    assert 0 < twa["seconds_besides"] < outcome["seconds"]
    # Recording is full fine-tuning, and whatever it holds while the first checkpoint is coded.
    assert twa["choosing_peak_bytes"] >= full["peak_bytes"]
    assert twa["peak_bytes"] < full["peak_bytes"]
    assert abs(twa["kept_bytes_at_peak"] - full["kept_bytes_at_peak"]) < 0.1 * full["kept_bytes_at_peak"]
    weights = full["trainable_weights"]
    assert twa["mapped_bytes"] == 0  # one checkpoint is no step from another
    lines = text.splitlines()
    whole = next(line for line in lines if line.startswith("full, then TWA "))
    own = lines[lines.index(whole) + 1]
    assert whole.split()[4] == f"{weights:,}"
    assert own.split()[:4] == ["its", "TWA", "steps", "1"]
    assert [row["mapped_bytes"] for row in outcome["rows"] if row is not twa] == [0] * (len(CONTESTANTS) - 1)


def test_a_whole_run_of_two_parts_takes_six_tenths_of_the_steps() -> None:
    steps = FULL.tuning
    assert opening_steps(steps) + averaging_steps(steps) == 0.6 * steps
    assert num_checkpoints(steps) == 20
    whole = FULL.steps(CONTESTANTS)
    others = FULL.pretraining + (len(CONTESTANTS) - 1) * (steps * len(RATES) + FULL.rounds)
    assert whole - others == 60 * len(RATES) + FULL.rounds


def test_a_run_of_two_parts_records_every_second_step_of_the_first_and_trains_their_average() -> None:
    _, task = digits.tasks()
    torch.manual_seed(0)
    model = Digits()
    trainee = Averaged(model, Course(task, 0, 20))
    folder, opening = trainee._history.folder, trainee.part
    batches = [batch for epoch, _ in zip(task.epochs(64, 0), range(3), strict=False) for batch in epoch]
    for batch in batches[:9]:
        assert trainee.attached_bytes == trainee.mapped_bytes == 0
        trainee.step(batch)
    assert trainee._history.steps == [4, 6, 8]
    trainee.step(batches[9])
    assert trainee._average is not None
    assert trainee._history.steps == [4, 6, 8, 10]
    assert not folder.exists()
    assert trainee.optimizer is not opening.optimizer
    assert trained_weights(trainee.optimizer) == num_checkpoints(20) == 4
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if not name.endswith("@theta"))
    assert 3 * weights < trainee.mapped_bytes < 1.1 * 3 * weights  # a byte for each, and each step between two
    kept = trainee._average._sharing.kept
    assert kept is not None
    theta = next(iter(trainee._average.parameters()))
    assert trainee.attached_bytes == theta.nbytes + kept.waiting.nbytes
    assert trainee._average.coefficients()["span"].tolist() == pytest.approx([0.25] * 4, abs=1e-5)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if not name.endswith("@theta")}
    trainee.step(batches[10])
    trainee.step(batches[11])
    assert any(not torch.equal(start[name], p) for name, p in model.named_parameters() if name in start)
    assert trainee.besides > 0
    trainee.release()


def test_a_measured_run_of_two_parts_is_in_the_second() -> None:
    _, task = digits.tasks()
    trainee = Averaged(Digits(), Course(task, 0, 8, measured=True))
    assert trained_weights(trainee.optimizer) == num_checkpoints(8)
    batch = next(task.epochs(64, 0))[0]
    for _ in range(3):
        trainee.step(batch)
    assert trained_weights(trainee.optimizer) == num_checkpoints(8)
    trainee.release()


def test_a_shipped_narrow_network_is_as_narrow_as_it_says(shown: tuple[Path, dict[str, Any], str]) -> None:
    folder, outcome, _ = shown
    model = Digits()
    whole = sum(parameter.numel() for parameter in model.parameters())
    tithe.apply(model, folder / "vrpge.safetensors")
    left = sum(parameter.numel() for parameter in model.parameters())
    assert left < 0.7 * whole
    row = next(row for row in outcome["rows"] if row["name"] == "VR-PGE")
    assert 4 * left < row["file_bytes"] < 4 * left + 10_000
    assert any(block.up.out_features < 4 * WIDTH for block in model.blocks)


def test_a_shipped_delta_moves_the_selected_weights_of_the_base_only(shown: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = shown
    base = load_file(folder / "base.safetensors")
    for slug in ("fish", "fish-lean", "random"):
        model = Digits()
        model.load_state_dict(base)
        tithe.apply(model, folder / f"{slug}.safetensors")
        moved = sum(int((value != base[name]).sum()) for name, value in model.state_dict().items())
        assert 0 < moved <= int(DENSITY * sum(value.numel() for value in base.values()))


@pytest.mark.filterwarnings("ignore:the network that is exported:tithe.TitheWarning")  # after two steps
@pytest.mark.parametrize("contestant", CONTESTANTS, ids=lambda contestant: contestant.slug)
def test_a_contestant_trains_saves_and_leaves_an_ordinary_model(contestant: Any, tmp_path: Path) -> None:
    _, task = digits.tasks()
    base = Digits()
    keys = list(base.state_dict())
    trainee = contestant.start(copy.deepcopy(base), Course(task, 0, 2))
    batch = next(task.epochs(64, 0))[0]
    trainee.step(batch)
    state = [value for entry in trainee.optimizer.state.values() for value in entry.values()]
    assert optimizer_bytes(trainee.optimizer) == sum(value.nbytes for value in state)
    adamw = 8 * trained_weights(trainee.optimizer) + 4 * len(trainee.optimizer.state)
    assert optimizer_bytes(trainee.optimizer) == (0 if contestant.slug == "twa" else adamw)
    trainee.end_epoch()
    trainee.step(batch)
    trainee.save(tmp_path / "it.safetensors")
    trainee.release()
    tithe.apply(base, tmp_path / "it.safetensors")
    assert list(trainee.model.state_dict()) == list(base.state_dict()) == keys
    for name, value in trainee.model.state_dict().items():
        assert torch.equal(value, base.state_dict()[name]), name


def test_the_same_seed_gives_the_same_run(shown: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    torch.manual_seed(1234)
    state = torch.random.get_rng_state()
    again = run(tmp_path, quick=True, console=Page())
    assert torch.equal(torch.random.get_rng_state(), state)
    same = ("accuracy", "validation_accuracy", "trainable_weights", "peak_bytes", "optimizer_bytes", "file_bytes")
    for first, second in zip(shown[1]["rows"], again["rows"], strict=True):
        assert {key: first[key] for key in same} == {key: second[key] for key in same}


def test_an_interrupted_run_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("mine", encoding="utf-8")
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, quick=True, console=Page(interrupt_at="random mask"))
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_text(encoding="utf-8") == "mine"
    assert torch.get_num_threads() == threads


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine", encoding="utf-8")
    with pytest.raises(TitheError, match=r"taken: found .* \(File exists\); expected a folder"):
        run(taken, quick=True, console=Page())
    assert taken.read_text(encoding="utf-8") == "mine"


def test_a_terminal_sees_a_bar_with_the_time_left() -> None:
    page = Console(file=io.StringIO(), width=80, force_terminal=True)
    with Bar(page, 2) as bar:
        bar.phase("sorting")
        bar.advance()
        bar.say("half of it is sorted")
        bar.advance()
    assert isinstance(page.file, io.StringIO)
    for part in ("sorting", "left", "half of it is sorted"):
        assert part in page.file.getvalue()


def test_elsewhere_each_phase_is_a_line_with_the_time_left() -> None:
    page = Page()
    with Bar(page, 4) as bar:
        bar.phase("first")
        bar.advance()
        bar.phase("second")
    assert re.fullmatch(r"first\nsecond \(about \d+ s left\)\n", page.text)
