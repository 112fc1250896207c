"""Measure what a rolling cache saves: bytes, and the time of a step, with and without it.

    python benchmarks/rolling.py                 Gemma 3 270M, 32,768 positions, one row, float32
    python benchmarks/rolling.py --bytes         the bytes alone, without running the model

The model has the shape of Gemma 3 270M (windows of 512 in five of six layers) and random weights.
Two caches are filled up to the last positions: one of all positions, one that keeps windows. The
sides alternate; each call writes the same number of tokens. The result is the median time of a
token of each side and the median of the ratios of neighboring calls.
"""

# Shapes: V vocabulary

import argparse
import datetime
import functools
import json
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax.config import DecodeConfig, ModelConfig
from mtnlg_jax.decode import cache, sampling
from mtnlg_jax.decode.batched_settings import batch_settings
from mtnlg_jax.decode.results import CHUNK
from mtnlg_jax.interop.families import model_of
from mtnlg_jax.model.transformer import abstract_model

RESULT = Path(__file__).parent / "results" / "rolling.json"
POSITIONS = 32768
GEMMA = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": POSITIONS,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bytes", action="store_true", help="do not run the model")
    parser.add_argument("--positions", type=int, default=POSITIONS, help="of the cache")
    parser.add_argument("--chunks", type=int, default=1, help=f"{CHUNK} tokens each, of a call")
    parser.add_argument("--rounds", type=int, default=7, help="calls of each side")
    parser.add_argument("--output", default=os.fspath(RESULT), help="file for the result")
    flags = parser.parse_args()
    model = model_of(GEMMA)
    result: dict = {"positions": flags.positions, "cache_bytes": bytes_of(model, flags.positions)}
    if flags.bytes:
        print(json.dumps(result, indent=2))
        return
    result |= times(model, flags.positions, flags.chunks, flags.rounds) | {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    print(json.dumps(result, indent=2))
    Path(flags.output).write_text(json.dumps(result, indent=2) + "\n")


def bytes_of(model: ModelConfig, positions: int) -> dict[str, int]:
    """Return the bytes of a row's cache, by dtype and by what it keeps."""
    found = {}
    for dtype in ("float32", "bfloat16", "int8"):
        unstack = functools.partial(
            cache.unstack_params, config=model, dtype="bfloat16" if dtype == "int8" else dtype
        )
        params = jax.eval_shape(unstack, abstract_model(model)[1])
        tokens = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        for name, rolling in (("all positions", False), ("windows", True)):
            read = functools.partial(
                cache.prefill_rows, config=model, size=positions, rolling=rolling
            )
            held = jax.eval_shape(read, params, tokens, lengths).cache
            held = jax.eval_shape(cache.to_int8, held) if dtype == "int8" else held
            found[f"{dtype}, {name}"] = sum(
                x.size * x.dtype.itemsize for x in jax.tree.leaves(held)
            )
    return found


def times(model: ModelConfig, positions: int, chunks: int, rounds: int) -> dict:
    """Time steps near the end of a full cache; the keys and values are random."""
    draws = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.02 * draws.standard_normal(x.shape, np.float32)),
        abstract_model(model)[1],
    )
    decoder = cache.unstack(model, params)
    del params
    room = (rounds + 1) * chunks * CHUNK
    length = np.array([positions - room - 1], np.int32)
    settings = batch_settings(
        [DecodeConfig(max_new_tokens=positions, min_new_tokens=positions)],
        np.ones(model.vocabulary, np.bool_),
        eos=(0,),
    )
    whole = tuple(
        (jnp.asarray(draws.standard_normal(shape, np.float32)),) * 2
        for shape in [(1, model.kv_heads, positions, model.head_width)] * model.num_layers
    )
    prefix = cache.Prefix(
        jnp.asarray(draws.integers(0, model.vocabulary, (1, positions)), jnp.int32),
        jnp.asarray(length),
        jnp.zeros((1, model.vocabulary)),
        whole,
    )
    seconds: dict[str, list[float]] = {"all positions": [], "windows": []}
    sides = {}
    for name, rolling in (("all positions", None), ("windows", model)):
        sides[name] = sampling.begin(
            prefix,
            np.zeros(1, np.int32),
            np.array([positions], np.int32),
            np.zeros(1, np.uint32),
            settings,
            rolling=rolling,
        )
    for turn in range(rounds + 1):
        for name, (state, limits) in list(sides.items()):
            before = time.perf_counter()
            state = sampling.advance(
                decoder.params, state, limits, settings, np.int32(chunks), config=model
            )
            jax.block_until_ready(state)
            if turn:  # the first call compiles
                seconds[name].append((time.perf_counter() - before) / (chunks * CHUNK))
            sides[name] = state, limits
    tokens = [np.asarray(state.tokens_BS) for state, _ in sides.values()]
    pairs = zip(seconds["all positions"], seconds["windows"], strict=True)
    return {
        "seconds_per_token": {name: statistics.median(each) for name, each in seconds.items()},
        "times_as_fast": statistics.median(one / other for one, other in pairs),
        "same_tokens": bool(np.array_equal(*tokens)),
    }


if __name__ == "__main__":
    main()
