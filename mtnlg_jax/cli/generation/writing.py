"""--mode=generative: continue a prompt."""

import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Any

from mtnlg_jax.cli.decoding import devices, held_flags, shared_flags
from mtnlg_jax.cli.generation import options

if TYPE_CHECKING:
    from mtnlg_jax.config import DecodeConfig
    from mtnlg_jax.decode.cache import Decoder
    from mtnlg_jax.decode.results import Generated


def write(decoder: "Decoder", tokenizer, prompt: str, decode: "DecodeConfig") -> dict:
    """Generate the texts of one prompt, print them, and return them."""
    from mtnlg_jax.decode.generate import generate
    from mtnlg_jax.decode.results import encode_prompt

    draft = load_draft(tokenizer)
    stream = sys.stdout.isatty() if options.STREAM.value is None else options.STREAM.value
    # Several texts cannot be streamed to one terminal at once.
    stream = stream and decode.num_return_sequences == 1 and not shared_flags.JSON.value

    def show(_: int, text: str) -> None:
        print(text, end="", flush=True)

    if stream:
        show(0, prompt)
    begin = time.perf_counter()
    results = generate(
        decoder, tokenizer, [prompt], decode, on_text=show if stream else None, draft=draft
    )
    seconds = time.perf_counter() - begin
    for number, result in enumerate(results, 1):
        if stream:
            print()
        elif not shared_flags.JSON.value:
            score = "" if result.score is None else f", score {result.score:.4f}"
            print(f"--- {number}{score} ---\n" * (len(results) > 1) + prompt + result.text)
        if (
            len(encode_prompt(tokenizer, prompt)) + len(result.tokens) == decoder.context
            and not shared_flags.JSON.value
        ):
            print(f"(ended: the context of {decoder.context} tokens is full)", file=sys.stderr)
    answer: dict[str, Any] = {"sequences": [dataclasses.asdict(result) for result in results]}
    if options.STATS.value:
        # Time a second call, since the first one compiles.
        begin = time.perf_counter()
        results = generate(
            decoder, tokenizer, [prompt], dataclasses.replace(decode, max_time=None), draft=draft
        )
        answer["stats"] = _stats(
            decoder, tokenizer, prompt, results, decode, time.perf_counter() - begin
        ) | {"first_seconds": round(seconds, 3)}
        if not shared_flags.JSON.value:
            print(
                "\n".join(f"{name}: {value}" for name, value in answer["stats"].items()),
                file=sys.stderr,
            )
    return answer


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
    tokenizer,
    prompt: str,
    results: list["Generated"],
    decode: "DecodeConfig",
    seconds: float,
) -> dict:
    """Return the speed, the limit of the memory bandwidth, and the share of accepted guesses."""
    from mtnlg_jax.decode.results import encode_prompt
    from mtnlg_jax.decode.rolling import keeps_windows
    from mtnlg_jax.decode.roofline import copy_bandwidth, roofline

    tokens = sum(len(result.tokens) for result in results)
    guessed = sum(result.guessed for result in results)
    rows = max(decode.num_return_sequences, decode.num_beams)
    length = len(encode_prompt(tokenizer, prompt)) + decode.max_new_tokens
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
