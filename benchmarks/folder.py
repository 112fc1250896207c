"""Time a Hugging Face folder here beside transformers in PyTorch on the CPU, in one run.

    python benchmarks/folder.py --folder=FOLDER [--peer_python=PYTHON] [--cases greedy ranking lora]

FOLDER holds config.json, safetensors and tokenizer.json, such as Gemma 3 270M; both sides read it
in float32. Each side is a process of its own, and calls of the sides alternate. The peer runs
twice, with idle threads that spin and that sleep, and the faster one counts.

    greedy_1, greedy_8     --new tokens after --prompt tokens a row, prefill included; the result
                           says for how many first tokens the sides agree
    ranking_16             log-probabilities of 16 given candidates of --candidate tokens after one
                           prefix of --prefix tokens. The peer scores one padded batch, with logits
                           for the candidates alone (peer), or reads the prefix once, repeats its
                           cache and reads the candidates (peer_cached)
    lora                   one training step of rank --rank on all matrices of the blocks, with
                           AdamW on --batch rows of --length tokens. The peer uses the package
                           peft. The first losses must agree.

The peer's Python needs torch, transformers and, for lora, peft.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CASES = ("greedy", "ranking", "lora")
# Idle OpenMP threads of PyTorch spin, or (passive) sleep: spinning is faster on an idle machine and
# far slower on a busy one.
SIDES = {"ours": {}, "peer": {}, "peer_passive": {"OMP_WAIT_POLICY": "passive"}}
REST = 0.5  # seconds between the sides: PyTorch's threads spin for 0.2 s after their work
LEARNING_RATE = 1e-4
SMALL = {
    "rounds": 1,
    "prompt": 8,
    "new": 4,
    "prefix": 16,
    "candidate": 4,
    "candidates": 4,
    "batch": 2,
    "length": 16,
    "rank": 2,
}


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", required=True, help="a Hugging Face folder")
    parser.add_argument(
        "--peer_python", default=sys.executable, help="a Python with torch, transformers and peft"
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each side and case")
    parser.add_argument("--prompt", type=int, default=64, help="tokens in a prompt of greedy")
    parser.add_argument("--new", type=int, default=128, help="new tokens a row of greedy")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows of greedy")
    parser.add_argument("--prefix", type=int, default=256, help="tokens before the candidates")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--candidate", type=int, default=32, help="tokens in a candidate")
    parser.add_argument("--batch", type=int, default=4, help="rows of a training step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row in training")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--text", default=str(ROOT / "docs/architecture.md"), help="a text file")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script out")
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/folder.json"))
    parser.add_argument("--worker", choices=("ours", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.small:
        vars(args).update(SMALL)
    return args


# --- the two sides: each is {case: a function of the request that returns the result}


def ours(args):
    sys.path.insert(0, str(ROOT))
    import jax

    from mtnlg_jax.config import DecodeConfig
    from mtnlg_jax.decode.generate import generate
    from mtnlg_jax.decode.load import load_decoder
    from mtnlg_jax.decode.rank import rank
    from mtnlg_jax.interop import registry

    registry.register()
    held = {}

    def decoder():
        if "decoder" not in held:
            held.clear()
            held["decoder"] = load_decoder(args.folder)
        return held["decoder"]

    def greedy(request):
        run, model = decoder()
        settings = DecodeConfig(max_new_tokens=args.new, min_new_tokens=args.new)
        return [
            list(row.tokens) for row in generate(model, run.tokenizer, request["rows"], settings)
        ]

    def ranking(request):
        run, model = decoder()
        ranked = rank(
            model, run.tokenizer, request["prefix"], request["candidates"], normalise="sum"
        )
        return [each.sum for each in sorted(ranked, key=lambda each: each.index)]

    def lora(request):
        if "step" not in held:
            held.clear()
            held["step"] = our_step(args, request["tokens"])
        return held["step"]()

    return {"jax": jax.__version__}, {"greedy": greedy, "ranking": ranking, "lora": lora}


def our_step(args, tokens):
    import dataclasses

    import jax
    import numpy as np

    from mtnlg_jax import foreign
    from mtnlg_jax.config import MeshConfig, OptimizerConfig, TrainConfig, validate
    from mtnlg_jax.parallel.mesh import make_mesh
    from mtnlg_jax.train.batch import put_batch
    from mtnlg_jax.train.init_from import load_start
    from mtnlg_jax.train.state import init_state
    from mtnlg_jax.train.step import make_train_step

    config = foreign.reader_of(args.folder).config(args.folder)
    gated = config.model.activation.endswith("glu")
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(),
        data=dataclasses.replace(config.data, sequence_length=args.length),
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE,
            warmup_fraction=0.0,
            min_learning_rate_ratio=1.0,
            weight_decay=0.0,
            lora_rank=args.rank,
            lora_alpha=2.0 * args.rank,
            lora_targets=("q", "k", "v", "o", "in", "out") + (("gate",) if gated else ()),
        ),
        train=TrainConfig(init=args.folder, global_batch_size=args.batch, compute_dtype="float32"),
    )
    validate(config)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = init_state(config, mesh, load_start(config, mesh))
    tokens = np.array(tokens, np.int32)
    rows = {
        "tokens": tokens,
        "labels": np.roll(tokens, -1, 1),
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(args.length, dtype=np.int32), tokens.shape),
        # The last token has no successor.
        "weights": np.broadcast_to(np.arange(args.length) < args.length - 1, tokens.shape).astype(
            np.float32
        ),
    }
    batch = put_batch(
        lambda numbers: {name: x[numbers] for name, x in rows.items()}, (1, *tokens.shape), mesh
    )
    train_step = make_train_step(config, mesh, causal=True)

    def step():
        nonlocal state
        state, metrics = train_step(state, batch, np.int32(1), np.int32(args.batch), np.float32(1))
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    return step


def peer(args):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(args.folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    held = {}

    def greedy(request):
        rows = torch.tensor(request["rows"])
        with torch.inference_mode():
            written = model.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=args.new,
                min_new_tokens=args.new,
                do_sample=False,
                pad_token_id=0,
            )
        return written[:, rows.shape[1] :].tolist()

    def pairs(request):
        """Return the tokens of the prefix and of each candidate, as they join."""
        prefix = tokenizer(request["prefix"])["input_ids"]
        whole = [tokenizer(request["prefix"] + each)["input_ids"] for each in request["candidates"]]
        return prefix, [row[len(prefix) :] for row in whole]

    def padded(rows):
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return ids, mask

    def sums(logits, targets, mask):
        scores = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        return (scores * mask).sum(-1).tolist()

    def ranking(request):
        prefix, candidates = pairs(request)
        ids, mask = padded([prefix + each for each in candidates])
        longest = ids.shape[1] - len(prefix)
        with torch.inference_mode():
            logits = model(ids, attention_mask=mask, logits_to_keep=longest + 1).logits[:, :-1]
            return sums(logits, ids[:, -longest:], mask[:, -longest:])

    def ranking_cached(request):
        prefix, candidates = pairs(request)
        ids, mask = padded(candidates)
        with torch.inference_mode():
            read = model(torch.tensor([prefix]), use_cache=True, logits_to_keep=1)
            cache = read.past_key_values
            cache.batch_repeat_interleave(len(candidates))
            whole = torch.cat([torch.ones(len(candidates), len(prefix), dtype=torch.long), mask], 1)
            after = model(ids, attention_mask=whole, past_key_values=cache).logits[:, :-1]
            logits = torch.cat([read.logits.expand(len(candidates), -1, -1), after], 1)
            return sums(logits, ids, mask)

    def lora(request):
        if "step" not in held:
            held["step"] = peer_step(args, model, request["tokens"])
        return held["step"]()

    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_attention": model.config._attn_implementation,
    }
    return versions, {
        "greedy": greedy,
        "ranking": ranking,
        "ranking_cached": ranking_cached,
        "lora": lora,
    }


def peer_step(args, model, tokens):
    import peft
    import torch

    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"),
    ).train()
    trained = [each for each in adapted.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    tokens = torch.tensor(tokens)

    def step():
        loss = adapted(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def work(args) -> None:
    """Answer each line of standard input, a JSON request, with seconds and the result."""
    answers = sys.stdout  # output of libraries must not mix with the answers
    sys.stdout = sys.stderr
    versions, cases = (ours if args.worker == "ours" else peer)(args)
    print(json.dumps({"python": platform.python_version(), **versions}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        begin = time.perf_counter()
        result = cases[request["case"]](request)
        answer = {"seconds": time.perf_counter() - begin, "result": result}
        print(json.dumps(answer), file=answers, flush=True)


# --- the run


class Worker:
    """A process that answers requests."""

    def __init__(self, name: str, args, argv: list[str]):
        python = sys.executable if name == "ours" else args.peer_python
        self.name = name
        self.process = subprocess.Popen(
            [python, __file__, *argv, f"--worker={name.partition('_')[0]}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""} | SIDES[name],
        )
        self.versions = self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"error: the side {self.name!r} ended with code {self.process.wait()}; "
                "its message is above"
            )
        return json.loads(line)

    def ask(self, request: dict) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def alternate(sides: dict, rounds: int) -> tuple[dict, dict]:
    """Return ({side: result of its first, untimed call}, {side: seconds of ``rounds`` calls})."""
    first = {name: ask()["result"] for name, ask in sides.items()}
    seconds = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            time.sleep(REST)
            seconds[name].append(round(sides[name]()["seconds"], 4))
        print({name: values[-1] for name, values in seconds.items()}, flush=True)
    return first, seconds


def summary(seconds: dict, tokens: int, goal: float) -> dict:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    best = min((name for name in seconds if name != "ours"), key=median.get)
    pairs = zip(seconds["ours"], seconds[best], strict=True)
    ratio = round(median[best] / median["ours"], 3)
    return {
        "ratio": ratio,
        "goal": goal,
        "met": ratio >= goal,
        "counted_peer": best,
        "ratio_by_round": [round(theirs / ours, 3) for ours, theirs in pairs],
        "tokens_per_second": {name: round(tokens / m, 2) for name, m in median.items()},
        "seconds": seconds,
    }


def measure(args, argv: list[str]) -> dict:
    """Return the results; they are also written after each case, so that none is lost."""
    sys.path.insert(0, str(ROOT))
    from mtnlg_jax import foreign, storage
    from mtnlg_jax.interop import registry

    registry.register()
    load = os.getloadavg()[0]
    _, (tokenizer, *_) = foreign.reader_of(args.folder).settings(args.folder)
    ids = tokenizer.encode(Path(args.text).read_text())
    needed = max(args.prompt * max(args.batches), args.prefix, args.batch * args.length)
    ids = ids * (needed // len(ids) + 2)
    output = Path(args.output)
    results = {}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in SIDES:
            workers[name] = Worker(name, args, argv)
            stack.callback(workers[name].close)
        versions = {name: worker.versions for name, worker in list(workers.items())[:2]}

        def sides(request):
            return {name: lambda w=worker: w.ask(request) for name, worker in workers.items()}

        def add(name, found):
            results[name] = found
            whole = described(args, argv, load, versions, results)
            content = (json.dumps(whole, indent=1) + "\n").encode()
            storage.write_file(output.parent, output.name, content)

        for batch in args.batches if "greedy" in args.cases else ():
            rows = [ids[i * args.prompt :][: args.prompt] for i in range(batch)]
            first, seconds = alternate(sides({"case": "greedy", "rows": rows}), args.rounds)
            same = [
                next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), args.new)
                for pair in zip(first["ours"], first["peer"], strict=True)
            ]
            equal = {"equal_first_tokens": {"fewest": min(same), "of": args.new}}
            add(f"greedy_{batch}", summary(seconds, batch * args.new, 1.3) | equal)
        if "ranking" in args.cases:
            add(f"ranking_{args.candidates}", ranking(args, tokenizer, ids, workers, sides))
        if "lora" in args.cases:
            tokens = [ids[i * args.length :][: args.length] for i in range(args.batch)]
            first, seconds = alternate(sides({"case": "lora", "tokens": tokens}), args.rounds)
            found = summary(seconds, args.batch * args.length, 1.0)
            add("lora", found | {"first_losses": first})
    return results


def described(args, argv: list[str], load: float, versions: dict, results: dict) -> dict:
    """Return what the result file holds."""
    return {
        "what": "a Hugging Face folder beside transformers, float32, CPU",
        "model": json.loads((Path(args.folder) / "config.json").read_text()),
        "shapes": {
            name: getattr(args, name)
            for name in "prompt new prefix candidates candidate batch length rank".split()
        },
        "command": " ".join(
            ["python benchmarks/folder.py --folder=FOLDER --peer_python=PYTHON"]
            + [a for a in argv if not a.startswith(("--folder", "--peer_python", "--output"))]
        ),
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": processor(),
        "cores": os.cpu_count(),
        "load_average": {"before": round(load, 1), "after": round(os.getloadavg()[0], 1)},
        "versions": versions,
        "results": results,
    }


def ranking(args, tokenizer, ids, workers, sides) -> dict:
    prefix = tokenizer.decode(ids[: args.prefix])
    step = max(1, (len(ids) - args.candidate) // args.candidates)
    candidates = [
        f" {i} " + tokenizer.decode(ids[i * step :][: args.candidate - 2]).strip()
        for i in range(args.candidates)
    ]
    request = {"prefix": prefix, "candidates": candidates}
    asked = sides({"case": "ranking", **request})
    cached = {"case": "ranking_cached", **request}
    for name in ("peer", "peer_passive"):
        asked[f"{name}_cached"] = lambda w=workers[name]: w.ask(cached)
    first, seconds = alternate(asked, args.rounds)
    differences = [
        max(abs(a - b) for a, b in zip(first["ours"], first[name], strict=True))
        for name in ("peer", "peer_cached")
    ]
    plain = {name: seconds[name] for name in ("ours", "peer", "peer_passive")}
    return summary(plain, args.candidates * args.candidate, 3.0) | {
        "with_the_prefix_read_once": summary(
            {name: s for name, s in seconds.items() if name == "ours" or name.endswith("cached")},
            args.candidates * args.candidate,
            3.0,
        ),
        "largest_difference_of_sums": differences,
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.worker:
        work(args)
        return 0
    for name, found in measure(args, argv).items():
        print(f"{name}: {found['ratio']} times the faster peer (goal {found['goal']})")
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
