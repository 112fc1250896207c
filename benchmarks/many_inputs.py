"""Measure the tokens per second of tasks over many inputs, beside those of plain generation.

    python benchmarks/many_inputs.py              4 layers of width 256, 64 rows, batches of 8
    python benchmarks/many_inputs.py --small      a tiny model and few rows, to try the script out

One side answers the rows of a file into a file, as launch/task.py --inputs does, once the model is
loaded: read, compose, batch, generate, write. The other side gives the same prompts to
decode.generate, sorted by length, in batches of the same size, with the same stop strings and
without files. Both write the same number of tokens a row, greedily. The weights are random, the
prompts 5 to 120 words long. In each round both sides take a turn, and the side that begins
alternates; the result is the median of each side's tokens per second and the median of the rounds'
ratios.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import jax

from mtnlg_jax.config import DecodeConfig, ModelConfig
from mtnlg_jax.data.tokenizer import train_tokenizer
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.model.transformer import init_parameters
from mtnlg_jax.tasks import run as tasks_run
from mtnlg_jax.tasks.many.answering import answer_items
from mtnlg_jax.tasks.many.inputs import Inputs
from mtnlg_jax.tasks.many.record import Record, read_records
from mtnlg_jax.tasks.templates import TASKS

RESULT = Path(__file__).parent / "results" / "many_inputs.json"
GOAL = 0.9
NAMES = ("continue", "translate")
SIZES = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4}
SMALL = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
WORDS = (
    "the of a to in film story very good slow warm never always whale captain sea north old".split()
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a tiny model")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help=f"a JSON file; default {RESULT}, none with --small")
    args = parser.parse_args()
    rows, rounds, tokens = (8, 1, 4) if args.small else (args.rows, args.rounds, args.tokens)
    draws = random.Random(0)
    texts = [" ".join(draws.choices(WORDS, k=draws.randint(5, 120))) for _ in range(rows)]
    tokenizer = train_tokenizer([*texts, "English: Chinese: Translate into."], 400)
    config = ModelConfig(
        **(SMALL if args.small else SIZES),
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=512,
    )
    decoder = unstack(config, init_parameters(config, 0))
    results = {}
    for name in NAMES:
        results[name] = measure(decoder, tokenizer, name, texts, args.batch, tokens, rounds)
        print(name, json.dumps(results[name]))
    output = args.output or (None if args.small else RESULT)
    if output:
        report = {
            "command": "python benchmarks/many_inputs.py",
            "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": platform.processor() or jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "jax": jax.__version__,
            "rows": rows,
            "batch": args.batch,
            "new_tokens": tokens,
            "rounds": rounds,
            "goal": GOAL,
            "results": results,
        }
        Path(output).write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {output}")


def measure(
    decoder, tokenizer, name: str, texts: list[str], batch: int, tokens: int, rounds: int
) -> dict:
    """Return the tokens per second of both sides and their ratio."""
    decode = DecodeConfig(max_new_tokens=tokens, min_new_tokens=tokens)
    written = [0]

    def counting(*given, **options):
        found = generate(*given, **options)
        written[0] += sum(len(each.tokens) for each in found)
        return found

    tasks_run.generate = counting  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "rows.jsonl")
        source.write_text("".join(json.dumps({"input": text}) + "\n" for text in texts))

        def many(number: int, keep: bool = False) -> list[str]:
            inputs = Inputs(str(source))
            path = Path(folder, f"{number}.jsonl")
            with Record(path, {}, inputs.count, keep_prompt=keep) as record:
                answer_items(
                    inputs.items(),
                    record,
                    lambda rows, give: tasks_run.perform(
                        decoder,
                        tokenizer,
                        TASKS[name],
                        rows,
                        decode=decode,
                        batch=batch,
                        on_answer=give,
                    ),
                    batch=batch,
                )
            return [line.get("prompt", "") for line in read_records(path)]

        # The first turns compile.
        prompts = sorted(many(-1, keep=True), key=len)

        stops = TASKS[name].templates["en"].stops
        alike = dataclasses.replace(decode, stop_strings=stops)

        def plain(number: int) -> None:
            for start in range(0, len(prompts), batch):
                counting(decoder, tokenizer, prompts[start : start + batch], alike)

        plain(-1)
        speeds: dict[str, list[float]] = {"many": [], "plain": []}
        for number in range(rounds):
            sides = [("many", many), ("plain", plain)]
            for side, turn in sides if number % 2 else reversed(sides):
                written[0] = 0
                began = time.perf_counter()
                turn(number)
                speeds[side].append(written[0] / (time.perf_counter() - began))
    ratios = [one / other for one, other in zip(speeds["many"], speeds["plain"], strict=True)]
    return {
        "many_tokens_per_second": round(statistics.median(speeds["many"]), 1),
        "generate_tokens_per_second": round(statistics.median(speeds["plain"]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(each, 3) for each in ratios],
    }


if __name__ == "__main__":
    main()
