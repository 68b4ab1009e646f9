"""The zoo: one small model for each way in which a network can use its weights, built offline from tiny configs.

Each `Case` carries a model, batches of samples along the first axis, a mean loss and (for classifiers) the logits, so
that a test can run over all of them without knowing any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import Depthwise, Encoder, Experts, Functional, Recurrent, Signal, TiedMLP, TimeMajor, Volume

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    Args:
        name: what the test is called.
        make: builds the model; the caller seeds.
        draw: draws a batch of `n` samples, each tensor with the samples along the first axis.
        loss: the mean over the samples of the batch of a per-sample loss.
        logits: class scores `[n, classes]` for the cases whose loss is a cross-entropy over classes.
        head: globs of the task head, where there is one.
        dropout: True where training draws random numbers.
    """

    name: str
    make: Callable[[], nn.Module]
    draw: Callable[[int, torch.Generator], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    logits: Callable[[nn.Module, Batch], Tensor] | None = None
    head: tuple[str, ...] = ()
    dropout: bool = False
    tags: frozenset[str] = field(default_factory=frozenset)

    def model(self, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A fresh model in training mode, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() <= 1 or bool(
                        (parameter == 0).all()
                    ):  # biases and scales that start equal hide mistakes
                        parameter.add_(0.1 * torch.randn_like(parameter))
                for name, buffer in model.named_buffers():
                    if name.endswith(("running_mean", "running_var")):
                        buffer.add_(0.1 * torch.rand_like(buffer))
        return model.to(dtype).train()

    def batch(self, num_samples: int = 4, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
        """A batch of random samples; floating inputs in `dtype`."""
        drawn = self.draw(num_samples, torch.Generator().manual_seed(seed))
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in drawn.items()}

    def batches(self, count: int, num_samples: int = 4, *, dtype: torch.dtype = torch.float32) -> list[Batch]:
        """`count` different batches."""
        return [self.batch(num_samples, seed=seed, dtype=dtype) for seed in range(count)]


def samples(batch: Mapping[str, Tensor]) -> list[Batch]:
    """The batches of one sample each that `batch` is made of."""
    num_samples = next(iter(batch.values())).shape[0]
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(num_samples)]


# --- batches


def _vectors(width: int, classes: int) -> Callable[[int, torch.Generator], Batch]:
    return lambda n, g: {"x": torch.randn(n, width, generator=g), "y": torch.randint(classes, (n,), generator=g)}


def _images(*shape: int, classes: int = 3) -> Callable[[int, torch.Generator], Batch]:
    return lambda n, g: {"x": torch.randn(n, *shape, generator=g), "y": torch.randint(classes, (n,), generator=g)}


def _tokens(length: int, vocabulary: int, classes: int = 3) -> Callable[[int, torch.Generator], Batch]:
    """Token ids from 1 up, most of them repeated within a sample, with a class each."""
    return lambda n, g: {
        "x": torch.randint(1, vocabulary, (n, length), generator=g),
        "y": torch.randint(classes, (n,), generator=g),
    }


def _padded(length: int, vocabulary: int, classes: int = 3) -> Callable[[int, torch.Generator], Batch]:
    """Token ids with the last two places of every sample padded by 0, and the mask that says so."""

    def draw(n: int, g: torch.Generator) -> Batch:
        batch = _tokens(length, vocabulary, classes)(n, g)
        mask = torch.ones(n, length, dtype=torch.int64)
        mask[:, -2:] = 0
        return {"x": batch["x"] * mask, "mask": mask, "y": batch["y"]}

    return draw


# --- losses


def _plain(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"])


def _hf_images(model: nn.Module, batch: Batch) -> Tensor:
    return model(pixel_values=batch["x"]).logits


def _hf_tokens(model: nn.Module, batch: Batch) -> Tensor:
    return model(input_ids=batch["x"], attention_mask=batch.get("mask")).logits


def _classify(logits: Callable[[nn.Module, Batch], Tensor]) -> Callable[[nn.Module, Batch], Tensor]:
    return lambda model, batch: F.cross_entropy(logits(model, batch), batch["y"])


def _next_token(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["x"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["x"][:, 1:].flatten())


def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(
        input_ids=batch["x"], labels=batch["x"]
    ).loss  # Hugging Face computes it in float32 whatever the model's dtype


def _squared(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["t"])


def _penalised(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"]) + 0.1 * model.get_parameter("0.weight").square().sum()


# --- models


def _hf(name: str, head: type | str, **settings: object) -> Callable[[], nn.Module]:
    """A Hugging Face class by name, built from a config with `settings`."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**settings)
        return getattr(transformers, f"{name}{head}")(config)

    return make


_TEXT = dict(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
_BERT = dict(**_TEXT, max_position_embeddings=16, num_labels=3, pad_token_id=0)
_VIT = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
)
_GPT2 = dict(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
_STILL = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
_STILL_GPT2 = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
_LLAMA = dict(
    **_TEXT, num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=1
)


def _classifier(
    name: str,
    make: Callable[[], nn.Module],
    draw: Callable[[int, torch.Generator], Batch],
    logits: Callable[[nn.Module, Batch], Tensor] = _plain,
    head: str = "classifier.*",
    *,
    dropout: bool = False,
    tags: str = "",
) -> Case:
    return Case(name, make, draw, _classify(logits), logits, (head,) if head else (), dropout, frozenset(tags.split()))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


ZOO: tuple[Case, ...] = (
    _classifier("mlp", _mlp, _vectors(10, 3), head="4.*"),
    _classifier("tied_mlp", TiedMLP, _vectors(10, 3)),
    Case(
        "regression",
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 2)),
        lambda n, g: {"x": torch.randn(n, 6, generator=g), "t": torch.randn(n, 2, generator=g)},
        _squared,
        head=("2.*",),
    ),
    Case("penalty", _mlp, _vectors(10, 3), _penalised, head=("4.*",), tags=frozenset(["penalty"])),
    _classifier("depthwise", Depthwise, _images(3, 8, 8)),
    _classifier("signal", Signal, _images(2, 12)),
    _classifier("volume", Volume, _images(1, 4, 6, 4)),
    _classifier("recurrent", Recurrent, _padded(7, 20)),
    _classifier("time_major", TimeMajor, _tokens(5, 20)),
    _classifier("encoder", Encoder, _images(4, 5)),
    _classifier("experts", Experts, _images(4, 6)),
    _classifier("functional", Functional, _tokens(5, 20, classes=20), head=""),
    _classifier(
        "resnet_basic",
        _hf(
            "ResNet",
            "ForImageClassification",
            embedding_size=6,
            hidden_sizes=[6, 8],
            depths=[1, 1],
            layer_type="basic",
            num_labels=3,
        ),
        _images(3, 16, 16),
        _hf_images,
        tags="hf",
    ),
    _classifier(
        "resnet_bottleneck",
        _hf(
            "ResNet",
            "ForImageClassification",
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 2],
            layer_type="bottleneck",
            num_labels=3,
        ),
        _images(3, 16, 16),
        _hf_images,
        tags="hf",
    ),
    _classifier(
        "convnext",
        _hf("ConvNext", "ForImageClassification", hidden_sizes=[4, 6, 8, 8], depths=[1, 1, 1, 1], num_labels=3),
        _images(3, 32, 32),
        _hf_images,
        tags="hf",
    ),
    _classifier(
        "bert", _hf("Bert", "ForSequenceClassification", **_BERT, **_STILL), _padded(6, 30), _hf_tokens, tags="hf"
    ),
    _classifier(
        "bert_dropout",
        _hf("Bert", "ForSequenceClassification", **_BERT),
        _padded(6, 30),
        _hf_tokens,
        dropout=True,
        tags="hf",
    ),
    _classifier(
        "vit",
        _hf("ViT", "ForImageClassification", **_VIT, **_STILL, num_labels=3),
        _images(3, 8, 8),
        _hf_images,
        tags="hf",
    ),
    Case(
        "gpt2",
        _hf("GPT2", "LMHeadModel", **_GPT2, **_STILL_GPT2),
        _tokens(6, 30),
        _own_loss,
        tags=frozenset(["hf", "single"]),
    ),
    _classifier(
        "gpt2_classifier",
        _hf("GPT2", "ForSequenceClassification", **_GPT2, **_STILL_GPT2, num_labels=3, pad_token_id=0),
        _padded(6, 30),
        _hf_tokens,
        "score.*",
        tags="hf",
    ),
    Case(
        "llama",
        _hf("Llama", "ForCausalLM", **_LLAMA),
        _tokens(6, 30),
        _next_token,
        head=("lm_head.*",),
        tags=frozenset(["hf"]),
    ),
    _classifier(
        "llama_classifier",
        _hf("Llama", "ForSequenceClassification", **_LLAMA, num_labels=3),
        _padded(6, 30),
        _hf_tokens,
        "score.*",
        tags="hf",
    ),
)

LARGE: tuple[Case, ...] = (
    _classifier(
        "mobilenet_v2",
        _hf(
            "MobileNetV2",
            "ForImageClassification",
            depth_multiplier=0.35,
            image_size=32,
            num_labels=3,
            classifier_dropout_prob=0.0,
        ),
        _images(3, 32, 32),
        _hf_images,
        tags="hf",
    ),
    _classifier(
        "swin",
        _hf(
            "Swin",
            "ForImageClassification",
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=4,
            num_labels=3,
            drop_path_rate=0.0,
        ),
        _images(3, 16, 16),
        _hf_images,
        tags="hf",
    ),
)

CASES = {case.name: case for case in (*ZOO, *LARGE)}
