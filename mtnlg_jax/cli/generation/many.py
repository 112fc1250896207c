"""Answer the many prompts of --prompts, a JSON line each."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mtnlg_jax.cli.decoding.output import dump
from mtnlg_jax.cli.decoding.preset_flag import preset_scorers
from mtnlg_jax.cli.generation import adapters, options, prefixes
from mtnlg_jax.cli.generation.other_modes import fill_masks
from mtnlg_jax.cli.generation.writing import load_draft, write_best

if TYPE_CHECKING:
    from mtnlg_jax.config import DecodeConfig
    from mtnlg_jax.decode.cache import Decoder


def answer_all(
    decoder: "Decoder", tokenizer, rows: list[dict], decode: "DecodeConfig", ranking: Callable
) -> None:
    """Write a JSON line for each row as soon as its answer is known."""
    from mtnlg_jax.decode.adapters import for_rows
    from mtnlg_jax.decode.generate import generate
    from mtnlg_jax.decode.prefixes import encode_behind
    from mtnlg_jax.decode.results import check_context

    folder = prefixes.folder_of(options.PROMPTS.value)
    for number, row in enumerate(rows, 1):
        with _named(number, len(rows), 0):
            # `prefixes.check` has read what they name.
            ahead = next((row[key] for key in prefixes.KEYS if row.get(key) is not None), None)
            read = encode_behind(decoder.config, tokenizer, ahead, row["prompt"])
            check_context(decoder, len(read))
    draft = load_draft(tokenizer)
    output = (
        sys.stdout
        if options.OUTPUT.value is None
        else open(options.OUTPUT.value, "x", encoding="utf-8")
    )
    done = 0
    generative = options.MODE.value == "generative"
    size = options.BATCH.value if generative and not preset_scorers() else 1
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        with _named(start + 1, len(rows), done):
            names = adapters.names_of(decoder, part)
            model = decoder if names is None else for_rows(decoder, names)
            arrays = [prefixes.array_of(row, decoder.config, folder) for row in part]
            answers: list[dict]
            if generative and preset_scorers():
                best = write_best(model, tokenizer, part[0]["prompt"], decode, arrays[0])
                answers = [best]
            elif generative:
                answers = [{"sequences": []} for _ in part]
                prompts = [row["prompt"] for row in part]
                results = generate(
                    decoder,
                    tokenizer,
                    prompts,
                    decode,
                    draft=draft,
                    adapters=names,
                    prefixes=arrays,
                )
                for result in results:
                    sequence = dataclasses.asdict(result)
                    answers[sequence.pop("prompt")]["sequences"].append(sequence)
            elif options.MODE.value == "ranking":
                row = part[0]
                given = row.get("candidates")
                answers = [
                    ranking(model, tokenizer, row["prompt"], decode, given=given, prefix=arrays[0])
                ]
            else:
                answers = [fill_masks(model, tokenizer, part[0]["prompt"], decode)]
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
