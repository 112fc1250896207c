"""Read given candidates: their tokens behind a prompt, each at its own boundary."""

from collections.abc import Callable

from mtnlg_jax.decode.pool import Candidate
from mtnlg_jax.decode.results import check_context, common_prefix


def read_candidates(
    decoder, tokenizer, encode: Callable[[str], list[int]], prompt: str, candidates
) -> tuple[tuple[int, ...], list[Candidate]]:
    """Return the tokens of the prompt, and each candidate after the tokens it leaves unchanged.

    `rank.rank` says where a candidate begins. ``encode`` returns the tokens of a text behind what
    stands ahead of the prompt. Raises ValueError on a candidate that is empty, not
    Unicode, or too long for the context.
    """
    if isinstance(candidates, str):
        raise ValueError(f"candidates={candidates[:40]!r} is one text; give a list of texts")
    candidates = list(candidates)
    if not candidates:
        raise ValueError("there are no candidates to rank; give at least one")
    if "" in candidates:
        raise ValueError(
            f"candidate {candidates.index('') + 1} of {len(candidates)} is empty; leave it out"
        )
    for number, text in enumerate(candidates, 1):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(
                f"candidate {number} of {len(candidates)}, {text[:40]!r}, is not Unicode text; "
                "decode it from bytes with its encoding"
            )
    # Tokenizers join a space with the word behind it, so it belongs to the candidate.
    context = prompt.rstrip()
    spaces = prompt[len(context) :]
    alone = tuple(encode(context))
    # Equal candidates are tokenized once.
    read = {
        text: _at_its_boundary(decoder, tokenizer, encode, context, spaces, text, alone)
        for text in dict.fromkeys(candidates)
    }
    return alone, [read[text] for text in candidates]


def _at_its_boundary(
    decoder, tokenizer, encode, context: str, spaces: str, text: str, alone: tuple[int, ...]
) -> Candidate:
    row = tuple(encode(context + spaces + text))
    # The first token that the candidate changes; from there on all is scored.
    start = common_prefix(alone, row)
    # Tokens of the prompt that the candidate changed: their text is part of what is scored.
    joined = alone[start:]
    if start == 0:
        # Without a <bos> the texts may differ in their first token, which needs a token before it.
        row = (tokenizer.bos_id, *row)
        joined = () if alone == (tokenizer.bos_id,) else joined
        start = 1
    check_context(decoder, len(row), f"the prompt with candidate {text[:40]!r}")
    if len(row) == start:
        raise ValueError(f"candidate {text[:40]!r} adds no token to the prompt; leave it out")
    before = b"".join(map(tokenizer.token_bytes, joined))
    return Candidate(text, row, start, before + (spaces + text).encode())
