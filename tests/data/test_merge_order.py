"""Byte-level BPE by tiktoken: the same ids as the tokenizers package for every text."""

import json
import random

import pytest
from hub_folders import TEXT, byte_level

from mtnlg_jax.data.tokenizer import merge_order
from mtnlg_jax.data.tokenizer.hub import HubTokenizer
from mtnlg_jax.data.tokenizer.merge_order import COMPARED, GPT_4O, LLAMA_3, QWEN_2, TEKKEN

NAMES = {LLAMA_3: "llama 3", QWEN_2: "qwen 2", TEKKEN: "tekken", GPT_4O: "gpt-4o"}
CHARACTERS = (
    "aAbBsSdDlLtTvVrReEmM'   \n\r\t\u00a0\u3000\u2028\x85\x1c0123456789\u0663\u096a"
    "中文字，。🙂\U0001f469\u200d\U0001f467é\u0301\u017f\u212aßİ_-/+=<|>"
)


def texts_of(seed: int, number: int) -> list[str]:
    """Return random texts of letters, digits, white space, marks, CJK, emoji and any character."""
    rng = random.Random(seed)

    def character() -> str:
        if rng.random() < 0.9:
            return rng.choice(CHARACTERS)
        return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))

    made = ["".join(character() for _ in range(rng.randrange(40))) for _ in range(number)]
    for text in TEXT:
        made += [text, text.upper(), f"{text}<|endoftext|>{text}", f"a<think>{text}</think>"]
    return [*made, " " * 70 + "x", "\n" * 50, " \n" * 30 + "\t", "x" * 300, "", "<think>"]


def tokenizer_of(pattern: str, nfc: bool = False, **model) -> HubTokenizer:
    fast = byte_level(vocab_size=420)
    fast.add_special_tokens(["<|im_end|>"])
    whole = json.loads(fast.to_str())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [split | {"invert": False}, byte | {"use_regex": False}]
    whole["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    whole["normalizer"] = {"type": "NFC"} if nfc else None
    whole["model"] |= model
    end = 1 + max(whole["model"]["vocab"].values())
    for number, name in enumerate(("<think>", "</think>")):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        whole["added_tokens"].append({"id": end + 1 + number, "content": name} | flags)
    roles = {"bos": 0, "eos": 0, "pad": 0, "prompt_bos": False}
    return HubTokenizer(json.dumps(whole).encode(), json.dumps(roles).encode())


@pytest.mark.parametrize("pattern", COMPARED, ids=NAMES.get)
def test_ids_are_those_of_tokenizers(pattern):
    ours = tokenizer_of(pattern, nfc=pattern == QWEN_2, ignore_merges=pattern in (LLAMA_3, TEKKEN))
    texts = texts_of(0, 3000)
    slow = ours.encode_batch(texts)
    assert ours._tiktoken is not None
    ours._characters = 10**9
    assert ours.encode_batch(texts) == ours.encode_batch(texts, threads=2) == slow
    words = [ids for ids, text in zip(slow, texts, strict=True) if "<think>" in text]
    think = ours._fast.token_to_id("<think>")
    assert words and all(think in ids for ids in words)
    assert not any(0 in ids for ids in slow)  # <|endoftext|> in a text is text


def test_the_fast_way_is_taken_after_many_characters(monkeypatch):
    ours = tokenizer_of(LLAMA_3)
    called = []
    monkeypatch.setattr(
        ours, "_encode_faster", lambda *arguments: called.append(1) or [[]], raising=False
    )
    ours.encode_batch(["the man"])
    assert not called
    ours.encode_batch(["the man " * 20_000])
    assert called


def test_a_long_run_of_white_space_is_left_to_tokenizers(monkeypatch):
    """tiktoken would give it up; the limit is lower here."""
    ours = tokenizer_of(LLAMA_3)
    text = "the" + " " * 150_000 + "man"
    slow = ours._read([text])[0]
    ours._characters = 10**9
    assert merge_order.is_hard(text) and not merge_order.is_hard("the man " * 20_000)
    assert ours.encode_batch(["a", text, "b"])[1] == slow


def test_other_tokenizers_are_left_to_tokenizers():
    assert tokenizer_of(LLAMA_3.replace("{1,3}", "{1,2}"))._tiktoken is None
    assert tokenizer_of(LLAMA_3, dropout=0.1)._tiktoken is None
    assert tokenizer_of(QWEN_2)._tiktoken is not None
    merges = json.loads(byte_level(vocab_size=420).to_str())["model"]["merges"]
    at = next(i for i in range(len(merges) - 1) if "".join(merges[i]) not in merges[i + 1])
    swapped = [*merges[:at], merges[at + 1], merges[at], *merges[at + 2 :]]
    assert sorted(swapped) == sorted(merges) and swapped != merges
    assert tokenizer_of(QWEN_2, merges=swapped)._tiktoken is None
