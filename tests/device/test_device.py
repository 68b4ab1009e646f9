"""What a plan does on an accelerator equals what it does on the CPU, and no operator meets tensors of two devices.

`make test-device` runs these alone: on a GPU where there is one, and else on the pretend accelerator, which equals the
CPU bit for bit. Autograd counts the devices at the first backward pass, so that no other test may run before them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch as st
import torch
from torch import Tensor, nn

import tithe
from models import CASES, Batch, Case
from tithe.rules.lean.dropout import Dropped

pytestmark = pytest.mark.device

MODELS = ("depthwise", "resnet_basic", "bert", "llama")
STEPS = 3

Observed = dict[str, object]
Optimizer = Callable[[object], torch.optim.Optimizer]


@dataclass(frozen=True)
class Place:
    """A model of the zoo, where it computes, and a folder of the run's own."""

    case: Case
    device: torch.device
    folder: Path

    def model(self) -> nn.Module:
        """The model; whichever generator it draws from begins anew."""
        model = self.case.model().to(self.device)
        torch.manual_seed(1)
        return model

    def batches(self, count: int = STEPS) -> list[Batch]:
        return [{name: x.to(self.device) for name, x in batch.items()} for batch in self.case.batches(count)]

    def attach(self, model: nn.Module, method: object, **settings: object) -> tithe.Plan:
        settings = {"head": self.case.head, "loss": self.case.loss, "data": self.batches(), **settings}
        if isinstance(method, tithe.VRPGE) and self.case.name == "llama":
            settings["where"] = "!model.layers.*.self_attn.*"  # as its refusal says: heads are cut by a fixed width
        return tithe.attach(model, method, **settings)

    def train(
        self, plan: tithe.Plan, optimizer: torch.optim.Optimizer | None = None, steps: int = STEPS
    ) -> list[Tensor]:
        """Steps of AdamW, with an epoch's end after each; the losses."""
        optimizer = optimizer or adamw(plan)
        losses: list[Tensor] = []
        for batch in self.batches(steps):
            losses.append(plan.backward(lambda batch=batch: self.case.loss(plan.model, batch)).detach())
            optimizer.step()
            optimizer.zero_grad()
            plan.step()
            plan.end_epoch()
        return losses


def adamw(plan: tithe.Plan, **settings: object) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(plan.parameters(), lr=0.01, foreach=True, **settings)
    plan.bind(optimizer)
    return optimizer


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def selected(plan: tithe.Plan) -> dict[str, Tensor]:
    return {name: selection.indices for name, selection in plan.selections.items()}


def on_both(
    run: Callable[[Place], Observed], name: str, device: torch.device, folder: Path, *, close: float = 2e-3
) -> None:
    """Run the same on the CPU and on the device, from the same seeds, and compare all that was observed."""
    found: list[Observed] = []
    for where in (torch.device("cpu"), device):
        torch.manual_seed(1)
        (folder / where.type).mkdir()
        found.append(run(Place(CASES[name], where, folder / where.type)))
    of_cpu, of_device = map(flat, found)
    assert of_cpu.keys() == of_device.keys()
    for key, expected in of_cpu.items():
        got = of_device[key]
        if isinstance(expected, Tensor):
            assert isinstance(got, Tensor), key
            if device.type == "cuda" and expected.is_floating_point():
                torch.testing.assert_close(
                    got.cpu(), expected, rtol=close, atol=close, msg=lambda m, key=key: f"{key}: {m}"
                )
            else:
                assert torch.equal(got.cpu(), expected), key
        elif device.type != "cuda":
            assert got == expected, key


