"""Rows of messages: rendered by the chat template, trained on the assistant's turns, whole."""

import json

import numpy as np
import pytest
from hub_folders import FOLDERS

from mtnlg_jax.data.batches import Batches, HeldOut
from mtnlg_jax.data.conversations import Conversations, shown
from mtnlg_jax.data.prepare import describe, prepare
from mtnlg_jax.data.store.convert import write_lines
from mtnlg_jax.data.store.megatron import write_megatron
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.tokenizer import load_tokenizer
from mtnlg_jax.data.tokenizer.chat import Chat
from mtnlg_jax.train.objectives import causal_batch

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    made = FOLDERS["qwen"](tmp_path / "tokenizer")
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


def talk(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


ROWS = [
    talk("the man", "in the town"),
    talk("where?", "To be", "or not", "it is the sea 🙂"),
    talk("天地", "玄黄"),
    talk("a <|im_end|> b", "born"),
]


def write(path, rows, key="messages"):
    path.write_text("\n".join(json.dumps({key: row}) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def prepared(tmp_path, folder):
    rows = write(tmp_path / "rows.jsonl", ROWS)
    info = prepare(
        rows, tmp_path / "out", tokenizer=str(folder), messages="messages", progress=False
    )
    return info, tmp_path / "out"


def test_the_arrays_hold_what_the_template_renders(prepared):
    """Without a bos or eos of ours; prepared.json counts the answers."""
    info, out = prepared
    tokenizer = load_tokenizer(out / "tokenizer")
    expected = {tuple((row := Chat(tokenizer).training_row(each)).tokens): row for each in ROWS}
    found = 0
    for part in ("train", "heldout"):
        tokens = open_tokens(out / part)
        assert tokens.conversations and tokens.answers_only and tokens.prompt_lengths is None
        offsets = tokens.document_offsets
        for start, stop in zip(offsets, offsets[1:], strict=False):
            row = expected.pop(tuple(tokens.read(start, stop).tolist()))
            answers = tokens.read_answers(np.array([start]), stop - start)[0]
            assert np.array_equal(answers, row.answers)
            found += int(row.answers.sum())
        texts = [b"".join(map(tokenizer.token_bytes, tokens.read(0, len(tokens)).tolist()))]
        assert tokens.predicted == (info[part]["answer_tokens"], info[part]["answer_bytes"])
        assert 0 < tokens.predicted[1] < len(texts[0])
    assert not expected
    assert found == info["train"]["answer_tokens"] + info["heldout"]["answer_tokens"]
    assert "tokens are answers" in describe(info)
    assert info["examples"][0][:2] == ["<|im_start|>", "u"] and len(info["examples"]) == 3


def test_rows_predict_the_turns_of_the_assistant_alone(prepared):
    _, out = prepared
    tokenizer = load_tokenizer(out / "tokenizer")
    tokens = open_tokens(out / "train")
    rows = Batches([(tokens, 1.0)], 64, seed=0).rows(np.arange(4))
    batch = causal_batch(rows)
    chosen = batch["labels"][batch["weights"] > 0].tolist()
    shown_text = tokenizer.decode(chosen, skip_special=False)
    whole = shown_text.replace("<|im_end|>", "")
    assert whole != shown_text and "<|" not in whole
    assert "user" not in whole and "assistant" not in whole and "where" not in whole
    held_out = HeldOut([(open_tokens(out / "heldout"), 1.0)], 64, 4)
    held = held_out.read(held_out.source[:1], held_out.window[:1])
    assert held["answers"].sum() == open_tokens(out / "heldout").predicted[0]


def test_long_conversations_are_refused_by_their_line(tmp_path, folder):
    """At preparing if the length is known, else at training: they are never cut."""
    rows = write(tmp_path / "rows.jsonl", [*ROWS[:2], talk("a" * 80, "b"), ROWS[2]])
    arguments = {"tokenizer": str(folder), "messages": "messages", "progress": False}
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3: .* has 100 tokens, .* holds 65"):
        prepare(rows, tmp_path / "out", sequence_length=64, **arguments)
    info = prepare(rows, tmp_path / "out", sequence_length=64, on_error="skip", **arguments)
    assert info["input"]["damaged"] == 1 and info["settings"]["sequence_length"] == 64
    prepare(rows, tmp_path / "long", heldout=0.0, **arguments)
    with pytest.raises(
        ValueError, match=r"1 of 4 conversations are longer .* --sequence_length=64"
    ):
        Batches([(open_tokens(tmp_path / "long/train"), 1.0)], 64, seed=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "the conversation is empty"),
        ({"messages": talk("x")}, "the last turn is of the user; end with an answer"),
        ({"messages": "x"}, "messages hold a str"),
        ({"text": "x"}, "no 'messages' among text; name the right one with --messages"),
        (
            {"messages": talk("x", "")[:1] + [{"role": "assistant"}]},
            'turn 2, of the .* no "content"',
        ),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused_by_their_line(tmp_path, folder, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": ROWS[0]}) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2: .*{message}"):
        prepare(path, tmp_path / "out", tokenizer=str(folder), messages="messages", progress=False)
    assert not (tmp_path / "out").exists()


def test_conversations_are_shown_with_what_is_trained_on(tmp_path, folder, capsys):
    rows = write(tmp_path / "rows.jsonl", ROWS[:1], "talk")
    arguments = {"tokenizer": str(folder), "messages": "talk", "heldout": 0.0, "progress": False}
    prepare(rows, tmp_path / "out", show=3, **arguments)
    row = Chat(load_tokenizer(folder)).training_row(ROWS[0])
    counts = f"{row.answers.sum()} of {len(row.tokens)} tokens are trained on"
    assert capsys.readouterr().out == (
        f"--- {counts} ---\n"
        "<|im_start|>user\nthe man<|im_end|>\n<|im_start|>assistant\n«in the town<|im_end|>»\n\n"
    )
    talks = Conversations(load_tokenizer(folder), "talk")
    row = talks.row(talks.make({"talk": ROWS[0]}))
    assert "\033[32min the town<|im_end|>\033[0m\n" in shown(row, load_tokenizer(folder), True)


def test_a_given_template_comes_with_the_data(tmp_path):
    """So that the run that is trained on them can chat. Tools reach the template."""
    plain = FOLDERS["qwen"](tmp_path / "tokenizer")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": ROWS[0], "tools": [{"name": "look"}]}))
    arguments = {"tokenizer": str(plain), "messages": "messages", "progress": False}
    with pytest.raises(ValueError, match="no chat template"):
        prepare(path, tmp_path / "out", **arguments)
    template = tmp_path / "chat.jinja"
    template.write_text("{{ tools[0].name }}" + TEMPLATE)
    prepare(path, tmp_path / "out", chat_template=template, **arguments)
    tokenizer = load_tokenizer(tmp_path / "out/tokenizer")
    assert tokenizer.fingerprint == load_tokenizer(plain).fingerprint
    tokens = open_tokens(tmp_path / "out/train")
    assert tokenizer.decode(tokens.read(0, len(tokens))).startswith("lookuser\nthe man")


def test_what_does_not_go_with_conversations(tmp_path, folder, prepared):
    rows = write(tmp_path / "rows.jsonl", ROWS)
    quiet = {"progress": False}
    for arguments, message in (
        ({"messages": "messages"}, "--messages needs the tokenizer of a model"),
        ({"show": 3}, "--show are for conversations"),
        ({"messages": "m", "answer": " {a}", "tokenizer": str(folder)}, "without --answer"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(rows, tmp_path / "other", **arguments, **quiet)
    tokens = open_tokens(prepared[1] / "train")
    with pytest.raises(ValueError, match="holds conversations, and Megatron's files"):
        write_megatron(tokens, tmp_path / "prefix")
    with pytest.raises(ValueError, match="holds conversations, whose turns cannot be read back"):
        write_lines(tokens, str(tmp_path / "lines.jsonl"), load_tokenizer(folder))
