"""Check prompts with answers: from JSON rows to rows of tokens with loss only on answers."""

import json

import numpy as np
import pytest

from mtnlg_jax.config import MaskingConfig
from mtnlg_jax.data.batches import Batches, Packed, heldout_count, heldout_rows
from mtnlg_jax.data.prepare import describe, prepare
from mtnlg_jax.data.read.pairs import pair_maker
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.store.tokens import TokenWriter
from mtnlg_jax.data.tokenizer import load_tokenizer
from mtnlg_jax.train.objectives import causal_batch, masked_batch

PAIRS = [(3, 2), (5, 4), (1, 9), (14, 3), (2, 2), (4, 1)]  # tokens of prompt and answer
LENGTH = 11


def _tokens(location, pairs=PAIRS, vocab_size=1000):
    writer = TokenWriter(location, vocab_size, "")
    number = 0
    for prompt, answer in pairs:
        writer.add(np.arange(number, number + prompt + answer), prompt + answer, (prompt, prompt))
        number += prompt + answer
    writer.finish()
    return open_tokens(location)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return _tokens(tmp_path_factory.mktemp("pairs"))


def test_whole_pairs_share_a_row_and_one_too_long_keeps_its_end(tokens, caplog):
    with caplog.at_level("WARNING"):
        packed = Packed(tokens, LENGTH)
    assert "1 of 6 prompts are cut at their beginning to fit data.sequence_length=11" in caplog.text
    assert packed.count == 5
    rows = packed.rows(np.arange(6))
    # 5 + 9 are more than 12; the fourth pair has 17, of which the last 12 are kept.
    starts = [0, 5, 14, 29, 41]
    sizes = [5, 9, 10, 12, 9]
    for row, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        assert rows["tokens"][row].tolist() == [*range(start, start + size), *[0] * (12 - size)]
    assert rows["segment_ids"][4].tolist() == [1] * 4 + [2] * 5 + [0] * 3
    assert rows["positions"][4].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 0]
    assert rows["answers"][4].tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]
    assert rows["answers"][3].tolist() == [0] * 9 + [1] * 3
    assert all(not values[5].any() for values in rows.values())
    assert heldout_count(tokens, LENGTH) == 5
    again = heldout_rows(tokens, LENGTH, np.array([4, 7]))
    assert (
        np.array_equal(again["tokens"][0], rows["tokens"][4]) and not again["segment_ids"][1].any()
    )


def test_weights_are_1_on_answers_only(tokens):
    batch = causal_batch(Packed(tokens, LENGTH).rows(np.arange(5)))
    trained = batch["labels"][batch["weights"] > 0]
    ends = np.cumsum([sum(pair) for pair in PAIRS])
    assert trained.tolist() == [
        token
        for end, (_, answer) in zip(ends, PAIRS, strict=True)
        for token in range(end - answer, end)
    ]
    assert tokens.predicted == (21, 21) and batch["weights"].sum() == 21


def test_all_rows_occur_equally_often_in_changing_order(tokens):
    batches = Batches([(tokens, 1.0)], LENGTH, seed=3)
    firsts = batches.rows(np.arange(5 * 1024))["tokens"][:, 0]
    assert dict(zip(*np.unique(firsts, return_counts=True), strict=True)) == dict.fromkeys(
        [0, 5, 14, 29, 41], 1024
    )
    assert len({tuple(part) for part in firsts.reshape(-1, 5).tolist()}) > 100


def test_plain_text_in_a_blend_is_trained_on_completely(tokens, tmp_path):
    writer = TokenWriter(tmp_path, 1000, "")
    writer.add(np.arange(500, 600), 100)
    writer.finish()
    rows = Batches([(tokens, 1.0), (open_tokens(tmp_path), 1.0)], LENGTH, seed=0).rows(
        np.arange(40)
    )
    plain = rows["tokens"][:, 0] >= 500
    assert 10 < plain.sum() < 30 and (rows["answers"][plain] == 1).all()
    assert rows["answers"][~plain].mean() < 0.6


class _Words:
    mask_id = 999
    is_special = np.zeros(1000, bool)
    starts_word = np.ones(1000, bool)


def test_only_answers_are_masked(tokens):
    rows = Packed(tokens, LENGTH).rows(np.arange(5))
    masked = masked_batch(
        rows, range(5), 0, MaskingConfig(word_share=1.0, mask_share=1.0, random_share=0.0), _Words
    )
    answers = rows["answers"][:, :-1] > 0
    assert np.array_equal(masked["weights"] > 0, answers)
    assert (masked["tokens"][answers] == 999).all() and not (
        masked["tokens"][~answers] == 999
    ).any()


