"""Generative decoding: prompts in, continuations out.

A row is one sequence of the batch that is written greedily or by sampling, not by beams. A prompt
and its continuation must fit the model's context; a row that fills it ends with "length". A row's
tokens depend only on its prompt, settings and seed: not on other rows, its index in the batch or
the lengths of chunks (up to rounding, since other shapes may round a product differently in its
last bit).
"""

# Shapes: B rows, S positions, V vocabulary

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from mtnlg_jax.config import DecodeConfig, validate_decode
from mtnlg_jax.decode import beam, stochastic
from mtnlg_jax.decode.batched_settings import Settings, batch_settings, check_tokens
from mtnlg_jax.decode.cache import Decoder, Prefix, bucket, capacity, prefill, split_prefix
from mtnlg_jax.decode.results import (
    Generated,
    check_context,
    check_finite,
    encode_prompt,
    ends_of_config,
    text_stream,
    time_limits,
    writable,
)
from mtnlg_jax.decode.rolling import check_whole, keeps_windows
from mtnlg_jax.decode.sampling import advance, begin
from mtnlg_jax.decode.speculative import Speculation
from mtnlg_jax.parallel.auto import agreed, fetch, over_its_mesh, padded


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
    """Return num_return_sequences continuations of each prompt, in the order of ``prompts``.

    Args:
      prompts: texts, which get a <bos>, or token ids, which are used as they are; an empty prompt
        starts from <bos> alone.
      decode: settings of all prompts, or one for each; rows that differ share one compiled step.
      constraint: a pure JAX function (tokens_BS, lengths_B, prompts_B) -> bool (B, V) that marks
        the ids that may come next, such as a grammar; see ``StaticOptions``. A row ends if it
        allows none.
      on_text: called with (index in the result, text) as text is generated; the pieces add up to
        the result's text. The text of beams comes at the end, when the best are known.
      draft: a smaller model with the same tokens, which guesses num_assistant_tokens at a time for
        ``decoder`` to verify together; faster if it guesses well and the batch is small. See
        speculative.py.

    Control tokens (except ends and forced tokens; see `results.writable`) and the padding of the
    vocabulary are never written. The i-th sequence of a prompt draws with seed + i; the beams of a
    prompt are one draw with seed. There may be fewer beams than num_return_sequences if fewer
    different sequences exist.

    Raises:
      ValueError: settings are out of range or in conflict, ids are outside the vocabulary, or a
        prompt is longer than the context.
    """
    # Tokens and checks come first, so that a mistake costs no time on the device.
    token_prompts = [
        encode_prompt(tokenizer, prompt)
        if isinstance(prompt, str)
        else list(prompt) or [tokenizer.bos_id]
        for prompt in prompts
    ]
    configs = [decode] * len(prompts) if isinstance(decode, DecodeConfig) else list(decode)
    if len(configs) != len(token_prompts):
        raise ValueError(
            f"{len(configs)} settings for {len(token_prompts)} prompts; give one, or one for each"
        )
    for config in configs:
        validate_decode(config)
        check_tokens(config, decoder.config.vocabulary)
    check_draft(decoder, draft, configs)
    if not token_prompts:
        return []
    longest = max(map(len, token_prompts))
    check_context(decoder, longest)
    size = bucket(longest, decoder.context)
    # Beams keep new tokens in a cache of their own, so only rows need room for theirs here.
    pairs = zip(token_prompts, configs, strict=True)
    rows = [
        len(prompt) + config.max_new_tokens for prompt, config in pairs if config.num_beams == 1
    ]
    if rows:
        size = capacity(max(longest, *rows), decoder.context)
    rolling = draft is None and all(keeps_windows(config) for config in configs)
    # Rows that nobody reads make their number divisible by the mesh.
    extra = padded(len(token_prompts), decoder.mesh) - len(token_prompts)
    filled = [*token_prompts, *[token_prompts[0][:1]] * extra]
    prefix = prefill(decoder, filled, size, rolling=rolling)
    return continue_prefix(decoder, tokenizer, prefix, configs, on_text, constraint, draft)


