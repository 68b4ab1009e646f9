"""Attaching is enough: every method in every loop equals the reference loop, or is refused by its first step."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import loops
import tithe
from loops import Setting
from tithe import TitheError

METHODS = ("FISH", "FISH, again", "FISH, warm-up", "TraDy", "TraDy, static", "VR-PGE", "cuts", "TWA")

KERNELS: dict[str, Callable[[object], torch.optim.Optimizer]] = {
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "foreach AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def _trainer(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0, fused=True)


LOOPS: dict[str, Callable[[Setting, Path], nn.Module]] = {
    "plain `loss.backward()`": lambda setting, folder: loops.plain(setting),
    "no `bind`": lambda setting, folder: loops.no_bind(setting),
    "no `step`": lambda setting, folder: loops.no_step(setting),
    "no `end_epoch`": lambda setting, folder: loops.no_end_epoch(setting),
    "`model.parameters()`": lambda setting, folder: loops.all_parameters(setting),
    **{name: lambda setting, folder: loops.no_bind(setting) for name in KERNELS},
    "GradScaler": lambda setting, folder: loops.grad_scaler(setting),
    "accumulation": lambda setting, folder: loops.accumulation(setting),
    "clipping": lambda setting, folder: loops.clipping(setting),
    "`autograd.grad`": lambda setting, folder: loops.autograd_grad(setting),
    "`torch.compile`": lambda setting, folder: loops.compiled(setting),
    "EMA through `.data`": lambda setting, folder: loops.ema(setting),
    "accelerate, attached before": lambda setting, folder: loops.accelerate_before(setting),
    "accelerate, attached after": lambda setting, folder: loops.accelerate_after(setting),
    "HF Trainer": lambda setting, folder: loops.hf_trainer(setting, folder),
    "HF Trainer, resumed": lambda setting, folder: loops.hf_trainer(setting, folder, resume=True),
    "Lightning": lambda setting, folder: loops.lightning_loop(setting, manual=False, folder=folder),
    "Lightning, manual": lambda setting, folder: loops.lightning_loop(setting, manual=True, folder=folder),
    "DDP, attached before": lambda setting, folder: loops.ddp_after(setting),
    "resumed by the optimizer's state": lambda setting, folder: loops.resumed(setting),
}
OPTIMIZERS = {**KERNELS, "HF Trainer": _trainer, "HF Trainer, resumed": _trainer}
CLOSE = {"accumulation"}
"""Loops that sum in another order."""
REFUSED = {
    ("VR-PGE", "plain `loss.backward()`"): "plan.backward",
    ("VR-PGE", "`autograd.grad`"): "plan.backward",
    ("VR-PGE", "`model.parameters()`"): "plan.parameters()",
    ("VR-PGE", "HF Trainer"): "plan.parameters()",
    ("VR-PGE", "HF Trainer, resumed"): "plan.parameters()",
    ("VR-PGE", "Lightning"): "plan.backward",
    ("VR-PGE", "DDP, attached before"): "plan.backward",
    ("cuts", "HF Trainer, resumed"): "with_tithe",
    ("cuts", "DDP, attached before"): "plan.backward",
}
"""Cells that end in an error, and what its remedy names."""
WARNED = {("TraDy", "no `end_epoch`"): "end_epoch"}
"""Cells in which the choice stays, and a warning says so."""
PAGE = Path(__file__).parents[1] / "docs" / "loops.md"


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> tithe.History:
    return loops.record(tmp_path_factory.mktemp("history"))


def _setting(method: str, loop: str, history: tithe.History) -> Setting:
    states = 1 if loop == "SGD" else 2
    budget = tithe.Budget(fraction=0.5)
    makes: dict[str, Callable[[], object]] = {
        "FISH": lambda: tithe.FISH(k=100),
        "FISH, again": lambda: tithe.FISH(k=120, reselect=tithe.every(2)),
        "FISH, warm-up": lambda: tithe.FISH(k=120, warmup=2),
        "TraDy": lambda: tithe.TraDy(budget, optimizer_states=states),
        "TraDy, static": lambda: tithe.TraDy(budget, dynamic=False, optimizer_states=states),
        "VR-PGE": lambda: tithe.VRPGE(0.6),
        "cuts": lambda: tithe.TaylorPruning(0.6, stop=9, cuts=3),
        "TWA": lambda: tithe.TWA(history),
    }
    head = () if method in ("VR-PGE", "cuts", "TWA") else ("head.*",)
    optimizer = OPTIMIZERS.get(loop)
    return Setting(makes[method], head) if optimizer is None else Setting(makes[method], head, optimizer)


@functools.cache
def _reference(method: str, kernel: str, history: tithe.History) -> dict[str, torch.Tensor]:
    return loops.reference(_setting(method, kernel, history)).state_dict()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("method", METHODS)
def test_the_weights_are_those_of_the_reference_loop_or_the_first_step_is_refused(
    method: str, loop: str, history: tithe.History, tmp_path: Path
) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    setting = _setting(method, loop, history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", tithe.TitheWarning)
        if (method, loop) in REFUSED:
            with pytest.raises(TitheError) as error:
                LOOPS[loop](setting, tmp_path)
            assert REFUSED[method, loop] in error.value.remedy
            return
        if (method, loop) in WARNED:
            with pytest.raises(tithe.TitheWarning, match=WARNED[method, loop]):
                LOOPS[loop](setting, tmp_path)
            return
        found = LOOPS[loop](setting, tmp_path).state_dict()
    expected = _reference(method, loop if loop in OPTIMIZERS else "", history)
    assert list(found) == list(expected)
    for name, value in expected.items():
        if loop in CLOSE:
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(found[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("loop", [loop for loop in LOOPS if loop != "`torch.compile`"])
@pytest.mark.parametrize("method", ["FISH", "FISH, again", "FISH, warm-up", "TraDy"])
def test_a_model_in_bfloat16_keeps_its_masters_in_every_loop(
    method: str, loop: str, history: tithe.History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    net, batches = loops.net, loops.batches

    def half(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"x": batch["x"].bfloat16(), "labels": batch["labels"]}

    monkeypatch.setattr(loops, "net", lambda: net().bfloat16())
    monkeypatch.setattr(loops, "batches", lambda: [half(batch) for batch in batches()])
    setting = _setting(method, loop, history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = loops.reference(setting).state_dict()
        found = LOOPS[loop](setting, tmp_path).state_dict()
    for name, value in expected.items():
        assert found[name].dtype == torch.bfloat16
        if loop in CLOSE or (method, loop) in WARNED:
            torch.testing.assert_close(found[name], value, rtol=2e-2, atol=2e-1 if (method, loop) in WARNED else 2e-2)
        else:
            assert torch.equal(found[name], value), name


def page() -> str:
    """The table of the docs: a cell is "equal", or what the error or the warning names."""
    rows = ["| loop | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for loop in LOOPS:
        cells = [
            f"refused: {REFUSED[method, loop]}"
            if (method, loop) in REFUSED
            else f"warns: {WARNED[method, loop]}"
            if (method, loop) in WARNED
            else "close"
            if loop in CLOSE
            else "equal"
            for method in METHODS
        ]
        rows.append(f"| {loop} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def test_the_page_shows_what_is_tested() -> None:
    text = PAGE.read_text("utf-8")
    begin, end = "<!-- table -->\n", "\n<!-- end -->"
    assert text[text.index(begin) + len(begin) : text.index(end)] == page()


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    begin, end = "<!-- table -->\n", "\n<!-- end -->"
    PAGE.write_text(text[: text.index(begin) + len(begin)] + page() + text[text.index(end) :], "utf-8")