def test_an_answer_longer_than_a_row_raises_with_both_lengths(tokens):
    message = (
        "the answer of pair 2 has 9 tokens with its end, data.sequence_length=8 holds 8; "
        "raise it to 9"
    )
    with pytest.raises(ValueError, match=message):
        Batches([(tokens, 1.0)], 8, seed=0)
    assert Packed(tokens, 9).rows(np.arange(5))["answers"].sum() == 21


# --- from JSON


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(count=120):
    return [
        {
            "text": f"the film number {n} is good or bad",
            "label": ["bad", "good"][n % 2],
            "stars": n % 5,
        }
        for n in range(count)
    ]


def test_prepare_stores_where_answers_begin(tmp_path):
    info = prepare(
        _write(tmp_path / "a.jsonl", _rows()),
        tmp_path / "out",
        vocab_size=320,
        heldout=0.2,
        progress=False,
        prompt="{text}\\nIt is",
        answer=" {label}, {stars}",
    )
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    texts = []
    for part in ("train", "heldout"):
        tokens = open_tokens(tmp_path / "out" / part)
        for begin, end, asked in zip(
            tokens.document_offsets,
            tokens.document_offsets[1:],
            tokens.prompt_lengths,
            strict=False,
        ):
            ids = tokens.read(begin, end)
            assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
            texts.append((tokenizer.decode(ids[:asked]), tokenizer.decode(ids[asked:])))
            # Encoded separately: the answer's tokens are those that a decoder would write.
            assert ids[asked:-1].tolist() == tokenizer.encode(texts[-1][1])
    assert sorted(texts) == sorted(
        (f"{row['text']}\nIt is", f" {row['label']}, {row['stars']}") for row in _rows()
    )
    assert info["heldout"]["documents"] and info["train"]["answer_bytes"] == sum(
        len(answer) for _, answer in texts[: info["train"]["documents"]]
    )
    assert info["input"]["bytes"] == sum(len(prompt + answer) for prompt, answer in texts)
    assert (
        "tokens are answers" in describe(info) and info["settings"]["answer"] == " {label}, {stars}"
    )


def test_answers_to_one_prompt_are_held_out_together(tmp_path):
    rows = [{"prompt": f"say {n // 3}", "answer": f"word {n}"} for n in range(300)]
    prepare(
        _write(tmp_path / "a.jsonl", rows),
        tmp_path / "out",
        vocab_size=300,
        heldout=0.3,
        progress=False,
        answer=" {answer}",
    )
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    prompts = {}
    for part in ("train", "heldout"):
        tokens = open_tokens(tmp_path / "out" / part)
        prompts[part] = {
            tokenizer.decode(tokens.read(begin, begin + asked))
            for begin, asked in zip(tokens.document_offsets, tokens.prompt_lengths, strict=False)
        }
    assert prompts["train"] and prompts["heldout"] and not prompts["train"] & prompts["heldout"]


def test_few_pairs_are_held_out_whole(tmp_path):
    rows = [{"prompt": f"a sentence. {n} " * 100, "answer": "yes. and no. " * 60} for n in range(4)]
    info = prepare(
        _write(tmp_path / "a.jsonl", rows),
        tmp_path / "out",
        vocab_size=290,
        progress=False,
        answer=" {answer}",
    )
    assert (info["train"]["documents"], info["heldout"]["documents"]) == (3, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "a"},
            r"a.jsonl, line 2: no 'label' among text; name the right one with --answer='\{KEY\}'",
        ),
        (
            {"label": "a", "x": 1},
            r"line 2: no 'text' among label, x; name the right one with --prompt='\{KEY\}'",
        ),
        ({"text": "a", "label": " "}, r"line 2: the answer \('label'\) is empty"),
        ({"text": "a", "label": None}, "line 2: 'label' holds NoneType, not text"),
        (["a"], "line 2: a list, not an object"),
    ],
)
def test_invalid_pairs_raise_an_error(tmp_path, row, message):
    path = _write(tmp_path / "a.jsonl", [{"text": "a b", "label": "c"}, row])
    with pytest.raises(ValueError, match=message):
        prepare(path, tmp_path / "out", progress=False, prompt="{text}", answer=" {label}")
    assert not (tmp_path / "out").exists()


def test_invalid_files_and_templates_raise_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="pairs and conversations are read from .jsonl"):
        prepare(tmp_path / "a.txt", tmp_path / "out", progress=False, answer=" {label}")
    with pytest.raises(ValueError, match="give that as --input"):
        prepare(None, tmp_path / "out", progress=False, answer=" {label}")
    for template in (" yes", "{", "{a.b}", "{}", "{a:3}"):
        with pytest.raises(ValueError, match="--answer="):
            pair_maker("{prompt}", template)


def test_lists_are_joined_and_braces_are_kept():
    pair = pair_maker("{{ {a} }}\\n", "{b}")({"a": ["x", "y"], "b": 1.5})
    assert (pair.prompt, str(pair)) == ("{ x y }\n", "1.5")
