"""Time requests that arrive one after another: the engine against one request at a time.

    python benchmarks/serve.py                     GPT-2 124M with int8 weights
    python benchmarks/serve.py --small             a tiny model, to try the script out

Random weights, 8 requests of 16 to 64 prompt tokens that write 40 tokens each. Every ``--every``
seconds one arrives. The sides alternate:

    one at a time   `generate` writes each request alone, in the order of arrival
    engine          continuous batching, all requests in `Engine`

Each side gives tokens/s from the first arrival to the last token, the time from arrival to the
first token (p50, p99) and the largest gap between two pieces of one request's text. ``streams``
gives the engine's tokens/s where 1, 4 and 8 requests arrive at once.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import sys
import threading
import time
from pathlib import Path

END = 50256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="2 layers of width 64, 1 round")
    parser.add_argument("--every", type=float, nargs="+", default=[0.4, 1.5], metavar="SECONDS")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--new", type=int, default=40, help="tokens that each request writes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", default="int8", choices=["int8", "float32", "bfloat16"])
    parser.add_argument("--output", help="default benchmarks/results/serve.json; --small has none")
    args = parser.parse_args()
    if args.small:
        args.rounds = 1
    result = compare(args)
    print(json.dumps(result["cases"], indent=1))
    output = args.output or (
        None if args.small else Path(__file__).parent / "results" / "serve.json"
    )
    if output:
        from mtnlg_jax import storage

        output = Path(output)
        text = (json.dumps(result, indent=1) + "\n").encode()
        storage.write_file(output.parent, output.name, text)
        print(f"written to {output}")


class Numbers:
    """A tokenizer whose tokens are numbers: the benchmark needs no text."""

    prompt_bos = False

    def __init__(self, vocabulary: int):
        import numpy as np

        self.vocab_size = vocabulary
        self.bos_id = self.eos_id = vocabulary - 1
        self.eos_ids = (self.eos_id,)
        self.pad_id = self.sep_id = self.mask_id = self.eos_id
        self.special_names: dict[int, str] = {}
        self.is_special = np.arange(vocabulary) == self.eos_id

    def token_bytes(self, token: int) -> bytes:
        return b" %d" % token


def model(args):
    from mtnlg_jax.config import ModelConfig
    from mtnlg_jax.decode.cache import unstack
    from mtnlg_jax.model.transformer import init_parameters

    small = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512}
    gpt2 = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "vocab_size": END + 1}
    positions = 256 if args.small else 1024
    config = ModelConfig(**(small if args.small else gpt2), max_position_embeddings=positions)
    how = {"weights": "int8"} if args.weights == "int8" else {"dtype": args.weights}
    return unstack(config, init_parameters(config, 0), **how), Numbers(config.vocab_size)


def compare(args) -> dict:
    import jax
    import jaxlib
    import numpy as np

    from mtnlg_jax.config import DecodeConfig
    from mtnlg_jax.serve.engine import Engine

    load = os.getloadavg()
    decoder, tokenizer = model(args)
    draws = np.random.default_rng(1)
    prompts = [
        tuple(draws.integers(0, tokenizer.vocab_size - 1, int(n)).tolist())
        for n in draws.integers(16, 65, args.requests)
    ]
    settings = DecodeConfig(max_new_tokens=args.new, min_new_tokens=args.new)
    engine = Engine(decoder, tokenizer, slots=args.slots)
    started = time.monotonic()
    engine.start()
    engine.wait_ready()
    warm = time.monotonic() - started
    calls = itertools.count()

    def fresh(count: int) -> list[tuple[int, ...]]:
        # The same prompts again would find their keys in the engine's slots.
        shift = next(calls)
        ids = tokenizer.vocab_size - 1
        return [
            tuple((token + shift) % ids for token in prompts[i % len(prompts)])
            for i in range(count)
        ]

    sides = {
        "one at a time": lambda every, n: one_at_a_time(
            decoder, tokenizer, fresh(n), settings, every
        ),
        "engine": lambda every, n: together(engine, fresh(n), settings, every),
    }
    for side in sides.values():
        side(0.0, 2)
    cases: dict[str, dict] = {}
    for every in args.every:
        rounds: dict[str, list] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, side in sides.items():
                rounds[name].append(side(every, args.requests))
        cases[f"every {every} s"] = {name: middle(each) for name, each in rounds.items()}
    for count in args.streams:
        rounds = {"engine": [sides["engine"](0.0, count) for _ in range(args.rounds)]}
        cases[f"{count} streams"] = {"engine": middle(rounds["engine"])}
    compiles = engine.statistics()["counters"]["compiles_serving"]
    engine.close()
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/serve.py", *sys.argv[1:]]),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "load_before": load[0],
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "weights": args.weights,
        "warm_seconds": round(warm, 1),
        "compiles_while_serving": compiles,
        "cases": cases,
    }


def one_at_a_time(decoder, tokenizer, prompts, settings, every: float) -> dict:
    from mtnlg_jax.decode.generate import generate

    start = time.monotonic()
    arrivals = [start + every * i for i in range(len(prompts))]
    pieces = []
    for prompt, arrival in zip(prompts, arrivals, strict=True):
        time.sleep(max(0.0, arrival - time.monotonic()))
        times: list[float] = []
        generate(
            decoder,
            tokenizer,
            [prompt],
            settings,
            on_text=lambda _, text, times=times: times.append(time.monotonic()),
        )
        pieces.append(times)
    return figures(arrivals, pieces, settings.max_new_tokens)


def together(engine, prompts, settings, every: float) -> dict:
    from mtnlg_jax.serve.requests import Finished, Generation, Token

    pieces: list[list[float]] = [[] for _ in prompts]
    ended = threading.Semaphore(0)

    def listen(times):
        def on_events(events):
            if any(isinstance(event, Token) for event in events):
                times.append(time.monotonic())
            if isinstance(events[-1], Finished):
                ended.release()

        return on_events

    arrivals = []
    start = time.monotonic()
    for number, (prompt, times) in enumerate(zip(prompts, pieces, strict=True)):
        time.sleep(max(0.0, start + every * number - time.monotonic()))
        arrivals.append(time.monotonic())
        engine.submit(Generation(prompt, settings, seed=number), listen(times))
    for _ in prompts:
        ended.acquire()
    return figures(arrivals, pieces, settings.max_new_tokens)


def figures(arrivals: list[float], pieces: list[list[float]], new: int) -> dict:
    first = sorted(
        times[0] - arrival for times, arrival in zip(pieces, arrivals, strict=True) if times
    )
    gaps = [later - earlier for times in pieces for earlier, later in itertools.pairwise(times)]
    seconds = max(times[-1] for times in pieces) - arrivals[0]
    return {
        "tokens_per_second": round(len(pieces) * new / seconds, 1),
        "first_token_p50_seconds": round(statistics.median(first), 3),
        "first_token_p99_seconds": round(first[min(len(first) - 1, int(0.99 * len(first)))], 3),
        "largest_gap_seconds": round(max(gaps, default=0.0), 3),
    }


def middle(rounds: list[dict]) -> dict:
    """Return the median of each figure over the rounds."""
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


if __name__ == "__main__":
    main()
