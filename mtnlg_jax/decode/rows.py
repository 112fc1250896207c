"""Rows that are written together: greedily, by sampling or by contrastive search, not by beams."""

# Shapes: B rows, S positions, V vocabulary

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.adapters import of_rows
from mtnlg_jax.decode.batched_settings import Settings, batch_settings
from mtnlg_jax.decode.cache import Decoder, Prefix
from mtnlg_jax.decode.contrastive import ContrastiveSearch
from mtnlg_jax.decode.dry import breaker_bits
from mtnlg_jax.decode.results import (
    Generated,
    check_finite,
    ends_of_config,
    text_stream,
    time_limits,
    writable,
)
from mtnlg_jax.decode.rolling import keeps_windows
from mtnlg_jax.decode.sampling import Limits, advance, begin
from mtnlg_jax.decode.slider import MOST_TOKENS, Slider
from mtnlg_jax.decode.speculative import Speculation
from mtnlg_jax.decode.stopping import TextStream
from mtnlg_jax.decode.words import SentenceStream
from mtnlg_jax.parallel.auto import agreed, fetch, padded


def settings_maker(
    decoder: Decoder, tokenizer, constraint: Callable | None
) -> Callable[[Sequence[DecodeConfig]], Settings]:
    """Return a function from the configs of rows, one each, to the settings of their batch."""
    vocabulary = decoder.config.vocabulary
    # Without the end token: each row adds its own ends, which may differ.
    allowed_V = writable(tokenizer, vocabulary, end=False)
    return functools.partial(
        batch_settings,
        allowed_V=allowed_V,
        eos=tokenizer.eos_ids,
        constraint=constraint,
        breakers_of=functools.partial(breaker_bits, tokenizer, vocabulary),
    )


def continue_rows(
    decoder: Decoder,
    tokenizer,
    prefix: Prefix,
    configs: Sequence[DecodeConfig],
    settings_of: Callable[[Sequence[DecodeConfig]], Settings],
    on_text: Callable[[int, str], None] | None,
    draft: Decoder | None = None,
    *,
    slider: Slider | None = None,
    words: int | None = None,
) -> list[Generated]:
    """Generate rows: num_return_sequences for each prompt of ``prefix``.

    Args:
      on_text: called with (number of the row, text).
      slider: makes room in caches that are full; None: such rows end.
      words: end a text behind the first sentence that ends after this number of words.
    """
    start = time.monotonic()
    # Copies of a prompt are rows of their own: they share its prefill but not its cache.
    copies = [(i, copy) for i, c in enumerate(configs) for copy in range(c.num_return_sequences)]
    number = len(copies)
    # Rows without new tokens make their number divisible by the mesh.
    copies += copies[:1] * (padded(number, decoder.mesh) - number)
    owners = [i for i, _ in copies]
    decoder = of_rows(decoder, owners)
    per_row = [configs[i] for i in owners]
    # Seeds wrap around, so that seed + i of the largest seed is a seed as well.
    seeds_B = np.array([(configs[i].seed + copy) % 2**32 for i, copy in copies], np.uint32)
    # A larger number might not fit int32.
    max_new_tokens = [min(config.max_new_tokens, MOST_TOKENS) for config in per_row]
    max_new_tokens[number:] = [0] * (len(copies) - number)
    settings = settings_of(per_row)
    most_B = np.minimum(max_new_tokens, prefix.tokens_BS.shape[1]).astype(np.int32)
    numbers = (np.array(owners, np.int32), most_B, seeds_B)
    slides = slider is not None
    rows = _begin_rows(decoder, draft, prefix, numbers, settings, per_row, slides=slides)
    state = rows.state
    advance_rows = rows.advance
    if slider is not None:
        slider.start(owners, max_new_tokens)
        advance_rows = slider.advance
    # The host looks only at rows that somebody reads.
    never_B = np.ones(len(copies) - number, bool)
    owners = owners[:number]
    per_row = per_row[:number]
    # The device checks stop sequences. Only the host can check text and time, after every chunk.
    host_checks = on_text is not None or words is not None
    host_checks |= any(c.stop_strings or c.max_time for c in per_row)
    # Each return to the host costs a wait for the device, so without a reason there is only one.
    chunks = 1 if host_checks else decoder.context
    # The clock includes the first token but not the prefill, which all rows share.
    time_limits_B = time_limits(per_row)
    texts = _Texts(tokenizer, per_row, fetch(rows.limits.prompts_B)[:number], on_text, words)
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
            decoder.params, state, rows.limits, settings, np.int32(chunks), config=decoder.config
        )

    texts.finish()
    return _results(rows, texts, owners, (tokens_BS, lengths_B, logprobs_BS), timed_out_B)


def _results(
    rows: "_Rows",
    texts: "_Texts",
    owners: Sequence[int],
    written: tuple[np.ndarray, np.ndarray, np.ndarray],
    timed_out_B: np.ndarray,
) -> list[Generated]:
    """Return the results of rows that are done; ``written``: tokens, lengths, log-probabilities."""
    tokens_BS, lengths_B, logprobs_BS = written
    none_B = np.zeros(len(owners), np.int32)
    guesses = rows.speculation
    guessed_B, accepted_B = (none_B, none_B) if guesses is None else guesses.counts
    results = []
    for row, stream in enumerate(texts.streams):
        new = slice(texts.start_B[row], texts.seen_B[row])
        # A token that was written but is not in the text is an end token, or follows a stop.
        ended = stream.stopped or lengths_B[row] > texts.seen_B[row]
        results.append(
            Generated(
                owners[row],
                tuple(tokens_BS[row, new].tolist()),
                stream.text,
                "stop" if ended else "timeout" if timed_out_B[row] else "length",
                tuple(logprobs_BS[row, new].tolist()),
                guessed=int(guessed_B[row]),
                accepted=int(accepted_B[row]),
            )
        )
    return results


class _Rows(NamedTuple):
    """Rows that have begun, and what writes more of them."""

    state: Any  # a State, whose done_B the host changes
    limits: Limits
    advance: Callable
    speculation: Speculation | None = None


def _begin_rows(
    decoder: Decoder,
    draft: Decoder | None,
    prefix: Prefix,
    numbers: tuple[np.ndarray, np.ndarray, np.ndarray],
    settings: Settings,
    configs: Sequence[DecodeConfig],
    *,
    slides: bool,
) -> _Rows:
    """Begin rows that are written by the same method, one of ``configs`` each.

    Args:
      numbers: the owners, the most new tokens and the seeds of the rows.
      slides: the prefix has its windowed layers as a slider keeps them.
    """
    if configs[0].penalty_alpha > 0:
        search = ContrastiveSearch(decoder, prefix, *numbers, settings, configs)
        return _Rows(search.state, search.limits, search.advance)
    speculates = draft is not None or not all(map(keeps_windows, configs))
    rolling = None if speculates or slides else decoder.config
    state, limits = begin(
        prefix, *numbers, settings, int8_cache=decoder.int8_cache, rolling=rolling
    )
    if not speculates:
        return _Rows(state, limits, advance)
    speculation = Speculation(decoder, draft, prefix, numbers[0].tolist(), configs)
    return _Rows(state, limits, speculation.advance, speculation)


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
        words: int | None = None,
    ):
        streams = [text_stream(tokenizer, config) for config in configs]
        self.streams: Sequence[TextStream | SentenceStream] = streams
        if words is not None:
            self.streams = [SentenceStream(stream, words) for stream in streams]
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
