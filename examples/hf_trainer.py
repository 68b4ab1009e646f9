"""Fine-tune a part of a vision transformer with Hugging Face's Trainer, and ship the difference: seconds on one core.

The images are those of the package. A stock Trainer teaches a small transformer the digits 0 to 4; then
`with_tithe(Trainer)` trains 5 % of it, and a new head, on the digits 5 to 9.
"""

import copy
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import tithe
from tithe.app.demo.digits import tasks
from tithe.integrations.transformers import with_tithe

EPOCHS = 20


def rows(part: tuple[Tensor, Tensor]) -> list[dict[str, Tensor]]:
    return [{"pixel_values": image, "labels": label} for image, label in zip(*part, strict=True)]


def arguments(folder: Path, epochs: int, **settings: object) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        weight_decay=0.01,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **settings,
    )


def accuracy(found: object) -> dict[str, float]:
    logits, labels = found
    return {"accuracy": float(np.mean(logits.argmax(1) == labels))}


def main(folder: Path, epochs: int = EPOCHS) -> dict[str, float]:
    torch.manual_seed(0)
    shape = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=5, **shape))
    first, second = tasks()
    base = Trainer(
        model=model,
        args=arguments(folder, epochs, learning_rate=3e-3, save_strategy="no"),
        train_dataset=rows(first.train),
        compute_metrics=accuracy,
    )
    base.train()
    base.save_model(str(folder / "base"))
    print(f"digits 0 to 4, all weights      {base.evaluate(rows(first.test))['eval_accuracy']:.3f}")

    trainer = with_tithe(Trainer)(
        model=copy.deepcopy(model),
        args=arguments(
            folder / "run",
            epochs,
            learning_rate=1e-2,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
        ),
        train_dataset=rows(second.train),
        eval_dataset=rows(second.validation),
        compute_metrics=accuracy,
        tithe=tithe.FISH(density=0.05, samples=256),
        tithe_head=["classifier.*"],
    )
    before = trainer.evaluate(rows(second.test))["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate(rows(second.test))["eval_accuracy"]
    trainer.save_model(str(folder / "tuned"))
    print(f"digits 5 to 9, before and after {before:.3f}, {after:.3f}")
    print(repr(trainer.plan))

    delta = folder / "tuned" / "delta.safetensors"
    shipped = tithe.apply(ViTForImageClassification.from_pretrained(folder / "base"), delta)
    plain = ViTForImageClassification.from_pretrained(folder / "tuned")
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in shipped.state_dict().items())
    print(f"delta.safetensors               {delta.stat().st_size:,} bytes")
    return {"before": before, "after": after}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else made))
