import gc
import json
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils.checkpoint import checkpoint

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
    assert ledger.kept == hidden  # ReLU's output is also the second layer's input: one storage
    assert ledger.kept_by_module == {"1": hidden}
    # At ReLU in backward: its output, the gradients above and below, those of the second layer, the loss and its own.
    head = float32(h, o) + float32(o)
    assert ledger.peak == 3 * hidden + head + 2 * 4
    assert ledger.by_kind == {"kept": hidden, "gradients": head, "other": 2 * hidden + 2 * 4}


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
    assert ledger.kept == 10 * 4000
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
    assert ledger.kept == 4000  # x was there before
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
    assert recomputed.kept == 3 * float32(100, 16)
    assert stored.kept == recomputed.kept + 3 * float32(100, 256)
    assert recomputed.peak < stored.peak


def test_micro_batches_do_not_add_up() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    x = torch.randn(100, 8)

    def work(times: int) -> None:
        for _ in range(times):
            model(x).sum().backward()

    assert measure(lambda: work(1)).kept == measure(lambda: work(4)).kept == float32(100, 8)


def test_modules_are_named_by_the_model_or_the_outermost_one() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Tanh()), "head": nn.Sigmoid()})
    x = torch.ones(10, requires_grad=True)

    def work() -> None:
        model["head"](model["body"](x)).exp().sum().backward()

    assert measure(work, model=model).kept_by_module == {"body.0": 40, "head": 40, "": 40}
    assert measure(work).kept_by_module == {"0": 40, "Sigmoid": 40, "": 40}


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
    assert inner[0].kept == outer.kept == 4000
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
    ledger = Ledger(peak=3 * 10**12, kept=5, kept_by_module=modules, by_kind={"kept": 5}, allocator_peak=7, theta=9)
    assert max(map(len, str(ledger).splitlines())) < 80
    assert "3000.0 GB" in str(ledger)
    assert "28 more modules" in str(ledger)
    assert json.loads(json.dumps(ledger.as_dict()))["kept_by_module"] == modules
