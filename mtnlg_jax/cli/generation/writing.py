"""--mode=generative: continue a prompt."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mtnlg_jax.cli.decoding import devices, held_flags, shared_flags
from mtnlg_jax.cli.decoding.preset_flag import preset_scorers
from mtnlg_jax.cli.generation import options, sliding

if TYPE_CHECKING:
    from mtnlg_jax.config import DecodeConfig
    from mtnlg_jax.decode.cache import Decoder
    from mtnlg_jax.decode.results import Generated


def write(
    decoder: "Decoder", tokenizer, prompt: str, decode: "DecodeConfig", prefix: Any = None
) -> dict:
    """Generate the texts of one prompt behind ``prefix``, print them, and return them."""
    from mtnlg_jax.decode.prefixes import encode_behind
    from mtnlg_jax.decode.words import Pace

    if preset_scorers():
        best = write_best(decoder, tokenizer, prompt, decode, prefix)
        if not shared_flags.JSON.value:
            print(prompt + best["text"])
        return best
    once = _writer(decoder, tokenizer, prompt, prefix)
    read = len(encode_behind(decoder.config, tokenizer, prefix, prompt))
    if sliding.asked():
        sliding.note_prompt(decoder.config, read)
    stream = sys.stdout.isatty() if options.STREAM.value is None else options.STREAM.value
    # Several texts cannot be streamed to one terminal at once.
    stream = stream and decode.num_return_sequences == 1 and not shared_flags.JSON.value

    def show(_: int, text: str) -> None:
        print(text, end="", flush=True)

    if stream:
        show(0, prompt)
    begin = time.perf_counter()
    results = once(decode, on_text=show if stream else None)
    seconds = time.perf_counter() - begin
    for number, result in enumerate(results, 1):
        if stream:
            print()
        elif not shared_flags.JSON.value:
            score = "" if result.score is None else f", score {result.score:.4f}"
            print(f"--- {number}{score} ---\n" * (len(results) > 1) + prompt + result.text)
        if shared_flags.JSON.value:
            continue
        if sliding.asked():
            sliding.note_end(result, decode)
        elif read + len(result.tokens) == decoder.context:
            print(f"(ended: the context of {decoder.context} tokens is full)", file=sys.stderr)
    answer: dict[str, Any] = {"sequences": [dataclasses.asdict(result) for result in results]}
    if options.STATS.value:
        # Time a second call, since the first one compiles.
        begin = time.perf_counter()
        pace = Pace()
        results = once(
            dataclasses.replace(decode, max_time=None),
            on_text=pace.on_text if sliding.asked() else None,
        )
        answer["stats"] = _stats(decoder, read, results, decode, time.perf_counter() - begin) | {
            "first_seconds": round(seconds, 3)
        }
        if sliding.asked():
            answer["stats"] |= sliding.near_words(pace, tokenizer, results[0].tokens)
        if not shared_flags.JSON.value:
            print(
                "\n".join(f"{name}: {value}" for name, value in answer["stats"].items()),
                file=sys.stderr,
            )
    return answer


def write_best(
    decoder: "Decoder", tokenizer, prompt: str, decode: "DecodeConfig", prefix: Any = None
) -> dict:
    """Return the best of the texts of one prompt by the scorers of --preset, and the ranking."""
    from mtnlg_jax.decode.rank import rank

    ranking = rank(
        decoder, tokenizer, prompt, decode=decode, scorers=preset_scorers(), prefix=prefix
    )
    return {"text": ranking[0].text, "ranking": dataclasses.asdict(ranking)}


def _writer(
    decoder: "Decoder", tokenizer, prompt: str, prefix: Any
) -> "Callable[..., list[Generated]]":
    """Return a function that continues ``prompt`` by its settings, and takes ``on_text``."""
    from mtnlg_jax.decode.generate import generate
    from mtnlg_jax.decode.sliding import continue_sliding

    if sliding.asked():
        continued = functools.partial(continue_sliding, sliding=sliding.sliding())
    else:
        continued = functools.partial(generate, draft=load_draft(tokenizer), prefixes=[prefix])
    return functools.partial(continued, decoder, tokenizer, [prompt])


def load_draft(tokenizer) -> "Decoder | None":
    """Load the model of --draft; raise ValueError if its tokenizer is another one."""
    from mtnlg_jax.decode.load import load_decoder

    if options.DRAFT.value is None:
        return None
    run, draft = load_decoder(
        options.DRAFT.value,
        held_flags.CHECKPOINT.value,
        held_flags.DTYPE.value,
        weights=held_flags.WEIGHTS.value,
        cache=held_flags.CACHE.value,
        mesh=devices.mesh(),
    )
    if run.tokenizer.vocab_size != tokenizer.vocab_size or any(
        run.tokenizer.token_bytes(i) != tokenizer.token_bytes(i)
        for i in range(tokenizer.vocab_size)
    ):
        raise ValueError(
            f"--draft={options.DRAFT.value} was trained with another tokenizer, of "
            f"{run.tokenizer.vocab_size} tokens where the model's has {tokenizer.vocab_size}; give "
            "a draft with the same one"
        )
    return draft


def _stats(
    decoder: "Decoder",
    read: int,
    results: list["Generated"],
    decode: "DecodeConfig",
    seconds: float,
) -> dict:
    """Return the speed, the limit of the memory bandwidth, and the share of accepted guesses.

    ``read``: tokens of the prompt.
    """
    from mtnlg_jax.decode.rolling import keeps_windows
    from mtnlg_jax.decode.roofline import copy_bandwidth, roofline

    tokens = sum(len(result.tokens) for result in results)
    guessed = sum(result.guessed for result in results)
    rows = max(decode.num_return_sequences, decode.num_beams)
    length = read + decode.max_new_tokens
    stats: dict[str, Any] = {"tokens_per_second": round(tokens / seconds, 2)} | roofline(
        decoder,
        rows,
        length,
        copy_bandwidth(),
        rolling=options.DRAFT.value is None and keeps_windows(decode),
    )
    if guessed:
        accepted = sum(result.accepted for result in results)
        stats |= {
            "guessed": guessed,
            "accepted": accepted,
            "acceptance_rate": round(accepted / guessed, 3),
        }
    return stats
