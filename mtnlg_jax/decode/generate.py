"""Generative decoding: prompts in, continuations out.

A prompt and its continuation fill at most the model's context: a row that reaches it ends with "length".
A row's tokens depend on its prompt, settings and seed alone, not on its neighbours, its place in the batch or
where chunks end (to rounding: other shapes may round a product differently in its last bit).
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtnlg_jax.config import DecodeConfig, validate_decode
from mtnlg_jax.decode.cache import Decoder, Prefix, bucket, capacity, prefill, step, to_int8
from mtnlg_jax.decode.processors import choose, process
from mtnlg_jax.decode.rows import check_tokens, ends_of, rows_and_families, stopped
from mtnlg_jax.decode.stopping import TextStream

CHUNK = 8  # tokens between two looks at the host, and between two checks whether all rows are done


@dataclasses.dataclass(frozen=True)
class Generated:
    prompt: int  # index of its prompt
    tokens: tuple[int, ...]  # without the end token; with those of a stop string or a stop sequence
    text: str  # without special tokens and stops; a character cut in two at the end is left out
    finish_reason: str  # "stop": end token or stop; "length": max_new_tokens or the context's end; "timeout": max_time
    logprobs: tuple[float, ...]  # of ``tokens``, natural logarithm, of the model's own distribution
    score: float | None = None  # of beams: what they are sorted by, as sequences_scores of Hugging Face
    guessed: int = 0  # tokens that speculative decoding guessed
    accepted: int = 0  # those of them that stand in the row


class State(NamedTuple):
    """What changes from step to step; donated, so that the cache stays in its place."""

    cache: tuple[tuple[jax.Array, ...], ...]
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
    """A text as training saw its beginning: <bos>, where the tokenizer has it so, then its tokens. Of no text only
    <bos> is left: the model then writes a document from its beginning."""
    tokens = tokenizer.encode(text)
    return [tokenizer.bos_id, *tokens] if tokenizer.prompt_bos or not tokens else tokens


def generate(decoder: Decoder, tokenizer, prompts: Sequence[str | Sequence[int]],
             decode: DecodeConfig | Sequence[DecodeConfig], *, constraint: Callable | None = None,
             on_text: Callable[[int, str], None] | None = None, draft: Decoder | None = None) -> list[Generated]:
    """Continuations of ``prompts``, num_return_sequences of the first, then of the second ...

    Args:
      prompts: texts, which get a <bos>, or token ids, taken as they are; an empty one starts from <bos> alone.
      decode: settings of all prompts, or one for each; rows that differ share one compiled step.
      constraint: a pure JAX function (tokens_BS, lengths_B, prompts_B) -> bool (B, V), which ids may come next; as
        for a grammar. See ``Families``. Where it allows none, the row ends.
      on_text: called with (index in the result, text) as text comes; pieces joined are the result's text. Of beams
        it comes at the end, when the best are known.
      draft: a smaller model with the same tokens, which guesses num_assistant_tokens at a time for ``decoder`` to
        verify at once: faster where it guesses well and the batch is small. See speculative.py.
    Raises ValueError, before any work, on settings out of range or in conflict, ids outside the vocabulary and a
    prompt longer than the context. Specials (but ends and forced tokens) and the padding of the vocabulary are never
    written. The i-th sequence of a prompt draws with seed + i; beams are one draw with seed. Beams may be fewer than
    num_return_sequences, where there are not so many different sequences to write.
    """
    prompts = [encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else list(prompt) or [tokenizer.bos_id]
               for prompt in prompts]
    configs = [decode] * len(prompts) if isinstance(decode, DecodeConfig) else list(decode)
    if len(configs) != len(prompts):
        raise ValueError(f"{len(configs)} settings for {len(prompts)} prompts; give one, or one for each")
    for each in configs:
        validate_decode(each)
        check_tokens(each, decoder.config.vocab_size)
    check_draft(decoder, draft, configs)
    if not prompts:
        return []
    check_context(decoder, max(map(len, prompts)))
    longest = max(map(len, prompts))
    size = bucket(longest, decoder.context)
    rows = [len(p) + c.max_new_tokens for p, c in zip(prompts, configs, strict=True) if c.num_beams == 1]
    if rows:  # the new tokens of beams are kept apart from their prompt
        size = capacity(max(longest, *rows), decoder.context)
    prefix = prefill(decoder, prompts, size)
    return continue_prefix(decoder, tokenizer, prefix, configs, on_text, constraint, draft)


def check_draft(decoder: Decoder, draft: Decoder | None, configs: Sequence[DecodeConfig]) -> None:
    """Raises ValueError where ``draft`` cannot guess for ``decoder`` under these settings."""
    if draft is None:
        return
    ours, theirs = decoder.config.vocab_size, draft.config.vocab_size
    if theirs != ours:
        raise ValueError(f"the draft model has a vocabulary of {theirs} tokens and the model one of {ours}; give a "
                         "draft that was trained with the model's tokenizer, or none")
    if draft.context < decoder.context:
        raise ValueError(f"the draft model's context holds {draft.context} tokens and the model's {decoder.context}; "
                         "give a draft with at least as many positions, or none")
    for config in configs:
        if config.num_beams > 1:
            raise ValueError(f"a draft model guesses how one row goes on, and num_beams={config.num_beams} beams "
                             "go on in several ways; set num_beams=1, or give no draft model")
        if config.prompt_lookup_num_tokens:
            raise ValueError(f"both a draft model and prompt_lookup_num_tokens={config.prompt_lookup_num_tokens} would "
                             "guess; give no draft model, or set prompt_lookup_num_tokens=0")


def check_context(decoder: Decoder, length: int, what: str = "the prompt") -> None:
    if length > decoder.context:
        raise ValueError(f"{what} has {length} tokens and the model's context holds {decoder.context}; shorten it, "
                         "or use a model with more positions")


def continue_prefix(decoder: Decoder, tokenizer, prefix: Prefix, configs: Sequence[DecodeConfig],
                    on_text: Callable[[int, str], None] | None = None,
                    constraint: Callable | None = None, draft: Decoder | None = None) -> list[Generated]:
    """``generate`` from prompts that are read already; ``prefix`` stays usable."""
    from mtnlg_jax.decode import beam, stochastic  # which need what stands here

    kinds = [(c.num_beams, c.num_beam_groups, c.temperature > 0) if c.num_beams > 1 else None for c in configs]
    if set(kinds) == {None}:
        return _continue_rows(decoder, tokenizer, prefix, configs, on_text, constraint, draft)
    if decoder.int8_cache:
        raise ValueError(f"an int8 cache is for rows, and num_beams={max(c.num_beams for c in configs)}; set "
                         "num_beams=1, or leave cache=int8 out")
    results = [[] for _ in configs]
    # Beams first: they may be fewer than asked for, and then the indices of what streams are known.
    for kind in sorted(set(kinds) - {None}):
        chosen = [i for i, each in enumerate(kinds) if each == kind]
        part = prefix if len(chosen) == len(kinds) else _prompts_of(prefix, chosen)
        search = stochastic.draw if kind[2] else beam.search
        for result in search(decoder, tokenizer, part, [configs[i] for i in chosen], constraint):
            results[chosen[result.prompt]].append(dataclasses.replace(result, prompt=chosen[result.prompt]))
    rest = [i for i, each in enumerate(kinds) if each is None]
    counts = [len(found) or config.num_return_sequences * (kind is None)
              for found, config, kind in zip(results, configs, kinds, strict=True)]
    starts = np.cumsum([0, *counts])
    if on_text:
        for i, found in enumerate(results):
            for place, result in enumerate(found):
                if result.text:
                    on_text(int(starts[i]) + place, result.text)
    if rest:
        part = _prompts_of(prefix, rest)
        places = [int(starts[i]) + place for i in rest for place in range(counts[i])]
        shown = (lambda row, text: on_text(places[row], text)) if on_text else None
        for result in _continue_rows(decoder, tokenizer, part, [configs[i] for i in rest], shown, constraint):
            results[rest[result.prompt]].append(dataclasses.replace(result, prompt=rest[result.prompt]))
    return [result for found in results for result in found]


def _prompts_of(prefix: Prefix, chosen: list[int]) -> Prefix:
    return jax.tree.map(lambda x: x[np.array(chosen)], prefix)


def _continue_rows(decoder, tokenizer, prefix, configs, on_text, constraint, draft=None) -> list[Generated]:
    """Rows of which none is a beam."""
    from mtnlg_jax.decode.speculative import Speculation  # which needs what stands here

    start = time.monotonic()
    owners = [i for i, config in enumerate(configs) for _ in range(config.num_return_sequences)]
    per_row = [configs[i] for i in owners]
    # Seeds wrap: seed + i of the largest seed is a seed too.
    seeds = np.array([(config.seed + copy) % 2**32
                      for config in configs for copy in range(config.num_return_sequences)], np.uint32)
    rows, families = rows_and_families(per_row, constraint)
    news = np.array([min(config.max_new_tokens, decoder.context) for config in per_row], np.int32)
    static = {"families": families, "eos": tokenizer.eos_id}
    allowed_V = writable(tokenizer, decoder.config.vocab_size, end=False)
    state, limits = _begin(prefix, np.array(owners, np.int32), news, seeds, rows, allowed_V, **static,
                           int8_cache=decoder.int8_cache)
    speculation = None
    if draft is not None or any(config.prompt_lookup_num_tokens for config in per_row):
        speculation = Speculation(decoder, draft, prefix, owners, per_row)
    streams = [text_stream(tokenizer, config) for config in per_row]
    ends = [ends_of_config(tokenizer, config) for config in per_row]
    # Stop sequences are seen on the device; text and time are not.
    looking = on_text is not None or any(config.stop_strings or config.max_time for config in per_row)
    chunks = 1 if looking else decoder.context
    prompts = np.asarray(limits.prompts_B)
    seen = prompts.copy()
    late = np.zeros(len(per_row), bool)
    allowance = np.array([np.inf if config.max_time is None else config.max_time for config in per_row])

    while True:
        tokens, lengths, done = (np.asarray(x) for x in (state.tokens_BS, state.lengths_B, state.done_B))
        done = done.copy()
        logprobs = np.asarray(state.logprobs_BS)
        for row, owner in enumerate(owners):
            check_finite(logprobs[row, seen[row] : lengths[row]], owner, seen[row] - prompts[row])
        for row, stream in enumerate(streams):
            for token in tokens[row, seen[row] : lengths[row]]:
                if stream.stopped or int(token) in ends[row]:
                    break
                seen[row] += 1
                piece = stream.push(int(token))
                if piece and on_text:
                    on_text(row, piece)
            if stream.stopped:
                done[row] = True
        late |= ~done & (time.monotonic() - start > allowance)
        done |= late
        if done.all():
            break
        state = state._replace(done_B=jnp.asarray(done))
        advance = _advance if speculation is None else speculation.advance
        state = advance(decoder.params, state, limits, rows, allowed_V, np.int32(chunks), config=decoder.config,
                        **static)

    guessed, accepted = (0 * prompts, 0 * prompts) if speculation is None else speculation.counts
    results = []
    for row, stream in enumerate(streams):
        piece = stream.finish()
        if piece and on_text:
            on_text(row, piece)
        written = slice(prompts[row], seen[row])
        ended = stream.stopped or lengths[row] > seen[row]
        reason = "stop" if ended else "timeout" if late[row] else "length"
        results.append(Generated(owners[row], tuple(tokens[row, written].tolist()), stream.text, reason,
                                 tuple(logprobs[row, written].tolist()), guessed=int(guessed[row]),
                                 accepted=int(accepted[row])))
    return results


def check_finite(logprobs: np.ndarray, prompt: int, first: int) -> None:
    """Raises ValueError where a log-probability is not finite, of the new tokens from the ``first`` one on, behind the
    ``prompt``-th prompt, both from 0. Logits of which one is NaN or +inf give none that is."""
    bad = np.flatnonzero(~np.isfinite(logprobs))
    if len(bad):
        raise ValueError(f"new token {first + int(bad[0]) + 1} behind prompt {prompt + 1} has log-probability "
                         f"{logprobs[bad[0]]}, so the model's logits are not finite; look for parameters that are not "
                         "finite or far too large, or take another checkpoint")


def text_stream(tokenizer, config: DecodeConfig) -> TextStream:
    return TextStream(tokenizer, config.stop_strings,
                      [*((token,) for token in config.stop_token_ids), *config.stop_sequences])


def ends_of_config(tokenizer, config: DecodeConfig) -> frozenset[int]:
    return frozenset(config.eos_token_id or (tokenizer.eos_id,))


def writable(tokenizer, vocabulary: int, end: bool = True) -> np.ndarray:
    """Which ids may be written: nothing beyond the tokenizer's vocabulary, no token that marks something (pad, bos,
    mask, sep) but, with ``end``, the end. Rows add their own ends. Other special tokens of a tokenizer from elsewhere
    may be written, as its model learned to, and add nothing to the text."""
    size = min(tokenizer.vocab_size, vocabulary)
    allowed = np.zeros(vocabulary, bool)
    allowed[:size] = ~tokenizer.is_special[:size] | _is_learned_special(tokenizer)[:size]
    if tokenizer.eos_id >= 0:
        allowed[tokenizer.eos_id] |= end
    return allowed


def _is_learned_special(tokenizer) -> np.ndarray:
    found = np.zeros(tokenizer.vocab_size, bool)
    if getattr(tokenizer, "kind", "sentencepiece") == "sentencepiece":  # all of its specials mark something
        return found
    roles = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.sep_id}
    with contextlib.suppress(ValueError):
        roles.add(tokenizer.mask_id)
    found[[index for index in tokenizer.special_names if index not in roles]] = True
    return found


def append(logits_BV, state: State, limits: Limits, rows, allowed_V, families, eos, choose: Callable = choose) -> State:
    """Chooses one more token for every row that is not done; ``choose`` does it from processed logits."""
    processed = process(logits_BV, rows, families, state.tokens_BS, state.lengths_B, limits.prompts_B,
                        limits.longest_B, allowed_V, eos)
    tokens_B = choose(processed, rows, families, limits.keys_B, state.lengths_B - limits.prompts_B)
    ends_BE = ends_of(rows, families, eos)
    # A row to which everything is forbidden, as by n-grams of size 1 in a small vocabulary, has said it all.
    tokens_B = jnp.where(processed.max(-1) == -jnp.inf, ends_BE[:, 0], tokens_B).astype(jnp.int32)
    picked_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], 1)[:, 0]
    logprobs_B = picked_B - jax.nn.logsumexp(logits_BV, -1)
    at = (jnp.arange(tokens_B.shape[0]), jnp.where(state.done_B, state.tokens_BS.shape[1], state.lengths_B))
    lengths_B = state.lengths_B + ~state.done_B
    tokens_BS = state.tokens_BS.at[at].set(tokens_B, mode="drop")
    done_B = (tokens_B[:, None] == ends_BE).any(-1) | stopped(rows, families, tokens_BS, lengths_B, limits.prompts_B)
    return State(state.cache, tokens_BS, state.logprobs_BS.at[at].set(logprobs_B, mode="drop"), lengths_B,
                 state.done_B | done_B | (lengths_B >= limits.longest_B))


@functools.partial(jax.jit, static_argnames=("families", "eos", "int8_cache"))
def _begin(prefix: Prefix, owners_B, news_B, seeds_B, rows, allowed_V, *, families, eos, int8_cache=False):
    """Rows for the sequences to write, each from its prompt's part of ``prefix``, and their first tokens."""
    if int8_cache:
        prefix = prefix._replace(cache=to_int8(prefix.cache))
    tokens_BS, prompts_B, logits_BV, cache = jax.tree.map(lambda x: x[owners_B], prefix)
    longest_B = jnp.minimum(prompts_B + news_B, tokens_BS.shape[1])
    limits = Limits(prompts_B, longest_B, jax.vmap(jax.random.key)(seeds_B))
    state = State(cache, tokens_BS, jnp.zeros(tokens_BS.shape), prompts_B, prompts_B >= longest_B)
    return append(logits_BV, state, limits, rows, allowed_V, families, eos), limits


@functools.partial(jax.jit, static_argnames=("config", "families", "eos"), donate_argnames="state")
def _advance(params, state: State, limits: Limits, rows, allowed_V, chunks, *, config, families, eos):
    """At most ``chunks`` times CHUNK more tokens; fewer when all rows are done."""

    def one_token(state, _):
        last_B = state.lengths_B - 1
        tokens_B = jnp.take_along_axis(state.tokens_BS, last_B[:, None], 1)[:, 0]
        logits_BV, cache = step(config, params, state.cache, tokens_B, last_B)
        return append(logits_BV, state._replace(cache=cache), limits, rows, allowed_V, families, eos), None

    def more(carry):
        return (carry[0] < chunks) & ~carry[1].done_B.all()

    def one_chunk(carry):
        return carry[0] + 1, lax.scan(one_token, carry[1], length=CHUNK)[0]

    return lax.while_loop(more, one_chunk, (jnp.int32(0), state))[1]
