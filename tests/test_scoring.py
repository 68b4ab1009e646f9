"""Scoring: how many passes it takes, what it makes of data and losses as people have them, and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tithe
from models import CASES
from tithe import FISH, Budget, SpIEL, TitheError, TitheWarning, TraDy
from tithe.batch import num_samples, slice_batch
from tithe.method import SelectionContext, SparseMethod
from tithe.selection import Coordinates

Loss = Callable[[nn.Module, Any], Tensor]


class Listen(SparseMethod):
    """It keeps the scores and chooses the first weight of each tensor."""

    needs_data = True

    def __init__(self, kind: str = "fisher", samples: int = 10**6) -> None:
        self.kind, self.samples = kind, samples
        self.heard: dict[str, Tensor] = {}

    def choose(self, context: SelectionContext) -> dict[str, Coordinates]:
        self.heard = {name: score.clone() for name, score in context.scores(self.kind, samples=self.samples)}
        return {name: Coordinates(shape, torch.tensor([0])) for name, shape in context.shapes.items()}


def _scores(model: nn.Module, loss: Loss, data: Any, kind: str = "fisher") -> dict[str, Tensor]:
    method = Listen(kind)
    tithe.attach(model, method, loss=loss, data=data).release()
    return method.heard


def _loop(model: nn.Module, loss: Loss, data: Any) -> dict[str, Tensor]:
    """Mean squared gradients, one backward a sample."""
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    count = 0
    for batch in data:
        for n in range(num_samples(batch)):
            model.zero_grad()
            value = loss(model, slice_batch(batch, n, n + 1))
            if value.requires_grad:
                value.backward()
            count += 1
            for name, p in model.named_parameters():
                if p.grad is not None:
                    totals[name] += p.grad.square()
    model.zero_grad()
    return {name: total / count for name, total in totals.items()}


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(float(want.max()) for want in expected.values())
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=1e-6, atol=1e-12 * largest, msg=name)


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 3)).double()


def _data(count: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def _mean(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


# --- how many passes


def _count(model: nn.Module, loss: Loss, data: Any) -> tuple[int, int]:
    """Forward passes of scoring, and the samples in them."""
    passes = [0, 0]

    def counted(model: nn.Module, batch: Any) -> Tensor:
        passes[0] += 1
        passes[1] += num_samples(batch)
        return loss(model, batch)

    _scores(model, counted, data)
    return passes[0], passes[1]


@pytest.mark.parametrize("name", ["mlp", "bert", "depthwise", "tied_mlp", "recurrent", "experts", "gpt2"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 24])
def test_no_more_passes_than_a_loop_over_single_samples(name: str, size: int) -> None:
    case = CASES[name]
    whole = case.batch(24)
    data = [slice_batch(whole, start, start + size) for start in range(0, 24, size)]
    passes, samples = _count(case.model(), case.loss, data)
    assert passes <= 24 + 3  # two samples together and one batch, where a weight turns out to mix samples
    assert samples <= 24 + 10
    if name == "mlp" and size >= 4:
        assert passes <= 12


def test_batches_of_four_are_not_scored_group_by_group() -> None:
    """What a network of convolutions once took 271 passes for."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(6)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    data = [(torch.randn(4, 3, 12, 12), torch.randint(3, (4,))) for _ in range(6)]
    assert _count(model, _mean, data)[0] <= 10


# --- all of the data


