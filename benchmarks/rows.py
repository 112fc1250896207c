"""Measure a step of decoding by the number of rows that share it, on this machine.

    python benchmarks/rows.py            the shape of GPT-2 124M, 1 to 16 rows
    python benchmarks/rows.py --small    a tiny model, to try the script out

The weights are random. In each round every (type, rows) takes one step, so that all share what else
the machine does; the result is the least time of each.
"""

import argparse
import datetime
import functools
import json
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode import cache
from mtnlg_jax.model.transformer import init_parameters

RESULT = Path(__file__).parent / "results" / "rows.json"
KINDS = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}, "int8": {"weights": "int8"}}
ROWS = (1, 2, 3, 4, 8, 16)
SIZES = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "vocab_size": 50257}
SMALL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a tiny model")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each")
    parser.add_argument("--output", help=f"a JSON file; default {RESULT}, none with --small")
    args = parser.parse_args()
    config = ModelConfig(**(SMALL if args.small else SIZES), max_position_embeddings=1024)
    params = init_parameters(config, 0)
    steps = {
        (kind, rows): step_of(cache.unstack(config, params, **held), rows)
        for kind, held in KINDS.items()
        for rows in ROWS
    }
    least = dict.fromkeys(steps, float("inf"))
    for _ in range(2 if args.small else args.rounds):
        for key, step in steps.items():
            begin = time.perf_counter()
            jax.block_until_ready(step())
            least[key] = min(least[key], time.perf_counter() - begin)
    results = {}
    for kind in KINDS:
        seconds = [least[kind, rows] for rows in ROWS]
        results[kind] = {
            "milliseconds": dict(
                zip(ROWS, (round(1e3 * each, 2) for each in seconds), strict=True)
            ),
            "two_rows_over_one": round(seconds[1] / seconds[0], 3),
            "tokens_per_second_of_8_rows_over_one": round(
                8 * seconds[0] / seconds[ROWS.index(8)], 2
            ),
        }
        print(kind, json.dumps(results[kind]))
    output = args.output or (None if args.small else RESULT)
    if output:
        report = {
            "command": "python benchmarks/rows.py",
            "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": platform.processor() or jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
            "jax": jax.__version__,
            "results": results,
        }
        Path(output).write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {output}")


def step_of(decoder: cache.Decoder, rows: int):
    """Return a compiled step of ``rows`` rows behind prompts of three tokens."""
    prefix = cache.prefill(decoder, [[5, 6, 7]] * rows, 128)
    tokens_B = jnp.ones(rows, jnp.int32)
    positions_B = jnp.full(rows, 3, jnp.int32)
    step = jax.jit(functools.partial(cache.step, decoder.config))
    run = functools.partial(step, decoder.params, prefix.cache, tokens_B, positions_B)
    jax.block_until_ready(run())
    return run


if __name__ == "__main__":
    main()
