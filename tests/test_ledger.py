import gc
import json
import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks
from torch.utils.checkpoint import checkpoint

from tithe.errors import TitheError
from tithe.ledger import Ledger, measure, predict

MB = 1_000_000


def float32(*shape: int) -> int:
    return 4 * torch.Size(shape).numel()


# --- measure, against arithmetic


def test_a_chain_costs_what_arithmetic_says() -> None:
    n, i, h, o = 64, 8, 32, 2
    model = nn.Sequential(nn.Linear(i, h), nn.ReLU(), nn.Linear(h, o))
    x = torch.randn(n, i)
    ledger = measure(lambda: model(x).sum().backward())
    hidden = float32(n, h)
    assert ledger.saved == hidden  # ReLU's output is also the second layer's input: one storage
    assert ledger.saved_by_module == {"1": hidden}
    # At ReLU in backward: its output, the gradients above and below, those of the second layer, the loss and its own.
    head = float32(h, o) + float32(o)
    assert ledger.peak == 3 * hidden + head + 2 * 4
    assert ledger.by_kind == {"saved": hidden, "gradients": head, "other": 2 * hidden + 2 * 4}


def test_views_aliases_and_what_existed_before_cost_nothing() -> None:
    x = torch.ones(1000)

    def work() -> None:
        y = x.view(10, 100).t()[2:].detach()
        x.mul_(2)
        y.add_(1)
        x.data = y.data

    assert measure(work).peak == 0


def test_a_storage_lives_as_long_as_its_last_view() -> None:
    def work() -> None:
        view = torch.ones(1000)[:1]
        torch.ones(500)
        del view
        torch.ones(750)

    assert measure(work).peak == 4 * 1500


def test_results_in_place_and_out_cost_their_first_tensor() -> None:
    def work() -> None:
        x = torch.ones(1000)
        x.add_(1).relu_()
        torch.add(x, 1, out=x)

    assert measure(work).peak == 4000


def test_a_tensor_from_a_list_is_counted() -> None:
    assert measure(lambda: torch.tensor([1.0, 2.0, 3.0])).peak == 12


def test_a_resized_storage_counts_at_its_size() -> None:
    original = torch.UntypedStorage.resize_

    def work() -> None:
        x = torch.ones(1000)
        x.untyped_storage().resize_(0)
        torch.ones(900)
        x.untyped_storage().resize_(4000)
        torch.ones(0).resize_(2000)

    assert measure(work).peak == 4000 + 8000
    assert torch.UntypedStorage.resize_ is original


def test_sparse_tensors_count_their_parts() -> None:
    ledger = measure(lambda: torch.eye(100).to_sparse())
    assert ledger.peak >= float32(100, 100) + 2 * 8 * 100 + float32(100)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_count_their_values() -> None:
    parts = [torch.ones(30, 4), torch.ones(70, 4)]
    ledger = measure(lambda: torch.nested.nested_tensor(parts, layout=torch.jagged) * 2)
    assert ledger.peak >= float32(100, 4)


def test_nothing_is_kept_alive() -> None:
    died: list[str] = []

    def work() -> None:
        x = torch.ones(1000, requires_grad=True)
        y = x.exp()  # saves its own output
        weakref.finalize(y.untyped_storage(), died.append, "y")
        z = y * 2
        weakref.finalize(z.untyped_storage(), died.append, "z")
        del z
        assert died == ["z"]
        del y
        assert died == ["z", "y"]

    gc.disable()
    try:
        ledger = measure(work)
    finally:
        gc.enable()
    assert ledger.peak == 3 * 4000


def test_backward_frees_layer_by_layer() -> None:
    layers = nn.Sequential(*[nn.Tanh() for _ in range(10)])
    x = torch.ones(1000, requires_grad=True)
    ledger = measure(lambda: layers(x).backward(torch.ones(1000)))
    assert ledger.saved == 10 * 4000
    assert ledger.peak == 13 * 4000  # at the last layer but one: the caller's gradient, and those above and below it


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x * x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _, square = ctx.saved_tensors
        return grads[0] * 3 * square


def test_autograd_functions_are_seen() -> None:
    x = torch.ones(1000, requires_grad=True)
    ledger = measure(lambda: Cube.apply(x).sum().backward())
    assert ledger.saved == 4000  # x was there before
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((1000,), 3.0))


