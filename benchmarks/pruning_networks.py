"""Two trained networks that are pruned and fine-tuned, each with its data, its optimizer and its seconds.

* MiniLM: all-MiniLM-L6-v2 with a classification head after one epoch of fine-tuning on SST-2 (sentences).
* ResNet-20: the CIFAR-10 weights of Idelbayev's pytorch_resnet_cifar10, with shortcuts as projections.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from benchmarks import course, encoder, finetune, narrow_networks, text
from benchmarks.images import Images, restored, stratified

Batch = Any  # what a network's loss takes

SENTENCES = replace(text.TASKS["sst2"], num_train=6152, num_validation=768)  # all of train.tsv
START_RATE = 1e-4  # of the epoch that makes MiniLM a classifier; what full fine-tuning chose on the page on accuracy
NUM_VALIDATION = 1000  # images of CIFAR-10's test file
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the pretrained ResNet-20 expects
SHIFT = 4  # pixels, each way
BATCH = 64  # images


@dataclass(frozen=True)
class Trained:
    """A trained network and everything that its pruning needs.

    Args:
        name: for people.
        seconds: CPU seconds that pruning and fine-tuning may take together.
        num_scored: batches by which units are scored.
        rates: learning rates to choose from; settings are compared at the first.
        head: globs over what stays whole.
        load: the data folder → the network as it starts, in training mode.
        loss: of a network on a batch, the mean over the batch.
        batches: (data folder, seed) → training batches without end.
        optimizer: (parameters, rate) → the optimizer of every method.
        evaluate: (network, data folder, "validation" or "test") → accuracy in percent and mean cross-entropy.
    """

    name: str
    seconds: float
    num_scored: int
    rates: tuple[float, ...]
    head: tuple[str, ...]
    load: Callable[[Path], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    batches: Callable[[Path, int], Iterator[Batch]]
    optimizer: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
    evaluate: Callable[[nn.Module, Path, str], tuple[float, float]]

    def scored(self, data: Path, seed: int) -> list[Batch]:
        """The batches by which units are scored: the first of the run."""
        return list(islice(self.batches(data, seed), self.num_scored))


# --------------------------------------------------------------------------------------------------------------- text


def _sentences(data: Path, seed: int) -> Iterator[Batch]:
    train = text.load(SENTENCES, data).train
    return chain.from_iterable(
        text.training_batches(train, SENTENCES.batch, seed=seed, epoch=epoch) for epoch in count()
    )


def _classifier(data: Path) -> nn.Module:
    """MiniLM after its epoch, which is run once and kept until the machine clears its temporary files."""
    model = encoder.encoder(seed=0)
    file = Path(tempfile.gettempdir(), "tithe-benchmarks", "pruning-minilm.safetensors")
    if not file.exists():
        _fit_once(model, data)
        file.parent.mkdir(exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, file)
    model.load_state_dict(load_file(file), strict=False)
    return model


def _fit_once(model: nn.Module, data: Path) -> None:
    """One epoch over all training sentences, the rate falling linearly to zero."""
    train = text.load(SENTENCES, data).train
    batches = text.training_batches(train, SENTENCES.batch, seed=0, epoch=0)
    optimizer = _adamw(model.parameters(), START_RATE)
    for done, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = START_RATE * (1 - done / len(batches))
        encoder.loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), finetune.CLIP)
        optimizer.step()
        optimizer.zero_grad()


def _adamw(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


def _score_sentences(model: nn.Module, data: Path, part: str) -> tuple[float, float]:
    return finetune.evaluate(model, SENTENCES, getattr(text.load(SENTENCES, data), part))


# ------------------------------------------------------------------------------------------------------------- images


@cache
def _images(data: Path) -> dict[str, Images]:
    """15,000 training images, which the network was trained on; validation and test halves of what it never saw."""
    with np.load(data / "cifar10" / "cifar10.npz", allow_pickle=False) as file:
        labels, unseen = file["y_test"], restored(file["med_test"])
        validation = stratified(labels, NUM_VALIDATION)
        rest = np.setdiff1d(np.arange(len(labels)), validation)
        train = restored(file["med_train"]), file["y_train"]
    parts = {
        "train": train,
        "validation": (unseen[validation], labels[validation]),
        "test": (unseen[rest], labels[rest]),
    }
    return {part: Images(torch.from_numpy(x), torch.from_numpy(y).long()) for part, (x, y) in parts.items()}


def _shown(data: Path, seed: int) -> Iterator[Batch]:
    """Epoch after epoch, each image flipped or not and shifted up to 4 pixels each way, zeros coming in."""
    images = _images(data)["train"]
    side = images.x.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(images.y), generator=generator).split(BATCH):
            x = pad(_scaled(images.x[rows]), (SHIFT,) * 4)
            flips = torch.rand(len(rows), 1, generator=generator) < 0.5
            down, right = torch.randint(2 * SHIFT + 1, (2, len(rows), 1), generator=generator)
            across = torch.arange(side).expand(len(rows), -1)
            columns = torch.where(flips, across.flip(-1), across) + right
            down = torch.arange(side) + down
            x = x[torch.arange(len(rows))[:, None, None], :, down[:, :, None], columns[:, None, :]]  # (N, H, W, C)
            yield x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last), images.y[rows]


def _scaled(x: Tensor) -> Tensor:
    mean, deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
    return (x.float() / 255 - mean[:, None, None]) / deviation[:, None, None]


def _resnet20(data: Path) -> nn.Module:
    """The pretrained network, its zero-padded shortcuts written as 1×1 convolutions of the same values."""
    model = narrow_networks.ResNet(narrow_networks.resnet(3, 32).widths, depth=3)
    for block in model.blocks.children():
        assert isinstance(block, narrow_networks.Basic)
        if not isinstance(block.shortcut, nn.Identity):
            block.shortcut = nn.Sequential(_padding(block.conv1.in_channels, block.conv1.out_channels))
    own = dict(model.state_dict())
    for name, tensor in load_file(data / "weights" / "cifar10_resnet20.safetensors").items():
        own[_own_name(name)] = tensor
    model.load_state_dict(own)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


@torch.no_grad()
def _padding(c: int, d: int) -> nn.Conv2d:
    """Every second pixel, the channels in the middle of `d`, zeros around them: He et al.'s option A."""
    shortcut = nn.Conv2d(c, d, 1, 2, bias=False)
    shortcut.weight.zero_()
    first = (d - c) // 2
    shortcut.weight[torch.arange(first, first + c), torch.arange(c)] = 1.0
    return shortcut


