"""Log-probabilities of candidates behind many prompts, several prompts in one call of the model."""

# Shapes: B prompts of a block

from collections.abc import Sequence

import numpy as np

from mtnlg_jax.decode.cache import Decoder, prefill
from mtnlg_jax.decode.scoring import blocks, narrow, score_block
from mtnlg_jax.parallel.auto import over_its_mesh, padded, padded_positions


@over_its_mesh
def score_behind(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Sequence[Sequence[int]]],
    starts: Sequence[Sequence[int]],
) -> list[list[np.ndarray]]:
    """Return, for each prompt and each of its rows, the log-probabilities from the row's start on.

    Does the same as `scoring.score_from` for each prompt. Each prompt is read once, and prompts of
    similar lengths are read together, at most ``decoder.block_tokens`` tokens in a call.

    Args:
      prompts: token ids, at least one each.
      rows: for each prompt, prompt and candidate together, one or more.
      starts: for each row, 1 to the prompt's length; up to there the row equals its prompt.
    """
    most = max(map(len, rows), default=1)
    firsts = [min(each) for each in starts]
    tails = [
        [row[first:] for row in of_prompt] for first, of_prompt in zip(firsts, rows, strict=True)
    ]
    longest = max((len(tail) for of_prompt in tails for tail in of_prompt), default=1)
    # The candidates of a block are as bounded as its prompts are.
    limit = max(1, decoder.block_tokens // (most * _width(longest, decoder.context)))
    scored: list[list[np.ndarray]] = [[] for _ in prompts]
    for chosen, number, width in blocks(list(map(len, prompts)), decoder, limit):
        number = padded(number, decoder.mesh)
        # Prompts that nobody reads; <bos> or whatever the first token is.
        filled = [prompts[i] for i in chosen] + [prompts[chosen[0]][:1]] * (number - len(chosen))
        lengths_B = np.ones(number, np.int32)
        lengths_B[: len(chosen)] = [firsts[i] for i in chosen]
        prefix = prefill(decoder, filled, width)._replace(lengths_B=lengths_B)
        count = max(len(tails[i]) for i in chosen)
        # Each prompt has the same number of candidates; those that nobody reads are empty.
        given = [tail for i in chosen for tail in [*tails[i], *[()] * (count - len(tails[i]))]]
        given += [()] * (count * number - len(given))
        found = score_block(
            decoder, prefix, given, len(given), _width(max(map(len, given)), decoder.context)
        )
        for at, i in enumerate(chosen):
            own = found[at * count : at * count + len(tails[i])]
            scored[i] = [
                each[start - firsts[i] :] for each, start in zip(own, starts[i], strict=True)
            ]
    return scored


def _width(length: int, context: int) -> int:
    return padded_positions(narrow(length, context))