def check_draft(decoder: Decoder, draft: Decoder | None, configs: Sequence[DecodeConfig]) -> None:
    """Raise ValueError if ``draft`` cannot guess for ``decoder`` under these settings."""
    if draft is None:
        return
    # Guesses are token ids, so both models must number tokens alike.
    ours = decoder.config.vocabulary
    theirs = draft.config.vocabulary
    if draft.mesh != decoder.mesh:
        raise ValueError(
            "the draft model and the model are on different devices; load both with the same mesh"
        )
    if theirs != ours:
        raise ValueError(
            f"the draft model has a vocabulary of {theirs} tokens and the model one of {ours}; "
            "give a draft that was trained with the model's tokenizer, or none"
        )
    # The draft reads every position that the model reads.
    if draft.context < decoder.context:
        raise ValueError(
            f"the draft model's context holds {draft.context} tokens and the model's "
            f"{decoder.context}; give a draft with at least as many positions, or none"
        )
    for config in configs:
        if config.num_beams > 1:
            raise ValueError(
                "a draft model guesses the next tokens of one sequence, and "
                f"num_beams={config.num_beams} continues several; set num_beams=1, or give no "
                "draft model"
            )
        if config.prompt_lookup_num_tokens:
            raise ValueError(
                "both a draft model and prompt_lookup_num_tokens="
                f"{config.prompt_lookup_num_tokens} would guess the next tokens; give no draft "
                "model, or set prompt_lookup_num_tokens=0"
            )


@over_its_mesh
def continue_prefix(
    decoder: Decoder,
    tokenizer,
    prefix: Prefix,
    configs: Sequence[DecodeConfig],
    on_text: Callable[[int, str], None] | None = None,
    constraint: Callable | None = None,
    draft: Decoder | None = None,
) -> list[Generated]:
    """Generate from prompts that are already in a cache; ``prefix`` stays usable.

    ``configs`` has one entry for each prompt of ``prefix``; prompts behind those are not continued.
    The other arguments and the result are those of `generate`. Raises ValueError if beams are to
    use an int8 cache or a draft model, and if beams or guesses are to continue a prefix that keeps
    only windows (``rolling`` of `prefill`).
    """
    for config in configs:
        if not keeps_windows(config):
            check_whole(prefix.cache, "beam search or prompt_lookup_num_tokens")
    if draft is not None:
        check_draft(decoder, draft, configs)
        check_whole(prefix.cache, "a draft model")
    # Without the end token: each row adds its own ends, which may differ.
    allowed_V = writable(tokenizer, decoder.config.vocabulary, end=False)

    def settings_of(configs: Sequence[DecodeConfig]) -> Settings:
        return batch_settings(configs, allowed_V, tokenizer.eos_ids, constraint)

    # Beam searches with equal (beams, groups, whether sampled) run as one batch. None marks rows.
    kinds = [
        (c.num_beams, c.num_beam_groups, c.temperature > 0) if c.num_beams > 1 else None
        for c in configs
    ]
    # The usual case: text can then be shown as it is written.
    if set(kinds) == {None}:
        return _continue_rows(decoder, tokenizer, prefix, configs, settings_of, on_text, draft)
    # The cache of beams holds only floats.
    if decoder.int8_cache:
        raise ValueError(
            "beam search does not support an int8 cache, and "
            f"num_beams={max(c.num_beams for c in configs)}; set num_beams=1, or leave cache=int8 "
            "out"
        )
    results: list[list[Generated]] = [[] for _ in configs]

    def add(found: list[Generated], chosen: list[int]) -> None:
        for result in found:
            prompt = chosen[result.prompt]
            results[prompt].append(dataclasses.replace(result, prompt=prompt))

    # Beams first: there may be fewer than requested, and on_text needs indices in the result.
    for kind in sorted({kind for kind in kinds if kind is not None}):
        chosen = [i for i, each in enumerate(kinds) if each == kind]
        filled = [*chosen, *chosen[:1] * (padded(len(chosen), decoder.mesh) - len(chosen))]
        # Selecting prompts copies the cache, so it is skipped if all are selected.
        part = (
            prefix if filled == list(range(len(prefix.lengths_B))) else _prompts_of(prefix, filled)
        )
        search = stochastic.draw if kind[2] else beam.search
        part_configs = [configs[i] for i in filled]
        found = search(decoder, tokenizer, part, part_configs, settings_of(part_configs))
        add([result for result in found if result.prompt < len(chosen)], chosen)
    rest = [i for i, kind in enumerate(kinds) if kind is None]
    # Beams are known already; a prompt of rows always has all its sequences.
    counts = [
        len(found) or config.num_return_sequences * (kind is None)
        for found, config, kind in zip(results, configs, kinds, strict=True)
    ]
    # Index of each prompt's first sequence in the result.
    starts = np.cumsum([0, *counts]).tolist()
    if on_text:
        for start, found in zip(starts, results, strict=False):
            for index, result in enumerate(found, start):
                if result.text:
                    on_text(index, result.text)
    if rest:
        part = _prompts_of(prefix, rest)
        # Rows are numbered within their own batch; on_text needs their number in the whole result.
        indices = [starts[i] + copy for i in rest for copy in range(counts[i])]
        show = (lambda row, text: on_text(indices[row], text)) if on_text else None
        part_configs = [configs[i] for i in rest]
        add(_continue_rows(decoder, tokenizer, part, part_configs, settings_of, show), rest)
    return [result for found in results for result in found]