class _Routed(nn.Module):
    """Tokens go to the expert of the largest score; a second expert may be asked too."""

    def __init__(self, top: int, dim: int = 6) -> None:
        super().__init__()
        self.top = top
        self.router, self.out = nn.Linear(dim, 4), nn.Linear(dim, 3)
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(self.top, -1)
        out = torch.zeros_like(x)
        for n, expert in enumerate(self.experts):
            at = (chosen == n).nonzero(as_tuple=True)
            if len(at[0]):
                out = out.index_put(at[:-1], weights[at][:, None] * expert(x[at[:-1]]), accumulate=True)
        return self.out((x + out).mean(1))


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.sampled_from([3, 8, 20, 24]), st.integers(0, 10**6))
def test_routed_experts_are_scored_as_sample_by_sample(top: int, tokens: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = _Routed(top).double()
    data = [(torch.randn(size, tokens, 6).double(), torch.randint(3, (size,))) for _ in range(40 // size)]
    expected = _loop(model, _mean, data)
    if all(bool(want.any()) for want in expected.values()):
        _assert_close(_scores(model, _mean, data), expected)


def test_a_branch_that_one_late_sample_takes_is_scored() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.late = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.body(x)
            return torch.where(x[:, :1] > 9, self.late(x), out) if bool((x[:, 0] > 9).any()) else out

    x, y = _data(40)
    x[37, 0] = 10.0
    for data in ([(x, y)], [(x[i : i + 5], y[i : i + 5]) for i in range(0, 40, 5)]):
        model = Early().double()
        found = _scores(model, _mean, data)
        _assert_close(found, _loop(model, _mean, data))
        assert found["late.weight"].any()


def test_one_weight_alone_may_miss_some_samples() -> None:
    torch.manual_seed(1)
    model = _Routed(1).double()
    data = [(torch.randn(2, 1, 6).double(), torch.randint(3, (2,))) for _ in range(20)]
    method = Listen()
    tithe.attach(model, method, loss=_mean, data=data, where="experts.2.weight").release()
    torch.testing.assert_close(method.heard["experts.2.weight"], _loop(model, _mean, data)["experts.2.weight"])


def test_what_only_whole_batches_reach_has_a_score_of_zero() -> None:
    """Experts by the place in the batch: a sample alone is always the first."""
    experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(4)).double()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        rows = [model[i % 4](row) for i, row in enumerate(batch[0])]  # type: ignore[index]
        return F.cross_entropy(torch.stack(rows), batch[1])

    found = _scores(experts, loss, [_data()])
    assert found["0.weight"].any()
    assert not any(found[f"{n}.weight"].any() for n in (1, 2, 3))
    plan = tithe.attach(experts, FISH(k=9), loss=loss, data=[_data()])
    assert set(plan.selections) <= {"0.weight", "0.bias"}


def test_what_nothing_reaches_is_left_out_as_the_error_says() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 3)
            self.spare = nn.ModuleList(nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    with pytest.raises(TitheError, match=r"no gradient .* 11 more") as error:
        tithe.attach(Spare().double(), FISH(k=5), loss=_mean, data=[_data()])
    assert "'!spare.*'" in error.value.remedy
    tithe.attach(Spare().double(), FISH(k=5), loss=_mean, data=[_data()], where=["*", "!spare.*"])
    with pytest.raises(TitheError, match="no gradient") as error:
        tithe.attach(Spare().double(), FISH(k=5), loss=_mean, data=[_data()], where="body.*", head="spare.0.*")
    assert "and where=" in error.value.remedy


# --- scores that are zero


GRADIENTS = {
    "fisher": FISH(k=8),
    "true": FISH(k=8, fisher="true"),
    "gradient": FISH(k=8, score="gradient"),
    "tensor": FISH(k=8, scope="tensor"),
    "spiel": SpIEL(density=0.5),
    "uniform": TraDy(Budget("4kB")),
    "rgn": TraDy(Budget("4kB"), layers="all", score="rgn"),
    "channels": TraDy(Budget("4kB"), layers="all", score="fisher"),
}


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("count", [8, 32])
def test_a_head_of_zeros_is_refused_and_the_remedies_help(name: str, count: int) -> None:
    model, data = _mlp(), [_data(count)]
    nn.init.zeros_(model[2].weight)
    with pytest.raises(TitheError, match=r"all zero.*2\.weight holds nothing but zeros") as error:
        tithe.attach(model, GRADIENTS[name], loss=_mean, data=data, head="2.*")
    assert "nn.init.normal_" in error.value.remedy
    with pytest.raises(TitheError, match="all zero"):
        tithe.attach(model, GRADIENTS[name], loss=_mean, data=data, head="2.*")
    if "warmup=" in error.value.remedy:
        plan = tithe.attach(model, FISH(k=8, warmup=1), loss=_mean, data=data, head="2.*")
        opt = torch.optim.SGD(plan.parameters(), lr=0.1)
        plan.bind(opt)
        plan.backward(lambda: _mean(model, data[0]))
        opt.step()
        assert plan.step()
        plan.release()
        tithe.attach(model, FISH(k=8, score="magnitude"), loss=_mean, data=data, head="2.*").release()
    if "layers=" in error.value.remedy:
        tithe.attach(model, TraDy(Budget("4kB"), layers="all"), loss=_mean, data=data, head="2.*").release()
    nn.init.normal_(model[2].weight, std=0.02)
    tithe.attach(model, GRADIENTS[name], loss=_mean, data=data, head="2.*")


def test_a_branch_of_zeros_is_not_chosen_from_and_the_rest_is() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.down, self.up = nn.Linear(6, 3), nn.Linear(6, 2, bias=False), nn.Linear(2, 3, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.up(self.down(x))

    model = Adapted().double()
    plan = tithe.attach(model, FISH(k=20), loss=_mean, data=[_data()])
    assert "down.weight" not in plan.selections
    plan.release()
    with pytest.warns(TitheWarning, match="6 are chosen by their place alone"):
        tithe.attach(model, FISH(k=33), loss=_mean, data=[_data()])


def test_a_loss_that_compares_samples_says_which_score_takes_batches() -> None:
    def contrast(model: nn.Module, batch: Any) -> Tensor:
        out = F.normalize(model(batch[0]), dim=1)
        return F.cross_entropy(out @ out.t(), torch.arange(len(out)))

    with pytest.raises(TitheError, match="compares them") as error:
        tithe.attach(_mlp(), FISH(k=8), loss=contrast, data=[_data()])
    assert 'score="gradient"' in error.value.remedy
    tithe.attach(_mlp(), FISH(k=8, score="gradient"), loss=contrast, data=[_data()])


@pytest.mark.parametrize("size", [4, 24])
def test_a_sample_whose_labels_are_all_ignored_adds_no_gradient(size: int) -> None:
    """As a row of which random masking masks nothing, or whose answer was cut off."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 5, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (size, 5), generator=generator)
    y[::3] = -100
    model = _mlp()
    found = _scores(model, loss, [(x, y)])
    counted = _loop(model, loss, [(x[n : n + 1], y[n : n + 1]) for n in range(size) if n % 3])
    share = (size - len(range(0, size, 3))) / size
    for name, score in counted.items():
        torch.testing.assert_close(found[name], score * share)
    with pytest.raises(TitheError, match="loss of nan") as error:
        _scores(model, loss, [(x, torch.full_like(y, -100))])
    assert "labels are all ignored" in error.value.remedy
    spoiled = x.clone()
    spoiled[1] = torch.nan
    with pytest.raises(TitheError, match="loss of nan"):
        _scores(model, loss, [(spoiled, y)])


def test_norms_that_are_not_finite_are_refused_by_name() -> None:
    model = _mlp().float()
    with torch.no_grad():
        model[0].weight.mul_(1e38)
    with pytest.raises(TitheError, match=r"not finite|loss of"):
        tithe.attach(model, TraDy(Budget("4kB")), loss=_mean, data=[(_data()[0].float(), _data()[1])], head="2.*")


# --- losses


def _summed(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


@pytest.mark.parametrize("kind", ["fisher", "gradient"])
def test_a_summed_loss_is_said_and_costs_no_more(kind: str) -> None:
    x, y = _data(40)
    data = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 35, 8)] + [(x[35:], y[35:])]
    calls = {_mean: 0, _summed: 0}
    found: dict[Loss, dict[str, Tensor]] = {}
    for loss in calls:

        def counted(model: nn.Module, batch: Any, loss: Loss = loss) -> Tensor:
            calls[loss] += 1
            return loss(model, batch)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found[loss] = _scores(_mlp(), counted, data, kind)
        assert ["sum over the samples" in str(w.message) for w in caught] == ([] if loss is _mean else [True])
    assert calls[_mean] == calls[_summed]
    _assert_close(found[_summed], found[_mean])


def test_a_ranking_by_a_summed_loss_is_that_of_the_mean() -> None:
    x, y = _data(20)
    data = [(x[:16], y[:16]), (x[16:], y[16:])]
    mean = tithe.Ranking.compute(_mlp(), loss=_mean, data=data)
    with pytest.warns(TitheWarning, match="sum over the samples"):
        summed = tithe.Ranking.compute(_mlp(), loss=_summed, data=data)
    assert mean.rgn == pytest.approx(summed.rgn)


class _Output(dict[str, Any]):
    """What a Hugging Face model returns is a dict with attributes."""

    loss: Tensor


RETURNED: dict[str, tuple[Loss, str, Callable[[Any], Tensor]]] = {
    "an output": (lambda m, b: _Output(loss=_mean(m, b)), "output.loss", lambda out: out["loss"]),  # type: ignore[return-value]
    "a tuple": (lambda m, b: (_mean(m, b), m(b[0])), "output[0]", lambda out: out[0]),  # type: ignore[return-value]
    "a number": (lambda m, b: _mean(m, b).item(), "without .item()", lambda out: out),  # type: ignore[return-value]
    "nothing": (lambda m, b: None, "return loss", lambda out: out),  # type: ignore[return-value]
    "no loss": (lambda m, b: _Output(logits=m(b[0])), "labels=", lambda out: out),  # type: ignore[return-value]
    "no mean": (lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), ".mean()", lambda out: out.mean()),
}


@pytest.mark.parametrize("name", RETURNED)
@pytest.mark.parametrize("method", [FISH(k=8), FISH(k=8, score="gradient"), TraDy(Budget("4kB"))], ids=repr)
def test_what_a_loss_returns_that_is_none_is_named_with_what_to_return(name: str, method: SparseMethod) -> None:
    loss, told, remedy = RETURNED[name]
    with pytest.raises(TitheError) as error:
        tithe.attach(_mlp(), method, loss=loss, data=[_data()])
    assert told in error.value.remedy
    if name in ("an output", "a tuple", "no mean"):
        tithe.attach(_mlp(), method, loss=lambda m, b: remedy(loss(m, b)), data=[_data()])


# --- data


def test_images_of_several_sizes_with_boxes() -> None:
    """Samples are the items of lists; the loss runs over them as a detector does."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    ).double()
    images = [torch.rand(3, 8 + n % 3, 9 + n % 2).double() for n in range(24)]
    targets = [{"boxes": torch.rand(1 + n % 3, 4).double(), "labels": torch.zeros(1 + n % 3)} for n in range(24)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = [model(image[None])[0] for image in batch[0]]
        each = [(one - target["boxes"]).square().mean() for one, target in zip(found, batch[1], strict=True)]
        return torch.stack(each).mean()

    data = [(images[i : i + 6], targets[i : i + 6]) for i in range(0, 24, 6)]
    _assert_close(_scores(model, loss, data), _loop(model, loss, data))
    tithe.attach(model, TraDy(Budget("64kB")), loss=loss, data=data)


def test_packed_batches_pass_their_bounds_through() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 20)).double()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        assert int(batch["cu_seq_lens_q"][-1]) == batch["input_ids"].shape[1]
        return F.cross_entropy(model(batch["input_ids"])[0], batch["labels"][0])

    ids = [torch.randint(20, (1, length)) for length in (9, 12, 7)]
    bounds = torch.tensor([0, 3, 7])
    data = [
        {
            "input_ids": x,
            "labels": x,
            "cu_seq_lens_q": torch.cat([bounds[:2], torch.tensor([x.shape[1]])]),
            "max_length": 7,
        }
        for x in ids
    ]
    _assert_close(_scores(model, loss, data), _loop(model, loss, data))
    tithe.attach(model, TraDy(Budget("64kB")), loss=loss, data=data)


def test_what_cannot_be_split_is_refused_and_batches_of_one_go() -> None:
    """Positions of several axes come before the samples, and patches belong to no row."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if len(batch["patches"]) != 4 * len(batch["y"]):
            raise ValueError("features and tokens do not match")
        return F.cross_entropy(model(batch["patches"].unflatten(0, (-1, 4)).mean(1)), batch["y"])

    def data(size: int) -> Iterator[Any]:
        x, y = torch.randn(80, 6).double(), torch.arange(20) % 3
        for i in range(0, 20, size):
            rows = torch.zeros(size, 5)
            yield {"ids": rows, "mask": rows, "patches": x[4 * i : 4 * (i + size)], "y": y[i : i + size]}

    with pytest.raises(TitheError, match="runs whole, and not in parts") as error:
        tithe.attach(_mlp(), FISH(k=8), loss=loss, data=list(data(5)))
    assert "batch_size=1" in error.value.remedy
    tithe.attach(_mlp(), FISH(k=8), loss=loss, data=list(data(1)))


def test_an_error_of_the_loss_itself_is_left_as_it_is() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        tithe.attach(_mlp(), FISH(k=8), loss=loss, data=[_data()])


# --- checkpointing


class _Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("method", [FISH(k=8), FISH(k=8, score="gradient"), TraDy(Budget("4kB"))], ids=repr)
@pytest.mark.parametrize("head", ["head.*", ()])
def test_a_reentrant_checkpoint_without_gradients_is_named(method: SparseMethod, head: Any) -> None:
    with pytest.raises(TitheError, match="reentrant") as error:
        tithe.attach(_Checkpointed(reentrant=True).double(), method, loss=_mean, data=[_data()], head=head)
    assert "use_reentrant=False" in error.value.remedy
    tithe.attach(_Checkpointed(reentrant=False).double(), method, loss=_mean, data=[_data()], head=head)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("size", [1, 24])
def test_a_reentrant_checkpoint_whose_input_has_a_gradient_is_scored_exactly(twice: bool, size: int) -> None:
    class Below(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.body, self.first(x), use_reentrant=True).tanh()
            return self.out(checkpoint(self.body, x, use_reentrant=True) if twice else x)

    torch.manual_seed(0)
    model = Below().double()
    x, y = _data(24)
    data = [(x[i : i + size], y[i : i + size]) for i in range(0, 24, size)]
    expected = _scores(_same_without_checkpoints(model, twice=twice), _mean, data)
    _assert_close(_scores(model, _mean, data), expected)


def _same_without_checkpoints(model: Any, *, twice: bool) -> nn.Module:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body, self.out = model.first, model.body, model.out

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(self.first(x)).tanh()
            return self.out(self.body(x) if twice else x)

    return Plain()
