"""Answer the many prompts of --prompts, a JSON line each."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mtnlg_jax.cli.decoding.output import dump
from mtnlg_jax.cli.generation import options
from mtnlg_jax.cli.generation.other_modes import fill_masks
from mtnlg_jax.cli.generation.writing import load_draft

if TYPE_CHECKING:
    from mtnlg_jax.config import DecodeConfig
    from mtnlg_jax.decode.cache import Decoder


def answer_all(
    decoder: "Decoder", tokenizer, rows: list[dict], decode: "DecodeConfig", ranking: Callable
) -> None:
    """Write a JSON line for each row as soon as its answer is known."""
    from mtnlg_jax.decode.generate import generate
    from mtnlg_jax.decode.results import check_context, encode_prompt

    for number, row in enumerate(rows, 1):
        with _named(number, len(rows), 0):
            check_context(decoder, len(encode_prompt(tokenizer, row["prompt"])))
    draft = load_draft(tokenizer)
    output = (
        sys.stdout
        if options.OUTPUT.value is None
        else open(options.OUTPUT.value, "x", encoding="utf-8")
    )
    done = 0
    size = options.BATCH.value if options.MODE.value == "generative" else 1
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        with _named(start + 1, len(rows), done):
            if options.MODE.value == "generative":
                answers: list[dict] = [{"sequences": []} for _ in part]
                prompts = [row["prompt"] for row in part]
                results = generate(decoder, tokenizer, prompts, decode, draft=draft)
                for result in results:
                    sequence = dataclasses.asdict(result)
                    answers[sequence.pop("prompt")]["sequences"].append(sequence)
            elif options.MODE.value == "ranking":
                row = part[0]
                given = row.get("candidates")
                answers = [ranking(decoder, tokenizer, row["prompt"], decode, given=given)]
            else:
                answers = [fill_masks(decoder, tokenizer, part[0]["prompt"], decode)]
        for row, answer in zip(part, answers, strict=True):
            done += 1
            print(dump(row | answer), file=output, flush=True)
    if output is not sys.stdout:
        output.close()
        print(f"{done:,} answers in {options.OUTPUT.value}")


@contextlib.contextmanager
def _named(number: int, count: int, done: int) -> Iterator[None]:
    """Prefix errors with the number of their row, and append the number of answers written."""
    try:
        yield
    except ValueError as error:
        written = f" ({done:,} answers are written)" if done else ""
        raise ValueError(f"prompt {number:,} of {count:,}: {error}{written}") from None
