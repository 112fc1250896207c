"""Times greedy decoding against Hugging Face's GPT-2 in PyTorch on the CPU, in one run, with the same weights.

    python benchmarks/cpu_decode.py --peer_python=PYTHON     a Python that has torch and transformers

GPT-2 124M: 12 layers, width 768, 12 heads, vocabulary 50257 (not padded), 1024 positions, float32. A round is one
call of ``generate`` on each side, a prompt of 64 random tokens a row and 128 new ones, prefill included; rounds of
the sides alternate, and each uses all cores. The peer runs in eager mode, with its cache and its default attention
(sdpa). All are to write the same tokens: the result says for how long they do.
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

from decode import PEERS, REST, processor, read

LAYERS, WIDTH, HEADS, VOCABULARY, POSITIONS, END = 12, 768, 12, 50257, 1024, 50256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", default=sys.executable, help="a Python that has torch and transformers")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each side and batch")
    parser.add_argument("--prompt", type=int, default=64, help="tokens in a prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens a row")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "cpu_decode.json"))
    parser.add_argument("--peer_weights", help=argparse.SUPPRESS)  # makes this process the peer
    args = parser.parse_args()
    if args.peer_weights:
        serve_peer(args.peer_weights)
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    result = compare(args)
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.output}")


def compare(args) -> dict:
    import jax
    import numpy as np

    from mtnlg_jax.config import DecodeConfig, ModelConfig
    from mtnlg_jax.decode.cache import unstack
    from mtnlg_jax.decode.generate import generate
    from mtnlg_jax.interop import gpt2
    from mtnlg_jax.model.transformer import init_parameters

    config = ModelConfig(num_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=HEADS, vocab_size=VOCABULARY,
                         max_position_embeddings=POSITIONS)
    params = init_parameters(config, 0)
    decode = DecodeConfig(max_new_tokens=args.new, min_new_tokens=args.new)
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "gpt2.npz")
        tensor = gpt2.reader_of(config, params)
        np.savez(weights, **{name: tensor(name) for name in gpt2.shapes_of(config)})
        decoder = unstack(config, params)
        del params
        with contextlib.ExitStack() as stack:
            peers = {}
            for name, environment in PEERS.items():
                command = [args.peer_python, __file__, f"--peer_weights={weights}"]
                peers[name] = stack.enter_context(subprocess.Popen(
                    command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | environment))
            versions = [read(peer) for peer in peers.values()][0]
            results = {}
            for batch in args.batches:
                prompts = np.random.default_rng(batch).integers(0, END, (batch, args.prompt)).tolist()

                def ours(prompts=prompts):
                    begin = time.perf_counter()
                    written = generate(decoder, Ids(), prompts, decode)
                    return time.perf_counter() - begin, [list(row.tokens) for row in written]

                def theirs(name, prompts=prompts):
                    print(json.dumps({"prompts": prompts, "new": args.new}), file=peers[name].stdin, flush=True)
                    reply = read(peers[name])
                    return reply["seconds"], reply["tokens"]

                sides = {"ours": ours} | {name: functools.partial(theirs, name) for name in PEERS}
                results[f"batch_{batch}"] = alternate(sides, args.rounds, batch * args.new)
    return {
        "what": f"greedy decoding, GPT-2 124M shape, float32, {args.prompt} prompt + {args.new} new tokens a row",
        "command": f"python benchmarks/cpu_decode.py --peer_python=PYTHON --rounds={args.rounds}",
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": processor(), "cores": os.cpu_count(),
        "load_average": {"before": load[0], "after": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__} | versions,
        **results,
    }


def alternate(sides: dict, rounds: int, tokens: int) -> dict:
    """Medians over ``rounds`` calls of each side in turn, after one call of each that is not timed."""
    first = {name: side()[1] for name, side in sides.items()}
    equal = [next((i for i, (a, b) in enumerate(zip(*rows, strict=True)) if a != b), len(rows[0]))
             for rows in zip(first["ours"], first["peer"], strict=True)]
    seconds = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            time.sleep(REST)
            seconds[name].append(round(sides[name]()[0], 4))
        print({name: values[-1] for name, values in seconds.items()}, flush=True)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    best = min(PEERS, key=median.get)
    result = {"ratio": round(median[best] / median["ours"], 3), "counted_peer": best,
              "ratio_by_round": [round(theirs / ours, 3)
                                 for ours, theirs in zip(seconds["ours"], seconds[best], strict=True)],
              "tokens_per_second": {name: round(tokens / m, 2) for name, m in median.items()}, "seconds": seconds,
              "equal_first_tokens": {"fewest": min(equal), "of": len(first["ours"][0])}}
    print(result, flush=True)
    return result


class Ids:
    """What generation asks of a tokenizer, for tokens that are but numbers."""

    vocab_size, bos_id, eos_id = VOCABULARY, END, END

    @property
    def is_special(self):
        import numpy as np

        return np.arange(VOCABULARY) == END

    def token_bytes(self, index):
        return b""


def serve_peer(weights: str) -> None:
    """Answers each line of standard input, a JSON request, with seconds and tokens."""
    import numpy as np
    import torch
    import transformers

    config = transformers.GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCABULARY,
                                     n_positions=POSITIONS)
    model = transformers.GPT2LMHeadModel(config).eval()
    missing, unexpected = model.transformer.load_state_dict(
        {name: torch.from_numpy(array) for name, array in np.load(weights).items()}, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__,
                      "peer_python": platform.python_version(), "peer_threads": torch.get_num_threads(),
                      "peer_attention": model.config._attn_implementation}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prompts = torch.tensor(request["prompts"])
        begin = time.perf_counter()
        with torch.inference_mode():
            written = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
                                     use_cache=True, max_new_tokens=request["new"], min_new_tokens=request["new"],
                                     eos_token_id=END, pad_token_id=END)
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "tokens": written[:, prompts.shape[1] :].tolist()}), flush=True)


if __name__ == "__main__":
    main()
