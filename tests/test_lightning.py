"""The Lightning callback trains as the plain loop does, goes on from a checkpoint, and leaves nothing else changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tithe
from fits import BATCHES, EPOCHS, HEAD, METHODS, SIZE, ByHand, Module, data, fit, loader, loss_fn, plain, same, trainer
from loops import record
from tithe.integrations.lightning import Tithe

each_method = pytest.mark.parametrize("method", METHODS)


@each_method
def test_weights_are_those_of_the_plain_loop(method: str) -> None:
    module, callback = Module(), Tithe(METHODS[method](), head=HEAD)
    fit(trainer(callback), module, loader(), loader())
    assert same(module, plain(METHODS[method]()))
    assert (callback.plan.num_steps, callback.plan.num_epochs) == (EPOCHS * BATCHES, EPOCHS)
    assert not same(module, Module())


class Resumable:
    """A loader that goes on in the middle of an epoch."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Iterator[Any]:
        x, y = data().tensors
        for number in range(self.next % BATCHES, BATCHES):
            self.next = number + 1
            yield x[SIZE * number : SIZE * (number + 1)], y[SIZE * number : SIZE * (number + 1)]

    def __len__(self) -> int:
        return BATCHES

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


@pytest.mark.parametrize(
    ("method", "when", "number"),
    [
        ("FISH", "each step", 5),
        ("FISH", "validation's end", 8),
        ("FISH, again", "each step", 3),  # a new choice was made right before
        ("FISH, each epoch", "each step", 8),  # after the last batch, before the epoch's end
        ("FISH, each epoch", "validation's end", 4),
        ("FISH, warm-up", "each step", 6),
        ("TraDy", "each step", 4),
        ("TraDy", "each step", 6),
        ("TraDy", "epoch's end", 8),
    ],
)
def test_a_checkpoint_resumes_to_the_same_bits(method: str, when: str, number: int, tmp_path: Path) -> None:
    settings = {"every_n_train_steps": 1} if when == "each step" else {}
    settings |= {"save_on_train_epoch_end": when == "epoch's end"} if when != "each step" else {}
    validation = loader() if when == "validation's end" else None
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **settings)
    whole, callback = Module(), Tithe(METHODS[method](), head=HEAD)
    fit(trainer(callback, saving), whole, Resumable(), validation)

    module, resumed = Module(), Tithe(METHODS[method](), head=HEAD)
    path = tmp_path / f"step={number}.ckpt"
    fit(trainer(resumed), module, Resumable(), validation, ckpt_path=path, weights_only=True)
    assert same(module, whole)
    assert (resumed.plan.num_steps, resumed.plan.num_epochs) == (EPOCHS * BATCHES, EPOCHS)
    for name, selection in callback.plan.selections.items():
        assert torch.equal(resumed.plan.selected(name), selection.indices)
    for plan in (callback.plan, resumed.plan):
        plan.save(tmp_path / "delta.safetensors")
        fresh = Module()
        tithe.apply(fresh, tmp_path / "delta.safetensors")
        assert same(fresh, whole)
    assert list(torch.load(path, weights_only=True)["state_dict"]) == list(Module().state_dict())


# ------------------------------------------------------------------------------------------------- settings of trainers


@pytest.mark.parametrize("method", ["FISH", "TraDy"])
def test_accumulation_counts_steps_of_the_optimizer(method: str) -> None:
    module, callback = Module(), Tithe(METHODS[method](), head=HEAD)
    fit(trainer(callback, accumulate_grad_batches=2, gradient_clip_val=0.1), module, loader())
    assert same(module, plain(METHODS[method](), accumulate=2, clip=0.1))
    assert callback.plan.num_steps == EPOCHS * BATCHES // 2