def _own_name(name: str) -> str:
    """layer2.1.bn1.weight → blocks.4.norm1.weight, and so on."""
    first, *rest = name.split(".")
    if first.startswith("layer"):
        block = 3 * (int(first[-1]) - 1) + int(rest[0])
        return ".".join(["blocks", str(block), rest[1].replace("bn", "norm"), *rest[2:]])
    return ".".join([{"conv1": "stem.0", "bn1": "stem.1", "linear": "classifier"}[first], *rest])


def _sgd(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate, momentum=course.MOMENTUM, weight_decay=course.DECAY)


@torch.no_grad()
def _score_images(model: nn.Module, data: Path, part: str) -> tuple[float, float]:
    images = _images(data)[part]
    model.eval()
    answers = [model(_scaled(x).contiguous(memory_format=torch.channels_last)) for x in images.x.split(250)]
    model.train()
    logits = torch.cat(answers)
    accuracy = 100 * float((logits.argmax(-1) == images.y).double().mean())
    return accuracy, float(cross_entropy(logits, images.y))


MINILM = Trained(
    "MiniLM",
    seconds=8,
    num_scored=8,
    rates=(1e-4, 3e-5),
    head=(encoder.HEAD,),
    load=_classifier,
    loss=encoder.loss_of,
    batches=_sentences,
    optimizer=_adamw,
    evaluate=_score_sentences,
)
RESNET20 = Trained(
    "ResNet-20",
    seconds=8,
    num_scored=4,
    rates=(0.1, 0.3),
    head=(),
    load=_resnet20,
    loss=narrow_networks.loss_of,
    batches=_shown,
    optimizer=_sgd,
    evaluate=_score_images,
)
NETWORKS = {trained.name: trained for trained in (MINILM, RESNET20)}
