"""Generative decoding: prompts in, continuations out.

A row is one sequence of the batch that is written greedily, by sampling or by contrastive search,
not by beams. A prompt and its continuation must fit the model's context; a row that fills it ends
with "length". A row's tokens depend only on its prompt, settings and seed: not on other rows, its
index in the batch or the lengths of chunks (up to rounding, since other shapes may round a product
differently in its last bit).
"""

# Shapes: B rows, S positions, V vocabulary

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from mtnlg_jax.config import DecodeConfig, validate_decode
from mtnlg_jax.decode import beam, stochastic
from mtnlg_jax.decode.adapters import for_rows, of_rows
from mtnlg_jax.decode.batched_settings import check_tokens
from mtnlg_jax.decode.cache import Decoder, Prefix, bucket, capacity, prefill, split_prefix
from mtnlg_jax.decode.prefixes import check_ways, encode_behind, marked, stacked
from mtnlg_jax.decode.results import Generated, check_context
from mtnlg_jax.decode.rolling import check_whole, keeps_windows
from mtnlg_jax.decode.rows import continue_rows, settings_maker
from mtnlg_jax.parallel.auto import over_its_mesh, padded


def generate(
    decoder: Decoder,
    tokenizer,
    prompts: Sequence[str | Sequence[int]],
    decode: DecodeConfig | Sequence[DecodeConfig],
    *,
    constraint: Callable | None = None,
    on_text: Callable[[int, str], None] | None = None,
    draft: Decoder | None = None,
    adapters: Sequence[str | None] | None = None,
    prefixes: Sequence[Any | None] | None = None,
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
      adapters: the name of each prompt's adapter, None for none, of those that `adapters.stack`
        has given ``decoder``. Default: what the decoder is set to.
      prefixes: for each prompt an image (uint8, size x size x channels) or features (positions x
        width), as config.prefix of the model has it, which the model reads ahead of the prompt;
        None for a prompt without. A text behind one always gets a <bos>.

    Control tokens (except ends and forced tokens; see `results.writable`) and the padding of the
    vocabulary are never written. The i-th sequence of a prompt draws with seed + i; the beams of a
    prompt are one draw with seed. There may be fewer beams than num_return_sequences if fewer
    different sequences exist.

    Raises:
      ValueError: settings are out of range or in conflict, ids are outside the vocabulary, a
        prompt is longer than the context, or a prefix is not what the model takes.
    """
    # Tokens and checks come first, so that a mistake costs no time on the device.
    ahead = [None] * len(prompts) if prefixes is None else list(prefixes)
    if len(ahead) != len(prompts):
        raise ValueError(f"{len(ahead)} prefixes for {len(prompts)} prompts; give one for each")
    token_prompts = [
        _encode(decoder, tokenizer, prompt, prefix)
        for prompt, prefix in zip(prompts, ahead, strict=True)
    ]
    configs = [decode] * len(prompts) if isinstance(decode, DecodeConfig) else list(decode)
    if len(configs) != len(token_prompts):
        raise ValueError(
            f"{len(configs)} settings for {len(token_prompts)} prompts; give one, or one for each"
        )
    for config in _distinct(configs):
        validate_decode(config)
        check_tokens(config, decoder.config.vocabulary)
    check_draft(decoder, draft, configs)
    if adapters is not None and len(adapters) != len(token_prompts):
        raise ValueError(
            f"{len(adapters)} adapters for {len(token_prompts)} prompts; give one for each"
        )
    if not token_prompts:
        return []
    # Rows that nobody reads make their number divisible by the mesh.
    rows_of_mesh = padded(len(token_prompts), decoder.mesh)
    arrays = stacked(decoder.config, ahead, rows_of_mesh)
    if arrays is not None:
        check_ways(configs, draft=draft is not None)
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
    extra = rows_of_mesh - len(token_prompts)
    filled = [*token_prompts, *[token_prompts[0][:1]] * extra]
    if adapters is not None:
        decoder = for_rows(decoder, [*adapters, *[None] * extra])
    prefix = prefill(decoder, filled, size, rolling=rolling, prefixes=arrays)
    return continue_prefix(decoder, tokenizer, prefix, configs, on_text, constraint, draft)


def _distinct(configs: Sequence[DecodeConfig]) -> Iterable[DecodeConfig]:
    """Return ``configs`` without repetitions: the rows of a batch often share theirs."""
    try:
        return dict.fromkeys(configs)
    except TypeError:  # a setting is a list, which the check refuses by its name
        return configs


def _encode(decoder: Decoder, tokenizer, prompt: str | Sequence[int], prefix: Any) -> list[int]:
    """Return the tokens of a prompt, behind those that stand for its prefix if it has one."""
    if isinstance(prompt, str):
        return encode_behind(decoder.config, tokenizer, prefix, prompt)
    tokens = list(prompt) or [tokenizer.bos_id]
    if min(tokens) < 0:  # it would stand for a position of a prefix
        raise ValueError(f"token {min(tokens)} is below 0; give ids of the model's vocabulary")
    return tokens if prefix is None else marked(decoder.config, tokens)


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
        for name in ("penalty_alpha", "mirostat_tau"):
            if getattr(config, name):
                raise ValueError(
                    f"{name}={getattr(config, name)} decides one token after the other, and a "
                    f"draft model guesses several at once; set {name}=0, or give no draft model"
                )
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
    The other arguments and the result are those of `generate`. Raises ValueError if beams or
    contrastive search are to use an int8 cache or a draft model, and if these or guesses are to
    continue a prefix that keeps only windows (``rolling`` of `prefill`).
    """
    for config in configs:
        if not keeps_windows(config):
            check_whole(prefix.cache, "beam search, penalty_alpha or prompt_lookup_num_tokens")
    if draft is not None:
        check_draft(decoder, draft, configs)
        check_whole(prefix.cache, "a draft model")
    settings_of = settings_maker(decoder, tokenizer, constraint)
    # Beam searches with equal (beams, groups, whether sampled) run as one batch. None marks rows.
    kinds = [
        (c.num_beams, c.num_beam_groups, c.temperature > 0) if c.num_beams > 1 else None
        for c in configs
    ]
    contrastive = [config.penalty_alpha > 0 for config in configs]
    # The usual case: text can then be shown as it is written.
    if set(kinds) == {None} and len(set(contrastive)) == 1:
        return continue_rows(decoder, tokenizer, prefix, configs, settings_of, on_text, draft)
    # The cache of beams holds only floats.
    if decoder.int8_cache and set(kinds) != {None}:
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
        model = of_rows(decoder, filled)
        found = search(model, tokenizer, part, part_configs, settings_of(part_configs))
        add([result for result in found if result.prompt < len(chosen)], chosen)
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
    for contrasts in (False, True):
        rest = [i for i, kind in enumerate(kinds) if kind is None and contrastive[i] == contrasts]
        if not rest:
            continue
        part = _prompts_of(prefix, rest)
        # Rows are numbered within their own batch; on_text needs their number in the whole result.
        indices = [starts[i] + copy for i in rest for copy in range(counts[i])]
        show = _renumbered(on_text, indices) if on_text else None
        part_configs = [configs[i] for i in rest]
        model = of_rows(decoder, rest)
        add(continue_rows(model, tokenizer, part, part_configs, settings_of, show), rest)
    return [result for found in results for result in found]


def _renumbered(
    on_text: Callable[[int, str], None], indices: Sequence[int]
) -> Callable[[int, str], None]:
    """Return ``on_text`` for rows that have the numbers ``indices`` in the result."""
    return lambda row, text: on_text(indices[row], text)


def _prompts_of(prefix: Prefix, chosen: list[int]) -> Prefix:
    """Return a copy of ``prefix`` with only the prompts at the indices ``chosen``."""
    return _select(prefix, np.array(chosen))


@jax.jit
def _select(prefix: Prefix, chosen_B) -> Prefix:
    return split_prefix(jax.tree.map(lambda x: x[chosen_B], prefix))
