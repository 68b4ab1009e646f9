"""Why a rate that suits one layer breaks another: the largest curvature of the loss along each layer's weights.

For each network, after three epochs of the head alone on CIFAR-10: the largest eigenvalue λ in size of the Hessian of
the loss with respect to one convolution's weights, by four steps of power iteration on one batch. Gradient descent on
that layer alone is stable below 2/λ.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tithe
from benchmarks import vision
from benchmarks.images import TASKS, Batch, load, training_batches
from benchmarks.records import Store, parse
from benchmarks.transfer import CHOICE, ranking_file
from benchmarks.transfer_methods import loss_of
from benchmarks.vision import NETWORKS

NUM_STEPS = 4
NUM_EPOCHS = 3
HEAD_RATE = 0.1


def sharpness(model: nn.Module, weight: nn.Parameter, batch: Batch) -> float:
    """v·Hv of the last step of power iteration; H is the Hessian over this weight alone."""
    torch.manual_seed(0)
    model.requires_grad_(False)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(model, batch), weight, create_graph=True)
    v, value = torch.randn_like(weight), torch.zeros(())
    for i in range(NUM_STEPS):
        v = v / v.norm()
        product: Tensor
        (product,) = torch.autograd.grad(gradient, weight, v, retain_graph=i + 1 < NUM_STEPS)
        value, v = (product * v).sum(), product
    return abs(float(value))


def main() -> None:
    """Measure what is missing."""
    args = parse(__doc__ or "")
    torch.set_num_threads(args.threads)
    store = Store(args.results / "curvature.jsonl", key=("network",))
    images = load(TASKS[CHOICE], args.data).train
    for network in NETWORKS.values():
        if store.find(network=network.name) is not None:
            continue
        model = vision.load(network, args.data, num_classes=TASKS[CHOICE].num_classes)
        model = model.to(memory_format=torch.channels_last)
        model.requires_grad_(False)
        head = list(model.classifier.requires_grad_().parameters())
        optimizer = torch.optim.SGD(head, lr=HEAD_RATE)
        for epoch in range(NUM_EPOCHS):
            for batch in training_batches(images, seed=0, epoch=epoch):
                loss_of(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        batch = next(training_batches(images, seed=0, epoch=NUM_EPOCHS))
        drawn = set(tithe.Ranking.load(ranking_file(args.results, network)).layers(0.97))
        layers = [
            {
                "name": name,
                "sharpness": sharpness(model, module.weight, batch),
                "drawn": f"{name}.weight" in drawn,
            }
            for name, module in vision.convolutions(model).items()
        ]
        store.add({"network": network.name, "layers": layers})


if __name__ == "__main__":
    main()
