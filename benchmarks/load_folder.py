"""Time loading a Hugging Face folder beside safetensors' own loader, on the same files.

    python benchmarks/load_folder.py            2 GB in shards of 0.5 GB; --small: 0.1 GB

A folder of bf16 tensors in the shapes of Llama is written with random values. The sides alternate
with the page cache in the same, warm state; each reads every tensor:

    safetensors    safetensors.numpy.load_file of each shard, bf16 arrays
    decoder        load_decoder(dtype="bfloat16"): tensors checked, turned to our layout and put on
                   the device
    run            load_run: the same as float32, in stacked parameters

The result is bytes of the files a second, and the median of the ratios of neighbouring calls.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "load_folder.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="0.1 GB instead of 2 GB")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each side")
    parser.add_argument("--output", default=os.fspath(RESULT), help="file for the result")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = write_folder(Path(folder), small=flags.small)
        result = measure(Path(folder), size, flags.rounds)
    result |= {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    print(json.dumps(result, indent=2))
    Path(flags.output).write_text(json.dumps(result, indent=2) + "\n")


def write_folder(folder: Path, small: bool) -> int:
    """Write the model, and return the bytes of its tensors."""
    import ml_dtypes
    import numpy as np
    import tokenizers

    from mtnlg_jax.interop.families import FAMILIES, model_of
    from mtnlg_jax.interop.interchange import Interchange
    from mtnlg_jax.interop.shards import write_shards

    width = 512 if small else 2048
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32_000,
        "max_position_embeddings": 2048,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"w{number}": number for number in range(100)}
    model = tokenizers.models.WordLevel(words, unk_token="w0")
    tokenizers.Tokenizer(model).save(os.fspath(folder / "tokenizer.json"))
    table = Interchange(model_of(config), FAMILIES["llama"]).table
    sizes = {name: 2 * int(np.prod(entry.shape)) for name, entry in table.items()}
    random = np.random.default_rng(0)

    def make(name):
        values = random.standard_normal(table[name].shape, np.float32)
        return values.astype(ml_dtypes.bfloat16)

    write_shards(folder, sizes, make, max_shard_size=0.05 if small else 0.5)
    return sum(sizes.values())


def measure(folder: Path, size: int, rounds: int) -> dict:
    """Return the rate of each side and their ratios."""
    import jax
    from safetensors.numpy import load_file

    from mtnlg_jax.decode.load import load_decoder
    from mtnlg_jax.interop import registry
    from mtnlg_jax.train.checkpoint import load_run

    registry.register()
    paths = sorted(folder.glob("*.safetensors"))

    def peer() -> None:
        for path in paths:
            load_file(path)

    def decoder() -> None:
        jax.block_until_ready(load_decoder(folder, dtype="bfloat16")[1].params)

    def run() -> None:
        jax.block_until_ready(load_run(folder).params)

    sides = {"safetensors": peer, "decoder": decoder, "run": run}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, call in sides.items():
            start = time.perf_counter()
            with contextlib.redirect_stdout(None):
                call()
            if number:  # the first round compiles and fills the page cache
                seconds[name].append(time.perf_counter() - start)
    rates = {name: round(size / statistics.median(each) / 1e9, 3) for name, each in seconds.items()}
    ratios = {
        name: round(
            statistics.median(
                peer / own for peer, own in zip(seconds["safetensors"], seconds[name], strict=True)
            ),
            3,
        )
        for name in ("decoder", "run")
    }
    return {"bytes": size, "rounds": rounds, "GB_per_second": rates, "of_safetensors": ratios}


if __name__ == "__main__":
    main()
