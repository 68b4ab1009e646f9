import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tithe.errors import TitheError
from tithe.ledger import measure, predict


def mlp() -> tuple[nn.Module, Any, Any]:
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Dropout(0.1), nn.Linear(40, 3))
    return model, lambda b: F.cross_entropy(model(b[0]), b[1]), (torch.randn(16, 20), torch.randint(3, (16,)))


def conv() -> tuple[nn.Module, Any, Any]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    batch = {"x": torch.randn(8, 3, 12, 12), "y": torch.ones(8).long()}
    return model, lambda b: F.cross_entropy(model(b["x"]), b["y"]), batch


def recurrent() -> tuple[nn.Module, Any, Any]:
    model = nn.ModuleDict({"words": nn.Embedding(50, 16), "rnn": nn.GRU(16, 16, batch_first=True)})
    return model, lambda b: model["rnn"](model["words"](b))[0].square().mean(), torch.randint(50, (4, 7))


def attention() -> tuple[nn.Module, Any, Any]:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return model, lambda b: model(b).square().mean(), torch.randn(4, 7, 16)


def masked() -> tuple[nn.Module, Any, Any]:
    # Branches on the batch's values, indexes by a mask, draws a number to skip a layer, adds up in a small tensor.
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def closure(batch: Any) -> Tensor:
        total = torch.tensor(0.0)
        y = model[0](batch["x"])
        if not batch["mask"].all():
            y = model[1](y[batch["mask"]])
        if torch.rand([]) < 2:
            y = y.tanh()
        total += y.square().mean()
        return total

    mask = torch.arange(12).view(3, 4) < 7
    return model, closure, {"x": torch.randn(3, 4, 8), "mask": mask}


def autocast() -> tuple[nn.Module, Any, Any]:
    model, closure, batch = mlp()

    def cast(batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return closure(batch)

    return model, cast, batch


def recomputed() -> tuple[nn.Module, Any, Any]:
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
    return model, lambda b: checkpoint(model, b, use_reentrant=False).sum(), torch.randn(5, 8)


def hugging_face(kind: str, attention: str) -> tuple[nn.Module, Any, Any]:
    tf = pytest.importorskip("transformers")
    ids = torch.randint(5, 90, (4, 12))
    mask = (torch.arange(12) < torch.tensor([[12], [8], [3], [12]])).long()
    text = tf.BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])})
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if kind == "bert":
        cls, batch, config = tf.BertForSequenceClassification, text, tf.BertConfig(vocab_size=100, **size)
    elif kind == "vit":
        cls, config = tf.ViTForImageClassification, tf.ViTConfig(image_size=32, patch_size=8, **size)
        batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": text["labels"]}
    elif kind == "gpt2":
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        cls, batch = tf.GPT2ForSequenceClassification, text
        config = tf.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, **special)
    else:
        cls, config = tf.LlamaForCausalLM, tf.LlamaConfig(vocab_size=100, num_key_value_heads=2, **size)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    model = cls._from_config(config, attn_implementation=attention)
    return model, lambda b: model(**b).loss, batch


cases: dict[str, Callable[[], tuple[nn.Module, Any, Any]]] = {
    fn.__name__: fn for fn in (mlp, conv, recurrent, attention, masked, autocast, recomputed)
} | {
    f"{kind}-{how}": lambda kind=kind, how=how: hugging_face(kind, how)
    for kind in ("bert", "vit", "gpt2", "llama")
    for how in ("sdpa", "eager")
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", cases)
def test_predicted_is_measured_and_nothing_was_touched(case: str, train: bool) -> None:
    torch.manual_seed(0)
    model, closure, batch = cases[case]()
    model.train(train)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    grads = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
    tensors = {name: (t, t._version, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    predicted = predict(model, closure, batch)

    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name][0]
        assert torch.equal(parameter.grad, grads[name][1])
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(tensors)
    for name, (tensor, _, value) in tensors.items():
        assert after[name] is tensor
        assert torch.equal(tensor, value)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]

    model.zero_grad()
    measured = measure(lambda: closure(batch).backward(), model=model)
    for field in ("peak", "kept", "kept_by_module", "by_kind"):
        assert getattr(predicted, field) == getattr(measured, field), field
    assert measured.peak >= measured.kept
    assert predicted.weights == sum(t.nbytes for t in model.state_dict().values()) or case.startswith(("bert", "llama"))


def test_a_prediction_allocates_nothing_of_the_size() -> None:
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Tanh(), nn.Linear(1000, 1000))
    batch = torch.empty(1, 1000).expand(10**9, 1000)  # 4 TB of activations a layer
    assert predict(model, lambda x: model(x).sum(), batch).kept >= 4 * 10**12


class Fancy(nn.Module):
    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.act = forward

    def forward(self, x: Tensor) -> Tensor:
        self.cached = self.inner(x)
        return self.act(self.cached)


def test_no_fake_stays_in_the_model() -> None:
    model = Fancy(torch.tanh)
    predict(model, lambda x: model(x).sum(), torch.ones(2, 4))
    assert "cached" not in vars(model)


@pytest.mark.parametrize(
    "forward", [lambda x: x if x.sum() > 0 else -x, lambda x: x[x > 0], lambda x: x * x.sum().item()]
)
def test_branching_on_an_activation_is_a_clear_error(forward: Callable[[Tensor], Tensor]) -> None:
    model = nn.Sequential(Fancy(forward))
    with pytest.raises(TitheError, match=r"^0: found aten\..*depends on the values.*Remedy: measure"):
        predict(model, lambda x: model(x).sum(), torch.ones(2, 4))


def test_leaving_torch_is_a_clear_error() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(TitheError, match=r"the forward pass: found what a tensor .*numpy"):
        predict(model, lambda x: model(x).sum() * float(model(x).detach().numpy().sum()), torch.ones(2, 4))


@pytest.mark.filterwarnings("ignore:`torch.jit")  # the compiler's own
@pytest.mark.slow
def test_compiled_models_are_predicted_as_written() -> None:
    model = nn.Sequential(nn.Linear(20, 40), nn.GELU(), nn.Linear(40, 3))
    compiled, x = torch.compile(model, backend="aot_eager"), torch.randn(16, 20)
    compiled(x).sum().backward()
    model.zero_grad()
    predicted = predict(model, lambda x: compiled(x).sum(), x)
    assert predicted == predict(model, lambda x: model(x).sum(), x)
    measure(lambda: compiled(x).sum().backward())


@pytest.mark.parametrize("closure", [lambda x: x, lambda x: x.sum().detach()])
def test_a_loss_must_be_an_attached_scalar(closure: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TitheError, match="loss: found a tensor of shape"):
        predict(nn.Linear(1, 1), closure, torch.ones(2, 4))
