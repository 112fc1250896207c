"""Load decoders from checkpoints: equal to parameters in memory, with less memory, finite values
only."""

import dataclasses
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import save_run

from mtnlg_jax.config import (
    Config,
    DecodeConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
)
from mtnlg_jax.decode import cache
from mtnlg_jax.decode import load as loading
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.infill import fill
from mtnlg_jax.decode.load import load_decoder, names_of
from mtnlg_jax.decode.rank import rank
from mtnlg_jax.model.transformer import abstract_model, init_parameters
from mtnlg_jax.train import arrays, checkpoint, checkpoint_arrays, lora
from mtnlg_jax.train.checkpoint import load_run

ROOT = Path(__file__).resolve().parents[2]
HELD = [
    {},
    {"dtype": "bfloat16"},
    {"weights": "int8"},
    {"weights": "int8", "dtype": "bfloat16", "cache": "int8"},
]


def _poisoned(tiny, name: str, value: float):
    """Return the parameters of ``tiny`` with one value of ``name`` replaced."""

    def one(path, leaf):
        if jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") != name:
            return leaf
        return leaf.at[(-1,) * leaf.ndim].set(value)

    return jax.tree_util.tree_map_with_path(one, tiny.params)


@pytest.mark.parametrize(
    "chunk", [pytest.param(2**24, marks=pytest.mark.slow), 2**12], ids=["whole", "by_layer"]
)
def test_a_loaded_decoder_equals_the_parameters_in_memory(
    tiny, tokenizer, tmp_path, monkeypatch, chunk
):
    monkeypatch.setattr(checkpoint_arrays, "CHUNK_BYTES", chunk)
    folder = save_run(tmp_path, Config(model=tiny.config), tiny.params, tokenizer)
    stored = arrays.StoredArrays(checkpoint.epath.Path(folder / "checkpoints/3/params"))
    layers = stored._open("blocks.mlp.w_in_DF").chunk_layout.read_chunk.shape[0]
    assert layers == (2 if chunk == 2**24 else 1), "stored as the test means it"
    run = load_run(folder)
    for held in HELD:
        expected = cache.unstack(tiny.config, run.params, **held)
        found_run, found = load_decoder(folder, "best", **held)
        assert found_run.params is None and (found_run.step, found_run.config) == (3, run.config)
        assert (found.config, found.int8_cache) == (expected.config, expected.int8_cache)
        assert jax.tree.structure(found.params) == jax.tree.structure(expected.params)
        for one, other in zip(
            jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True
        ):
            assert one.dtype == other.dtype
            # XLA and NumPy round a quotient differently in its last bit, which occasionally
            # decides a tie.
            differences = np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32))
            if one.dtype == jnp.int8:
                assert differences.max() <= 1 and differences.mean() < 1e-3
            else:
                assert differences.max() <= 1e-6 * np.abs(np.asarray(other, np.float32)).max()


def test_int8_holds_a_tied_table_once(learned):
    """The embedding table and the head are one int8 array; the largest float array holds the
    positions."""
    held = cache.unstack(learned.config, learned.params, weights="int8")
    sizes = {
        name: leaf.size for name, leaf in names_of(held.params[0]).items() if leaf.dtype != jnp.int8
    }
    assert (
        max(sizes.values()) == learned.config.max_position_embeddings * learned.config.hidden_size
    )
    table = learned.config.vocab_size * learned.config.hidden_size
    assert [leaf.size for leaf in jax.tree.leaves(held.params) if leaf.size >= table] == [table]


def test_adapters_of_a_run_are_merged(learned, tokenizer, tmp_path):
    config = Config(model=learned.config, optimizer=OptimizerConfig(lora_rank=2))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, init="elsewhere"))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), lora.abstract_adapters(config)
    )
    folder = save_run(tmp_path, config, lora.joined(learned.params, adapters), tokenizer)
    run, found = load_decoder(folder)
    expected = cache.unstack(learned.config, load_run(folder).params)
    assert run.config.optimizer.lora_rank == 0
    for one, other in zip(
        jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "value"),
    [("blocks.mlp.b_in_F", np.nan), ("tokens_VD", np.inf), ("final_norm.scale_D", -np.inf)],
)
def test_a_parameter_that_is_not_finite_raises_an_error(learned, tokenizer, tmp_path, name, value):
    folder = save_run(
        tmp_path, Config(model=learned.config), _poisoned(learned, name, value), tokenizer
    )
    for load in (load_run, load_decoder, lambda folder: load_decoder(folder, weights="int8")):
        with pytest.raises(
            ValueError,
            match=rf"parameter {name} .*has 1 of .* not finite, the first of them {value}",
        ):
            load(folder)


def test_finite_values_with_an_infinite_sum_are_accepted():
    arrays.check_finite(np.full(8, 3e38, np.float32), "w", "here")
    with pytest.raises(ValueError, match="1 of 8"):
        arrays.check_finite(np.array([3e38] * 7 + [np.inf], np.float32), "w", "here")


