"""Generative decoding: prompts in, continuations out.

A prompt and its continuation fill at most the model's context: a row that reaches it ends with
"length". A row's tokens depend on its prompt, settings and seed alone, not on its neighbours, its
place in the batch or where chunks end (to rounding: other shapes may round a product differently in
its last bit).
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax.config import DecodeConfig, validate_decode
from mtnlg_jax.decode import beam, stochastic
from mtnlg_jax.decode.batched_settings import check_tokens, rows_and_families
from mtnlg_jax.decode.cache import Decoder, Prefix, bucket, capacity, prefill
from mtnlg_jax.decode.results import (
    Generated,
    check_context,
    check_finite,
    encode_prompt,
    ends_of_config,
    text_stream,
    writable,
)
from mtnlg_jax.decode.sampling import advance, begin
from mtnlg_jax.decode.speculative import Speculation


def generate(
    decoder: Decoder,
    tokenizer,
    prompts: Sequence[str | Sequence[int]],
    decode: DecodeConfig | Sequence[DecodeConfig],
    *,
    constraint: Callable | None = None,
    on_text: Callable[[int, str], None] | None = None,
    draft: Decoder | None = None,
) -> list[Generated]:
    """Continuations of ``prompts``, num_return_sequences of the first, then of the second ...

    Args:
      prompts: texts, which get a <bos>, or token ids, taken as they are; an empty one starts from
          <bos> alone.
      decode: settings of all prompts, or one for each; rows that differ share one compiled step.
      constraint: a pure JAX function (tokens_BS, lengths_B, prompts_B) -> bool (B, V), which ids
        may come next; as for a grammar. See ``Families``. Where it allows none, the row ends.
      on_text: called with (index in the result, text) as text comes; pieces joined are the result's
        text. Of beams it comes at the end, when the best are known.
      draft: a smaller model with the same tokens, which guesses num_assistant_tokens at a time for
          ``decoder`` to
        verify at once: faster where it guesses well and the batch is small. See speculative.py.
    Raises ValueError, before any work, on settings out of range or in conflict, ids outside the
    vocabulary and a prompt longer than the context. Specials (but ends and forced tokens) and the
    padding of the vocabulary are never written. The i-th sequence of a prompt draws with seed + i;
    beams are one draw with seed. Beams may be fewer than num_return_sequences, where there are not
    so many different sequences to write.
    """
    prompts = [
        encode_prompt(tokenizer, prompt)
        if isinstance(prompt, str)
        else list(prompt) or [tokenizer.bos_id]
        for prompt in prompts
    ]
    configs = [decode] * len(prompts) if isinstance(decode, DecodeConfig) else list(decode)
    if len(configs) != len(prompts):
        raise ValueError(
            f"{len(configs)} settings for {len(prompts)} prompts; give one, or one for each"
        )
    for each in configs:
        validate_decode(each)
        check_tokens(each, decoder.config.vocabulary)
    check_draft(decoder, draft, configs)
    if not prompts:
        return []
    check_context(decoder, max(map(len, prompts)))
    longest = max(map(len, prompts))
    size = bucket(longest, decoder.context)
    rows = [
        len(p) + c.max_new_tokens for p, c in zip(prompts, configs, strict=True) if c.num_beams == 1
    ]
    if rows:  # the new tokens of beams are kept apart from their prompt
        size = capacity(max(longest, *rows), decoder.context)
    prefix = prefill(decoder, prompts, size)
    return continue_prefix(decoder, tokenizer, prefix, configs, on_text, constraint, draft)


def check_draft(decoder: Decoder, draft: Decoder | None, configs: Sequence[DecodeConfig]) -> None:
    """Raises ValueError where ``draft`` cannot guess for ``decoder`` under these settings."""
    if draft is None:
        return
    ours = decoder.config.vocab_size
    theirs = draft.config.vocab_size
    if theirs != ours:
        raise ValueError(
            f"the draft model has a vocabulary of {theirs} tokens and the model one of {ours}; give a "
            "draft that was trained with the model's tokenizer, or none"
        )
    if draft.context < decoder.context:
        raise ValueError(
            f"the draft model's context holds {draft.context} tokens and the model's {decoder.context}; "
            "give a draft with at least as many positions, or none"
        )
    for config in configs:
        if config.num_beams > 1:
            raise ValueError(
                f"a draft model guesses how one row goes on, and num_beams={config.num_beams} beams "
                "go on in several ways; set num_beams=1, or give no draft model"
            )
        if config.prompt_lookup_num_tokens:
            raise ValueError(
                f"both a draft model and prompt_lookup_num_tokens={config.prompt_lookup_num_tokens} would "
                "guess; give no draft model, or set prompt_lookup_num_tokens=0"
            )


def continue_prefix(
    decoder: Decoder,
    tokenizer,
    prefix: Prefix,
    configs: Sequence[DecodeConfig],
    on_text: Callable[[int, str], None] | None = None,
    constraint: Callable | None = None,
    draft: Decoder | None = None,
) -> list[Generated]:
    """``generate`` from prompts that are read already; ``prefix`` stays usable."""
    kinds = [
        (c.num_beams, c.num_beam_groups, c.temperature > 0) if c.num_beams > 1 else None
        for c in configs
    ]
    if set(kinds) == {None}:
        return _continue_rows(decoder, tokenizer, prefix, configs, on_text, constraint, draft)
    if decoder.int8_cache:
        raise ValueError(
            f"an int8 cache is for rows, and num_beams={max(c.num_beams for c in configs)}; set "
            "num_beams=1, or leave cache=int8 out"
        )
    results = [[] for _ in configs]
    # Beams first: they may be fewer than asked for, and then the indices of what streams are known.
    for kind in sorted(set(kinds) - {None}):
        chosen = [i for i, each in enumerate(kinds) if each == kind]
        part = prefix if len(chosen) == len(kinds) else _prompts_of(prefix, chosen)
        search = stochastic.draw if kind[2] else beam.search
        for result in search(decoder, tokenizer, part, [configs[i] for i in chosen], constraint):
            results[chosen[result.prompt]].append(
                dataclasses.replace(result, prompt=chosen[result.prompt])
            )
    rest = [i for i, each in enumerate(kinds) if each is None]
    counts = [
        len(found) or config.num_return_sequences * (kind is None)
        for found, config, kind in zip(results, configs, kinds, strict=True)
    ]
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
        for result in _continue_rows(
            decoder, tokenizer, part, [configs[i] for i in rest], shown, constraint
        ):
            results[rest[result.prompt]].append(
                dataclasses.replace(result, prompt=rest[result.prompt])
            )
    return [result for found in results for result in found]


def _prompts_of(prefix: Prefix, chosen: list[int]) -> Prefix:
    return jax.tree.map(lambda x: x[np.array(chosen)], prefix)


def _continue_rows(
    decoder, tokenizer, prefix, configs, on_text, constraint, draft=None
) -> list[Generated]:
    """Rows of which none is a beam."""
    start = time.monotonic()
    owners = [i for i, config in enumerate(configs) for _ in range(config.num_return_sequences)]
    per_row = [configs[i] for i in owners]
    # Seeds wrap: seed + i of the largest seed is a seed too.
    seeds = np.array(
        [
            (config.seed + copy) % 2**32
            for config in configs
            for copy in range(config.num_return_sequences)
        ],
        np.uint32,
    )
    rows, families = rows_and_families(per_row, constraint)
    news = np.array([min(config.max_new_tokens, decoder.context) for config in per_row], np.int32)
    static = {"families": families, "eos": tokenizer.eos_id}
    allowed_V = writable(tokenizer, decoder.config.vocabulary, end=False)
    state, limits = begin(
        prefix,
        np.array(owners, np.int32),
        news,
        seeds,
        rows,
        allowed_V,
        **static,
        int8_cache=decoder.int8_cache,
    )
    speculation = None
    if draft is not None or any(config.prompt_lookup_num_tokens for config in per_row):
        speculation = Speculation(decoder, draft, prefix, owners, per_row)
    streams = [text_stream(tokenizer, config) for config in per_row]
    ends = [ends_of_config(tokenizer, config) for config in per_row]
    # Stop sequences are seen on the device; text and time are not.
    looking = on_text is not None or any(
        config.stop_strings or config.max_time for config in per_row
    )
    chunks = 1 if looking else decoder.context
    prompts = np.asarray(limits.prompts_B)
    seen = prompts.copy()
    late = np.zeros(len(per_row), bool)
    allowance = np.array(
        [np.inf if config.max_time is None else config.max_time for config in per_row]
    )

    while True:
        tokens, lengths, done = (
            np.asarray(x) for x in (state.tokens_BS, state.lengths_B, state.done_B)
        )
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
        advance_rows = advance if speculation is None else speculation.advance
        state = advance_rows(
            decoder.params,
            state,
            limits,
            rows,
            allowed_V,
            np.int32(chunks),
            config=decoder.config,
            **static,
        )

    guessed, accepted = (0 * prompts, 0 * prompts) if speculation is None else speculation.counts
    results = []
    for row, stream in enumerate(streams):
        piece = stream.finish()
        if piece and on_text:
            on_text(row, piece)
        written = slice(prompts[row], seen[row])
        ended = stream.stopped or lengths[row] > seen[row]
        reason = "stop" if ended else "timeout" if late[row] else "length"
        results.append(
            Generated(
                owners[row],
                tuple(tokens[row, written].tolist()),
                stream.text,
                reason,
                tuple(logprobs[row, written].tolist()),
                guessed=int(guessed[row]),
                accepted=int(accepted[row]),
            )
        )
    return results
