"""Language models: texts and chats become tokens that are predicted, packed or not, and runs resume as if unstopped."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from task_rows import TEXTS as RECIPE
from tithe import TitheError
from tithe.app.train import read_recipe
from tithe.app.train.loop import Run
from tithe.app.train.signals import Interrupted
from tithe.app.train.tasks.causal_lm import CausalEncoder
from tithe.app.train.tasks.text import IGNORED
from workplace import assert_equal, quiet, run, shown

TEXT = "".join(f"line {number} of {number**3 % 1001}, and so on\n" for number in range(40))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a text and a recipe."""
    (tmp_path / "train.txt").write_text(TEXT)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def made(place: Path, *settings: str) -> Run:
    return Run(read_recipe(place / "recipe.toml", settings), resume=False, console=quiet())


def refusal(place: Path, *settings: str) -> TitheError:
    with pytest.raises(TitheError) as error:
        made(place, *settings)
    assert not (place / "out").exists()
    return error.value


def items(samples: Any) -> list[tuple[list[int], list[int]]]:
    return [samples[row] for row in range(len(samples))]


def words(ids: list[int]) -> str:
    return bytes(token - 3 for token in ids if token > 2).decode()


# ------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_text_file_is_learned_from(packing: str, place: Path) -> None:
    result = run(place / "recipe.toml", f"data.packing={packing}", "run.steps=8")
    losses = [evaluation["loss"] for evaluation in result["evaluations"]]
    assert losses[-1] < math.log(259)
    assert result["metrics"]["validation"]["perplexity"] == pytest.approx(math.exp(losses[-1]))
    assert result["trainable"]["head"] == 0
    assert (place / "out" / "model" / "config.json").is_file()


def test_the_end_of_every_text_is_held_out_and_nothing_of_it_is_lost(place: Path) -> None:
    both = made(place, "data.validation_fraction=0.25").samples
    texts = {name: "".join(words(ids) for ids, _ in items(samples)) for name, samples in both.items()}
    assert texts["train"] + texts["validation"] == TEXT
    assert texts["validation"].startswith("line 30 ")
    assert max(len(ids) for ids, _ in items(both["train"])) == 16


def test_packing_fills_rows_with_one_text_after_the_other(place: Path) -> None:
    samples = made(place, "data.packing=true", 'data.documents="line"').samples["train"]
    rows = items(samples)
    assert {len(ids) for ids, _ in rows[:-1]} == {16}
    tokens = [token for ids, _ in rows for token in ids]
    assert tokens.count(1) == 36  # each line ends with the token that ends a text; four lines validate
    assert sorted(words(tokens).split("line ")[1:]) == sorted(
        line.removeprefix("line ") for line in _lines(made(place, 'data.documents="line"').samples["train"])
    )


def _lines(samples: Any) -> list[str]:
    tokens = [token for ids, _ in items(samples) for token in ids]
    text = "".join("\n" if token == 1 else bytes([token - 3]).decode() for token in tokens)
    return text.splitlines()


def test_the_loss_of_a_batch_is_the_mean_over_its_tokens(place: Path) -> None:
    one = made(place, 'data.documents="line"', "data.max_length=40")
    samples = one.samples["train"]
    (batch,) = samples.batches([range(4)])
    alone = [next(samples.batches([[row]])) for row in range(4)]
    one.model.eval()
    with torch.no_grad():
        whole, parts = one.loss(one.model, batch), [one.loss(one.model, row) for row in alone]
    weights = [samples.weight([row]) for row in range(4)]
    assert len(set(weights)) > 1
    mean = sum(float(part) * weight for part, weight in zip(parts, weights, strict=True)) / sum(weights)
    assert float(whole) == pytest.approx(mean, rel=1e-5)
    assert samples.weight(range(4)) == sum(weights) == int((batch["labels"][:, 1:] != IGNORED).sum())


