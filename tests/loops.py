"""Training loops as people write them, each over the same batches: what they leave in the weights is to be the same.

A loop takes a model, a method and its settings, attaches the method, trains, releases the plan, and returns the model.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tithe

EPOCHS, BATCHES = 3, 4
"""A loop trains 12 steps: a new choice every second one, or after each epoch."""


class Net(nn.Module):
    """Two layers and a head; called with a batch's tensors it returns the loss beside the logits, as trainers like."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.two(F.leaky_relu(self.one(x)))))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def record(folder: Path, make: Callable[[], nn.Module] = net) -> tithe.History:
    """Three checkpoints around a network's start."""
    history = tithe.History(folder)
    for step in range(3):
        model = make()
        torch.manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        history.record(model, step)
    return history


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda: {  # noqa: E731
        "x": torch.randn(8, 6, generator=generator),
        "labels": torch.randint(3, (8,), generator=generator),
    }
    return [draw() for _ in range(BATCHES)]


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch)["loss"]


@dataclass
class Setting:
    """What a loop attaches, and with which optimizer.

    Args:
        make: the method.
        head: globs of what is trained whole.
        optimizer: makes it over parameters.
        state: of an earlier plan.
    """

    make: Callable[[], Any]
    head: Sequence[str] = ("head.*",)
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] = field(
        default=lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    )

    def attach(self, model: nn.Module) -> tithe.Plan:
        return tithe.attach(model, self.make(), loss=loss_fn, data=batches(), head=self.head)


Step = Callable[[tithe.Plan, torch.optim.Optimizer, Any], None]


def reference(setting: Setting, *, epochs: int = EPOCHS) -> nn.Module:
    """The loop of the README, every call in it."""
    model = net()
    plan = setting.attach(model)
    optimizer = setting.optimizer(plan.parameters())
    plan.bind(optimizer)
    for _ in range(epochs):
        for batch in batches():
            plan.backward(lambda batch=batch: loss_fn(model, batch))
            optimizer.step()
            optimizer.zero_grad()
            plan.step()
        plan.end_epoch()
    plan.release()
    return model


def _loop(
    setting: Setting,
    *,
    bind: bool = False,
    step: bool = False,
    end_epoch: bool = True,
    backward: Callable[[tithe.Plan, nn.Module, Any], None] | None = None,
    update: Callable[[torch.optim.Optimizer], Any] | None = None,
    parameters: Callable[[nn.Module, tithe.Plan], Iterable[Any]] = lambda model, plan: plan.parameters(),
    between: Callable[[nn.Module, tithe.Plan, torch.optim.Optimizer], None] | None = None,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> nn.Module:
    model = net()
    plan = setting.attach(model)
    optimizer = setting.optimizer(list(parameters(model, plan)))
    wrapped = wrap(model)
    if bind:
        plan.bind(optimizer)
    for _ in range(EPOCHS):
        for batch in batches():
            if backward is None:
                plan.backward(lambda batch=batch: loss_fn(wrapped, batch))
            else:
                backward(plan, wrapped, batch)
            (update or (lambda opt: opt.step()))(optimizer)
            if between is not None:
                between(model, plan, optimizer)
            optimizer.zero_grad()
            if step:
                plan.step()
        if end_epoch:
            plan.end_epoch()
    plan.release()
    return model


def plain(setting: Setting) -> nn.Module:
    """`loss.backward()` and `optimizer.step()`, and nothing of the plan's but the end of an epoch."""
    return _loop(setting, backward=lambda plan, model, batch: loss_fn(model, batch).backward())


def no_bind(setting: Setting) -> nn.Module:
    return _loop(setting, step=True)


def no_step(setting: Setting) -> nn.Module:
    return _loop(setting, bind=True)


def no_end_epoch(setting: Setting) -> nn.Module:
    return _loop(setting, bind=True, step=True, end_epoch=False)


def all_parameters(setting: Setting) -> nn.Module:
    """An optimizer over `model.parameters()`, made after attaching."""
    return _loop(setting, parameters=lambda model, plan: model.parameters())


def grad_scaler(setting: Setting) -> nn.Module:
    """The first step overflows, and is skipped: its batch is run again."""
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
    made: list[torch.optim.Optimizer] = []

    def make(parameters: Iterable[Any]) -> torch.optim.Optimizer:
        made.append(setting.optimizer(parameters))
        return made[0]

    def backward(plan: tithe.Plan, model: nn.Module, batch: Any) -> None:
        plan.backward(lambda: scaler.scale(loss_fn(model, batch)))
        if made:
            optimizer = made.pop()
            for parameter in plan.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("inf"))
            update(optimizer)
            optimizer.zero_grad()
            plan.step()
            plan.backward(lambda: scaler.scale(loss_fn(model, batch)))

    def update(optimizer: torch.optim.Optimizer) -> None:
        scaler.step(optimizer)
        scaler.update()

    return _loop(Setting(setting.make, setting.head, make), backward=backward, update=update)