def flat(value: object, path: str = "") -> dict[str, object]:
    """Path → tensor or number, of nested mappings and sequences."""
    if isinstance(value, Mapping):
        return {at: x for key, each in value.items() for at, x in flat(each, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {at: x for i, each in enumerate(value) for at, x in flat(each, f"{path}/{i}").items()}
    return {path: value}


def layer_weights(model: nn.Module) -> list[str]:
    """Weights of linear layers and convolutions, the last one (the head) apart."""
    kinds = (nn.Linear, nn.Conv2d)
    return [f"{path}.weight" for path, module in model.named_modules() if isinstance(module, kinds)][:-1]


def sparse_update(place: Place) -> tithe.SparseUpdate:
    names = layer_weights(place.model())
    biases = [name for name, _ in place.model().named_parameters() if name.endswith("bias")][:1]
    return tithe.SparseUpdate(dict.fromkeys(names[:3], 0.5), biases=biases)


METHODS: dict[str, Callable[[Place], object]] = {
    "FISH": lambda place: tithe.FISH(density=0.5),
    "FISH, again": lambda place: tithe.FISH(density=0.5, reselect=tithe.every(2, "steps")),
    "FISH, warm-up": lambda place: tithe.FISH(density=0.5, warmup=1),
    "FISH, each tensor": lambda place: tithe.FISH(density=0.5, scope="tensor", reselect=tithe.each_step()),
    "TraDy": lambda place: tithe.TraDy(tithe.Budget(fraction=0.3)),
    "TraDy, static": lambda place: tithe.TraDy(tithe.Budget(fraction=0.3), dynamic=False, lean=False),
    "TraDy, oracle": lambda place: tithe.TraDy(tithe.Budget("1MB"), score="rgn"),
    "SparseUpdate": sparse_update,
    "SpIEL": lambda place: tithe.SpIEL(density=0.5),
    "VR-PGE": lambda place: tithe.VRPGE(keep=0.5),
    "VR-PGE, by operations": lambda place: tithe.VRPGE(keep=0.7, cost="flops", gradual=(0, 2)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_methods(name: str, method: str, device: torch.device, tmp_path: Path) -> None:
    def run(place: Place) -> Observed:
        model = place.model()
        plan = place.attach(model, METHODS[method](place))
        chosen = selected(plan)
        losses = place.train(plan)
        assert all(p.device == place.device for p in (*model.parameters(), *plan.parameters()))
        ledger = plan.predict(place.batches(1)[0])
        plan.save(place.folder / "trained.safetensors")
        seen = {"chosen": chosen, "losses": losses, "later": selected(plan), "kept": ledger.kept}
        plan.release()
        return {**seen, "weights": state(model)}

    on_both(run, name, device, tmp_path)


@pytest.mark.parametrize("method", ["FISH, again", "TraDy, oracle", "SpIEL", "VR-PGE, by operations"])
def test_data_that_the_loss_moves(method: str, device: torch.device, tmp_path: Path) -> None:
    """Batches as a DataLoader gives them, on the CPU."""

    def run(place: Place) -> Observed:
        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return place.case.loss(model, {name: x.to(place.device) for name, x in batch.items()})

        plan = place.attach(place.model(), METHODS[method](place), loss=loss, data=place.case.batches(STEPS))
        plan.predict(place.case.batch())
        losses = place.train(plan)
        plan.settle(draws=2)
        plan.release()
        return {"losses": losses, "weights": state(plan.model)}

    on_both(run, "bert", device, tmp_path)


SCORES: dict[str, dict[str, object]] = {
    **{
        score: {"score": score}
        for score in ("fisher", "gradient", "snr", "saliency", "magnitude", "random", "principal")
    },
    "true Fisher": {"fisher": "true"},
    "columns": {"unit": "column", "scope": "tensor"},
}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", MODELS)
def test_scores(name: str, score: str, device: torch.device, tmp_path: Path) -> None:
    if score == "true Fisher" and CASES[name].logits is None:
        pytest.skip("drawing labels needs a classifier")

    def run(place: Place) -> Observed:
        plan = place.attach(place.model(), tithe.FISH(density=0.5, samples=6, **SCORES[score]))
        return {"chosen": selected(plan), "losses": place.train(plan, steps=1)}

    on_both(run, name, device, tmp_path)


LEAN: dict[str, dict[str, object]] = {"full": {}, "8 bits": {"bits": 8}, "exact": {"exact": True}}


@pytest.mark.parametrize("planned", [False, True], ids=["alone", "with FISH"])
@pytest.mark.parametrize("kind", LEAN)
@pytest.mark.parametrize("name", MODELS)
def test_lean(name: str, kind: str, planned: bool, device: torch.device, tmp_path: Path) -> None:
    def run(place: Place) -> Observed:
        model = place.model()
        plan = place.attach(model, tithe.FISH(density=0.5)) if planned else None
        handle = tithe.lean(model, **LEAN[kind])
        if plan is not None:
            return {"losses": place.train(plan), "weights": state(model)}
        loss = place.case.loss(model, place.batches(1)[0])
        loss.backward()
        handle.release()
        return {
            "loss": loss.detach(),
            "gradients": {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        }

    on_both(run, name, device, tmp_path)


def history_of(place: Place, bits: int | None = None) -> tithe.History:
    """The checkpoints of a few steps of full training, recorded from where the model is."""
    model, history = place.model(), tithe.History(place.folder / f"history{bits}", bits)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step, batch in enumerate(place.batches(4)):
        place.case.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.record(model, step, score=float(step % 3))
    return history


SPANS: dict[str, dict[str, object]] = {
    "as stored": {},
    "8 bits": {"bits": 8},
    "1 bit": {"bits": 1},
    "each tensor": {"granularity": "tensor", "start": "last"},
    "from a decay": {"start": "cosine"},
    "each tensor, 8 bits": {"granularity": "tensor", "bits": 8, "start": "best"},
}


@pytest.mark.parametrize("kind", SPANS)
@pytest.mark.parametrize("name", MODELS)
def test_spans(name: str, kind: str, device: torch.device, tmp_path: Path) -> None:
    def run(place: Place) -> Observed:
        history = history_of(place)
        model = place.model()
        plan = place.attach(model, tithe.TWA(history, **SPANS[kind]), head=())
        losses = place.train(plan)
        refreshed = plan.refresh_statistics(place.batches())
        plan.save(place.folder / "trained.safetensors")
        coefficients = plan.coefficients()
        plan.release()
        return {"losses": losses, "weights": state(model), "coefficients": coefficients, "refreshed": refreshed}

    on_both(run, name, device, tmp_path)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_histories(name: str, bits: int | None, device: torch.device, tmp_path: Path) -> None:
    def run(place: Place) -> Observed:
        history = history_of(place, bits)
        again = tithe.History(place.folder / f"history{bits}", bits)
        model = place.model()
        model.load_state_dict(again.mean())
        again.record(model, 10)
        average = again.average([0.5, 0.5, 0.0, 0.0, 0.0])
        tithe.average(history, place.folder / "average")
        written = {path.name: st.load_file(path) for path in sorted((place.folder / "average").glob("*.safetensors"))}
        return {"rows": list(again), "average": average, "written": written, "weights": state(model)}

    on_both(run, name, device, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_moving_averages(name: str, device: torch.device, tmp_path: Path) -> None:
    """They follow the weights where these are, and go on from files, which are read into the host's memory."""

    def run(place: Place) -> Observed:
        model, folder = place.model(), place.folder / "averages"
        history = tithe.History(folder, ema=(0.05, 0.10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step, batch in enumerate(place.batches(4), start=1):
            place.case.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            history.update(model, step)
            if step == 2:
                history.record(model, step)
                history = tithe.History(folder)
        history.record(model, 4)
        return {"rows": list(history), "average": history.average(history.weights("ema:0.07"))}

    on_both(run, name, device, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_ledgers(name: str, device: torch.device, tmp_path: Path) -> None:
    """What a step is predicted to keep, and what it is seen to keep, on a device as on the CPU."""

    def run(place: Place) -> Observed:
        model, batch = place.model(), place.batches(1)[0]
        plan = place.attach(model, tithe.FISH(density=0.5))
        predicted = plan.predict(batch)
        measured = tithe.measure(lambda: plan.backward(lambda: place.case.loss(model, batch)), model=model)
        assert str(plan)
        return {"predicted": (predicted.kept, predicted.peak), "measured": (measured.kept, measured.peak)}

    on_both(run, name, device, tmp_path)


def test_a_delta_is_the_same_wherever_its_weights_lie(device: torch.device, tmp_path: Path) -> None:
    def run(place: Place) -> Observed:
        base, model = place.model(), place.model()
        plan = place.attach(model, tithe.FISH(density=0.5))
        place.train(plan)
        plan.save(place.folder / "delta.safetensors")
        plan.release()
        trained = state(model)
        tithe.diff(base, model, place.folder / "diff.safetensors")
        onto_device, onto_cpu = place.model(), place.case.model()
        for target, file in ((onto_device, "delta"), (onto_cpu, "diff")):
            tithe.apply(target, place.folder / f"{file}.safetensors")
        info = tithe.inspect(place.folder / "delta.safetensors")
        st.save_model(place.case.model(), str(place.folder / "base.safetensors"))
        tithe.merge(
            place.folder / "base.safetensors", place.folder / "delta.safetensors", place.folder / "merged.safetensors"
        )
        seen = {"trained": trained, "on device": state(onto_device), "on cpu": state(onto_cpu)}
        for found in (seen["on device"], seen["on cpu"], st.load_file(place.folder / "merged.safetensors")):
            for key, value in found.items():
                assert torch.equal(value.cpu(), trained[key].cpu()) or "running" in key or "num_batches" in key, key
        return {**seen, "tensors": str(info).partition("\n")[2]}  # after the line that names the file

    for number, name in enumerate(MODELS):
        folder = tmp_path / str(number)
        folder.mkdir()
        on_both(run, name, device, folder)


RESUMED = ("FISH, again", "FISH, warm-up", "TraDy", "SpIEL", "VR-PGE")


@pytest.mark.parametrize("method", [*RESUMED, "TWA"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("by", ["plan", "optimizer"])
def test_resuming(name: str, method: str, by: str, device: torch.device, tmp_path: Path) -> None:
    """A run that stops, is saved, and goes on from a file that was read onto the CPU."""

    def run(place: Place) -> Observed:
        asked = tithe.TWA(history_of(place)) if method == "TWA" else METHODS[method](place)
        settings = {"head": ()} if method == "TWA" else {}
        first = place.model()
        plan = place.attach(first, asked, **settings)
        optimizer = adamw(plan)
        place.train(plan, optimizer)
        torch.save({"plan": plan.state_dict(), "optimizer": optimizer.state_dict()}, place.folder / "run.pt")
        weights = state(first)
        losses = place.train(plan, optimizer)

        saved = torch.load(place.folder / "run.pt", map_location="cpu", weights_only=True)
        second = place.model()
        statistics = {name: x for name, x in weights.items() if "running" in name or "num_batches" in name}
        second.load_state_dict(statistics, strict=False)
        going = place.attach(second, asked, **settings, **({"state": saved["plan"]} if by == "plan" else {}))
        again = adamw(going)
        again.load_state_dict(saved["optimizer"])
        more = place.train(going, again)
        if place.device.type != "cuda":
            assert all(map(torch.equal, more, losses))
        return {"losses": losses, "more": more, "weights": state(second)}

    on_both(run, name, device, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_narrow_networks(name: str, device: torch.device, tmp_path: Path) -> None:
    def run(place: Place) -> Observed:
        model, example = place.model(), place.batches(1)[0]
        plan = place.attach(model, tithe.VRPGE(keep=0.6))
        losses = place.train(plan)
        settled = plan.settle(place.batches(), draws=3)
        losses += place.train(plan)
        model.eval()
        whole = place.case.loss(model, example).detach()
        narrow = plan.export(example)
        plan.save(place.folder / "narrow.safetensors")
        network = tithe.apply(place.model(), place.folder / "narrow.safetensors").eval()
        plan.release()
        found = {"exported": place.case.loss(narrow, example), "applied": place.case.loss(network, example)}
        assert next(network.parameters()).device == place.device
        return {"losses": losses, "settled": settled, "whole": whole, **{k: v.detach() for k, v in found.items()}}

    on_both(run, name, device, tmp_path)


MOVED = {"FISH, again", "FISH, warm-up", "TraDy", "SparseUpdate", "SpIEL", "VR-PGE"}


@pytest.mark.parametrize("method", sorted(MOVED | {"TWA"}))
@pytest.mark.parametrize("name", MODELS)
def test_moving_an_attached_model(name: str, method: str, device: torch.device, tmp_path: Path) -> None:
    """Attached on the CPU, moved, trained, moved back, trained: all of it equals staying on the CPU."""

    def run(place: Place) -> Observed:
        home = Place(place.case, torch.device("cpu"), place.folder)
        asked = tithe.TWA(history_of(home)) if method == "TWA" else METHODS[method](home)
        model = home.model()
        data: list[Batch] = home.batches()
        plan = home.attach(model, asked, data=data, **({"head": ()} if method == "TWA" else {}))
        model.to(place.device)
        data[:] = place.batches()
        losses = place.train(plan)
        model.to("cpu")
        data[:] = home.batches()
        losses += home.train(plan)
        plan.release()
        assert all(p.device.type == "cpu" for p in model.parameters())
        return {"losses": losses, "weights": state(model)}

    on_both(run, name, device, tmp_path)


@pytest.mark.parametrize("method", ["FISH", "TraDy", "VR-PGE"])
@pytest.mark.parametrize("name", MODELS)
def test_deep_copies(name: str, method: str, device: torch.device, tmp_path: Path) -> None:
    def run(place: Place) -> Observed:
        plan = place.attach(place.model(), METHODS[method](place))
        before = place.train(plan)
        plan.release()
        other = copy.deepcopy(plan.model)
        assert all(p.device == place.device for p in other.parameters())
        return {
            "before": before,
            "after": place.train(place.attach(other, METHODS[method](place))),
            "own": state(plan.model),
        }

    on_both(run, name, device, tmp_path)


@pytest.mark.parametrize("kernel", ["fused", "foreach", "plain", "scaled"])
def test_kernels_of_the_optimizer(kernel: str, device: torch.device, tmp_path: Path) -> None:
    def run(place: Place) -> Observed:
        model = place.model()
        plan = place.attach(model, tithe.FISH(density=0.5, reselect=tithe.every(2, "steps")))
        settings = {"fused": {"fused": True}, "foreach": {"foreach": True}}.get(kernel, {"foreach": False})
        optimizer = torch.optim.AdamW(plan.parameters(), lr=0.01, **settings)
        scaler = torch.amp.GradScaler(place.device.type, enabled=kernel == "scaled", init_scale=8.0)
        for batch in place.batches():
            scaler.scale(place.case.loss(model, batch)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(list(plan.parameters()), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        plan.release()
        return {"weights": state(model)}

    for number, name in enumerate(MODELS):
        folder = tmp_path / str(number)
        folder.mkdir()
        on_both(run, name, device, folder)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("method", ["FISH", "VR-PGE"])
def test_dropout_draws_what_the_cpu_draws(method: str, lean: bool, device: torch.device, tmp_path: Path) -> None:
    """Also in the second pass of VR-PGE, before which the random state of the device is put back."""
    if device.type == "cuda":
        pytest.skip("a GPU draws other numbers")

    def run(place: Place) -> Observed:
        model = place.model()
        plan = place.attach(model, METHODS[method](place))
        if lean:
            tithe.lean(model)
        return {"losses": place.train(plan), "weights": state(model)}

    on_both(run, "bert_dropout", device, tmp_path)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_lean_dropout_of_a_device_keeps_what_it_drew(p: float, device: torch.device) -> None:
    x = torch.ones(7, 33, device=device, requires_grad=True)
    y = Dropped.apply(x, p, False)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())
    assert set(y.detach().cpu().unique().tolist()) == {0.0, float(torch.ones(1).mul(1 / (1 - p)))}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["bert", "bert_dropout", "llama"])
def test_checkpointed_blocks(name: str, device: torch.device, tmp_path: Path) -> None:
    """Blocks that run again in backward, where the random state of the device is put back."""
    if device.type == "cuda" and CASES[name].dropout:
        pytest.skip("a GPU draws other numbers")

    def run(place: Place) -> Observed:
        model = place.model()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        plan = place.attach(model, tithe.FISH(density=0.5))
        tithe.lean(model, bits=None if place.case.dropout else 8)
        return {"losses": place.train(plan), "weights": state(model)}

    on_both(run, name, device, tmp_path)


@pytest.mark.parametrize("method", ["FISH, again", "TraDy", "VR-PGE"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*rounds small updates away:tithe.TitheWarning")  # VR-PGE has no master copies
def test_half_precision(name: str, method: str, device: torch.device, tmp_path: Path) -> None:
    def run(place: Place) -> Observed:
        model = place.case.model(dtype=torch.bfloat16).to(place.device)
        data = [
            {key: x.bfloat16() if x.is_floating_point() else x for key, x in batch.items()} for batch in place.batches()
        ]
        plan = place.attach(model, METHODS[method](place), data=data)
        chosen, optimizer, losses = selected(plan), adamw(plan), list[Tensor]()
        for batch in data:
            losses.append(plan.backward(lambda batch=batch: place.case.loss(model, batch)).detach())
            optimizer.step()
            optimizer.zero_grad()
        plan.release()
        return {"chosen": chosen, "losses": losses, "weights": state(model)}

    on_both(run, name, device, tmp_path, close=5e-2)


def test_the_device_refuses_what_another_lies_on(device: torch.device) -> None:
    here, there = torch.ones(3, 3, device=device), torch.ones(3, 3)
    row, generator = torch.tensor([0]), torch.Generator()
    mixed: dict[str, Callable[[], object]] = {
        "sum": lambda: here + there,
        "in place": lambda: there.add_(here),
        "product": lambda: here @ there,
        "joined": lambda: torch.cat([here, there]),
        "rows": lambda: here.index_select(0, row),
        "rows of the CPU": lambda: there[row.to(device)],
        "written": lambda: here.index_put_((row,), there[:1]),
        "embedding": lambda: nn.functional.embedding(row, here),
        "generator": lambda: torch.rand(3, generator=generator, device=device),
    }
    for name, use in mixed.items():
        with pytest.raises((RuntimeError, IndexError), match="device"):
            use()
        if device.type != "cuda":
            from device import pretend

            assert len(pretend.take_refusals()) == 1, name
    assert (here * torch.tensor(2.0)).sum() == 18
    assert here[row].device == here.device
