"""Check and time this package on a Hopper GPU, in one command of a few minutes:

    python benchmarks/card.py --seconds=500      writes benchmarks/results/card_CARD.json

The parts, most important first, each in its own process with its own time limit:

    parity       fast forms of our attention kernels against exact attention: 6 shapes, bfloat16
    calibration  a product of two 8192 x 8192 matrices and a copy of 1 GiB, as a reference for the
                 other parts
    attention    forward and backward at 2,048 and 8,192 tokens, head widths 64, 128, 160; cuDNN;
                 PyTorch's SDPA
    train        a step of 1.3 billion parameters: our kernels, cuDNN, PyTorch eager and
                 torch.compile; MFU; the seconds that planning predicts for our program
    decode       1.3 billion parameters, bfloat16 and int8, 1, 8 and 64 rows, beside copy bandwidth;
                 Hugging Face

The result is written after every row, so an interrupted run keeps its rows. Where something failed,
a row names the error instead of a number; a part that crashes or takes too long keeps its rows and
a note on how it ended. Failed parity ends the command with exit code 1 after everything else has
run. --seconds bounds the whole command.

It needs jax with its CUDA plugin, flax, optax, orbax-checkpoint and tensorstore. The peers need
torch and transformers, and are left out with a note if those are missing. --small tries every part
anywhere, including a CPU, and writes only to --output.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The machine with the card may have the repository without having installed it.
sys.path[:0] = [str(HERE), str(HERE.parent)]

import card_prediction  # noqa: E402  the path above leads to it

# The largest share of the remaining time that a part may take; what it does not use is left to the
# next.
PARTS = {"parity": 0.35, "calibration": 0.15, "attention": 0.4, "train": 0.6, "decode": 1.0}
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "flax",
    "optax",
    "torch",
    "transformers",
    "triton",
)
# Shapes of benchmarks/attention.py: plain, grouped heads, another length of keys, width 160,
# documents, lengths.
SHAPES = (0, 1, 2, 3, 4, 5)
MODEL = {
    "num_layers": 24,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "vocab_size": 50304,
    "max_position_embeddings": 2048,
}  # 1.3 billion parameters, heads of width 128
SMALL_MODEL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 64,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=500, help="for everything together")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes: tries the script on anything"
    )
    parser.add_argument(
        "--output", help="default: benchmarks/results/card_CARD.json; with --small, nothing"
    )
    parser.add_argument(
        "--part", choices=list(PARTS), help=argparse.SUPPRESS
    )  # runs this part in this process
    args = parser.parse_args(argv)
    if args.part:
        work(args.part, args.small)
        return 0
    if not args.seconds > 0:
        parser.error(f"--seconds={args.seconds} must be above 0")
    result = {
        "device": None,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python benchmarks/card.py", *argv]),
        "versions": versions(),
        "parts": {},
    }
    deadline = time.monotonic() + args.seconds
    for number, part in enumerate(part for part in PARTS if part in args.parts):
        left = deadline - time.monotonic()
        last = number == len(args.parts) - 1
        run_part(part, args, left if last else PARTS[part] * left, result)
        if result["device"] is None:
            return 2
    words = {part: found["ended"] for part, found in result["parts"].items()}
    print("; ".join(f"{part} {ended}" for part, ended in words.items()))
    wrong = [row for row in result["parts"].get("parity", {}).get("rows", ()) if row.get("failure")]
    return 1 if wrong or "done" not in words.get("parity", "done") else 0


def versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# --- the parent: a process for each part; rows are written as they arrive


def run_part(part: str, args, seconds: float, result: dict) -> None:
    """Run ``part`` for at most ``seconds``, and keep its rows in ``result``."""
    rows = []
    found = result["parts"][part] = {"ended": "running", "seconds": None, "rows": rows}
    if seconds < 1:
        found["ended"] = "left out: no time"
        return write(args, result)
    begin = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), f"--part={part}"] + [
        "--small"
    ] * args.small
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        late = threading.Event()

        def stop() -> None:
            late.set()
            os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            for line in child.stdout:
                if not line.startswith("{"):
                    continue  # output of a library
                said = json.loads(line)
                if "error" in said:
                    print(f"error: {said['error']}", file=sys.stderr)
                elif "device" in said:
                    result["device"] = said["device"]
                else:
                    rows.append(said)
                found["seconds"] = round(time.monotonic() - begin, 1)
                write(args, result)
                if rows and rows[-1] is said:  # save before showing
                    print(f"{part}: {shown(said)}", flush=True)
            code = child.wait()
        finally:
            timer.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(
                    child.pid, signal.SIGKILL
                )  # processes left by a part must not disturb the next one
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1][:300]
    found["seconds"] = round(time.monotonic() - begin, 1)
    found["ended"] = "done"
    if late.is_set():
        found["ended"] = f"stopped after {seconds:.0f} s"
    elif code:
        found["ended"] = f"code {code}: {last}"
    write(args, result)


def write(args, result: dict) -> None:
    if result["device"] is None or (args.small and not args.output):
        return
    from mtnlg_jax import storage

    card = result["device"].removeprefix("NVIDIA ").split()[0]
    path = Path(args.output or HERE / "results" / f"card_{card}.json")
    storage.write_file(path.parent, path.name, (json.dumps(result, indent=1) + "\n").encode())


def shown(row: dict) -> str:
    """Return a row in one line."""
    parts = []
    for name, value in row.items():
        if isinstance(value, dict):
            value = "{" + shown(value) + "}"
        parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)


# --- a part


def say(row: dict) -> None:
    print(json.dumps(row), flush=True)


def work(part: str, small: bool) -> None:
    """Print the device, then each row of ``part`` as a JSON line."""
    if part == "decode" or part == "train":  # leave memory for PyTorch
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from mtnlg_jax import compat

    if jax.default_backend() != "gpu" and not small:
        error = (
            f"there is no GPU here (JAX sees {jax.default_backend()}); "
            "--small tries the script without one"
        )
        say({"error": error})
        sys.exit(2)
    say({"device": compat.device_kind()})
    globals()[part](small)


def attempt(row: dict, call) -> None:
    """Print ``row`` with the results of ``call``, or with why it failed."""
    try:
        row |= call()
    except ImportError as error:
        row["left_out"] = str(error)
    except Exception as error:  # any error of the compiler or driver belongs in the result
        row["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    say(row)


def has_our_kernels() -> bool:
    from mtnlg_jax.model.kernels import select

    return select.device() in ("H100", "H200")


def parity(small: bool) -> None:
    from attention import PARITY, check

    from mtnlg_jax import compat

    if small:
        with contextlib.nullcontext() if has_our_kernels() else compat.interpreted():
            say(check((1, 128, 128, 1, 1, 64, True, ()), "float16"))
    elif not has_our_kernels():
        say({"left_out": "our kernels are for Hopper cards"})
    else:
        for shape in SHAPES:
            say(check(PARITY[shape], "bfloat16"))


def calibration(small: bool) -> None:
    from attention import copy, matmul

    attempt({"what": "product"}, lambda: {"tflops": matmul(256 if small else 8192)})
    attempt({"what": "copy"}, lambda: {"gb_s": copy(1 << (20 if small else 30))})


def attention(small: bool) -> None:
    from attention import speed

    ours = has_our_kernels()
    for width in (64,) if small else (64, 128, 160):
        for length in (128,) if small else (2048, 8192):
            attempt({}, functools.partial(speed, length, width, True, ours, small))


def train(small: bool) -> None:
    sizes = SMALL_MODEL if small else MODEL
    rows = 2 if small else 8
    if has_our_kernels():
        attempt({"side": "ours"}, lambda: train_ours(sizes, rows, "pallas_gpu", packed=True))
        attempt({"side": "cudnn"}, lambda: train_ours(sizes, rows, "cudnn", packed=False))
    else:
        attempt({"side": "ours"}, lambda: train_ours(sizes, rows, "auto", packed=True))
    attempt({"side": "torch"}, lambda: train_torch(sizes, rows, compiled=False))
    if not small:
        attempt({"side": "torch.compile"}, lambda: train_torch(sizes, rows, compiled=True))


def train_ours(sizes: dict, rows: int, impl: str, packed: bool) -> dict:
    """Time our step in bfloat16 with float32 master weights and AdamW.

    cuDNN does not support documents: ``packed`` is false for it.
    """
    import jax
    import numpy as np

    from mtnlg_jax.config import Config, DataConfig, ModelConfig, TrainConfig, validate
    from mtnlg_jax.parallel.mesh import make_mesh
    from mtnlg_jax.train import batch as batches
    from mtnlg_jax.train import micro_batches
    from mtnlg_jax.train.state import init_state
    from mtnlg_jax.train.step import make_train_step

    length = sizes["max_position_embeddings"]
    config = Config(
        model=ModelConfig(**sizes, attention_impl=impl),
        data=DataConfig(sequence_length=length),
        train=TrainConfig(global_batch_size=rows, micro_batch_size=rows, compute_dtype="bfloat16"),
    )
    validate(config)
    if not packed:
        whole = micro_batches.context_attention
        micro_batches.context_attention = lambda *args, segment_ids=None, **options: whole(
            *args, **options
        )
    try:
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        tokens = np.random.default_rng(0).integers(
            0, sizes["vocab_size"], (rows, length), dtype=np.int32
        )
        arrays = {
            "tokens": tokens,
            "labels": np.roll(tokens, -1, 1),
            "segment_ids": np.ones_like(tokens),
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
            "weights": np.ones(tokens.shape, np.float32),
        }

        def rows_of(numbers):
            return {name: x[numbers] for name, x in arrays.items()}

        batch = batches.put_batch(rows_of, (1, *tokens.shape), mesh)
        state = init_state(config, mesh)
        rest = (batch, np.int32(1), np.int32(rows), np.float32(1))
        compiled = make_train_step(config, mesh, causal=True).lower(state, *rest).compile()

        def one():
            nonlocal state
            state, metrics = compiled(state, *rest)
            return metrics["loss"]

        losses, seconds = timed(one, lambda loss: float(jax.block_until_ready(loss)))
    finally:
        if not packed:
            micro_batches.context_attention = whole
    predicted = card_prediction.beside(compiled.as_text() or "", seconds)
    return (
        of_step(sizes, rows, seconds) | predicted | {"losses": losses, "packed_documents": packed}
    )


def train_torch(sizes: dict, rows: int, compiled: bool) -> dict:
    """Time GPT-2 of transformers with the same sizes: float32 master weights, bfloat16 products by
    autocast, fused AdamW."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    length = sizes["max_position_embeddings"]
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = gpt2(transformers, sizes).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens = torch.randint(0, sizes["vocab_size"], (rows, length), device=device)
    forward = torch.compile(model) if compiled else model

    def one():
        with torch.autocast(device, torch.bfloat16):
            loss = forward(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    losses, seconds = timed(one, lambda loss: loss.item())
    return of_step(sizes, rows, seconds) | {
        "losses": losses,
        "attention": model.config._attn_implementation,
    }


def gpt2(transformers, sizes: dict):
    config = transformers.GPT2Config(
        vocab_size=sizes["vocab_size"],
        n_positions=sizes["max_position_embeddings"],
        n_embd=sizes["hidden_size"],
        n_layer=sizes["num_layers"],
        n_head=sizes["num_attention_heads"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=True,
    )
    return transformers.GPT2LMHeadModel(config)


def timed(call, finish, times: int = 5) -> tuple[list[float], float]:
    """Return (results of three warm-up calls, seconds of one of ``times`` consecutive calls)."""
    first = [finish(call()) for _ in range(3)]
    begin = time.perf_counter()
    for _ in range(times):
        last = call()
    finish(last)
    return first, (time.perf_counter() - begin) / times


def of_step(sizes: dict, rows: int, seconds: float) -> dict:
    """Return milliseconds, tokens/s, model TFLOP/s (PaLM's count) and, for a known card, MFU."""
    from mtnlg_jax import compat
    from mtnlg_jax.config import ModelConfig
    from mtnlg_jax.hardware import CHIPS, flops_per_token
    from mtnlg_jax.model.kernels import select

    tokens = rows * sizes["max_position_embeddings"]
    flops = (
        tokens * flops_per_token(ModelConfig(**sizes), sizes["max_position_embeddings"]) / seconds
    )
    peak = (
        CHIPS[select.device()].flops
        if select.device() in CHIPS and compat.platform() == "gpu"
        else None
    )
    return {
        "rows": rows,
        "milliseconds": 1e3 * seconds,
        "tokens_per_second": tokens / seconds,
        "tflops": flops / 1e12,
        "mfu": peak and flops / peak,
    }


def decode(small: bool) -> None:
    from mtnlg_jax.decode.roofline import copy_bandwidth

    sizes = SMALL_MODEL if small else MODEL
    prompt, new = (8, 8) if small else (512, 128)
    bandwidth = copy_bandwidth(2**20 if small else 2**30)
    for held in ("bfloat16",) if small else ("bfloat16", "int8"):
        decoder = None
        for rows in (2,) if small else (1, 8, 64):
            row = {"side": "ours", "weights": held, "rows": rows, "prompt": prompt, "new": new}

            def ours(held=held, rows=rows):
                nonlocal decoder
                decoder = decoder or make_decoder(sizes, held)
                found = decode_ours(decoder, rows, prompt, new, bandwidth)
                predicted = card_prediction.decode(sizes, held, rows, prompt + new)
                ratio = found["tokens_per_second"] / predicted["predicted_tokens_per_second"]
                return found | predicted | {"predicted_over_measured": ratio}

            attempt(row, ours)
    decoder = None  # free its memory for the peer
    for rows in (2,) if small else (1, 8, 64):
        row = {
            "side": "transformers",
            "weights": "bfloat16",
            "rows": rows,
            "prompt": prompt,
            "new": new,
        }
        attempt(row, functools.partial(decode_torch, sizes, rows, prompt, new))


def make_decoder(sizes: dict, held: str):
    from mtnlg_jax.config import ModelConfig
    from mtnlg_jax.decode.cache import unstack
    from mtnlg_jax.model.transformer import init_parameters

    config = ModelConfig(**sizes)
    return unstack(
        config, init_parameters(config, 0), "bfloat16", weights="int8" if held == "int8" else None
    )


def decode_ours(decoder, rows: int, prompt: int, new: int, bandwidth: float) -> dict:
    import numpy as np
    from decode import Ids

    from mtnlg_jax.config import DecodeConfig
    from mtnlg_jax.decode.generate import generate
    from mtnlg_jax.decode.roofline import roofline

    class Numbers(Ids):
        vocab_size = decoder.config.vocab_size
        bos_id = eos_id = decoder.config.vocab_size - 1
        eos_ids = (eos_id,)

        @functools.cached_property
        def is_special(self):
            return np.arange(self.vocab_size) == self.eos_id

    prompts = (
        np.random.default_rng(rows)
        .integers(0, decoder.config.vocab_size - 1, (rows, prompt))
        .tolist()
    )
    settings = DecodeConfig(max_new_tokens=new, min_new_tokens=new)
    _, seconds = timed(
        lambda: generate(decoder, Numbers(), prompts, settings), lambda _: 0.0, times=2
    )
    limit = roofline(decoder, rows, prompt + new, bandwidth)
    rate = rows * new / seconds
    return {
        "tokens_per_second": rate,
        "of_copy": rate / limit["roofline_tokens_per_second"],
    } | limit


def decode_torch(sizes: dict, rows: int, prompt: int, new: int) -> dict:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = gpt2(transformers, sizes).to(device, torch.bfloat16).eval()
    prompts = torch.randint(0, sizes["vocab_size"], (rows, prompt), device=device)

    def one():
        with torch.inference_mode():
            return model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )

    _, seconds = timed(one, lambda ids: float(ids[0, -1]), times=2)
    return {
        "tokens_per_second": rows * new / seconds,
        "attention": model.config._attn_implementation,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