def test_checkpointing_counts_inputs_once_and_recomputation_never() -> None:
    block = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 16))
    x = torch.randn(100, 16)

    def work(recompute: bool) -> None:
        y = x.tanh()
        for _ in range(3):
            y = checkpoint(block, y.requires_grad_(), use_reentrant=False) if recompute else block(y.requires_grad_())
        y.sum().backward()

    stored, recomputed = measure(lambda: work(False)), measure(lambda: work(True))
    assert recomputed.saved == 3 * float32(100, 16)
    assert stored.saved == recomputed.saved + 3 * float32(100, 256)
    assert recomputed.peak < stored.peak


def test_micro_batches_do_not_add_up() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    x = torch.randn(100, 8)

    def work(times: int) -> None:
        for _ in range(times):
            model(x).sum().backward()

    assert measure(lambda: work(1)).saved == measure(lambda: work(4)).saved == float32(100, 8)


def test_modules_are_named_by_the_model_or_the_outermost_one() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Tanh()), "head": nn.Sigmoid()})
    x = torch.ones(10, requires_grad=True)

    def work() -> None:
        model["head"](model["body"](x)).exp().sum().backward()

    assert measure(work, model=model).saved_by_module == {"body.0": 40, "head": 40, "": 40}
    assert measure(work).saved_by_module == {"0": 40, "Sigmoid": 40, "": 40}


def test_gradients_are_told_even_when_they_are_gone_afterwards() -> None:
    model = nn.Linear(1000, 10, bias=False)
    opt = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.ones(1, 1000)).sum().backward()
        opt.step()
        opt.zero_grad()

    ledger = measure(step)
    assert ledger.by_kind["gradients"] == float32(10, 1000)
    assert sum(ledger.by_kind.values()) == ledger.peak


def test_measures_nest() -> None:
    inner: list[Ledger] = []

    def work() -> None:
        x = torch.ones(1000, requires_grad=True)
        inner.append(measure(lambda: x.exp().sum().backward()))

    outer = measure(work)
    assert inner[0].saved == outer.saved == 4000
    assert outer.peak == inner[0].peak + 4000


def hooks() -> tuple[Any, ...]:
    return (
        len(module_hooks._global_forward_hooks),
        len(module_hooks._global_forward_pre_hooks),
        len(module_hooks._global_forward_hooks_always_called),
        vars(torch.UntypedStorage).get("resize_"),
        torch.utils._python_dispatch._get_current_dispatch_mode(),
    )


@pytest.mark.parametrize("run", [measure, lambda fn: predict(nn.Linear(1, 1), lambda _: fn(), None)])
def test_an_exception_passes_and_leaves_no_hook_behind(run: Callable[[Any], Any]) -> None:
    layer, before = nn.Linear(4, 4), hooks()

    def work() -> None:
        layer(torch.ones(2, 4)).sum().backward()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(work)
    assert hooks() == before
    assert not layer.weight._post_accumulate_grad_hooks
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        layer(torch.ones(2, 4))
    assert saved  # autograd's stack of hooks is whole


def test_results_are_those_of_an_unwatched_step() -> None:
    def grads(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.5), nn.LayerNorm(8))
        x = torch.randn(16, 8)

        def step() -> None:
            model(x).square().sum().backward()

        measure(step) if watched else step()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(grads(True), grads(False), strict=True))


# --- the page


def test_the_table_is_narrow_and_the_dict_is_json() -> None:
    modules = {f"encoder.layer.{i}." + "very_long_module_name." * 5: i * MB for i in range(40)}
    ledger = Ledger(peak=3 * 10**12, saved=5, saved_by_module=modules, by_kind={"saved": 5}, allocator_peak=7, theta=9)
    assert max(map(len, str(ledger).splitlines())) < 80
    assert "3000.0 GB" in str(ledger)
    assert "28 more modules" in str(ledger)
    assert json.loads(json.dumps(ledger.as_dict()))["saved_by_module"] == modules


# --- predict == measure


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
    for field in ("peak", "saved", "saved_by_module", "by_kind"):
        assert getattr(predicted, field) == getattr(measured, field), field
    assert measured.peak >= measured.saved
    assert predicted.weights == sum(t.nbytes for t in model.state_dict().values()) or case.startswith(("bert", "llama"))


def test_a_prediction_allocates_nothing_of_the_size() -> None:
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Tanh(), nn.Linear(1000, 1000))
    batch = torch.empty(1, 1000).expand(10**9, 1000)  # 4 TB of activations a layer
    assert predict(model, lambda x: model(x).sum(), batch).saved >= 4 * 10**12


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
    with pytest.raises(TitheError, match=r"the forward pass: found data asked of a tensor .*numpy"):
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
