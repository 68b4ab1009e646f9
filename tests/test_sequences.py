"""Language models: a sample is a row, however it is padded or packed, and scores are those of rows one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tithe
from test_scoring import _assert_close, _count, _loop, _scores

Batch = dict[str, Tensor]
VOCABULARY, PAD = 40, 39
_TEXT: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24
)
_IDS: dict[str, Any] = dict(pad_token_id=PAD, bos_token_id=1, eos_token_id=PAD)


def _llama() -> nn.Module:
    """Grouped queries: two key-value heads to four."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_TEXT, **_IDS, num_key_value_heads=2, max_position_embeddings=32))


def _gpt2() -> nn.Module:
    """`Conv1D`, and embeddings tied to the head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    still: dict[str, Any] = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, **still, **_IDS)
    )


def _mixtral() -> nn.Module:
    """Two of four experts to a token, whose weights lie in one tensor each."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **_TEXT,
        **_IDS,
        num_key_value_heads=2,
        max_position_embeddings=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.0,
    )
    return MixtralForCausalLM(config)


MODELS = {"llama": _llama, "gpt2": _gpt2, "mixtral": _mixtral}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def _model(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make() if make is _mixtral else make().double()  # torch multiplies groups of rows in float32 at most


def _same(make: Callable[[], nn.Module], loss: Callable[[Any, Any], Tensor], data: list[Batch]) -> None:
    found, expected = _scores(_model(make), loss, data), _loop(_model(make), loss, data)
    if make is not _mixtral:
        _assert_close(found, expected)
        return
    largest = max(float(want.max()) for want in expected.values())
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=1e-3, atol=1e-6 * largest, msg=name)


