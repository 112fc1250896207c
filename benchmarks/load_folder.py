"""Time loading a Hugging Face folder beside the disk and safetensors' own loader.

    python benchmarks/load_folder.py            1.2 GB in shards of 0.5 GB; --small: 0.1 GB

A folder of bf16 tensors in the shapes of Llama is written with random values. The sides alternate;
each reads every tensor:

    disk           the files in pieces of 8 MB, into one buffer
    safetensors    safetensors.numpy.load_file of each shard, bf16 arrays
    decoder        load_decoder(dtype="bfloat16"): tensors checked, turned to our layout and put on
                   the device
    run            load_run: the same as float32, in stacked parameters

"warm" reads the files from the page cache. "cold" drops them from it before each call
(posix_fadvise); what lies between this machine and its disk may still hold them. The result is
bytes of the files a second, and the median of the ratios of neighboring calls.
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
    parser.add_argument("--small", action="store_true", help="0.1 GB instead of 1.2 GB")
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
    """Return the rate of each side and their ratios, with a warm and a cold page cache."""
    import jax
    from safetensors.numpy import load_file

    from mtnlg_jax.decode.load import load_decoder
    from mtnlg_jax.interop import registry
    from mtnlg_jax.train.checkpoint import load_run

    registry.register()
    paths = sorted(folder.glob("*.safetensors"))
    buffer = bytearray(8 << 20)

    def disk() -> None:
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def peer() -> None:
        for path in paths:
            load_file(path)

    def decoder() -> None:
        jax.block_until_ready(load_decoder(folder, dtype="bfloat16")[1].params)

    def run() -> None:
        jax.block_until_ready(load_run(folder).params)

    sides = {"disk": disk, "safetensors": peer, "decoder": decoder, "run": run}
    for call in sides.values():  # compiles and fills the page cache
        _timed(call)
    result: dict = {"bytes": size, "rounds": rounds}
    for state in ("warm", "cold"):
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, call in sides.items():
                if state == "cold":
                    _drop(paths)
                seconds[name].append(_timed(call))
        result[state] = _compared(seconds, size)
    return result


def _timed(call) -> float:
    start = time.perf_counter()
    with contextlib.redirect_stdout(None):
        call()
    return time.perf_counter() - start


def _drop(paths: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)  # pages that are not written yet would stay
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _compared(seconds: dict[str, list[float]], size: int) -> dict:
    def ratio(own: str, peer: str) -> float:
        pairs = zip(seconds[peer], seconds[own], strict=True)
        return round(statistics.median(there / here for there, here in pairs), 3)

    return {
        "GB_per_second": {
            name: round(size / statistics.median(each) / 1e9, 3) for name, each in seconds.items()
        },
        "of_disk": {name: ratio(name, "disk") for name in ("safetensors", "decoder", "run")},
        "of_safetensors": {name: ratio(name, "safetensors") for name in ("decoder", "run")},
    }


if __name__ == "__main__":
    main()
