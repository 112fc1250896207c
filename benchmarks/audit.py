"""Time the ranking of a canary: candidates behind one prefix against a pass for each of them.

    python benchmarks/audit.py                     GPT-2 124M's shape, 10,000 candidates, float32
    python benchmarks/audit.py --candidates=500 --layers=2 --output=FILE      a quick try

The model has random weights. A canary is a prefix of --prefix random tokens and a secret of
--secret random tokens, about as many as the default format has. Three sides:

    shared     what launch/audit.py does: the prefix is read once, candidates are scored in blocks
    separate   a pass of the model over prefix and secret for each candidate, one at a time
    batched    the same passes in blocks of rows, each row with its prefix

``separate`` and ``batched`` run over some of the candidates (--separate, --batched), and their
times are multiplied up to the number of all; the result says so. The sides alternate, and every
side compiles before it is timed. The result has the median time of each side, and the ratio of
``shared`` to each of the others.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode.cache import Decoder, unstack
from mtnlg_jax.decode.scoring import score_rows
from mtnlg_jax.evaluate.audit.exposure import score_secrets
from mtnlg_jax.model.transformer import init_parameters

# Candidates that are enough to compile every program.
_COMPILED = 1024
RESULT = Path(__file__).parent / "results" / "audit.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--candidates", type=int, default=10_000, help="ranked in one call")
    parser.add_argument("--separate", type=int, default=50, help="of them with a pass each")
    parser.add_argument("--batched", type=int, default=400, help="of them in rows of their own")
    parser.add_argument("--prefix", type=int, default=10, help="tokens")
    parser.add_argument("--secret", type=int, default=6, help="tokens")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3, help="calls of each side")
    parser.add_argument("--output", default=os.fspath(RESULT), help="file for the result")
    flags = parser.parse_args()
    model = ModelConfig(
        num_layers=flags.layers,
        hidden_size=768,
        num_attention_heads=12,
        vocab_size=50304,
        max_position_embeddings=1024,
    )
    decoder = unstack(model, init_parameters(model, 0))
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, 50257, flags.prefix).tolist()
    secrets = rng.integers(0, 50257, (flags.candidates, flags.secret)).tolist()
    sides = sides_of(decoder, prefix, secrets, flags.separate, flags.batched)
    check(sides_of(decoder, prefix, secrets[:_COMPILED], flags.separate, flags.batched))
    times = times_of(sides, flags.candidates, flags.rounds)
    shared = times["shared"]["seconds"]
    commanded = [each for each in sys.argv[1:] if not each.startswith("--output")]
    result = {
        "model": {"layers": flags.layers, "width": 768, "vocabulary": 50304, "dtype": "float32"},
        "prefix_tokens": flags.prefix,
        "secret_tokens": flags.secret,
        "candidates": flags.candidates,
        "sides": times,
        "shared_over_separate": shared / times["separate"]["seconds"],
        "shared_over_batched": shared / times["batched"]["seconds"],
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "command": " ".join(["python benchmarks/audit.py", *commanded]),
    }
    print(json.dumps(result, indent=2))
    Path(flags.output).write_text(json.dumps(result, indent=2) + "\n")


# A side: the number of candidates it runs over, and what returns their log-probabilities.
Side = tuple[int, Callable[[], list[float]]]


def sides_of(
    decoder: Decoder, prefix: list[int], secrets: list[list[int]], separate: int, batched: int
) -> dict[str, Side]:
    """Return the three sides."""
    rows = [prefix + secret for secret in secrets]
    start = len(prefix)

    def shared() -> list[float]:
        return score_secrets(decoder, prefix, secrets).tolist()

    def one_by_one() -> list[float]:
        return [float(score_rows(decoder, [row], [start])[0].sum()) for row in rows[:separate]]

    def in_rows() -> list[float]:
        found = score_rows(decoder, rows[:batched], [start] * len(rows[:batched]))
        return [float(each.sum()) for each in found]

    return {
        "shared": (len(rows), shared),
        "separate": (min(separate, len(rows)), one_by_one),
        "batched": (min(batched, len(rows)), in_rows),
    }


def check(sides: dict[str, Side]) -> None:
    """Run each side once, which compiles it, and check that all have the same scores."""
    found = {name: run() for name, (_, run) in sides.items()}
    for name in ("separate", "batched"):
        ours = found["shared"][: len(found[name])]
        np.testing.assert_allclose(ours, found[name], atol=2e-3, err_msg=name)


def times_of(sides: dict[str, Side], candidates: int, rounds: int) -> dict[str, dict]:
    """Return, for each side, the median seconds of its calls, multiplied up to all candidates."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (_, run) in sides.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {
        name: {
            "timed_candidates": count,
            "seconds_timed": statistics.median(seconds[name]),
            "seconds": statistics.median(seconds[name]) * candidates / count,
        }
        for name, (count, _) in sides.items()
    }


if __name__ == "__main__":
    main()
