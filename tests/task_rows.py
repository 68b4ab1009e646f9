"""Rows of every task beside classification, and recipes to learn from them with models of a few thousand weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from workplace import BAD, FILLERS, GOOD

RECIPE = """
[model]
{model}
[data]
task = "{task}"
train = "train.jsonl"
{data}
[method]
name = "full"
[optimizer]
lr = 0.01
[run]
steps = 3
batch_size = 8
log_every = 1
output = "out"
device = "cpu"
"""
T5 = """
tokenizer = "bytes"
[model.scratch]
model_type = "t5"
d_model = 16
d_kv = 8
d_ff = 32
num_layers = 1
num_heads = 2
"""
BART = """
tokenizer = "bytes"
[model.scratch]
model_type = "bart"
d_model = 16
encoder_layers = 1
decoder_layers = 1
encoder_attention_heads = 2
decoder_attention_heads = 2
encoder_ffn_dim = 32
decoder_ffn_dim = 32
max_position_embeddings = 128
"""
TEXTS = """
[model]
tokenizer = "bytes"
[model.scratch]
model_type = "llama"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
[data]
task = "causal-lm"
train = "train.txt"
max_length = 16
[method]
name = "fish"
density = 0.2
samples = 4
score = "magnitude"
[optimizer]
lr = 0.01
[run]
steps = 3
batch_size = 4
log_every = 1
output = "out"
device = "cpu"
"""


def words(draw: random.Random) -> list[str]:
    return draw.choices(FILLERS + GOOD + BAD, k=draw.randrange(3, 8))


def tagged(draw: random.Random) -> dict[str, Any]:
    text = words(draw)
    return {"tokens": text, "tags": ["GOOD" if w in GOOD else "BAD" if w in BAD else "O" for w in text]}


def several(draw: random.Random) -> dict[str, Any]:
    text = words(draw)
    found = [name for name, kind in (("good", GOOD), ("bad", BAD)) if any(word in kind for word in text)]
    return {"text": " ".join(text), "labels": found}


def turned(draw: random.Random) -> dict[str, Any]:
    text = "".join(draw.choices("abc", k=4))
    return {"source": text, "target": text.upper()}


ROWS: Mapping[str, Callable[[random.Random], dict[str, Any]]] = {
    "token-classification": tagged,
    "multi-label": several,
    "seq2seq": turned,
}