def test_accumulated_parts_count_by_their_tokens(place: Path) -> None:
    settings = ('data.documents="line"', "data.max_length=40", "method.density=1.0", "run.steps=2")
    run(place / "recipe.toml", *settings, "run.output=whole", 'optimizer.name="sgd"', "run.batch_size=6")
    parts = ("run.batch_size=2", "run.accumulate=3")
    run(place / "recipe.toml", *settings, "run.output=parts", 'optimizer.name="sgd"', *parts)
    one, two = (load_file(place / name / "delta.safetensors") for name in ("whole", "parts"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("packing", "stop"), [("true", 2), ("false", 5)])
def test_resuming_equals_never_stopping(packing: str, stop: int, place: Path) -> None:
    settings = (f"data.packing={packing}", "run.steps=7", "run.checkpoint_every=3", "run.evaluate_every=2")
    path = place / "recipe.toml"
    whole = run(path, "run.output=whole", *settings)
    parts = Run(read_recipe(path, ["run.output=parts", *settings]), resume=False, console=quiet())
    inner = parts.trainee.backward

    def backward(closure: Callable[[], Tensor]) -> Tensor:
        if parts.position.step + 1 == stop:
            signal.raise_signal(signal.SIGINT)
        return inner(closure)

    parts.trainee.backward = backward  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(Interrupted, match=f"at step {stop} of 7"):
        parts.fit()
    again = run(path, "run.output=parts", *settings, resume=True)
    assert_equal(*(load_file(place / name / "delta.safetensors") for name in ("whole", "parts")))
    for key in ("metrics", "best_step", "evaluations"):
        assert whole[key] == again[key]


def test_a_folder_of_texts_and_a_paragraph_each(place: Path) -> None:
    (place / "texts" / "deeper").mkdir(parents=True)
    (place / "texts" / "a.txt").write_text("one\ntwo\n\n  \nthree\n")
    (place / "texts" / "deeper" / "b.txt").write_bytes(b"\r\n\r\nfour\r\n\r\nfive")
    (place / "texts" / "notes.csv").write_text("no,text")
    (place / "texts" / ".hidden.txt").write_text("no text")
    one = made(place, "data.train=texts", 'data.documents="paragraph"', "data.validation=train.txt")
    rows = one.examples.splits["train"]
    assert rows.text == ("one\ntwo", "three", "four", "five")  # pyright: ignore[reportAttributeAccessIssue]
    assert [rows.place(row) for row in range(4)] == [
        "a.txt line 1",
        "a.txt line 5",
        "deeper/b.txt line 3",
        "deeper/b.txt line 5",
    ]


def test_a_table_of_texts_is_learned_from_too(place: Path) -> None:
    (place / "rows.jsonl").write_text("".join(json.dumps({"text": f"number {n}"}) + "\n" for n in range(20)))
    assert run(place / "recipe.toml", "data.train=rows.jsonl")["rows"] == {"train": 18, "validation": 2}


FILES: dict[str, tuple[str, bytes, tuple[str, ...], str, str]] = {
    "empty": ("a.txt", b"", (), "a.txt", "an empty file"),
    "blank": ("a.txt", b" \n\n\t\n", (), "a.txt", "an empty file"),
    "latin-1": ("a.txt", b"one\ncaf\xe9 au lait\n", (), "a.txt line 2 column 4", "cp1252"),
    "utf-16 without a mark": ("a.txt", "one\ntwo\n".encode("utf-16-le"), (), "a.txt line 1", "UTF-16"),
    "zeros": ("a.txt", b"one\ntw\0o\n", (), "a.txt line 2 column 3", "0x00"),
    "an archive": ("a.txt", b"\x1f\x8b\x08\0\0", (), "a.txt", "gzip"),
    "one character": ("a.txt", b"x", (), "a.txt", "too short to hold out"),
    "no such column": ("a.jsonl", b'{"body": "x"}\n', (), "[data] text", "no column 'text'"),
    "an empty text in a table": ("a.jsonl", b'{"text": "x"}\n{"text": ""}\n', (), "a.jsonl line 2", "an empty text"),
    "half a character": ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud83d"}\n', (), "a.jsonl line 2", "surrogate"),
    "a key of another task": ("a.txt", b"x", ('data.label="x"',), "[data] label", "label with task"),
    "a number of outputs": ("a.txt", b"x", ("model.num_labels=3",), "[model] num_labels", "3 outputs"),
    "a metric of another task": ("a.txt", b"x", ('run.metrics=["accuracy"]',), "[run] metrics", "accuracy of"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_text_that_cannot_be_learned_from_is_named(name: str, place: Path) -> None:
    file, content, settings, where, found = FILES[name]
    (place / file).write_bytes(content)
    error = refusal(place, f"data.train={file}", *settings)
    assert where in error.place
    assert found in error.found


def test_texts_in_another_encoding_and_empty_files_by_wish(place: Path) -> None:
    (place / "texts").mkdir()
    (place / "texts" / "a.txt").write_bytes(("café " * 30).encode("latin-1"))
    (place / "texts" / "b.txt").write_bytes(b"")
    one = made(place, "data.train=texts", 'data.encoding="latin-1"', "data.skip_bad=true")
    assert one.examples.splits["train"].text[0].startswith("café café")  # pyright: ignore[reportAttributeAccessIssue]
    assert "left out 1" in one.notes[0]


# ------------------------------------------------------------------------------------------------------------- chats

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "bye"},
]


def write_chats(path: Path, *chats: Any) -> None:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


@pytest.fixture
def chats(place: Path) -> Path:
    """The same folder with a tokenizer that has a template, and eight chats."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place / "chatty")
    write_chats(place / "chats.jsonl", *[CHAT] * 8)
    return place


CHATS = ("model.tokenizer=chatty", "data.train=chats.jsonl", 'data.messages="messages"', "data.max_length=128")


def test_of_a_chat_the_assistants_turns_are_learned(chats: Path) -> None:
    one = made(chats, *CHATS)
    (ids, labels), *_ = items(one.samples["train"])
    assert words(ids) == "<system>be kind\n<user>hello\n<assistant>good day\n<user>and?\n<assistant>bye\n"
    assert words([label for label in labels if label != IGNORED]) == "good day\nbye\n"
    assert one.notes == []
    result = run(chats / "recipe.toml", *CHATS, "data.packing=true")
    assert result["steps"] == 3


def test_a_template_that_marks_what_is_generated_says_it_itself(chats: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "user", "assistant", "system", "hello"])}
    more = ["good", "day", "be", "kind", "and?", "bye", ":", "<unk>"]
    inner = Tokenizer(models.WordLevel({**vocabulary, **{w: 6 + n for n, w in enumerate(more)}}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = (
        "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }} </s>{% endgeneration %} {% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    fast.save_pretrained(chats / "fast")
    one = made(chats, *CHATS, "model.tokenizer=fast")
    (ids, labels), *_ = items(one.samples["train"])
    learned = fast.decode([label for label in labels if label != IGNORED])
    assert learned == "good day </s> bye </s>"
    assert len(ids) == len(labels)


def test_a_template_that_rewrites_earlier_turns_is_said_to(chats: Path) -> None:
    path = chats / "chatty" / "chat_template.jinja"
    path.write_text("{{ messages | length }}" + TEMPLATE)
    one = made(chats, *CHATS)
    assert "every token is learned" in one.notes[0]
    (ids, labels), *_ = items(one.samples["train"])
    assert ids == labels


def without(number: int, key: str) -> list[dict[str, str]]:
    return [
        {name: value for name, value in message.items() if at != number or name != key}
        for at, message in enumerate(CHAT)
    ]


WRONG: dict[str, tuple[Any, str, str]] = {
    "an unknown role": ([{"role": "human", "content": "x"}, CHAT[2]], "the role 'human'", '"role": "user"'),
    "a role in capitals": ([{"role": "User", "content": "x"}, CHAT[2]], "the role 'User'", '"role": "user"'),
    "another role": ([{"role": "narrator", "content": "x"}, CHAT[2]], "the role 'narrator'", "correct the role"),
    "no role": (without(1, "role"), "message 2 without a role", 'add "role"'),
    "roles of another name": ([{"from": "human", "value": "x"}], "without a role", "rename 'from'"),
    "no content": (without(2, "content"), "message 3 (of the assistant) without content", 'write "content"'),
    "null content": ([{"role": "user", "content": None}, CHAT[2]], "without content", 'write "content"'),
    "content of another name": ([{"role": "user", "value": "x"}, CHAT[2]], "without content", "rename 'value'"),
    "empty content": ([{"role": "user", "content": " "}, CHAT[2]], "an empty text", "write a text"),
    "a number for content": ([{"role": "user", "content": 3}, CHAT[2]], "int, no text", "write a text"),
    "no messages": ([], "no messages", "write the messages"),
    "null": (None, "null", "write the messages"),
    "a text": ("hello", "the text 'hello'", "as a list"),
    "texts": (["hello", "you"], "message 1 that is str", "correct the line"),
    "no assistant": ([CHAT[1]], "the assistant says nothing", "remove the line"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_chat_that_is_none_is_refused_with_its_line_or_left_out_by_wish(name: str, chats: Path) -> None:
    wrong, found, remedy = WRONG[name]
    write_chats(chats / "chats.jsonl", CHAT, CHAT, wrong, *[CHAT] * 6)
    error = refusal(chats, *CHATS, "data.validation=chats.jsonl")
    assert error.place.startswith("chats.jsonl line 3")
    assert found in error.found
    assert remedy in error.remedy
    one = made(chats, *CHATS, "data.validation=chats.jsonl", "data.skip_bad=true")
    assert len(one.samples["train"]) == 8
    assert any("left out 1" in note for note in one.notes)


def test_what_a_template_refuses_is_told_with_its_line(chats: Path) -> None:
    path = chats / "chatty" / "chat_template.jinja"
    path.write_text(
        "{% if messages[0].role != 'system' %}{{ raise_exception('begin with the system') }}{% endif %}" + TEMPLATE
    )
    write_chats(chats / "chats.jsonl", CHAT, CHAT[1:], *[CHAT] * 6)
    error = refusal(chats, *CHATS, "data.validation=chats.jsonl")
    assert error.place == "chats.jsonl line 2"
    assert "begin with the system" in error.found


def test_a_tokenizer_without_a_template_is_refused_with_a_remedy(chats: Path) -> None:
    error = refusal(chats, *CHATS, "model.tokenizer=bytes")
    assert "without a chat template" in error.found
    assert "chat_template.jinja" in error.remedy


def test_chats_that_are_longer_are_cut_and_said_to_be(chats: Path) -> None:
    long = [{"role": "user", "content": "why " * 30}, CHAT[2]]
    write_chats(chats / "chats.jsonl", *[CHAT] * 7, long)
    one = made(chats, *CHATS, "data.max_length=64", "data.validation=chats.jsonl")
    assert one.notes[:2] == [
        "train: 8 of 8 chats are longer than 64 tokens ([data] max_length): cut",
        "train: left out 1 of 8 rows, in which the assistant says nothing",
    ]
    assert len(one.samples["train"]) == 7
    assert "too long" not in shown(quiet())
    error = refusal(chats, *CHATS, "data.max_length=8")
    assert "raise max_length" in error.remedy


def test_a_tokenizer_without_a_token_that_pads_uses_its_end_and_masks_it(chats: Path) -> None:
    path = chats / "chatty" / "tokenizer_config.json"
    told = json.loads(path.read_text())
    told["pad_token"] = None
    path.write_text(json.dumps(told))
    one = made(chats, *CHATS)
    if one.network.notes:
        assert "which ends a text, pads, and is masked there" in one.notes[0]
    encoder = one.network.encoder
    assert isinstance(encoder, CausalEncoder)
    batch = encoder.join([([5, 6, 7], [5, 6, 7]), ([5], [5])])
    inputs = batch["inputs"]
    assert isinstance(inputs, dict)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [5, IGNORED, IGNORED]]


# ------------------------------------------------------------------------------------------------------------ models


def test_weights_from_scratch_are_those_of_the_seed(place: Path) -> None:
    one, two, other = (made(place, f"run.seed={seed}").model.state_dict() for seed in (0, 0, 1))
    assert_equal(one, two)
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_a_saved_model_is_trained_by_its_folder_or_its_architecture_is_taken(place: Path) -> None:
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=259, num_attention_heads=2, **shape))
    model.save_pretrained(place / "saved")
    ByT5Tokenizer(extra_ids=0).save_pretrained(place / "saved")
    text = RECIPE[: RECIPE.index("tokenizer")] + 'pretrained = "saved"\n' + RECIPE[RECIPE.index("[data]") :]
    (place / "recipe.toml").write_text(text)
    loaded = made(place)
    assert_equal(dict(loaded.model.state_dict()), dict(model.state_dict()))
    fresh = made(place, "model.scratch=true").model.state_dict()
    assert fresh.keys() == model.state_dict().keys()
    assert any(not torch.equal(value, model.state_dict()[name]) for name, value in fresh.items())


@pytest.mark.parametrize(
    ("settings", "found", "remedy"),
    [
        (['model.scratch={model_type = "lama"}'], "model_type 'lama'", "llama"),
        (["model.scratch={hidden_size = 16}"], "model_type None", "correct it"),
        (['model.scratch={model_type = "llama", hiden_size = 16}'], "'hiden_size'", "hidden_size"),
        (['model.scratch={model_type = "llama", hidden_size = "x"}'], "hidden_size", "correct"),
        (['model.scratch={model_type = "bert-japanese-x"}'], "model_type", "correct it"),
        (['model.scratch={model_type = "vit"}'], "", "model_type"),
        (['model.pretrained="saved"'], "a configuration beside pretrained", "scratch = true"),
        (["model.scratch=true"], "none of them", "add one"),
        (
            ["data.max_length=3000", 'model.scratch={model_type = "gpt2", n_embd = 16, n_layer = 1, n_head = 2}'],
            "1024 learned positions",
            "max_length = 1024",
        ),
        (['method.name="head"', "method.density=1"], "unknown key", "remove"),
    ],
)
def test_a_configuration_that_is_none_is_refused(settings: list[str], found: str, remedy: str, place: Path) -> None:
    error = refusal(place, *settings)
    assert found in error.found
    assert remedy in error.remedy


BERT = """
[model]
tokenizer = "bytes"
[model.scratch]
model_type = "bert"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
"""


def test_a_model_that_sees_what_it_is_to_predict_is_refused(place: Path) -> None:
    path = place / "recipe.toml"
    rest = "[data]" + path.read_text().partition("[data]")[2]
    path.write_text(BERT + rest)
    with pytest.raises(TitheError, match="a token sees those after it") as error:
        made(place)
    assert "write is_decoder = true into [model] scratch" in error.value.remedy
    path.write_text(BERT + "is_decoder = true\n" + rest)
    made(place)
