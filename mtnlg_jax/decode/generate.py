"""Generative decoding: prompts in, continuations out.

A prompt and its continuation fill at most the model's context: a row that reaches it ends with "length".
A row's tokens depend on its prompt, settings and seed alone, not on its neighbours, its place in the batch or
where chunks end (to rounding: other shapes may round a product differently in its last bit).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtnlg_jax.config import DecodeConfig, validate_decode
from mtnlg_jax.decode.cache import Decoder, Prefix, capacity, prefill, step
from mtnlg_jax.decode.processors import choose, process, rows_and_families
from mtnlg_jax.decode.stopping import TextStream

CHUNK = 8  # tokens between two looks at the host, and between two checks whether all rows are done


@dataclasses.dataclass(frozen=True)
class Generated:
    prompt: int  # index of its prompt
    tokens: tuple[int, ...]  # without the end token; with those of a stop string
    text: str  # without special tokens and stop string; a character cut in two at the end is left out
    finish_reason: str  # "stop": end token or stop string; "length": max_new_tokens or the context's end
    logprobs: tuple[float, ...]  # of ``tokens``, natural logarithm, of the model's own distribution


class State(NamedTuple):
    """What changes from step to step; donated, so that the cache stays in its place."""

    cache: tuple[tuple[jax.Array, jax.Array], ...]
    tokens_BS: jax.Array  # prompt and continuation
    logprobs_BS: jax.Array
    lengths_B: jax.Array  # known tokens; the last one is not in the cache yet
    done_B: jax.Array


class Limits(NamedTuple):
    """What stays for each row besides its ``Rows``."""

    prompts_B: jax.Array  # length of the prompt
    longest_B: jax.Array  # of prompt and continuation
    keys_B: jax.Array


def encode_prompt(tokenizer, text: str) -> list[int]:
    """A text as training saw its beginning: <bos>, then its tokens. Of no text only <bos> is left: the model
    then writes a document from its beginning."""
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def generate(decoder: Decoder, tokenizer, prompts: Sequence[str | Sequence[int]],
             decode: DecodeConfig | Sequence[DecodeConfig], *,
             on_text: Callable[[int, str], None] | None = None) -> list[Generated]:
    """Continuations of ``prompts``, num_return_sequences of the first, then of the second ...

    Args:
      prompts: texts, which get a <bos>, or token ids, taken as they are; an empty one starts from <bos> alone.
      decode: settings of all prompts, or one for each; rows that differ share one compiled step.
      on_text: called with (index in the result, text) as text comes; pieces joined are the result's text.
    Raises ValueError, before any work, on settings out of range, ids outside the vocabulary and a prompt longer
    than the context. Specials (but the end token) and the padding of the vocabulary are never written.
    The i-th sequence of a prompt draws with seed + i.
    """
    prompts = [encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else list(prompt) or [tokenizer.bos_id]
               for prompt in prompts]
    configs = [decode] * len(prompts) if isinstance(decode, DecodeConfig) else list(decode)
    if len(configs) != len(prompts):
        raise ValueError(f"{len(configs)} settings for {len(prompts)} prompts; give one, or one for each")
    for each in configs:
        validate_decode(each)
    if not prompts:
        return []
    check_context(decoder, max(map(len, prompts)))
    longest = max(len(p) + c.max_new_tokens for p, c in zip(prompts, configs, strict=True))
    prefix = prefill(decoder, prompts, capacity(longest, decoder.context))
    return continue_prefix(decoder, tokenizer, prefix, configs, on_text)


def check_context(decoder: Decoder, length: int, what: str = "the prompt") -> None:
    if length > decoder.context:
        raise ValueError(f"{what} has {length} tokens and the model's context holds {decoder.context}; shorten it, "
                         "or use a model with more positions")


def continue_prefix(decoder: Decoder, tokenizer, prefix: Prefix, configs: Sequence[DecodeConfig],
                    on_text: Callable[[int, str], None] | None = None) -> list[Generated]:
    """``generate`` from prompts that are read already; ``prefix`` stays usable."""
    owners = [i for i, config in enumerate(configs) for _ in range(config.num_return_sequences)]
    per_row = [configs[i] for i in owners]
    # Seeds wrap: seed + i of the largest seed is a seed too.
    seeds = np.array([(config.seed + copy) % 2**32
                      for config in configs for copy in range(config.num_return_sequences)], np.uint32)
    rows, families = rows_and_families(per_row)
    news = np.array([min(config.max_new_tokens, decoder.context) for config in per_row], np.int32)
    static = {"families": families, "eos": tokenizer.eos_id}
    allowed_V = writable(tokenizer, decoder.config.vocab_size)
    state, limits = _begin(prefix, np.array(owners, np.int32), news, seeds, rows, allowed_V, **static)
    streams = [TextStream(tokenizer, config.stop_strings) for config in per_row]
    looking = on_text is not None or any(config.stop_strings for config in per_row)
    chunks = 1 if looking else decoder.context
    prompts = np.asarray(limits.prompts_B)
    seen = prompts.copy()

    while True:
        tokens, lengths, done = (np.asarray(x) for x in (state.tokens_BS, state.lengths_B, state.done_B))
        done = done.copy()
        for row, stream in enumerate(streams):
            for token in tokens[row, seen[row] : lengths[row]]:
                if stream.stopped or token == tokenizer.eos_id:
                    break
                seen[row] += 1
                piece = stream.push(int(token))
                if piece and on_text:
                    on_text(row, piece)
            if stream.stopped:
                done[row] = True
        if done.all():
            break
        state = state._replace(done_B=jnp.asarray(done))
        state = _advance(decoder.params, state, limits, rows, allowed_V, np.int32(chunks),
                         config=decoder.config, **static)

    logprobs, results = np.asarray(state.logprobs_BS), []
    for row, stream in enumerate(streams):
        piece = stream.finish()
        if piece and on_text:
            on_text(row, piece)
        written = slice(prompts[row], seen[row])
        ended = stream.stopped or lengths[row] > seen[row]
        results.append(Generated(owners[row], tuple(tokens[row, written].tolist()), stream.text,
                                 "stop" if ended else "length", tuple(logprobs[row, written].tolist())))
    return results


def writable(tokenizer, vocabulary: int) -> np.ndarray:
    """Which ids may be written: no specials but the end, nothing beyond the tokenizer's vocabulary."""
    size = min(tokenizer.vocab_size, vocabulary)
    allowed = np.zeros(vocabulary, bool)
    allowed[:size] = ~tokenizer.is_special[:size]
    allowed[tokenizer.eos_id] = True
    return allowed


