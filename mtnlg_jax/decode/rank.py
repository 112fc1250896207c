"""Ranking: candidates, given or sampled, scored as one block behind one shared prefix."""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax.config import DecodeConfig, validate_decode
from mtnlg_jax.decode.cache import Decoder, Prefix, bucket, capacity, prefill, run_layers
from mtnlg_jax.decode.generate import check_context, continue_prefix, encode_prompt
from mtnlg_jax.model.attention import attention
from mtnlg_jax.model.loss import token_log_probs

NORMALISATIONS = ("sum", "per_token", "per_char", "per_byte")


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A candidate and its scores, natural logarithms of the model's own distribution."""

    text: str
    tokens: tuple[int, ...]  # the tokens scored
    score: float  # the one of the four below that it was sorted by
    sum: float
    per_token: float
    per_char: float
    per_byte: float  # UTF-8
    index: int  # among the candidates, first occurrence
    count: int  # how many candidates were this one


def rank(decoder: Decoder, tokenizer, prompt: str, candidates: Sequence[str] | None = None, *,
         decode: DecodeConfig | None = None, normalise: str = "per_token") -> list[Ranked]:
    """Candidates by falling score; ties keep their order, equal candidates are one with a count.

    Args:
      candidates: texts that continue ``prompt``, with their own leading space where there is one. None: samples
        ``decode.num_return_sequences`` of them.
      normalise: "sum", or the sum divided by the number of tokens, characters or UTF-8 bytes of the candidate.

    A given candidate is scored in the tokens of prompt + candidate read as one text, as training saw it, not in
    those of its two parts. Where they differ at the seam, the last tokens of the prompt that some candidate
    changes are scored with every candidate, so that all are compared behind the same prefix.
    Raises ValueError on an empty candidate or list, and on more tokens than the context holds.
    """
    if normalise not in NORMALISATIONS:
        raise ValueError(f"normalise={normalise!r} is not known; choose one of {', '.join(NORMALISATIONS)}")
    if candidates is None:
        prefix, pairs = _sample(decoder, tokenizer, prompt, decode or DecodeConfig())
    else:
        prefix, pairs = _read(decoder, tokenizer, prompt, candidates)
    counts = collections.Counter(pairs)
    unique = list(counts)
    table = score(decoder, prefix, [tokens for _, tokens in unique])
    ranked = []
    for (text, tokens), logprobs in zip(unique, table, strict=True):
        total = float(logprobs.sum(dtype=np.float64))
        sums = {"sum": total, "per_token": total / len(tokens), "per_char": total / max(len(text), 1),
                "per_byte": total / max(len(text.encode()), 1)}
        ranked.append(Ranked(text, tokens, sums[normalise], **sums, index=pairs.index((text, tokens)),
                             count=counts[text, tokens]))
    return sorted(ranked, key=lambda candidate: -candidate.score)  # stable, and unique is in order of index


def _sample(decoder, tokenizer, prompt, decode):
    """The prefix of ``prompt`` and the candidates written behind it; the prompt is read once."""
    validate_decode(decode)
    if decode.temperature == 0 and decode.num_return_sequences > 1:
        raise ValueError(f"{decode.num_return_sequences} candidates at temperature 0 would all be the same; set "
                         "temperature above 0, or give the candidates")
    tokens = encode_prompt(tokenizer, prompt)
    check_context(decoder, len(tokens) + 1, "the prompt with one token more")
    # A candidate has at least one token, else there were nothing to score.
    decode = dataclasses.replace(decode, min_new_tokens=max(1, decode.min_new_tokens))
    prefix = prefill(decoder, [tokens], capacity(len(tokens) + decode.max_new_tokens, decoder.context))
    written = continue_prefix(decoder, tokenizer, prefix, [decode])
    return prefix, [(result.text, result.tokens) for result in written]


def _read(decoder, tokenizer, prompt, candidates):
    """The prefix that all candidates share, and the tokens of each behind it."""
    candidates = list(candidates)
    if not candidates:
        raise ValueError("there are no candidates to rank; give at least one")
    if "" in candidates:
        raise ValueError(f"candidate {candidates.index('') + 1} of {len(candidates)} is empty; leave it out")
    whole = [encode_prompt(tokenizer, prompt + candidate) for candidate in candidates]
    seam = min(_common([encode_prompt(tokenizer, prompt), tokens]) for tokens in whole)
    for candidate, tokens in zip(candidates, whole, strict=True):
        check_context(decoder, len(tokens), f"the prompt with candidate {candidate[:40]!r}")
        if len(tokens) == seam:
            raise ValueError(f"candidate {candidate[:40]!r} adds no token to the prompt; leave it out")
    prefix = prefill(decoder, [whole[0][:seam]], capacity(seam, decoder.context))
    return prefix, [(text, tuple(tokens[seam:])) for text, tokens in zip(candidates, whole, strict=True)]


def _common(sequences) -> int:
    """How many tokens all sequences begin with alike."""
    return next((i for i, tokens in enumerate(zip(*sequences, strict=False)) if len(set(tokens)) > 1),
                min(map(len, sequences)))


def score(decoder: Decoder, prefix: Prefix, candidates: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The log-probability of every token of every candidate behind ``prefix`` (one row), in one block."""
    lengths = list(map(len, candidates))
    # Both sides are rounded up, so that compiles are few.
    width = bucket(max(lengths), decoder.context)
    labels_NW = np.zeros((1 << (len(candidates) - 1).bit_length(), width), np.int32)
    for row, tokens in zip(labels_NW, candidates, strict=False):
        row[: len(tokens)] = tokens
    table_NW = np.asarray(_score(decoder.params, prefix, labels_NW, config=decoder.config))
    return [row[:length] for row, length in zip(table_NW, lengths, strict=False)]


@functools.partial(jax.jit, static_argnames="config")
def _score(params, prefix: Prefix, labels_NW, *, config):
    """The block begins with the prefix's last token, whose output predicts each candidate's first: its queries
    see the cache up to before that token, and the block itself causally."""
    number, width = labels_NW.shape
    before = prefix.lengths_B[0] - 1
    first_N1 = jnp.broadcast_to(prefix.tokens_BS[0, before], (number, 1))
    tokens_NW = jnp.concatenate([first_N1, labels_NW[:, :-1]], 1)
    # Padding may reach past the last position; what stands there is never scored.
    positions_NW = jnp.minimum(before + jnp.arange(width), config.max_position_embeddings - 1)
    positions_NW = jnp.broadcast_to(positions_NW, (number, width))

    def attend(layer, q, k, v):
        shared_k, shared_v = (x.swapaxes(1, 2) for x in prefix.cache[layer])
        # All candidates are one long row of queries before the shared keys, which so are not copied N times.
        flat = q.reshape(1, number * width, *q.shape[2:])
        o_shared, lse_shared = attention(flat, shared_k, shared_v, causal=False, kv_lengths=before[None],
                                         return_lse=True)
        o_own, lse_own = attention(q, k, v, return_lse=True)
        lse_shared = lse_shared.reshape(-1, number, width).swapaxes(0, 1)
        share = jax.nn.sigmoid(lse_shared - lse_own).swapaxes(1, 2)[..., None]  # of the softmax's sum
        return (share * o_shared.reshape(q.shape) + (1 - share) * o_own).astype(q.dtype)

    x_NWD, head_VD = run_layers(config, params, tokens_NW, positions_NW, attend)
    return token_log_probs(x_NWD.reshape(-1, x_NWD.shape[-1]), head_VD, labels_NW.reshape(-1)).reshape(number, width)
