"""What a memory budget leaves out, counted as the TraDy paper counts it and measured in a real step.

One step of 32 noise images (128²) for each network, budget and method, averaged over the draws of eight epochs:

* activation sparsity: 1 − kept inputs of convolutions / all of them. Counted: Σ H·W of the selected channels. Measured:
  bytes that the convolutions saved for backward.
* weight-gradient sparsity: 1 − Σ C'·D² of the selected channels / all weights of convolutions. Measured: elements of
  the gradients that the step left, those of trained biases included, the head's apart.
* FLOPs of weight gradients: measured from the shapes of the kernels that ran.
* bytes saved for backward and the peak of the step beyond the weights, all layers, the head and the loss included.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tithe
from benchmarks import vision
from benchmarks.images import BATCH, Batch
from benchmarks.records import Record, Store, parse
from benchmarks.transfer import ranking_file
from benchmarks.transfer_methods import Drawn, Prepared, Setting, full, head_only, loss_of, sparse_update
from benchmarks.vision import NETWORKS, SIDE, Network

NUM_DRAWS = 8


class WeightGradientWork(TorchDispatchMode):
    """Adds up 2 · (elements of the weight's gradient) · N · H' · W' of every convolution's backward that makes one."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution_backward.default and result[1] is not None:
            gy: Tensor = args[0]
            self.flops += 2 * result[1].numel() * gy.shape[0] * gy.shape[2:].numel()
        return result


def methods(budget: str) -> dict[str, Callable[[nn.Module, Setting], Prepared]]:
    """Those with a budget, and what they are compared with."""
    drawn = {"TraDy": Drawn(budget=budget), "all layers": Drawn("all", budget=budget)}
    return {"full": full, "head only": head_only, "SU": sparse_update, **drawn} if budget == "tight" else drawn


def measured(prepared: Prepared, batch: Batch) -> Record:
    """One step without an update: what its convolutions kept and made, and what it all took."""

    def closure() -> Tensor:
        return loss_of(prepared.model, (batch[0].clone(), batch[1]))  # so that the images count as an input too

    def step() -> None:
        if prepared.plan is None:
            closure().backward()
        else:
            prepared.plan.backward(closure)

    ledger = tithe.measure(step, model=prepared.model)
    gradients = sum(p.grad.numel() for p in prepared.body if p.grad is not None)
    clear(prepared)
    with WeightGradientWork() as work:
        step()
    clear(prepared)
    names = vision.convolutions(prepared.model)
    return {
        "kept_bytes": sum(ledger.kept_by_module.get(name, 0) for name in names),
        "gradients": gradients,
        "flops": work.flops,
        "saved": ledger.kept,
        "peak": ledger.peak,
    }


def clear(prepared: Prepared) -> None:
    """Drop the gradients."""
    for parameter in (*prepared.head, *prepared.body):
        parameter.grad = None


def counted(prepared: Prepared, sizes: dict[str, int], outputs: dict[str, int]) -> Record:
    """Elements of the selected channels' inputs and weights, for one image, and FLOPs of their gradients."""
    kept = weights = flops = 0
    selections = {} if prepared.plan is None else prepared.plan.selections
    for name, module in vision.convolutions(prepared.model).items():
        selection = selections.get(f"{name}.weight")
        if prepared.plan is None and prepared.body:
            values = module.weight.numel()
        else:
            values = 0 if selection is None else selection.size
        per_channel = vision.channel_cost(module, 0)
        kept += values // per_channel * sizes[name]
        weights += values
        flops += 2 * values * outputs[name]
    return {"kept": kept, "weights": weights, "flops": flops}


def record(network: Network, prepare: Callable[[nn.Module, Setting], Prepared], results: Path, data: Path) -> Record:
    """Counted and measured sparsities and bytes, the mean over the draws."""
    model = vision.load(network, data, num_classes=10)
    sizes = vision.positions(model, torch.zeros(1, 3, SIDE, SIDE))
    inputs = {name: size for name, (size, _) in sizes.items()}
    outputs = {name: size for name, (_, size) in sizes.items()}
    generator = torch.Generator().manual_seed(0)
    batch = torch.rand(BATCH, 3, SIDE, SIDE, generator=generator) * 2 - 1, torch.arange(BATCH) % 10
    named = vision.convolutions(model)
    all_kept = sum(m.in_channels * inputs[name] for name, m in named.items())
    all_weights = sum(m.weight.numel() for m in named.values())
    all_flops = sum(2 * m.weight.numel() * outputs[name] for name, m in named.items())
    prepared = prepare(model, Setting(network, [batch], ranking_file(results, network), 0, lean=True))
    draws: list[Record] = []
    for draw in range(1 if prepared.plan is None else NUM_DRAWS):
        if prepared.plan is not None and draw:
            prepared.plan.end_epoch()
        count, measure = counted(prepared, inputs, outputs), measured(prepared, batch)
        draws.append(
            {
                "elements": count["kept"] + count["weights"],
                "activation_counted": 1 - count["kept"] / all_kept,
                "activation_measured": 1 - measure["kept_bytes"] / (4 * BATCH * all_kept),
                "weight_counted": 1 - count["weights"] / all_weights,
                "weight_measured": 1 - measure["gradients"] / all_weights,
                "flops_counted": 1 - count["flops"] / all_flops,
                "flops_measured": 1 - measure["flops"] / (BATCH * all_flops),
                "saved": measure["saved"],
                "peak": measure["peak"],
            }
        )
    least = {f"least_{key}": min(d[key] for d in draws) for key in draws[0] if key.endswith(("counted", "measured"))}
    most = {f"most_{key}": max(d[key] for d in draws) for key in ("elements", "saved", "peak")}
    return {**{key: fmean(d[key] for d in draws) for key in draws[0]}, **least, **most, "draws": len(draws)}


def main() -> None:
    """Measure what is missing."""
    args = parse(__doc__ or "")
    torch.set_num_threads(args.threads)
    store = Store(args.results / "sparsity.jsonl", key=("network", "budget", "method"))
    for network in NETWORKS.values():
        for budget in network.budgets:
            for name, prepare in methods(budget).items():
                fields = {"network": network.name, "budget": budget, "method": name}
                if store.find(**fields) is None:
                    store.add({**fields, **record(network, prepare, args.results, args.data)})


if __name__ == "__main__":
    main()