def _append(logits_BV, state: State, limits: Limits, rows, allowed_V, families, eos) -> State:
    """Chooses one more token for every row that is not done."""
    processed = process(logits_BV, rows, families, state.tokens_BS, state.lengths_B, limits.prompts_B,
                        allowed_V, eos)
    tokens_B = choose(processed, rows, families, limits.keys_B, state.lengths_B - limits.prompts_B)
    # A row to which everything is forbidden, as by n-grams of size 1 in a small vocabulary, has said it all.
    tokens_B = jnp.where(processed.max(-1) == -jnp.inf, eos, tokens_B).astype(jnp.int32)
    picked_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], 1)[:, 0]
    logprobs_B = picked_B - jax.nn.logsumexp(logits_BV, -1)
    at = (jnp.arange(tokens_B.shape[0]), jnp.where(state.done_B, state.tokens_BS.shape[1], state.lengths_B))
    lengths_B = state.lengths_B + ~state.done_B
    return State(state.cache, state.tokens_BS.at[at].set(tokens_B, mode="drop"),
                 state.logprobs_BS.at[at].set(logprobs_B, mode="drop"), lengths_B,
                 state.done_B | (tokens_B == eos) | (lengths_B >= limits.longest_B))


@functools.partial(jax.jit, static_argnames=("families", "eos"))
def _begin(prefix: Prefix, owners_B, news_B, seeds_B, rows, allowed_V, *, families, eos):
    """Rows for the sequences to write, each from its prompt's part of ``prefix``, and their first tokens."""
    tokens_BS, prompts_B, logits_BV, cache = jax.tree.map(lambda x: x[owners_B], prefix)
    longest_B = jnp.minimum(prompts_B + news_B, tokens_BS.shape[1])
    limits = Limits(prompts_B, longest_B, jax.vmap(jax.random.key)(seeds_B))
    state = State(cache, tokens_BS, jnp.zeros(tokens_BS.shape), prompts_B, prompts_B >= longest_B)
    return _append(logits_BV, state, limits, rows, allowed_V, families, eos), limits


@functools.partial(jax.jit, static_argnames=("config", "families", "eos"), donate_argnames="state")
def _advance(params, state: State, limits: Limits, rows, allowed_V, chunks, *, config, families, eos):
    """At most ``chunks`` times CHUNK more tokens; fewer when all rows are done."""

    def one_token(state, _):
        last_B = state.lengths_B - 1
        tokens_B = jnp.take_along_axis(state.tokens_BS, last_B[:, None], 1)[:, 0]
        logits_BV, cache = step(config, params, state.cache, tokens_B, last_B)
        return _append(logits_BV, state._replace(cache=cache), limits, rows, allowed_V, families, eos), None

    def more(carry):
        return (carry[0] < chunks) & ~carry[1].done_B.all()

    def one_chunk(carry):
        return carry[0] + 1, lax.scan(one_token, carry[1], length=CHUNK)[0]

    return lax.while_loop(more, one_chunk, (jnp.int32(0), state))[1]