def accumulation(setting: Setting) -> nn.Module:
    """Two micro-batches a step; `plan.step()` after each of them does no harm."""

    def backward(plan: tithe.Plan, model: nn.Module, batch: Any) -> None:
        for part in (slice(0, 4), slice(4, 8)):
            plan.backward(lambda part=part: loss_fn(model, {k: v[part] for k, v in batch.items()}) / 2)
            plan.step()

    return _loop(setting, bind=True, backward=backward)


def clipping(setting: Setting) -> nn.Module:
    def update(optimizer: torch.optim.Optimizer) -> None:
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1e6)
        optimizer.step()

    return _loop(setting, update=update)


def autograd_grad(setting: Setting) -> nn.Module:
    def backward(plan: tithe.Plan, model: nn.Module, batch: Any) -> None:
        parameters = [p for p in plan.parameters() if p.numel()]
        grads = torch.autograd.grad(loss_fn(model, batch), parameters, allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad

    return _loop(setting, backward=backward)


def compiled(setting: Setting) -> nn.Module:
    torch._dynamo.reset()
    return _loop(setting, wrap=lambda model: torch.compile(model, backend="aot_eager"))


def ema(setting: Setting) -> nn.Module:
    """An average of the parameters that swaps places with them after each step, through `.data`, and back."""
    shadow: list[Tensor] = []

    def between(model: nn.Module, plan: tithe.Plan, optimizer: torch.optim.Optimizer) -> None:
        parameters = list(plan.parameters())
        if not shadow or any(s.shape != p.shape for s, p in zip(shadow, parameters, strict=True)):
            shadow[:] = [p.detach().clone() for p in parameters]
        now = [p.detach().clone() for p in parameters]
        for s, p in zip(shadow, parameters, strict=True):
            s.lerp_(p.detach(), 0.5)
            p.data.copy_(s)
        with torch.no_grad():
            loss_fn(model, batches()[0])
        for value, p in zip(now, parameters, strict=True):
            p.data.copy_(value)

    return _loop(setting, between=between)


def _in_a_group(run: Callable[[], nn.Module]) -> nn.Module:
    """Run with a process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return run()
    finally:
        dist.destroy_process_group()


def ddp_after(setting: Setting) -> nn.Module:
    """Attached, then wrapped in DistributedDataParallel."""
    wrap = lambda model: nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)  # noqa: E731
    return _in_a_group(lambda: _loop(setting, wrap=wrap))


def accelerate_before(setting: Setting) -> nn.Module:
    """Attached, then prepared."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = net()
    plan = setting.attach(model)
    optimizer = setting.optimizer(plan.parameters())
    prepared, optimizer = accelerator.prepare(model, optimizer)
    return _accelerated(accelerator, plan, prepared, optimizer)


def accelerate_after(setting: Setting) -> nn.Module:
    """Prepared, then attached."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(net())
    plan = setting.attach(accelerator.unwrap_model(model))
    optimizer = accelerator.prepare(setting.optimizer(plan.parameters()))
    return _accelerated(accelerator, plan, model, optimizer)


def _accelerated(accelerator: Any, plan: tithe.Plan, model: nn.Module, optimizer: Any) -> nn.Module:
    for _ in range(EPOCHS):
        for batch in batches():
            if plan.needs_backward:
                plan.backward(lambda batch=batch: loss_fn(model, batch))
            else:
                accelerator.backward(loss_fn(model, batch))
            optimizer.step()
            optimizer.zero_grad()
        plan.end_epoch()
    plan.release()
    return plan.model


def hf_trainer(setting: Setting, folder: Path | None = None, *, resume: bool = False) -> nn.Module:
    """Hugging Face's Trainer, with its own optimizer and no word of the plan's."""
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import TrainerCallback

    class EndEpoch(TrainerCallback):
        def __init__(self, plan: tithe.Plan) -> None:
            self.plan = plan

        def on_epoch_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.plan.end_epoch()

    rows = [{k: v[i] for k, v in batch.items()} for batch in batches() for i in range(8)]
    assert folder is not None

    def run(epochs: int, checkpoint: bool) -> nn.Module:
        model = net()
        plan = setting.attach(model)
        arguments = TrainingArguments(
            str(folder),
            per_device_train_batch_size=8,
            num_train_epochs=EPOCHS,
            max_steps=-1 if epochs == EPOCHS else epochs * BATCHES,
            lr_scheduler_type="constant",
            learning_rate=0.01,
            weight_decay=0.0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="epoch" if resume else "no",
            max_grad_norm=0,
            seed=0,
            data_seed=0,
            dataloader_pin_memory=False,
        )
        trainer = _in_order(Trainer)(model=model, args=arguments, train_dataset=rows, callbacks=[EndEpoch(plan)])
        with contextlib.redirect_stdout(None):
            trainer.train(resume_from_checkpoint=checkpoint)
        plan.release()
        return model

    if resume:
        run(EPOCHS - 1, False)
        return run(EPOCHS, True)
    return run(EPOCHS, False)


def _in_order(trainer: type) -> type:
    class InOrder(trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder


def resumed(setting: Setting) -> nn.Module:
    """Stopped after five steps; the optimizer's state alone goes on, in a freshly attached model."""
    order = [(epoch, batch) for epoch in range(EPOCHS) for batch in batches()]

    def go(plan: tithe.Plan, optimizer: torch.optim.Optimizer, first: int, stop: int) -> None:
        for number in range(first, stop):
            _, batch = order[number]
            plan.backward(lambda batch=batch: loss_fn(plan.model, batch))
            optimizer.step()
            optimizer.zero_grad()
            if number % BATCHES == BATCHES - 1:
                plan.end_epoch()

    plan = setting.attach(net())
    optimizer = setting.optimizer(plan.parameters())
    go(plan, optimizer, 0, 5)
    state = copy.deepcopy(optimizer.state_dict())
    plan = setting.attach(net())
    optimizer = setting.optimizer(plan.parameters())
    optimizer.load_state_dict(state)
    go(plan, optimizer, 5, len(order))
    plan.release()
    return plan.model


def lightning_loop(setting: Setting, *, manual: bool, folder: Path) -> nn.Module:
    """Lightning's Trainer around a module that knows nothing of the plan but, where it must, `plan.backward`."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.plan = setting.attach(self.net)
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, number: int) -> Any:
            if not manual:
                return loss_fn(self.net, batch)
            optimizer = self.optimizers()
            self.plan.backward(lambda: loss_fn(self.net, batch))
            optimizer.step()
            optimizer.zero_grad()
            return None

        def on_train_epoch_end(self) -> None:
            self.plan.end_epoch()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return setting.optimizer(self.plan.parameters())

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(batches(), batch_size=None)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module)
    module.plan.release()
    return module.net
