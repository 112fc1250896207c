"""Measure what ranking costs the writer of long texts, beside plain writing.

    python benchmarks/writing.py --workdir=RUN           a trained run or a Hugging Face folder
    python benchmarks/writing.py                         a model of random weights, 256 positions

Both sides are `tasks.writing.write`: the same outline, number of words and number of candidates,
with the summary after each piece. The plain side chooses by the log-probabilities that generation
gives anyway, and computes no other part of the score. The sides alternate, after one round of each
that compiles. They choose other texts, so times are those of 1,000 tokens written. On a machine
that other work shares, the time of the processor says more than the clock, so both are kept. The
goal is a ratio below 1.5.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax import compat
from mtnlg_jax.config import ModelConfig
from mtnlg_jax.data.tokenizer import train_tokenizer
from mtnlg_jax.decode.cache import Decoder, unstack
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.tasks.writing.kinds import FRAMES, KINDS
from mtnlg_jax.tasks.writing.request import Request
from mtnlg_jax.tasks.writing.scores import WEIGHTS
from mtnlg_jax.tasks.writing.write import write

RESULT = Path(__file__).parent / "results" / "writing.json"
GOAL = 1.5
TOPIC = "A captain follows a white whale through all the seas."
HEADINGS = ("The harbor", "The open sea", "The storm", "The whale")
SIDES = {
    "ranked": WEIGHTS,
    "coherent": WEIGHTS | {"coherence": 1.0},
    "plain": dict.fromkeys(WEIGHTS, 0.0) | {"logprob": 1.0},
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", help="run or Hugging Face folder; default: random weights")
    parser.add_argument("--words", type=int, default=400, help="of each text")
    parser.add_argument("--candidates", type=int, default=4, help="of each piece")
    parser.add_argument("--rounds", type=int, default=5, help="texts of each side")
    parser.add_argument("--coherent", action="store_true", help="also rank by coherence")
    parser.add_argument("--output", default=os.fspath(RESULT), help="file for the result")
    flags = parser.parse_args(argv)
    load = os.getloadavg()[0]
    compat.quiet()
    compat.configure_cache()
    decoder, tokenizer = loaded(flags.workdir)
    rounds = alternate(decoder, tokenizer, flags)
    result = {
        "what": "seconds of 1,000 tokens written by task=write, with and without ranking",
        "command": "python benchmarks/writing.py"
        + (" --workdir=RUN" if flags.workdir else "")
        + f" --words={flags.words} --candidates={flags.candidates} --rounds={flags.rounds}"
        + " --coherent" * flags.coherent,
        "model": {
            "layers": decoder.config.num_layers,
            "hidden_size": decoder.config.hidden_size,
            "vocabulary": decoder.config.vocabulary,
            "context": decoder.context,
        },
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": str(jax.devices()[0].device_kind),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_average": {"before": round(load, 1), "after": round(os.getloadavg()[0], 1)},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")},
        },
        "goal": GOAL,
    } | summary(rounds)
    print(json.dumps(result, indent=1))
    Path(flags.output).write_text(json.dumps(result, indent=1) + "\n")


def loaded(workdir: str | None) -> tuple[Decoder, object]:
    """Return the decoder and tokenizer of a run, or of a model of random weights."""
    if workdir:
        from mtnlg_jax.interop import registry

        registry.register()
        run, decoder = load_decoder(workdir)
        return decoder, run.tokenizer
    words = [text for frame in FRAMES.values() for text in vars(frame).values()]
    words += [text for kind in KINDS.values() for text in kind.instructions.values()]
    tokenizer = train_tokenizer(["\n".join([*words, TOPIC, *HEADINGS])] * 9, 500)
    model = ModelConfig(
        num_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=256,
    )
    draws = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(draws.normal(0, 0.05, x.shape), jnp.float32),
        abstract_model(model)[1],
    )
    return unstack(model, params), tokenizer


def alternate(decoder: Decoder, tokenizer, flags) -> dict[str, list[dict]]:
    """Write ``rounds`` texts on each side by turns; the first round of each is not kept."""
    names = [name for name in SIDES if name != "coherent" or flags.coherent]
    kept: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(flags.rounds + 1):
        for name in names[:: 1 if number % 2 == 0 else -1]:
            request = Request(
                "story",
                TOPIC,
                flags.words,
                "en",
                HEADINGS,
                flags.candidates,
                SIDES[name],
            )
            begin = time.process_time()
            document = write(decoder, tokenizer, request)
            spent = time.process_time() - begin
            if number == 0:
                continue
            kept[name].append(
                {
                    "seconds": document.seconds,
                    "processor_seconds": round(spent, 3),
                    "tokens_written": document.tokens_written,
                    "tokens_scored": document.tokens_scored,
                    "words": document.words,
                }
            )
            print(f"round {number}: {name}: {kept[name][-1]}", file=sys.stderr, flush=True)
    return kept


def summary(rounds: dict[str, list[dict]]) -> dict:
    """Return the median time of each side and its ratio to the plain side, by each clock."""
    result: dict = {"rounds": rounds}
    for clock in ("seconds", "processor_seconds"):
        times = {
            name: [1000 * each[clock] / each["tokens_written"] for each in found]
            for name, found in rounds.items()
        }
        ratios = {
            name: [a / b for a, b in zip(values, times["plain"], strict=True)]
            for name, values in times.items()
            if name != "plain"
        }
        result[clock] = {
            "of_1000_tokens": {
                name: round(statistics.median(values), 3) for name, values in times.items()
            },
            "ratio": {name: round(statistics.median(each), 3) for name, each in ratios.items()},
            "by_round": {name: [round(r, 3) for r in each] for name, each in ratios.items()},
        }
    return result | {"met": result["seconds"]["ratio"]["ranked"] < GOAL}


if __name__ == "__main__":
    main()
