"""Measure training speed on CPU beside Hugging Face's GPT-2 in PyTorch eager, both in one run:

    python benchmarks/cpu_train.py [--peer_python=PATH] [--rounds=5] [--steps=1] [--threads=2]

Each side is a separate process. Both start from the same weights, train on the same batch with the
same AdamW, and take turns; the order is reversed every round. The losses of the first steps must
agree, so both compute the same loss, gradients and update. PyTorch may be in another environment
(--peer_python).

How XLA:CPU lost time, and the remedies. Processor time (the least of five or six runs on a busy
machine) of the six layers, forward and backward, at 2 x 512 tokens. The products alone take about
1.7 s at their measured 80 GFLOP/s a core:

| change | layers | memory for temporaries |
| --- | --- | --- |
| first plain version | 3.2 s | 798 MB |
| softmax keeps its weights only, not the inputs to the gradient of its maximum | 2.8 s | 596 MB |
| attention in blocks of 128 x 128, heads first, nothing above the diagonal | 2.2 s | 479 MB |
| a layer keeps its products and recomputes the rest (recompute "elementwise") | 1.9 s | 191 MB |

Attention alone fell from 148 to 44 ms a layer. XLA:CPU copies what a loop over layers keeps twice,
on one thread, while other cores wait: keeping less saves time there too. The whole step fell from
17.2 to about 13 s of processor time and used 1.9 of two cores with little else running.

Tried without success: unrolled layers (2.3 s instead of 1.9, and twice the time to compile), a
hand-written GELU backward (2.0 instead of 1.9), checkpointed norms (between 0.1 worse and 0.2
better before the last row, which includes them), XLA's older matmuls
(--xla_cpu_experimental_ynn_fusion_type= : 17.7 instead of 16.7 s a step), huge pages in malloc (no
less processor time). At the same shapes the loss over the vocabulary takes 1.4 s of 1.3 possible
and the embedding's scatter-add 0.05 s, so both stay as they are.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "benchmarks/results/cpu_train.json"
LOSS_TOLERANCE = 1e-4  # float32 sums in another order, over three steps
ADAMW = {
    "learning_rate": 3e-4,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip_grad_norm": 1.0,
}


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description="Times our train step beside GPT-2 in PyTorch eager, on CPU."
    )
    parser.add_argument(
        "--peer_python", default=sys.executable, help="a Python that has torch and transformers"
    )
    parser.add_argument("--output", default=str(OUTPUT), help="where the JSON result goes")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side takes its turn")
    parser.add_argument("--steps", type=int, default=1, help="train steps a turn")
    parser.add_argument("--threads", type=int, default=2, help="cores that either side may use")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--worker", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def tokens_of(args):
    import numpy as np

    return np.random.default_rng(0).integers(
        0, args.vocabulary, (args.batch, args.length), dtype=np.int32
    )


# --- the two sides: each returns (versions, a function that runs one step and returns its loss) --


def ours(args):
    sys.path.insert(0, str(ROOT))
    import flax
    import jax
    import numpy as np
    import optax

    from mtnlg_jax.config import (
        Config,
        DataConfig,
        ModelConfig,
        OptimizerConfig,
        TrainConfig,
        validate,
    )
    from mtnlg_jax.parallel.mesh import make_mesh
    from mtnlg_jax.train.batch import put_batch
    from mtnlg_jax.train.state import init_state
    from mtnlg_jax.train.step import make_train_step

    config = Config(
        model=ModelConfig(
            num_layers=args.layers,
            hidden_size=args.width,
            num_attention_heads=args.heads,
            vocab_size=args.vocabulary,
            max_position_embeddings=args.length,
        ),
        data=DataConfig(sequence_length=args.length),
        # A constant learning rate: no warm-up, and the floor of the cosine at its peak.
        optimizer=OptimizerConfig(**ADAMW, warmup_fraction=0.0, min_learning_rate_ratio=1.0),
        train=TrainConfig(global_batch_size=args.batch, compute_dtype="float32"),
    )
    validate(config)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = init_state(config, mesh)
    np.savez(
        os.path.join(args.folder, "weights.npz"),
        **{
            ".".join(str(key.key) for key in path if hasattr(key, "key")): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
        },
    )
    tokens = tokens_of(args)
    rows = {
        "tokens": tokens,
        "labels": np.roll(tokens, -1, 1),
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(args.length, dtype=np.int32), tokens.shape),
        # GPT-2's loss omits the last token, which has no successor.
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

    return {"jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__}, step


def peer(args):
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    # It warns that GPT-2's special tokens are outside this vocabulary.
    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(
        vocab_size=args.vocabulary,
        n_positions=args.length,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model = transformers.GPT2LMHeadModel(config).train()
    with np.load(os.path.join(args.folder, "weights.npz")) as weights:
        named = {name: torch.from_numpy(x) for name, x in weights.items()}
        report = model.load_state_dict(as_gpt2(named, args, torch), strict=False)
    if report.unexpected_keys or set(report.missing_keys) - {"lm_head.weight"}:
        raise ValueError(f"our weights do not fill GPT-2: {report}")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": ADAMW["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=ADAMW["learning_rate"],
        betas=(ADAMW["b1"], ADAMW["b2"]),
        eps=ADAMW["eps"],
        fused=True,
    )
    tokens = torch.from_numpy(tokens_of(args)).long()

    def step():
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW["clip_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "torch attention": model.config._attn_implementation,
    }, step


def as_gpt2(named, args, torch):
    """Rename our stacked parameters to GPT-2's; its matrices are stored (in, out) like ours."""
    width = args.width
    state = {
        "transformer.wte.weight": named["tokens_VD"],
        "transformer.wpe.weight": named["positions_PD"],
        "transformer.ln_f.weight": named["final_norm.scale_D"],
        "transformer.ln_f.bias": named["final_norm.bias_D"],
    }
    for i in range(args.layers):
        layer = {
            name[len("blocks.") :]: x[i] for name, x in named.items() if name.startswith("blocks.")
        }
        qkv = [layer[f"attention.{name}"] for name in ("w_q_DNH", "w_k_DKH", "w_v_DKH")]
        biases = [layer[f"attention.{name}"] for name in ("b_q_NH", "b_k_KH", "b_v_KH")]
        parts = {
            "ln_1.weight": layer["norm_1.scale_D"],
            "ln_1.bias": layer["norm_1.bias_D"],
            "ln_2.weight": layer["norm_2.scale_D"],
            "ln_2.bias": layer["norm_2.bias_D"],
            "attn.c_attn.weight": torch.cat([w.reshape(width, width) for w in qkv], 1),
            "attn.c_attn.bias": torch.cat([b.reshape(width) for b in biases]),
            "attn.c_proj.weight": layer["attention.w_o_NHD"].reshape(width, width),
            "attn.c_proj.bias": layer["attention.b_o_D"],
            "mlp.c_fc.weight": layer["mlp.w_in_DF"],
            "mlp.c_fc.bias": layer["mlp.b_in_F"],
            "mlp.c_proj.weight": layer["mlp.w_out_FD"],
            "mlp.c_proj.bias": layer["mlp.b_out_D"],
        }
        state |= {f"transformer.h.{i}.{name}": x for name, x in parts.items()}
    return state


