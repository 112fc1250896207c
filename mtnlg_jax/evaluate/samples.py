"""Show what a model writes: a filled mask, and continuations of held-out text."""

import dataclasses
import textwrap
from collections.abc import Iterator

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.infill import fill
from mtnlg_jax.decode.rank import rank
from mtnlg_jax.evaluate.baselines import held_out_text
from mtnlg_jax.train.inputs import Data

_BLANK = 7  # the word that is masked
_PROMPT = 12  # words
_RANKED = 6  # samples
_GREEDY = DecodeConfig(max_new_tokens=48, min_new_tokens=24)
_SAMPLED = dataclasses.replace(_GREEDY, temperature=0.8, top_p=0.95)


def samples(decoder: Decoder, tokenizer: Tokenizer, data: Data) -> Iterator[str]:
    """Yield a filled mask, and a greedy, a sampled and a ranked continuation, each as soon as it is
    known."""
    text = held_out_text(data, limit=4000)
    paragraph = max(text.split("\n\n")[:20], key=len).replace("\n", " ").strip()
    # Without spaces, as in Chinese, a character takes the place of a word.
    spaced = paragraph.count(" ") > 8
    words = paragraph.split(" ") if spaced else list(paragraph)
    joint = " " if spaced else ""

    masked = joint.join([*words[:_BLANK], "<mask>", *words[_BLANK + 1 : 20]])
    yield _wrapped("a filled mask", masked)
    filled = fill(decoder, tokenizer, masked, top_k=5)
    guesses = ", ".join(
        f"{candidate.text!r} {candidate.probability:.1%}" for candidate in filled.masks[0]
    )
    yield _wrapped("", f"{guesses} (the author wrote {words[_BLANK]!r})")

    prompt = joint.join(words[:_PROMPT])
    for name, decode in (("greedy", _GREEDY), ("sampled", _SAMPLED)):
        result = generate(decoder, tokenizer, [prompt], decode)[0]
        yield "\n" + _wrapped(name, f"{prompt} |{result.text}")

    decode = dataclasses.replace(_SAMPLED, num_return_sequences=_RANKED)
    ranked = rank(decoder, tokenizer, prompt, decode=decode)
    what = f"{len(ranked)} samples by log-probability a token, the best first"
    yield "\n" + _wrapped("ranked", what)
    for candidate in ranked:
        yield _wrapped(f"  {candidate.score:.3f}", candidate.text)


def _wrapped(label: str, text: str) -> str:
    """Return ``text`` without its line breaks, beside ``label``."""
    return textwrap.fill(
        " ".join(text.split()), 100, initial_indent=f"{label:<15}", subsequent_indent=" " * 15
    )