def _prompts_of(prefix: Prefix, chosen: list[int]) -> Prefix:
    """Return a copy of ``prefix`` with only the prompts at the indices ``chosen``."""
    return _select(prefix, np.array(chosen))


@jax.jit
def _select(prefix: Prefix, chosen_B) -> Prefix:
    return split_prefix(jax.tree.map(lambda x: x[chosen_B], prefix))


def _continue_rows(
    decoder: Decoder,
    tokenizer,
    prefix: Prefix,
    configs: Sequence[DecodeConfig],
    settings_of: Callable[[Sequence[DecodeConfig]], Settings],
    on_text: Callable[[int, str], None] | None,
    draft: Decoder | None = None,
) -> list[Generated]:
    """Generate rows: num_return_sequences for each prompt of ``prefix``.

    ``on_text`` is called with (number of the row, text).
    """
    start = time.monotonic()
    # Copies of a prompt are rows of their own: they share its prefill but not its cache.
    copies = [(i, copy) for i, c in enumerate(configs) for copy in range(c.num_return_sequences)]
    number = len(copies)
    # Rows without new tokens make their number divisible by the mesh.
    copies += copies[:1] * (padded(number, decoder.mesh) - number)
    owners = [i for i, _ in copies]
    per_row = [configs[i] for i in owners]
    # Seeds wrap around, so that seed + i of the largest seed is a seed as well.
    seeds_B = np.array([(configs[i].seed + copy) % 2**32 for i, copy in copies], np.uint32)
    # At most the context: a larger number might not fit int32.
    max_new_tokens = [min(config.max_new_tokens, decoder.context) for config in per_row]
    max_new_tokens[number:] = [0] * (len(copies) - number)
    settings = settings_of(per_row)
    speculates = draft is not None or not all(map(keeps_windows, per_row))
    state, limits = begin(
        prefix,
        np.array(owners, np.int32),
        np.array(max_new_tokens, np.int32),
        seeds_B,
        settings,
        int8_cache=decoder.int8_cache,
        rolling=None if speculates else decoder.config,
    )
    speculation = None
    if speculates:
        speculation = Speculation(decoder, draft, prefix, owners, per_row)
    # The host looks only at rows that somebody reads.
    never_B = np.ones(len(copies) - number, bool)
    owners = owners[:number]
    per_row = per_row[:number]
    advance_rows = advance if speculation is None else speculation.advance
    # The device checks stop sequences. Only the host can check text and time, after every chunk.
    host_checks = on_text is not None or any(c.stop_strings or c.max_time for c in per_row)
    # Each return to the host costs a wait for the device, so without a reason there is only one.
    chunks = 1 if host_checks else decoder.context
    # The clock includes the first token but not the prefill, which all rows share.
    time_limits_B = time_limits(per_row)
    texts = _Texts(tokenizer, per_row, fetch(limits.prompts_B)[:number], on_text)
    timed_out_B = np.zeros(len(per_row), bool)

    while True:
        tokens_BS, lengths_B, logprobs_BS = (
            fetch(x)[:number] for x in (state.tokens_BS, state.lengths_B, state.logprobs_BS)
        )
        for row, owner in enumerate(owners):
            # Only tokens that are new since the last return to the host.
            first = texts.seen_B[row]
            check_finite(
                logprobs_BS[row, first : lengths_B[row]], owner, first - texts.start_B[row]
            )
        # The host may end rows that the device would continue, by a stop string or by time.
        done_B = fetch(state.done_B)[:number] | texts.push(tokens_BS, lengths_B)
        # A row that is already done did not time out.
        late_B = time.monotonic() - start > time_limits_B
        timed_out_B |= ~done_B & agreed(late_B, decoder.mesh)
        done_B |= timed_out_B
        if done_B.all():
            break
        # The device writes no more tokens in rows that are done.
        state = state._replace(done_B=np.concatenate([done_B, never_B]))
        state = advance_rows(
            decoder.params, state, limits, settings, np.int32(chunks), config=decoder.config
        )

    texts.finish()
    none_B = np.zeros(len(per_row), np.int32)
    guessed_B, accepted_B = (none_B, none_B) if speculation is None else speculation.counts
    results = []
    for row, stream in enumerate(texts.streams):
        written = slice(texts.start_B[row], texts.seen_B[row])
        # A token that was written but is not in the text is an end token, or follows a stop.
        ended = stream.stopped or lengths_B[row] > texts.seen_B[row]
        results.append(
            Generated(
                owners[row],
                tuple(tokens_BS[row, written].tolist()),
                stream.text,
                "stop" if ended else "timeout" if timed_out_B[row] else "length",
                tuple(logprobs_BS[row, written].tolist()),
                guessed=int(guessed_B[row]),
                accepted=int(accepted_B[row]),
            )
        )
    return results


