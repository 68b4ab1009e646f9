"""Teach a small language model a text with TRL's SFTTrainer, packed, by training 2 % of it: seconds on one core.

    python examples/sft_packing.py [text file or folder of .py, .md and .txt files]

Without an argument the text is the package's own source. The model is built from a configuration and reads bytes, so
that nothing is downloaded. Packing puts several texts into a row; each row is scored and trained as the Trainer makes
it. The checkpoints hold deltas alone.
"""

import sys
import tempfile
from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import tithe
from tithe.integrations.transformers import with_tithe

STEPS = 60


def byte_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def paragraphs(path: Path) -> list[str]:
    files = (
        sorted(file for kind in ("py", "md", "txt") for file in path.rglob(f"*.{kind}")) if path.is_dir() else [path]
    )
    found = [part.strip() for file in files for part in file.read_text("utf-8").split("\n\n")]
    return [part for part in found if 20 < len(part) < 400]


def main(path: Path, folder: Path, steps: int = STEPS) -> tuple[float, float]:
    texts = paragraphs(path)
    data = datasets.Dataset.from_dict({"text": texts}).train_test_split(0.05, seed=0)
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )
    trainer = with_tithe(SFTTrainer)(
        model=model,
        args=SFTConfig(
            str(folder),
            packing=True,
            max_length=256,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=3e-2,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=None,  # SFTConfig's default is a name that transformers deprecates
            dataloader_pin_memory=False,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        tithe=tithe.FISH(density=0.02, samples=32),
        tithe_save="delta",
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder))
    size = (folder / "delta.safetensors").stat().st_size
    print(f"{len(texts):,} texts; loss a byte on texts left out: {before:.3f} before, {after:.3f} after")
    print(f"{trainer.plan!r}; {size:,} bytes to ship")
    return before, after


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tithe.__file__).parent
    with tempfile.TemporaryDirectory() as made:
        main(source, Path(made))
