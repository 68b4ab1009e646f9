"""One encoder for two tasks out of two fine-tunings: TIES, Iso-C, and AdaMerging, which learns from images alone.

The base reads digits turned by 0, 90, 180 or 270 degrees and says by how much. One fine-tuning of it tells the digits 0
to 4 apart, the other 5 to 9, each with a head of its own, which stays with the task. `tithe.merge_tasks` merges the two
encoders without data. AdaMerging (Yang et al., ICLR 2024) has a coefficient for each tensor and task, begins at base +
0.3 Σ τ, and lowers the entropy of the answers on images without labels: TWA with that start and that loss.
"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tithe
from tithe.app.demo.digits import Batch, Task, tasks
from tithe.app.demo.network import WIDTH, Digits

BATCH, STEPS = 64, 150


def encoder() -> nn.Module:
    """The demonstration's network without its head."""
    model = Digits()
    model.head = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return model


def train(model: nn.Module, head: nn.Module, task: Task, turn: Callable[[Batch], Batch] = lambda batch: batch) -> None:
    """Ordinary training of encoder and head."""
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3)
    epochs = task.epochs(BATCH, seed=0)
    for images, labels in [turn(batch) for _ in range(STEPS) for batch in next(epochs)][:STEPS]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(model(images)), labels).backward()
        optimizer.step()


def turned(batch: Batch) -> Batch:
    """Each image turned by a quarter, labelled with how often."""
    images, _ = batch
    turns = torch.arange(len(images)) % 4
    return torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(images, turns, strict=True)]), turns


@torch.no_grad()
def accuracy(model: nn.Module, heads: list[nn.Linear], both: tuple[Task, ...]) -> list[float]:
    """The share of each task's test images that are told right."""
    pairs = zip(heads, both, strict=True)
    return [float((head(model(task.test[0])).argmax(1) == task.test[1]).float().mean()) for head, task in pairs]


def main() -> None:
    torch.manual_seed(0)
    both = tasks()
    base, quarters, heads = encoder(), nn.Linear(WIDTH, 4), [nn.Linear(WIDTH, 5) for _ in both]
    for task in both:
        train(base, quarters, task, turned)
    tuned = [copy.deepcopy(base) for _ in both]
    for model, head, task in zip(tuned, heads, both, strict=True):
        train(model, head, task)
    folder = Path(tempfile.mkdtemp())
    paths = [folder / f"{name}.safetensors" for name in ("base", "low", "high")]
    for path, model in zip(paths, [base, *tuned], strict=True):
        save_file(model.state_dict(), path)
    found = {task.name: model for task, model in zip(both, tuned, strict=True)}
    for method in ("ties", "iso-c"):
        merged = tithe.merge_tasks(paths[0], paths[1:], folder / f"{method}.safetensors", method)
        found[method] = encoder()
        found[method].load_state_dict(load_file(merged))

    def entropy(model: nn.Module, batch: list[Tensor]) -> Tensor:
        answers = [head(model(images)).log_softmax(-1) for head, images in zip(heads, batch, strict=True)]
        return torch.stack([-(log_p.exp() * log_p).sum(-1).mean() for log_p in answers]).sum()

    model, images = encoder(), [task.validation[0] for task in both]  # and none of their labels
    span = tithe.TWA(paths, granularity="tensor", start=[0.4, 0.3, 0.3])
    plan = tithe.attach(model, span, loss=entropy, data=[images])
    found["0.3 of each"] = copy.deepcopy(model)
    optimizer = torch.optim.Adam(plan.parameters(), lr=0.02)
    plan.bind(optimizer)
    for _ in range(60):
        plan.backward(lambda: entropy(model, images))
        optimizer.step()
        optimizer.zero_grad()
        plan.step()
    plan.release()
    found["AdaMerging"] = model

    print("".ljust(14) + "  ".join(task.name for task in both))
    for name, model in found.items():
        print(f"{name:14}" + "  ".join(f"{share:13.1%}" for share in accuracy(model, heads, both)))


if __name__ == "__main__":
    main()