def _padded(lengths: list[int], *, left: bool, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), PAD)
    mask = torch.zeros(len(lengths), longest, dtype=torch.int64)
    for row, length in enumerate(lengths):
        at = slice(longest - length, None) if left else slice(0, length)
        ids[row, at] = torch.randint(1, PAD, (length,), generator=generator)
        mask[row, at] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _own(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss: the mean over the tokens of the batch."""
    return model(**batch).loss


def _bare(model: nn.Module, batch: Batch) -> Tensor:
    """The same from ids alone: mask and labels are made here."""
    ids = batch["input_ids"]
    mask = (ids != PAD).long()
    return model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss


def _by_row(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over rows of each row's mean over its tokens."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return (each.sum(1) / (labels != -100).sum(1)).mean()


@each_model
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("loss", [_own, _by_row])
def test_scores_of_padded_rows_are_those_of_rows_one_by_one(
    make: Callable[[], nn.Module], left: bool, loss: Callable[[Any, Any], Tensor]
) -> None:
    data = [_padded([3, 9, 5, 5, 7, 4, 8, 6], left=left, seed=s) for s in range(3)]
    _same(make, loss, data)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_ids_alone_tell_which_rows_are_unlike(left: bool) -> None:
    """No mask, and a padding id above zero: every row has as many entries that are not zero."""
    data = [{"input_ids": _padded([7, 7, 3, 9, 5, 4, 8, 6], left=left, seed=s)["input_ids"]} for s in range(3)]
    _same(_llama, _bare, data)


def test_prompts_without_labels_tell_which_rows_are_unlike() -> None:
    """All rows are of one length; of some, only the last tokens have a label."""
    data = []
    for seed in range(3):
        batch = _padded([8] * 8, left=False, seed=seed)
        for row, prompt in enumerate([1, 1, 6, 2, 3, 5, 1, 4]):
            batch["labels"][row, :prompt] = -100
        data.append(batch)
    _same(_llama, _own, data)


def test_rows_of_one_length_in_the_largest_batch_say_nothing_of_the_others() -> None:
    data = [_padded([10] * 8, left=False), _padded([3, 9, 5, 5, 7, 4, 8, 6], left=False, seed=1)]
    data += [_padded([6] * 8, left=False, seed=2)]
    _same(_llama, _own, data)


def test_rows_of_one_length_are_scored_together_and_so_are_means_of_rows() -> None:
    alike = [_padded([9] * 8, left=False, seed=s) for s in range(4)]
    assert _count(_model(_llama), _own, alike)[0] <= 12
    unlike = [_padded([3, 9, 5, 5, 7, 4, 8, 6], left=False, seed=s) for s in range(4)]
    assert _count(_model(_llama), _by_row, unlike)[0] <= 12


@each_model
def test_a_packed_row_is_one_sample(make: Callable[[], nn.Module]) -> None:
    """Several documents in a row, told apart by positions that begin again: the row's gradient is squared."""
    data = []
    for seed in range(3):
        batch = _padded([12] * 8, left=False, seed=seed)
        cuts = torch.randint(3, 9, (8,), generator=torch.Generator().manual_seed(seed))
        at = torch.arange(12).expand(8, 12)
        positions = torch.where(at < cuts[:, None], at, at - cuts[:, None])
        data.append({"input_ids": batch["input_ids"], "labels": batch["labels"], "position_ids": positions})
    _same(make, _own, data)


def test_weights_of_samples_tell_which_are_unlike() -> None:
    """One sample of many counts ten times as much."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, weight = batch
        return (F.cross_entropy(model(x), y, reduction="none") * weight).sum() / weight.sum()

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    torch.manual_seed(1)
    weight = torch.ones(24, dtype=torch.float64)
    weight[9] = 10.0
    data = [(torch.randn(24, 5, dtype=torch.float64), torch.randint(3, (24,)), weight)]
    _assert_close(_scores(net(), loss, data), _loop(net(), loss, data))


def test_scores_of_an_encoder_with_padded_rows() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    def make() -> nn.Module:
        still: dict[str, Any] = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return BertForSequenceClassification(BertConfig(**_TEXT, **still, max_position_embeddings=32))

    data = []
    for seed in range(3):
        batch = _padded([3, 9, 5, 5, 7, 4, 8, 6], left=False, seed=seed)
        data.append({**batch, "labels": torch.arange(8) % 2})
    _same(make, _own, data)
    assert _count(_model(make), _own, data)[0] <= 12


# --- sequences longer than a budget was priced for


def _trady(make: Callable[[], nn.Module], data: Any, budget: str = "12KB", **settings: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = make()
    method = tithe.TraDy(tithe.Budget(budget), layers="all", **settings)
    plan = tithe.attach(
        model, method, loss=_own, data=data, where=["*_proj.*", "*.c_*"] if make is _gpt2 else "*_proj.*"
    )
    return plan, torch.optim.AdamW(list(plan.parameters()), lr=1e-3)


def _step(plan: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> list[str]:
    """What a step warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _own(plan.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("dynamic", [True, False])
def test_longer_sequences_are_said_once_and_never_end_a_run(dynamic: bool) -> None:
    plan, optimizer = _trady(_llama, [_padded([3, 6, 5, 4], left=False)], dynamic=dynamic)
    limit = plan.spending().limit
    assert _step(plan, optimizer, _padded([6, 2, 6, 6], left=True)) == []
    said: list[str] = []
    for epoch in range(3):
        for longest in (12, 24, 3, 30):
            said += _step(plan, optimizer, _padded([longest, 3, 4, longest], left=True, seed=epoch))
            assert plan.spending().spent <= limit or not dynamic
        plan.end_epoch()
    assert len(said) == 1
    assert "a batch was larger than those that its budget was priced for" in said[0]
    assert plan.num_steps == 13
    kept = plan.spending()
    assert kept.channels > 0
    assert dynamic or kept.spent > limit  # it says what it is, and goes on


def test_layers_that_are_selected_whole_notice_a_longer_sequence_too() -> None:
    """All channels of a layer are trained by torch's own operation."""
    plan, optimizer = _trady(_llama, [_padded([3, 6, 5, 4], left=False)], "1MB", dynamic=False)
    before = plan.spending()
    assert before.channels == before.of_channels
    assert _step(plan, optimizer, _padded([12, 3], left=False)) == []  # as many tokens as were priced
    assert _step(plan, optimizer, _padded([12, 3, 3, 12], left=False)) == []
    batch = _padded([12, 3, 3, 12], left=False)
    ledger = tithe.measure(lambda: _own(plan.model, batch), model=plan.model)
    inputs = sum(48 * 4 * s.items.numel() for s in plan.selections.values())
    assert plan.spending().spent - before.spent == inputs // 2
    assert ledger.kept > inputs // 2


class _Shuffled:
    """A loader of 9 rows in batches of 4, in another order each time; the first time the longest is alone in one."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        lengths = [3, 4, 5, 4, 3, 3, 4, 4, 20]
        lengths = lengths if self.passes == 1 else lengths[::-1]
        for start in range(0, 9, 4):
            yield _padded(lengths[start : start + 4], left=False, seed=start)


def test_the_longest_row_may_come_in_a_whole_batch() -> None:
    data = _Shuffled()
    plan, optimizer = _trady(_llama, data)
    for _ in range(3):
        for batch in data:
            assert batch["input_ids"].numel() <= 80
            assert _step(plan, optimizer, batch) == []
        plan.end_epoch()
    assert plan.spending().spent <= plan.spending().limit


def test_experts_in_one_tensor_stay_frozen_under_channels_and_are_scored_by_entries() -> None:
    torch.manual_seed(0)
    model, data = _mixtral(), [_padded([3, 6, 5, 4], left=False)]
    with pytest.warns(tithe.TitheWarning, match="experts in one tensor"):
        tithe.attach(model, tithe.TraDy(tithe.Budget("20KB"), layers="all"), loss=_own, data=data).release()
    plan = tithe.attach(model, tithe.FISH(k=50), loss=_own, data=data, where="*.experts.*")
    assert plan.selections["model.layers.0.mlp.experts.gate_up_proj"].size
    before = model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"].clone()
    optimizer = torch.optim.AdamW(list(plan.parameters()), lr=1e-2)
    assert _step(plan, optimizer, data[0]) == []
    moved = (model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"] != before).flatten().nonzero().flatten()
    assert set(moved.tolist()) <= set(plan.selected("model.layers.0.mlp.experts.gate_up_proj").tolist())
    assert moved.numel()
    str(plan)  # what cannot be priced on shapes alone is left out
