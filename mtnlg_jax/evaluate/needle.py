"""Recall of a pass key hidden in a long text, by length and depth (Mohtashami 2023,
arXiv:2305.16300, section 4.2).

The key is five digits. Recall is measured in two ways: whether the key ranks first among other keys
behind the prompt, and whether greedy decoding writes it.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.rank import rank
from mtnlg_jax.decode.results import encode_prompt

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
DIGITS = 5


class Wording(NamedTuple):
    """The texts of a language around the key; ``join`` is written between sentences."""

    task: str
    filler: tuple[str, ...]
    key: str
    question: str
    lead: str  # between the question and the key
    join: str


WORDINGS = {
    "en": Wording(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "it. I will quiz you about the important information there.",
        (
            "The grass is green.",
            "The sky is blue.",
            "The sun is yellow.",
            "Here we go.",
            "There and back again.",
        ),
        "The pass key is {key}. Remember it. {key} is the pass key.",
        "What is the pass key? The pass key is",
        " ",
        " ",
    ),
    "zh": Wording(
        "下面的大量无关文字中藏有一条重要信息。请找到并记住它，之后我会考你这条信息。",
        ("草是绿色的。", "天空是蓝色的。", "太阳是黄色的。", "我们出发吧。", "去了又回来。"),
        "密码是{key}。请记住，{key}就是密码。",
        "请说出密码。密码是",
        "",
        "",
    ),
}


class Needle(NamedTuple):
    """Recall at one length and depth: shares of the trials, 0 to 1."""

    length: int  # most tokens of the prompt and the key
    depth: float  # 0: the key stands before the filler, 1: behind it
    ranked: float  # the key ranks first among the candidates
    exact: float  # greedy decoding writes the key and no further digit
    trials: int


class NeedlePrompt(NamedTuple):
    prompt: str
    key: str
    answer: str  # the key as it follows the prompt
    candidates: tuple[str, ...]  # the answer among others, in random order


def measure_needles(
    decoder: Decoder,
    tokenizer,
    language: str = "en",
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    trials: int = 4,
    candidates: int = 10,
    seed: int = 0,
    on_cell: Callable[[int, int], None] = lambda done, total: None,
) -> list[Needle]:
    """Return the recall for each length, and for each depth of it.

    Args:
      language: "en" or "zh", of the prompt.
      lengths: most tokens of prompt and key. None: 1/4, 1/2, 3/4 and all of the model's context,
        those that the prompt without filler fits.
      depths: 0 to 1.
      trials: different keys for each length and depth.
      candidates: keys to rank; chance is 1 / candidates.
      on_cell: called with (cells done, cells) after each.

    Raises ValueError as `lengths_of` does, and on settings outside their ranges.
    """
    _check(depths, trials, candidates, seed)
    lengths = lengths_of(tokenizer, decoder.context, language, lengths)
    draw = random.Random(seed)
    found = []
    for length in lengths:
        for depth in depths:
            prompts = [
                needle_prompt(tokenizer, length, depth, language, candidates, draw.random())
                for _ in range(trials)
            ]
            ranked, exact = _recalled(decoder, tokenizer, prompts)
            found.append(Needle(length, depth, ranked, exact, trials))
            on_cell(len(found), len(lengths) * len(depths))
    return found


def lengths_of(
    tokenizer, context: int, language: str, lengths: Sequence[int] | None = None
) -> list[int]:
    """Return ``lengths``, or those by default; see `measure_needles`.

    Raises ValueError on a length above ``context``, or below the prompt without filler.
    """
    wording = _wording_of(language)
    # A tokenizer may split some keys more than others.
    longest = _longest(tokenizer, wording, _keys(random.Random(0), 100))
    least = _size(tokenizer, wording, longest, longest, 0, 0.0)
    if lengths is None:
        quarters = [context * part // 4 for part in (1, 2, 3, 4)]
        # The context alone is refused below if it is too short.
        lengths = [length for length in quarters if length >= least] or quarters[-1:]
    for length in lengths:
        if not least <= length <= context:
            raise ValueError(
                f"length={length} does not fit: the prompt without filler has {least} tokens and "
                f"the model's context holds {context}; give a length between them"
                + (", or use a model with more positions" if least > context else "")
            )
    return list(lengths)


def needle_prompt(
    tokenizer, length: int, depth: float, language: str, candidates: int, seed: float
) -> NeedlePrompt:
    """Return a prompt that has, with any of its candidates, at most ``length`` tokens, and as much
    filler as fits."""
    wording = _wording_of(language)
    draw = random.Random(seed)
    keys = _keys(draw, candidates)
    longest = _longest(tokenizer, wording, keys)
    low = 0
    high = length
    # The most sentences of filler that fit: the number of tokens grows with them.
    while low < high:
        middle = (low + high + 1) // 2
        if _size(tokenizer, wording, keys[0], longest, middle, depth) <= length:
            low = middle
        else:
            high = middle - 1
    prompt = _text(wording, keys[0], low, depth)
    answers = [wording.lead + key for key in keys]
    # Ties are ranked in the order of the candidates, which must not favor the answer.
    return NeedlePrompt(prompt, keys[0], answers[0], tuple(draw.sample(answers, len(answers))))


def _recalled(decoder: Decoder, tokenizer, prompts: Sequence[NeedlePrompt]) -> tuple[float, float]:
    """Return the shares of prompts whose key ranks first, and is written."""
    first = sum(
        rank(decoder, tokenizer, each.prompt, each.candidates, normalise="sum")[0].text
        == each.answer
        for each in prompts
    )
    # With one token more than the key, to see whether digits follow.
    sizes = [len(tokenizer.encode(each.prompt + each.answer)) for each in prompts]
    room = [
        size - len(tokenizer.encode(each.prompt)) + 1
        for size, each in zip(sizes, prompts, strict=True)
    ]
    greedy = [DecodeConfig(max_new_tokens=each) for each in room]
    written = generate(decoder, tokenizer, [each.prompt for each in prompts], greedy)
    exact = 0
    for each, result in zip(prompts, written, strict=True):
        digits = re.match(r"\s*(\d+)", result.text)
        exact += digits is not None and digits[1] == each.key
    return first / len(prompts), exact / len(prompts)


def _text(wording: Wording, key: str, sentences: int, depth: float) -> str:
    filler = [wording.filler[number % len(wording.filler)] for number in range(sentences)]
    at = round(depth * sentences)
    filler.insert(at, wording.key.format(key=key))
    return wording.join.join([wording.task, *filler, wording.question])


def _size(tokenizer, wording: Wording, key: str, answer: str, sentences: int, depth: float) -> int:
    """Return the tokens of the prompt that hides ``key``, with ``answer`` behind it."""
    text = _text(wording, key, sentences, depth)
    return len(encode_prompt(tokenizer, text + wording.lead + answer))


def _keys(draw: random.Random, count: int) -> list[str]:
    return list(map(str, draw.sample(range(10 ** (DIGITS - 1), 10**DIGITS), count)))


def _longest(tokenizer, wording: Wording, keys: Sequence[str]) -> str:
    """Return the key of the most tokens."""
    return max(keys, key=lambda key: len(tokenizer.encode(wording.lead + key)))


def _wording_of(language: str) -> Wording:
    if language not in WORDINGS:
        raise ValueError(
            f"unknown language={language!r}; pass keys are asked for in {' or '.join(WORDINGS)}"
        )
    return WORDINGS[language]


def _check(depths: Sequence[float], trials: int, candidates: int, seed: int) -> None:
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depth={depth} is outside [0, 1]: before the filler to behind it")
    if trials < 1 or not depths:
        raise ValueError(f"trials={trials} at {len(depths)} depths measure nothing; give 1 or more")
    if not 2 <= candidates <= 1000:
        raise ValueError(f"candidates={candidates} is outside [2, 1000]; 10 is usual")
