"""Continue a prompt to any number of tokens: the window of the model slides over the text.

    sliding = Sliding(sinks=4, words=5000)
    results = continue_sliding(decoder, tokenizer, ["Once upon a time"], decode, sliding)

Until the window is full the texts are those of `generate`. Then the oldest tokens behind the
attention sinks leave the cache, half a window at a time, and the text goes on; slider.py says how.
Settings that look at the text, such as penalties, stops, n-grams and constraints, see all of it,
prompt and dropped tokens included. Only the model no longer sees what left the window.
"""

# Shapes: B rows, V vocabulary

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from mtnlg_jax.config import DecodeConfig, ModelConfig, validate_decode
from mtnlg_jax.decode.batched_settings import check_tokens
from mtnlg_jax.decode.cache import Decoder, Prefix, capacity, prefill
from mtnlg_jax.decode.results import Generated, encode_prompt
from mtnlg_jax.decode.rows import continue_rows, settings_maker
from mtnlg_jax.decode.slider import LEAST_TEXT, MOST_TOKENS, Room, Slider
from mtnlg_jax.parallel.auto import over_its_mesh, padded


@dataclasses.dataclass(frozen=True)
class Sliding:
    """How a text goes on when the window is full."""

    # shift: move cached keys and values. recompute: read the kept tokens again. auto: shift, and
    # recompute where positions are learned, as their keys cannot move.
    mode: Literal["auto", "shift", "recompute"] = "auto"
    # First tokens of the text, which are never dropped (Xiao 2023). 0: none.
    sinks: int = 4
    # Last tokens that are kept when the window is full. None: half of it, sinks included.
    keep: int | None = None
    # Tokens that the model sees at once. None: its context.
    window: int | None = None
    # End a text behind the first sentence that ends after this number of words; see `WordCounter`.
    # None: only max_new_tokens, stops and ends do.
    words: int | None = None


def room_of(config: ModelConfig, sliding: Sliding) -> Room:
    """Return what a row keeps of a full window; raise ValueError if ``sliding`` does not fit."""
    context = config.max_position_embeddings
    size = context if sliding.window is None else sliding.window
    if not 2 <= size <= context:
        raise ValueError(
            f"window={size} is not between 2 and the model's context of {context} tokens; give "
            "such a number, or leave it out"
        )
    if sliding.words is not None and sliding.words < 1:
        raise ValueError(f"words={sliding.words} is no length of a text; give 1 or more")
    if not 0 <= sliding.sinks <= size - 2:
        raise ValueError(
            f"sinks={sliding.sinks} is not between 0 and {size - 2}, so that a window of {size} "
            "tokens has room for others; give such a number, such as 4"
        )
    keep = sliding.keep
    if keep is None:
        keep = max(1, size // 2 - sliding.sinks)
    if not 1 <= keep < size - sliding.sinks:
        raise ValueError(
            f"keep={keep} is not between 1 and {size - sliding.sinks - 1}, so that a window of "
            f"{size} tokens with sinks={sliding.sinks} can drop one; give such a number, or leave "
            "it out to keep half"
        )
    learned = config.position_embedding_type == "learned"
    if sliding.mode == "shift" and learned:
        raise ValueError(
            "mode=shift moves cached keys to other positions, and this model has learned "
            "positions, on which every key depends; choose recompute or auto"
        )
    return Room(size, sliding.sinks, keep, sliding.mode != "recompute" and not learned)


def check_sliding(decode: DecodeConfig) -> None:
    """Raise ValueError if these settings write in a way whose cache cannot slide."""
    for name, off, why in (
        ("num_beams", 1, "beams share the cache of their prompt"),
        ("prompt_lookup_num_tokens", 0, "guesses are verified at positions that must not move"),
        ("penalty_alpha", 0, "contrastive search compares hidden states of the whole text"),
    ):
        value = getattr(decode, name)
        if value != off:
            raise ValueError(
                f"a sliding window writes rows, and {name}={value}: {why}; set {name}={off}"
            )


@over_its_mesh
def continue_sliding(
    decoder: Decoder,
    tokenizer,
    prompts: Sequence[str | Sequence[int]],
    decode: DecodeConfig | Sequence[DecodeConfig],
    sliding: Sliding = Sliding(),
    *,
    constraint: Callable | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generated]:
    """Return num_return_sequences continuations of each prompt, of any length.

    Arguments and results are those of `generate`, with these differences: max_new_tokens may be
    larger than the context, and so may a prompt, of which the model then reads the first tokens
    (``sliding.sinks``) and the last ones. Results hold all new tokens; their log-probabilities are
    the model's with the tokens that it saw. finish_reason is "stop" where ``sliding.words`` ended a
    text; its last token is then the one that showed that the sentence had ended.

    Raises:
      ValueError: settings are out of range or in conflict, also with the model; ids are outside the
        vocabulary; beams or prompt lookup are asked for.
    """
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
    room = room_of(decoder.config, sliding)
    for config in configs:
        validate_decode(config)
        check_tokens(config, decoder.config.vocabulary)
        check_sliding(config)
    if not token_prompts:
        return []
    pairs = zip(token_prompts, configs, strict=True)
    longest = max(min(len(prompt) + config.max_new_tokens, MOST_TOKENS) for prompt, config in pairs)
    # No larger than `generate` makes it: texts that never fill the window cost the same.
    room = room._replace(size=capacity(longest, room.size)) if longest <= room.size else room
    extra = padded(len(token_prompts), decoder.mesh) - len(token_prompts)
    filled = [*token_prompts, *[token_prompts[0][:1]] * extra]
    prefix = prefill(
        decoder, [room.read(p) for p in filled], room.size, rolling=room.rolls(decoder.config)
    )
    return continue_rows(
        decoder,
        tokenizer,
        _with_texts(prefix, filled, longest),
        configs,
        settings_maker(decoder, tokenizer, constraint),
        on_text,
        slider=Slider(decoder, room, list(map(len, filled))),
        words=sliding.words,
    )


def _with_texts(prefix: Prefix, prompts: Sequence[Sequence[int]], longest: int) -> Prefix:
    """Return ``prefix`` with the whole prompts, and room for texts of ``longest`` tokens."""
    # A larger text doubles the array on its way. One token must fit behind each prompt.
    most = max(LEAST_TEXT, 2 * max(map(len, prompts)))
    tokens = np.zeros((len(prompts), capacity(min(longest, most), MOST_TOKENS)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths_B = jnp.array(list(map(len, prompts)), jnp.int32)
    return prefix._replace(tokens_BS=jnp.asarray(tokens), lengths_B=lengths_B)
