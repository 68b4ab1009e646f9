"""What the Lightning callback cannot train is refused before the first step; two ranks train as one process does."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DistributedSampler

import tithe
from fits import BATCHES, EPOCHS, HEAD, METHODS, SIZE, ByHand, Module, data, fit, loader, same, trainer
from tithe.integrations.lightning import Tithe


class Whole(lightning.pytorch.strategies.SingleDeviceStrategy):
    """Restores a checkpoint late, as strategies do whose weights are in pieces by then."""

    restore_checkpoint_after_setup = True


class Part(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([*self.net.parameters(), *self.head.parameters()], lr=0.01)


class Asking(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)


def _iterator() -> Any:
    return iter([next(iter(loader()))])


@pytest.mark.parametrize(
    ("make", "method", "settings", "found", "remedy"),
    [
        (Module, "VR-PGE", {}, "automatic optimization", "self.automatic_optimization = False"),
        (lambda: ByHand(Tithe(tithe.FISH(k=1))), "FISH", {}, "manual optimization", "loss="),
        (lambda: Asking(), "FISH", {}, "AttributeError", "Tithe(method, loss="),
        (Part, "TraDy", {}, "without 1 of the plan's parameters", "torch.optim.AdamW(self.parameters()"),
        (Module, "FISH", {"strategy": Whole("cpu")}, "Whole", 'strategy="ddp"'),
        (Module, "FISH", {"loader": _iterator}, "an iterator", "DataLoader"),
        (Module, "FISH", {"average": "before"}, "made before the plan was attached", "Tithe before EMAWeightAveraging"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(
    make: Callable[[], nn.Module], method: str, settings: dict[str, Any], found: str, remedy: str
) -> None:
    callback = Tithe(
        tithe.VRPGE(0.6) if method == "VR-PGE" else METHODS[method](), head=HEAD if "V" not in method else ()
    )
    before = [EMAWeightAveraging()] if settings.pop("average", None) else []
    batches = settings.pop("loader", loader)()
    module = make()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(tithe.TitheError) as error:
        fit(trainer(*before, callback, **settings), module, batches)
    assert found in error.value.found
    assert remedy in error.value.remedy
    assert all(torch.equal(start[name], value) for name, value in module.state_dict().items())


def test_a_part_of_the_module_does_for_a_choice_that_is_made_once() -> None:
    module = Part()
    fit(trainer(Tithe(METHODS["FISH"](), head=HEAD)), module, loader())
    assert not same(module, Module())


def test_there_is_no_plan_before_fit() -> None:
    with pytest.raises(tithe.TitheError, match=r"call trainer\.fit"):
        _ = Tithe(tithe.FISH(k=1)).plan


# ------------------------------------------------------------------------------------------------------------ two ranks


def _two_ranks(rank: int, folder: str, port: int) -> None:
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", TORCHELASTIC_RUN_ID="1")
    torch.set_num_threads(1)
    told: dict[str, Any] = {}
    for method in ("FISH, again", "TraDy"):
        module, callback = Normless(), Tithe(METHODS[method](), head=HEAD)
        saving = ModelCheckpoint(folder, filename=method + " {step}", save_top_k=-1, enable_version_counter=False)
        sampler = DistributedSampler(data(), num_replicas=2, rank=rank, shuffle=False)
        batches = loader(sampler=sampler, batch_size=SIZE // 2)
        settings = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
        fit(trainer(callback, saving, **settings), module, batches, loader())
        resumed, again = Normless(), Tithe(METHODS[method](), head=HEAD)
        path = f"{folder}/{method} step=8.ckpt"
        fit(trainer(again, **settings), resumed, batches, loader(), ckpt_path=path)
        told[method] = (module.state_dict(), resumed.state_dict(), callback.plan.num_steps)
    with pytest.raises(tithe.TitheError, match="ddp_find_unused_parameters_true"):
        fit(trainer(Tithe(METHODS["FISH, warm-up"](), head=HEAD), devices=2, strategy="ddp"), Normless(), loader())
    torch.save(told, f"{folder}/rank-{rank}.pt")
    torch.distributed.destroy_process_group()


class Normless(Module):
    """Without a norm over the batch: two halves of a batch have the gradient of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1] = nn.Identity()


class Interleaved:
    """Batches of one process which are those of two ranks side by side."""

    def __iter__(self) -> Iterator[Any]:
        x, y = data().tensors
        for number in range(BATCHES):
            rows = torch.arange(SIZE * number, SIZE * (number + 1))
            rows = torch.cat([rows[0::2], rows[1::2]])
            yield x[rows], y[rows]

    def __len__(self) -> int:
        return BATCHES


def test_two_ranks_train_as_one_and_resume(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    torch.multiprocessing.start_processes(_two_ranks, (str(tmp_path), port), nprocs=2, start_method="fork")
    one, other = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    for method, (trained, resumed, steps) in one.items():
        module = Normless()
        fit(trainer(Tithe(METHODS[method](), head=HEAD)), module, Interleaved())
        assert steps == EPOCHS * BATCHES
        for name, value in module.state_dict().items():
            assert torch.equal(trained[name], other[method][0][name]), name
            assert torch.equal(trained[name], resumed[name]), name
            if method != "TraDy":  # whose budget pays for the batch of one process
                torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-5, msg=name)
