"""The data and the network of `digits_trady.toml`, from what is embedded in the package: nothing is downloaded.

`python examples/digits.py` trains a small vision transformer on the digits 0 to 4 (a few seconds) and writes it, with
the images of the digits 5 to 9, to `runs/digits`. The recipe then calls `make` and fine-tunes what was written.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tithe.app.demo.digits import tasks
from tithe.app.demo.network import WIDTH, Digits, classification_loss

FOLDER = Path(__file__).resolve().parents[1] / "runs" / "digits"
BATCH, STEPS = 64, 240


def make(num_labels: int) -> nn.Module:
    """The network, trained on the digits 0 to 4, with a new head."""
    model = Digits()
    model.load_state_dict(load_file(FOLDER / "base.safetensors"))
    model.head = nn.Linear(WIDTH, num_labels)
    return model


def uint8(images: Tensor) -> np.ndarray:
    """Pixels from 0 to 1, (N, 1, 8, 8), as grey images (N, 8, 8)."""
    return (images[:, 0] * 255).round().to(torch.uint8).numpy()


def main() -> None:
    torch.manual_seed(0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    first, second = tasks()
    model, epochs = Digits(), first.epochs(BATCH, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batches = [batch for _ in range(STEPS) for batch in next(epochs)][:STEPS]
    for batch in batches:
        optimizer.zero_grad()
        classification_loss(model, batch).backward()
        optimizer.step()
    save_file(model.state_dict(), FOLDER / "base.safetensors")

    images, labels = (torch.cat(parts) for parts in zip(second.train, second.validation, strict=True))
    test_images, test_labels = second.test
    arrays = {"x_train": uint8(images), "y_train": labels.numpy(), "x_test": uint8(test_images)}
    np.savez(FOLDER / "digits.npz", **arrays, y_test=test_labels.numpy(), classes=np.array(list("56789")))
    with torch.no_grad():
        right = (model(first.test[0]).argmax(1) == first.test[1]).float().mean()
    print(f"digits 0 to 4: {right:.3f} of the held-out images right; written to {FOLDER}")


if __name__ == "__main__":
    main()
