"""Time decoding beside Hugging Face's GPT-2 in PyTorch on the CPU, in one run, with equal weights.

    python benchmarks/decode.py --peer_python=PYTHON      a Python that has torch and transformers

GPT-2 124M: 12 layers, width 768, 12 heads, vocabulary 50257 (not padded), 1024 positions, random
float32 weights. Every call has a prompt of 64 random tokens a row and writes 128 new ones, prefill
included. Calls of the sides alternate, and each uses all cores. The peer runs in eager mode, with
its cache and its default attention (sdpa).

    batch_1, batch_8, batch_32   greedy; both should write the same tokens, and the result reports
                                 for how many tokens they do
    beam_5                       beam search, one prompt
    ranking_16                   16 samples of 32 tokens and their scores; the peer draws, then
                                 reads each once more
    held                         ours at batch 1 with bfloat16 and int8 weights and int8 cache
                                 against float32, with the tokens/s that the bytes of each allow;
                                 and with guesses by prompt look-up
    ranking_by_number            N given candidates in one call against N calls
    perplexity                   only with --run=FOLDER --text=FILE: the cost of bfloat16 and int8
                                 for a trained model
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
import time
from pathlib import Path

WIDTH = 768
HEADS = 12
VOCABULARY = 50257
POSITIONS = 1024
END = 50256
REST = 0.5  # seconds between the sides: PyTorch's threads spin for 0.2 s after their work
# Idle OpenMP threads of PyTorch spin, or (passive) sleep: spinning is faster on an idle machine and
# far slower on a busy one. The peer runs both ways, and the faster one counts.
PEERS = {"peer": {}, "peer_passive": {"OMP_WAIT_POLICY": "passive"}}
HELD = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8_weights": {"weights": "int8"},
    "int8_weights_and_cache": {"weights": "int8", "cache": "int8"},
}
CASES = ("greedy", "beam", "ranking", "held", "ranking_by_number")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peer_python", default=sys.executable, help="a Python that has torch and transformers"
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each side and case")
    parser.add_argument("--prompt", type=int, default=64, help="tokens in a prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens a row")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--candidate", type=int, default=32, help="tokens in a candidate")
    parser.add_argument("--numbers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--layers", type=int, default=12, help="fewer, to try the script out")
    parser.add_argument("--run", help="folder of a trained run")
    parser.add_argument("--text", help="text to score with it")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "decode.json"))
    parser.add_argument("--peer_weights", help=argparse.SUPPRESS)  # runs the peer in this process
    args = parser.parse_args()
    if (args.run is None) != (args.text is None):
        parser.error("--run and --text belong together; give both or none")
    if args.peer_weights:
        serve_peer(args.peer_weights, args.layers)
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    result = compare(args)
    from mtnlg_jax import storage  # not in a peer's Python

    output = Path(args.output)
    storage.write_file(output.parent, output.name, (json.dumps(result, indent=1) + "\n").encode())
    print(f"written to {args.output}")


def compare(args) -> dict:
    import jax
    import numpy as np

    from mtnlg_jax.config import ModelConfig
    from mtnlg_jax.decode.cache import unstack
    from mtnlg_jax.decode.roofline import copy_bandwidth
    from mtnlg_jax.interop.written import Written
    from mtnlg_jax.model.transformer import init_parameters

    config = ModelConfig(
        num_layers=args.layers,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
    )
    params = init_parameters(config, 0)
    load = os.getloadavg()
    bandwidth = copy_bandwidth()
    decoder = unstack(config, params)
    results = {}
    versions = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if {"greedy", "beam", "ranking"} & set(args.cases):
            weights = os.path.join(folder, "gpt2.npz")
            made = Written(config, "gpt2", params)
            bare = {name: name.removeprefix("transformer.") for name in made.names}
            np.savez(weights, **{bare[name]: made[name] for name in made.names})
            peers = {}
            for name, environment in PEERS.items():
                command = [
                    args.peer_python,
                    __file__,
                    f"--peer_weights={weights}",
                    f"--layers={args.layers}",
                ]
                peers[name] = stack.enter_context(
                    subprocess.Popen(
                        command,
                        text=True,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        env=os.environ | environment,
                    )
                )
            versions = [read(peer) for peer in peers.values()][0]
            results |= against_peers(args, decoder, peers, bandwidth)
    if "held" in args.cases:
        results["held"] = held(args, config, params, bandwidth)
    if "ranking_by_number" in args.cases:
        results["ranking_by_number"] = ranking_by_number(args, decoder)
    if args.run:
        results["perplexity"] = perplexities(args)
    return {
        "what": f"decoding, GPT-2 124M shape ({args.layers} layers), random float32 weights, "
        f"{args.prompt} prompt + {args.new} new tokens a row",
        "command": " ".join(
            [
                "python benchmarks/decode.py",
                "--peer_python=PYTHON",
                *(
                    each.split("=")[0] + "=..." if each.startswith(("--run=", "--text=")) else each
                    for each in sys.argv[1:]
                    if not each.startswith(("--peer_python=", "--output="))
                ),
            ]
        ),
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": processor(),
        "cores": os.cpu_count(),
        "copy_gigabytes_per_second": round(bandwidth / 1e9, 2),
        "load_average": {"before": load[0], "after": os.getloadavg()[0]},
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "numpy": np.__version__,
        }
        | versions,
        **results,
    }


def prompts_of(args, batch: int) -> list[list[int]]:
    return random_rows(batch, args.prompt)


def random_rows(rows: int, tokens: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(rows).integers(0, END, (rows, tokens)).tolist()


def against_peers(args, decoder, peers: dict, bandwidth: float) -> dict:
    from mtnlg_jax.config import DecodeConfig
    from mtnlg_jax.decode.generate import generate
    from mtnlg_jax.decode.rank import rank
    from mtnlg_jax.decode.roofline import roofline

    results = {}
    length = args.prompt + args.new

    def theirs(name, request):
        print(json.dumps(request), file=peers[name].stdin, flush=True)
        reply = read(peers[name])
        return reply["seconds"], reply["tokens"]

    def sides(ours, request):
        return {"ours": ours} | {name: functools.partial(theirs, name, request) for name in PEERS}

    def written(prompts, beams=1):
        decode = DecodeConfig(max_new_tokens=args.new, min_new_tokens=args.new, num_beams=beams)
        ours = functools.partial(
            timed, lambda: [list(row.tokens) for row in generate(decoder, Ids(), prompts, decode)]
        )
        request = {"prompts": prompts, "new": args.new, "beams": beams}
        return alternate(sides(ours, request), args.rounds, len(prompts) * args.new)

    if "greedy" in args.cases:
        for batch in args.batches:
            results[f"batch_{batch}"] = written(prompts_of(args, batch)) | roofline(
                decoder, batch, length, bandwidth
            )
    if "beam" in args.cases:
        results["beam_5"] = written(prompts_of(args, 1), beams=5)
    if "ranking" in args.cases:
        prompt = prompts_of(args, 1)[0]
        decode = DecodeConfig(
            max_new_tokens=args.candidate,
            min_new_tokens=args.candidate,
            temperature=1.0,
            num_return_sequences=args.candidates,
        )

        def ours():
            return [
                list(each.tokens) for each in rank(decoder, Ids(), as_text(prompt), decode=decode)
            ]

        request = {"prompts": [prompt], "new": args.candidate, "rank": args.candidates}
        results[f"ranking_{args.candidates}"] = alternate(
            sides(functools.partial(timed, ours), request),
            args.rounds,
            args.candidates * args.candidate,
            equal=False,
        )
    return results


def held(args, config, params, bandwidth: float) -> dict:
    """Time ours at batch 1, by the types of weights and cache, and with guesses."""
    from mtnlg_jax.config import DecodeConfig
    from mtnlg_jax.decode.cache import unstack
    from mtnlg_jax.decode.generate import generate
    from mtnlg_jax.decode.roofline import roofline

    prompts = prompts_of(args, 1)
    decode = DecodeConfig(max_new_tokens=args.new, min_new_tokens=args.new)
    guessing = DecodeConfig(
        max_new_tokens=args.new, min_new_tokens=args.new, prompt_lookup_num_tokens=4
    )
    decoders = {name: unstack(config, params, **options) for name, options in HELD.items()}
    ways = {name: (decoder, decode) for name, decoder in decoders.items()}
    ways["float32_look_up"] = decoders["float32"], guessing
    ways["int8_weights_look_up"] = decoders["int8_weights"], guessing
    last = {}

    def write(name):
        decoder, settings = ways[name]
        last[name] = generate(decoder, Ids(), prompts, settings)[0]

    seconds = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name in list(ways)[:: 1 if number % 2 == 0 else -1]:
            took = timed(functools.partial(write, name))[0]
            if number:  # the first call compiles
                seconds[name].append(round(took, 4))
        print("held", {name: values[-1:] for name, values in seconds.items()}, flush=True)
    results = {}
    exact = statistics.median(seconds["float32"])
    for name, (decoder, _) in ways.items():
        median = statistics.median(seconds[name])
        row = last[name]
        results[name] = {
            "tokens_per_second": round(args.new / median, 2),
            "times_float32": round(exact / median, 3),
            "seconds": seconds[name],
        } | roofline(decoder, 1, args.prompt + args.new, bandwidth)
        if row.guessed:
            results[name] |= {
                "guessed": row.guessed,
                "accepted": row.accepted,
                "acceptance_rate": round(row.accepted / row.guessed, 3),
            }
    return results


def ranking_by_number(args, decoder) -> dict:
    """Return seconds of N given candidates in one call, and of N calls with one each."""
    import numpy as np

    from mtnlg_jax.decode.rank import rank

    prompt = as_text(prompts_of(args, 1)[0])
    texts = [
        " " + as_text(tokens)
        for tokens in np.random.default_rng(7)
        .integers(0, END, (max(args.numbers), args.candidate))
        .tolist()
    ]
    results = {}
    for number in args.numbers:

        def together(number=number):
            return rank(decoder, Ids(), prompt, texts[:number])

        def apart(number=number):
            return [rank(decoder, Ids(), prompt, [text]) for text in texts[:number]]

        seconds = {"together": [], "apart": []}
        for turn in range(args.rounds + 1):
            for name, call in (("together", together), ("apart", apart)):
                took = timed(call)[0]
                if turn:
                    seconds[name].append(round(took, 4))
        results[number] = {name: statistics.median(values) for name, values in seconds.items()}
        print("ranking", number, results[number], flush=True)
    few = min(args.numbers)
    many = max(args.numbers)
    if many > few:
        growth = {
            name: (results[many][name] - results[few][name]) / (many - few)
            for name in ("together", "apart")
        }
        results["seconds_a_candidate"] = {name: round(value, 5) for name, value in growth.items()}
        results["growth_together_over_apart"] = round(growth["together"] / growth["apart"], 3)
    return results


def perplexities(args) -> dict:
    """Return perplexities of a trained run on a text, by the types of weights and cache."""
    from mtnlg_jax.decode.cache import unstack
    from mtnlg_jax.evaluate.perplexity import evaluate_text
    from mtnlg_jax.train.checkpoint import load_run

    run = load_run(args.run, "best")
    text = Path(args.text).read_text()
    results = {}
    for name, options in (HELD | {"int8_cache": {"cache": "int8"}}).items():
        scored = evaluate_text(
            unstack(run.config.model, run.params, **options), run.tokenizer, text
        )
        results[name] = {"loss": round(scored.loss, 5), "perplexity": round(scored.perplexity, 4)}
        results[name]["percent"] = round(
            100 * (scored.perplexity / results["float32"]["perplexity"] - 1), 3
        )
    print(results, flush=True)
    return {"tokens": scored.tokens, **results}


def timed(call) -> tuple:
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def alternate(sides: dict, rounds: int, tokens: int, equal: bool = True) -> dict:
    """Return medians over ``rounds`` alternating calls of each side, after one untimed call of
    each.

    ``equal``: whether all sides should write the same tokens.
    """
    first = {name: side()[1] for name, side in sides.items()}
    seconds = in_turn({name: lambda side=side: side()[0] for name, side in sides.items()}, rounds)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    best = min(PEERS, key=median.get)
    result = {
        "ratio": round(median[best] / median["ours"], 3),
        "counted_peer": best,
        "ratio_by_round": [
            round(theirs / ours, 3)
            for ours, theirs in zip(seconds["ours"], seconds[best], strict=True)
        ],
        "tokens_per_second": {name: round(tokens / m, 2) for name, m in median.items()},
        "seconds": seconds,
    }
    if equal:
        same = [
            next((i for i, (a, b) in enumerate(zip(*rows, strict=True)) if a != b), len(rows[0]))
            for rows in zip(first["ours"], first["peer"], strict=True)
        ]
        result["equal_first_tokens"] = {"fewest": min(same), "of": len(first["ours"][0])}
    print(result, flush=True)
    return result


def in_turn(calls: dict, rounds: int, *label: str) -> dict[str, list[float]]:
    """Return the seconds that each of ``calls`` gives in ``rounds``, every other one backwards.

    After each round the last ones are printed behind ``label``.
    """
    seconds = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            time.sleep(REST)
            seconds[name].append(round(calls[name](), 4))
        print(*label, {name: values[-1] for name, values in seconds.items()}, flush=True)
    return seconds


def as_text(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


class Ids:
    """The part of a tokenizer that decoding needs, for texts that are numbers."""

    vocab_size = VOCABULARY
    bos_id = END
    eos_id = END
    eos_ids = (END,)
    prompt_bos = False

    @functools.cached_property
    def is_special(self):
        import numpy as np

        return np.arange(VOCABULARY) == END

    def encode(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]

    def token_bytes(self, index: int) -> bytes:
        return b" %d" % index


def serve_peer(weights: str, layers: int) -> None:
    """Answer each line of standard input, a JSON request, with seconds and tokens."""
    import numpy as np
    import torch
    import transformers

    config = transformers.GPT2Config(
        n_layer=layers, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCABULARY, n_positions=POSITIONS
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    missing, unexpected = model.transformer.load_state_dict(
        {name: torch.from_numpy(array) for name, array in np.load(weights).items()}, strict=False
    )
    assert not missing and not unexpected, (missing, unexpected)
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peer_python": platform.python_version(),
                "peer_threads": torch.get_num_threads(),
                "peer_attention": model.config._attn_implementation,
            }
        ),
        flush=True,
    )
    for line in sys.stdin:
        request = json.loads(line)
        prompts = torch.tensor(request["prompts"])
        number = request.get("rank", 0)
        how = (
            {"do_sample": True, "top_k": 0, "num_return_sequences": number}
            if number
            else {"do_sample": False, "num_beams": request["beams"]}
        )
        begin = time.perf_counter()
        with torch.inference_mode():
            rows = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                use_cache=True,
                max_new_tokens=request["new"],
                min_new_tokens=request["new"],
                eos_token_id=END,
                pad_token_id=END,
                **how,
            )
            written = rows[:, prompts.shape[1] :]
            if number:
                scores = [score_peer(model, row[None], prompts.shape[1]) for row in rows]
                written = written[torch.tensor(scores).argsort(descending=True)]
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "tokens": written.tolist()}), flush=True)


def score_peer(model, row, prompt: int) -> float:
    """Return the mean log-probability of the tokens after the prompt, by a forward pass."""
    logits = model(row).logits[0, prompt - 1 : -1]
    return logits.log_softmax(-1).gather(-1, row[0, prompt:, None]).mean().item()


def read(peer) -> dict:
    """Return the peer's next JSON line; other output of its libraries is skipped."""
    for line in peer.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(
        "the peer ended before it answered; does --peer_python have torch and transformers?"
    )


def processor() -> str:
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if os.path.exists("/proc/cpuinfo")
        else []
    )
    return f"CPU, {names[0] if names else platform.processor()}"


if __name__ == "__main__":
    main()