class _Texts:
    """The texts of rows, built on the host as tokens arrive.

    ``start_B`` is the length of each row's prompt. ``seen_B`` is the length of the prompt and the
    text so far, without the end token and anything after a stop.
    """

    def __init__(
        self,
        tokenizer,
        configs: Sequence[DecodeConfig],
        start_B: np.ndarray,
        on_text: Callable[[int, str], None] | None,
    ):
        self.streams = [text_stream(tokenizer, config) for config in configs]
        self.start_B = start_B
        self.seen_B = start_B.copy()
        self._ends = [ends_of_config(tokenizer, config) for config in configs]
        self._on_text = on_text

    def push(self, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        """Read the tokens that are new, and return which rows stopped, (B,)."""
        for row, stream in enumerate(self.streams):
            # Tokens after an end or a stop stay unseen: they are not part of the result.
            for token in tokens_BS[row, self.seen_B[row] : lengths_B[row]].tolist():
                if stream.stopped or token in self._ends[row]:
                    break
                self.seen_B[row] += 1
                self._show(row, stream.push(token))
        # Rows that the device ended are in its own done_B.
        return np.array([stream.stopped for stream in self.streams])

    def finish(self) -> None:
        """Show what the streams held back."""
        for row, stream in enumerate(self.streams):
            self._show(row, stream.finish())

    def _show(self, row: int, piece: str) -> None:
        if piece and self._on_text:
            self._on_text(row, piece)