def work(args) -> None:
    """Run a worker: report the versions, then answer every line N with the seconds and the losses
    of N steps."""
    if hasattr(os, "sched_setaffinity"):  # set before any library counts the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    answers = sys.stdout  # output of libraries must not mix with the answers
    sys.stdout = sys.stderr
    try:
        versions, step = (ours if args.worker == "ours" else peer)(args)
    except ValueError as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
        return
    print(json.dumps({"python": platform.python_version(), **versions}), file=answers, flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        begin_cpu = time.process_time()
        losses = [step() for _ in range(int(line))]
        answer = {
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - begin_cpu,
            "losses": losses,
        }
        print(json.dumps(answer), file=answers, flush=True)


# --- the run ---


# Idle OpenMP threads of PyTorch spin, or (passive) sleep: spinning is faster on an idle machine and
# far slower on a busy one. The peer runs both ways and the faster counts.
SIDES = {"ours": {}, "peer": {}, "peer_passive": {"OMP_WAIT_POLICY": "passive"}}


class Worker:
    def __init__(self, name: str, args, argv: list[str], folder: str):
        self.name = name
        python = sys.executable if name == "ours" else args.peer_python
        self.process = subprocess.Popen(
            [python, __file__, *argv, f"--worker={name.partition('_')[0]}", f"--folder={folder}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""} | SIDES[name],
        )
        self.versions = self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the worker {self.name!r} ended with code {self.process.wait()}; "
                "its message is above"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def run(self, steps: int) -> dict:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def check(args) -> None:
    """Raise ValueError, in one line, if the arguments cannot work."""
    for name in "rounds steps threads layers width heads vocabulary batch length".split():
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} must be 1 or more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if args.threads > cores:
        raise ValueError(
            f"--threads={args.threads} exceeds the {cores} cores of this machine; "
            f"give at most {cores}"
        )
    if importlib.util.find_spec("jax") is None:
        raise ValueError(f"{sys.executable} has no jax; run: pip install -e .")
    if shutil.which(args.peer_python) is None:
        raise ValueError(
            f"--peer_python={args.peer_python} is not a program; "
            "give the path of a Python with torch"
        )
    if subprocess.run(
        [args.peer_python, "-c", "import numpy, torch, transformers"], capture_output=True
    ).returncode:
        raise ValueError(
            f"{args.peer_python} cannot import torch and transformers; run: pip install -e "
            ".[benchmarks], or give --peer_python=PATH of an environment that has them"
        )


def processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure(args, argv: list[str]) -> dict:
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers = []
        for name in SIDES:  # ours first: it writes the weights that all start from
            workers.append(Worker(name, args, argv, folder))
            stack.callback(workers[-1].close)
        # These steps also compile and warm up.
        losses = {worker.name: worker.run(3)["losses"] for worker in workers}
        difference = max(abs(a - b) for a, b in zip(losses["ours"], losses["peer"], strict=True))
        if not difference <= LOSS_TOLERANCE:
            raise RuntimeError(
                f"the losses differ by {difference:.2g}, above {LOSS_TOLERANCE}: {losses}; the "
                "sides do not compute the same thing"
            )
        turns = {name: [] for name in SIDES}
        for number in range(args.rounds):
            for worker in workers if number % 2 == 0 else reversed(workers):
                turns[worker.name].append(worker.run(args.steps))
            print(
                f"round {number + 1}: "
                + ", ".join(f"{name} {side[-1]['seconds']:.2f} s" for name, side in turns.items()),
                flush=True,
            )
        versions = {worker.name: worker.versions for worker in workers[:2]}
    seconds = {name: [round(turn["seconds"], 4) for turn in side] for name, side in turns.items()}
    processor_seconds = {
        name: [round(turn["cpu_seconds"], 4) for turn in side] for name, side in turns.items()
    }
    median = {name: statistics.median(side) for name, side in seconds.items()}
    best = min(("peer", "peer_passive"), key=median.get)
    tokens = args.batch * args.length * args.steps
    return {
        "ratio_tokens_per_second": round(median[best] / median["ours"], 3),
        "counted_peer": best,
        "ratio_by_round": [
            round(theirs / ours, 3)
            for ours, theirs in zip(seconds["ours"], seconds[best], strict=True)
        ],
        "tokens_per_second": {name: round(tokens / m, 1) for name, m in median.items()},
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "first_losses": {
            "ours": losses["ours"],
            "peer": losses["peer"],
            "largest_difference": difference,
        },
        "shapes": {
            name: getattr(args, name)
            for name in ("layers", "width", "heads", "vocabulary", "batch", "length", "steps")
        },
        "dtype": "float32",
        "optimizer": {"name": "AdamW", **ADAMW},
        "device": processor(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "load_average": {"before": round(load, 1), "after": round(os.getloadavg()[0], 1)},
        "versions": versions,
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(args),
    }


def command(args) -> str:
    """Return the command that repeats the run. The path of the peer's Python is left out."""
    defaults = parse([])
    words = [
        f"--{name}={'PYTHON' if name == 'peer_python' else value}"
        for name, value in vars(args).items()
        if value != getattr(defaults, name) and name not in ("output", "worker", "folder")
    ]
    return " ".join(["python benchmarks/cpu_train.py", *words])


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.worker:
        work(args)
        return 0
    from mtnlg_jax import storage  # not in a worker of another Python

    try:
        check(args)
        result = measure(args, argv)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output = Path(args.output)
    storage.write_file(output.parent, output.name, (json.dumps(result, indent=1) + "\n").encode())
    speeds = result["tokens_per_second"]
    print(
        f"ours {speeds['ours']} tokens/s, peer {speeds['peer']} tokens/s: "
        f"ratio {result['ratio_tokens_per_second']} to the faster peer; losses differ by "
        f"{result['first_losses']['largest_difference']:.1e}; written to {output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