# Slow: a parameter of a layer, which reaches the same check.
@pytest.mark.parametrize(
    "name",
    [
        "final_norm.bias_D",
        pytest.param("blocks.attention.b_v_KH", marks=pytest.mark.slow),
    ],
)
def test_logits_that_are_not_finite_raise_an_error(learned, tokenizer, name):
    """The parameters were not checked by a checkpoint."""
    decoder = cache.unstack(learned.config, _poisoned(learned, name, np.nan))
    for settings in (
        {},
        {"temperature": 1.0, "num_return_sequences": 2},
        {"num_beams": 2},
        {"num_beams": 2, "temperature": 1.0},
        {"prompt_lookup_num_tokens": 2},
    ):
        with pytest.raises(ValueError, match="not finite"):
            generate(
                decoder, tokenizer, ["The cat", " sat"], DecodeConfig(max_new_tokens=4, **settings)
            )
    with pytest.raises(ValueError, match="not finite"):
        fill(decoder, tokenizer, "The <mask>")
    for candidates in ([" cat"], None):
        with pytest.raises(ValueError, match="not finite"):
            rank(decoder, tokenizer, "The", candidates)


def test_generation_does_not_import_training_packages():
    heavy = [
        "orbax.checkpoint",
        "sacrebleu",
        "sklearn",
        "matplotlib",
        "transformers",
        "torch",
        "pandas",
        "pyarrow",
    ]
    program = (
        "import sys; from mtnlg_jax.decode import generate, infill, load, rank; "
        f"print(*(name for name in {heavy} if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == []


@pytest.fixture(scope="module")
def gpt2_124m(tokenizer, tmp_path_factory):
    model = ModelConfig(vocab_size=50257, vocab_size_divisible_by=1, max_position_embeddings=1024)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.02, x.shape), jnp.float32), abstract_model(model)[1]
    )
    return save_run(tmp_path_factory.mktemp("gpt2"), Config(model=model), params, tokenizer)


PACKAGES = "import jax, flax.nnx, optax"


def _processor_time() -> float:
    """Return the seconds that all ended child processes took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _seconds(command: list[str]) -> float:
    """Return the processor time of a command."""
    before = _processor_time()
    subprocess.run(command, check=True)
    return _processor_time() - before


def _ask(folder, *flags, environment=None) -> tuple[float, float]:
    """Return (peak memory in bytes, processor time in seconds) of launch/generate.py."""
    before = _processor_time()
    program = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); print('peak', used.ru_maxrss); "
        "sys.exit(done.returncode)"
    )
    command = [
        sys.executable,
        "-c",
        program,
        sys.executable,
        ROOT / "launch/generate.py",
        f"--workdir={folder}",
        "--prompt=The cat",
        "--max_new_tokens=16",
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return 1024 * int(done.stdout.split()[-1]), _processor_time() - before


@pytest.mark.slow
def test_int8_and_bfloat16_reduce_memory(gpt2_124m, tmp_path):
    """The limit for 124M parameters is the size of the decoder and 500 MB.

    JAX, its programs and the package take 390 MB with a model of any size.
    """
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    besides = 500e6
    peaks = []
    for flags, size in (((), 4), (("--dtype=bfloat16",), 2), (("--weights=int8",), 1.03)):
        peak = _ask(gpt2_124m, *flags, environment=environment)[0]
        assert peak < 124.4e6 * size + besides, flags
        peaks.append(peak)
    assert peaks[2] < 0.7 * peaks[0]


@pytest.mark.slow
def test_a_warm_start_is_fast(learned, tokenizer, tmp_path):
    folder = save_run(tmp_path / "run", Config(model=learned.config), learned.params, tokenizer)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    took = min(_ask(folder, environment=environment)[1] for _ in range(4))
    # Machines differ, so beside the packages alone; a start that compiles takes about 1.7 times.
    assert took < 1.4 * min(_seconds([sys.executable, "-c", PACKAGES]) for _ in range(3))


def test_a_shared_expert_is_rounded_as_from_parameters_in_memory():
    moe = MoEConfig(
        num_moe_experts=2,
        moe_router_topk=1,
        moe_shared_expert_intermediate_size=8,
        moe_shared_expert_gate=True,
    )
    model = ModelConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=8,
        vocab_size=32,
        max_position_embeddings=16,
        activation="swiglu",
        bias=(),
        moe=moe,
    )
    params = init_parameters(model, 0)
    read = loading._assemble(model, "float32", "int8", arrays.Held(params))
    held = cache.unstack(model, params, weights="int8").params
    assert jax.tree.structure(read) == jax.tree.structure(held)
    for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(held), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert read[1][0].mlp.shared.w_in_DF[...].number_OI.dtype == jnp.int8