def test_the_loss_of_scores_is_computed_in_the_trainers_precision() -> None:
    seen: list[torch.dtype] = []

    class Watched(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(self(batch[0]).dtype)
            return super().training_step(batch, batch_idx)

    for precision in ("bf16-mixed", "bf16-true"):
        seen.clear()
        module, callback = Watched(), Tithe(METHODS["FISH"](), head=HEAD)
        fit(trainer(callback, precision=precision), module, loader())
        assert set(seen) == {torch.bfloat16}
        assert len(seen) > EPOCHS * BATCHES
        assert callback.plan.num_steps == EPOCHS * BATCHES
        assert (module.head.weight.dtype == torch.bfloat16) == (precision == "bf16-true")


def test_two_optimizers_may_step_at_their_own_pace() -> None:
    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net.parameters(), lr=0.01), torch.optim.SGD(self.head.parameters(), lr=0.1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            body, head = self.optimizers()
            self.manual_backward(loss_fn(self, batch))
            body.step()
            body.zero_grad()
            if batch_idx % 2:
                head.step()
                head.zero_grad()

    module, callback = Two(), Tithe(METHODS["FISH"](), head=HEAD, loss=loss_fn)
    fit(trainer(callback), module, loader())
    assert callback.plan.num_steps == EPOCHS * BATCHES
    assert not torch.equal(module.head.weight, Module().head.weight)


def test_a_second_fit_goes_on_and_a_released_plan_is_attached_again() -> None:
    module, callback = Module(), Tithe(METHODS["TraDy"](), head=HEAD)
    fit(trainer(callback, max_epochs=1), module, loader())
    plan = callback.plan
    fit(trainer(callback, max_epochs=2), module, loader())
    assert callback.plan is plan
    assert (plan.num_steps, plan.num_epochs) == (3 * BATCHES, 3)
    plan.release()
    fit(trainer(callback, max_epochs=1), module, loader())
    assert callback.plan is not plan
    other = Module()
    fit(trainer(callback, max_epochs=1), other, loader())
    assert callback.plan.model is other


def test_validation_before_and_after_sees_the_trained_weights(tmp_path: Path) -> None:
    module, callback = Module(), Tithe(METHODS["FISH"](), head=HEAD)
    run = trainer(callback, ModelCheckpoint(tmp_path, filename="last"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = run.validate(module, loader(), verbose=False)
        fit(run, module, loader(), loader())
        after = run.test(module, loader(), verbose=False)
        stranger = trainer().validate(Module.load_from_checkpoint(tmp_path / "last.ckpt"), loader(), verbose=False)
    assert before != after
    assert after == stranger
    assert run.model is module


def test_the_callback_works_in_the_other_package() -> None:
    class Other(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Module()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return loss_fn(self.inner, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)

    module, callback = Other(), Tithe(METHODS["FISH"](), head="inner.head.*")
    fit(trainer(callback, package=pytorch_lightning), module, loader())
    assert same(module.inner, plain(METHODS["FISH"]()))


# ------------------------------------------------------------------------------------------------ what choosing leaves


class Stated(nn.Module):
    """Keeps a count as metrics do, and means something of its own by ==, as those of torchmetrics do."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.list = 0, []
        self.register_buffer("total", torch.zeros(()))

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def forward(self, x: Tensor) -> None:
        self.count += 1
        self.list.append(1)
        self.total += 1


@pytest.mark.parametrize("method", ["FISH, again", "TraDy"])
def test_choosing_leaves_random_states_counts_metrics_and_logs_alone(method: str) -> None:
    class Counting(Module):
        def __init__(self) -> None:
            super().__init__(dropout=0.3)
            self.metric, self.logged = Stated(), [[]]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.metric(batch[0])
            self.log_dict({"a": 1.0})
            torch.rand(3)
            return super().training_step(batch, batch_idx)

    class Watch(lightning.Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
            self.seen.append((torch.get_rng_state(), *batch, module.metric.count, len(module.metric.list)))

    seen: list[list[Any]] = []
    for callbacks in ([], [Tithe(METHODS[method](), head=HEAD)]):
        lightning.seed_everything(3, verbose=False)
        watch = Watch()
        shuffled = loader(shuffle=True, generator=torch.Generator().manual_seed(5))
        fit(trainer(*callbacks, watch), Counting(), shuffled)
        seen.append(watch.seen)
    for one, other in zip(*seen, strict=True):
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other, strict=True))


def test_a_choice_in_the_middle_does_not_disturb_workers_that_stay() -> None:
    module = Module()
    settings = {"num_workers": 1, "persistent_workers": True}
    fit(trainer(Tithe(METHODS["FISH, again"](), head=HEAD)), module, loader(**settings))
    assert same(module, plain(METHODS["FISH, again"]()))


def test_batches_are_what_the_trainer_hands_to_the_step() -> None:
    scored: list[Any] = []

    class Data(lightning.LightningDataModule):
        def setup(self, stage: str) -> None:
            self.rows = data()

        def train_dataloader(self) -> Any:
            return {"a": DataLoader(self.rows, batch_size=SIZE), "b": DataLoader(self.rows, batch_size=SIZE)}

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch["a"][0] + 1, batch["b"][1]]

    def watched(module: Any, batch: Any) -> Tensor:
        scored.append(batch)
        return loss_fn(module, batch)

    fit(trainer(Tithe(METHODS["FISH"](), loss=watched), limit_train_batches=2), Module(), datamodule=Data())
    assert sum(len(batch[0]) for batch in scored[:2]) <= 2 * SIZE
    assert max(float(batch[0].max()) for batch in scored) == float(data().tensors[0][: 2 * SIZE].max() + 1)


class Late(lightning.LightningModule):
    """Makes its layers and its data in `setup`."""

    def setup(self, stage: str) -> None:
        inner = Module()
        self.net, self.head, self.rows, self.seen = inner.net, inner.head, loader(), []

    forward, training_step = Module.forward, Module.training_step
    configure_optimizers = Module.configure_optimizers

    def train_dataloader(self) -> Any:
        return self.rows


class Configured(Late):
    def setup(self, stage: str) -> None:
        pass

    def configure_model(self) -> None:
        Late.setup(self, "fit")


@pytest.mark.parametrize("kind", [Late, Configured])
def test_layers_that_are_made_late_are_attached(kind: type[Late]) -> None:
    module = kind()
    fit(trainer(Tithe(METHODS["FISH"](), head=HEAD)), module)
    assert same(module, plain(METHODS["FISH"]()))
    assert "configure_model" not in vars(module)


# ------------------------------------------------------------------------------------------------------------ averages


def _averaged(method: Any, decay: float) -> dict[str, Tensor]:
    """The moving average of all weights in the plain loop."""
    module, average = Module(), {}
    names = [name for name, _ in module.named_parameters()]
    plan = tithe.attach(module, method, loss=loss_fn, data=loader(), head=HEAD)
    optimizer = torch.optim.AdamW(plan.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(EPOCHS):
        for batch in loader():
            loss_fn(module, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            for name in names:
                value = module.state_dict()[name]
                average[name] = average[name].lerp(value, 1 - decay) if name in average else value.clone()
        plan.end_epoch()
    return average


@pytest.mark.parametrize("method", ["FISH", "FISH, again", "TraDy"])
def test_a_moving_average_is_that_of_the_weights(method: str, tmp_path: Path) -> None:
    module, callback = Module(), Tithe(METHODS[method](), head=HEAD)
    average = EMAWeightAveraging(decay=0.5, use_buffers=False)
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit(trainer(callback, average, saving), module, loader(), loader())
    for name, value in _averaged(METHODS[method](), 0.5).items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-6, atol=1e-7, msg=name)
    callback.plan.save(tmp_path / "delta.safetensors")
    fresh = Module()
    tithe.apply(fresh, tmp_path / "delta.safetensors")
    assert same(fresh, module)

    resumed = Module()
    average = EMAWeightAveraging(decay=0.5, use_buffers=False)
    again = trainer(Tithe(METHODS[method](), head=HEAD), average)
    fit(again, resumed, loader(), loader(), ckpt_path=tmp_path / "step=8.ckpt")
    assert same(resumed, module)


def test_stochastic_weight_averaging_ends_in_weights_that_a_delta_has(tmp_path: Path) -> None:
    module, callback = Module(), Tithe(METHODS["FISH"](), head=HEAD)
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)
    fit(trainer(callback, average), module, loader())
    assert not same(module, plain(METHODS["FISH"]()))
    callback.plan.save(tmp_path / "delta.safetensors")
    fresh = Module()
    tithe.apply(fresh, tmp_path / "delta.safetensors")
    assert same(fresh, module)


# ---------------------------------------------------------------------------------------------------- other methods


def test_two_forward_passes_a_step_are_optimized_by_hand_and_validated_narrow() -> None:
    callback = Tithe(tithe.VRPGE(0.6), loss=loss_fn)
    module = ByHand(callback)
    fit(trainer(callback), module, loader(), loader())
    assert callback.plan.num_steps == EPOCHS * BATCHES
    assert max(module.widths[-BATCHES:]) < 16
    callback.plan.release()

    reference = Module()
    plan = tithe.attach(reference, tithe.VRPGE(0.6), loss=loss_fn, data=loader())
    optimizer = torch.optim.AdamW(plan.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(EPOCHS):
        for batch in loader():
            plan.backward(lambda batch=batch: loss_fn(reference, batch))
            optimizer.step()
            optimizer.zero_grad()
        plan.end_epoch()
    plan.release()
    assert same(module, reference)


def test_a_span_of_checkpoints_is_trained_and_its_statistics_estimated(tmp_path: Path) -> None:
    history = record(tmp_path, Module)
    module, callback = Module(), Tithe(tithe.TWA(history))
    fit(trainer(callback), module, loader(), loader())
    callback.plan.release()

    reference = Module()
    plan = tithe.attach(reference, tithe.TWA(history), loss=loss_fn, data=loader())
    optimizer = torch.optim.AdamW(plan.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(EPOCHS):
        for batch in loader():
            loss_fn(reference, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    plan.release()
    assert same(module, reference)
