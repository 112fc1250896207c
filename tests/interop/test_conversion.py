"""Convert models of every family to runs and back, and use them without conversion."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mtnlg_jax.config import (
    Config,
    LayerSpec,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    Multipliers,
    RopeScaling,
    load_config,
    to_json,
)
from mtnlg_jax.data.tokenizer import load_tokenizer
from mtnlg_jax.decode.generate import DecodeConfig, generate
from mtnlg_jax.decode.load import load_decoder, names_of
from mtnlg_jax.interop import registry
from mtnlg_jax.interop.export import config_of, differences, meaning
from mtnlg_jax.interop.families import FAMILIES, family_of, model_of
from mtnlg_jax.interop.huggingface import convert, read_model
from mtnlg_jax.interop.shards import write_shards
from mtnlg_jax.interop.source import Source
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train.checkpoint import Checkpoints, load_run
from mtnlg_jax.train.init_from import load_start, refuse_other_runs

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "data"))
from hub_folders import FOLDERS  # noqa: E402

ROOT = HERE.parents[1]
NAMES = sorted(path.name for path in (HERE / "families").iterdir())


registry.register()


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """Return the folder of a tokenizer of 52 tokens, fewer than the rows of the models here."""
    folder = tmp_path_factory.mktemp("letters")
    vocabulary = {letter: index for index, letter in enumerate("_\n .,abcdefghijklmnopqrstuvwxyz")}
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="_"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    made.save(os.fspath(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def folder(tmp_path, letters):
    """Return a function that copies a fixture and adds the tokenizer of letters."""

    def copy(name: str) -> Path:
        made = tmp_path / name
        made.mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(HERE / "families" / name / file, made / file)
        shutil.copyfile(letters / "tokenizer.json", made / "tokenizer.json")
        return made

    return copy


def same_bits(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes()
        for name in one
    )


def store(folder: Path, tensors: dict) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def logits_of(model: ModelConfig, params, tokens, causal: bool) -> np.ndarray:
    graph = abstract_model(model)[0]
    return np.asarray(nnx.merge(graph, params)(jnp.asarray(tokens, jnp.int32), causal=causal))


# --- there and back


# Quick: float16 where 1 is added to the scales.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name,
            dtype,
            marks=[] if dtype == "float32" or name == "gemma2" else pytest.mark.slow,
        )
        for name in NAMES
        for dtype in ("float32", "float16")
    ],
)
def test_a_round_trip_of_every_family_keeps_every_bit(folder, tmp_path, name, dtype):
    source = folder(name)
    before = load_file(source / "model.safetensors")
    # Values that float16 does not hold: (scale + 1) - 1 then rounds.
    rng = np.random.default_rng(0)
    noise = {
        key: (values * rng.uniform(0.9, 1.1, values.shape)).astype(np.float32)
        for key, values in before.items()
    }
    config = json.loads((source / "config.json").read_text()) | {"dtype": dtype}
    tensors = {"float16": before, "float32": noise}[dtype]
    store(source, tensors)
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    assert same_bits(tensors, load_file(tmp_path / "back/model.safetensors"))
    assert json.loads((tmp_path / "back/config.json").read_text()) == config
    run = load_run(tmp_path / "run")
    _, params, _ = read_model(source)
    assert same_bits(
        {key: np.asarray(leaf) for key, leaf in names_of(params).items()},
        {key: np.asarray(leaf) for key, leaf in names_of(run.params).items()},
    )
    masked = FAMILIES[family_of(config)[0]].masked
    assert run.config.train.stages[0].masked == masked


def test_tensors_that_were_trained_on_are_written_as_trained(folder, tmp_path):
    source = folder("gemma2")
    convert(source, tmp_path / "run")
    run = load_run(tmp_path / "run")
    params = jax.tree.map(lambda leaf: leaf.at[..., 0].add(0.5), run.params)
    checkpoints = Checkpoints(tmp_path / "run/checkpoints")
    config = json.loads(to_json(run.config))
    checkpoints.save(1, {"params": params}, {"config": config}, metric=1.0, wait=True)
    checkpoints.close()
    convert(tmp_path / "run", tmp_path / "back")
    _, found, _ = read_model(tmp_path / "back")
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-6)


def test_tensors_of_another_family_are_refused_by_name(folder, tmp_path):
    source = folder("llama3")
    tensors = load_file(source / "model.safetensors")
    shutil.copyfile(HERE / "families/gpt_neox/config.json", source / "config.json")
    with pytest.raises(
        ValueError, match=r"a gpt_neox: .*embed_out.weight is missing.* and \d+ more"
    ):
        convert(source, tmp_path / "run")
    shutil.copyfile(HERE / "families/llama3/config.json", source / "config.json")
    store(source, tensors | {"lm_head.bias": np.zeros(61, np.float16)})
    with pytest.raises(ValueError, match=r"lm_head.bias \[61\] is not part of the model"):
        convert(source, tmp_path / "run")
    (source / "config.json").unlink()
    with pytest.raises(
        ValueError, match="config.json is missing, so that nothing names the family"
    ):
        convert(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_heads_for_other_tasks_are_left_out_and_reported(folder, tmp_path):
    source = folder("bert")
    tensors = load_file(source / "model.safetensors")
    pooler = {"bert.pooler.dense.weight": np.zeros((32, 32), np.float16)}
    ids = {"bert.embeddings.position_ids": np.arange(66, dtype=np.int64)[None]}
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in tensors.items()}
    store(source, old | pooler | ids)
    report = convert(source, tmp_path / "run")
    assert "bert.embeddings.position_ids, bert.pooler.dense.weight: tensors that" in report
    convert(tmp_path / "run", tmp_path / "back")
    assert same_bits(tensors, load_file(tmp_path / "back/model.safetensors"))


def test_a_text_model_inside_a_multimodal_one_is_read(folder, tmp_path):
    source = folder("gemma3")
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    outer = {"model_type": "gemma3", "text_config": config, "vision_config": {"a": 1}}
    (source / "config.json").write_text(json.dumps(outer | {"eos_token_id": 2}))
    nested = {f"language_model.{name}": values for name, values in tensors.items()}
    store(source, nested | {"vision_tower.x": np.zeros(3, np.float16)})
    convert(source, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    assert same_bits(tensors, load_file(tmp_path / "back/model.safetensors"))
    assert family_of(json.loads((tmp_path / "back/config.json").read_text()))[0] == "gemma3_text"


# --- runs that were trained here


def rotary(**more) -> ModelConfig:
    return ModelConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=32,
        position_embedding_type="rotary",
        **more,
    )


GATED = {"normalization": "rmsnorm", "activation": "swiglu", "bias": ()}
OWN = {
    "gpt2": ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=4, vocab_size=64),
    "llama": rotary(num_query_groups=2, tie_embeddings=False, **GATED),
    "mistral": rotary(layer_pattern=(LayerSpec(window=8),), **GATED),
    "qwen2": rotary(**GATED | {"bias": ("qkv",)}),
    "qwen3": rotary(qk_layernorm="head", kv_channels=8, **GATED),
    "olmo2": rotary(norm_placement="output", qk_layernorm="full", **GATED),
    "gpt_neox": rotary(rotary_percent=0.5),
    "starcoder2": rotary(num_query_groups=2),
    "bloom": dataclasses.replace(
        ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=4, vocab_size=64),
        position_embedding_type="alibi",
        embedding_norm=True,
    ),
    "mixtral": rotary(moe=MoEConfig(num_moe_experts=4), ffn_hidden_size=24, **GATED),
    "bert": ModelConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        vocab_size=64,
        activation="gelu_exact",
        norm_placement="post",
        embedding_norm=True,
        mlm_head=True,
        bias=("qkv", "out", "mlp", "norm", "head", "mlm"),
    ),
}

_ONE_NORM = {"parallel_residual": "one_norm"}
_PLAIN = {"normalization": "layernorm", "activation": "swiglu", "bias": ()}
_LOCAL = LayerSpec(window=8)
OWN |= {
    "smollm3": rotary(
        num_query_groups=2, layer_pattern=(LayerSpec(), LayerSpec(rotary=False)), **GATED
    ),
    "granite": rotary(num_query_groups=2, multipliers=Multipliers(6.0, 0.05, 0.22, 1 / 8), **GATED),
    "phi3": rotary(rotary_percent=0.5, layer_pattern=(_LOCAL,), **GATED),
    "phi": rotary(
        rotary_percent=0.5,
        tie_embeddings=False,
        bias=("qkv", "out", "mlp", "norm", "head"),
        **_ONE_NORM,
    ),
    "olmo3": rotary(
        norm_placement="output",
        qk_layernorm="full",
        rope_scaling=RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=8),
        layer_pattern=(LayerSpec(window=8, rope_scaling=False), LayerSpec()),
        **GATED,
    ),
    "glm4": rotary(
        norm_placement="sandwich", rotary_percent=0.5, num_query_groups=2, kv_channels=8, **GATED
    ),
    "cohere": rotary(
        num_query_groups=2, multipliers=Multipliers(logits=0.25), **_ONE_NORM | _PLAIN
    ),
    "cohere2": rotary(
        layer_pattern=(_LOCAL, LayerSpec(rotary=False)),
        multipliers=Multipliers(logits=0.25),
        kv_channels=8,
        **_ONE_NORM | _PLAIN,
    ),
    "nemotron": rotary(
        activation="squared_relu", rotary_percent=0.5, num_query_groups=2, bias=("norm",)
    ),
    "gptj": dataclasses.replace(
        rotary(tie_embeddings=False, bias=("mlp", "norm", "head"), **_ONE_NORM),
        kv_channels=8,
        num_attention_heads=2,
        rotary_percent=0.5,
    ),
    "falcon": rotary(num_query_groups=1, activation="gelu_exact", bias=("norm",), **_ONE_NORM),
    "falcon two norms": rotary(
        num_query_groups=2, activation="gelu_exact", bias=("norm",), parallel_residual="two_norms"
    ),
    "falcon in turn": rotary(num_query_groups=2, activation="gelu_exact", bias=("norm",)),
    "opt": dataclasses.replace(OWN["gpt2"], activation="relu"),
    "roberta": OWN["bert"],
    "modernbert": rotary(
        activation="geglu_exact",
        bias=("head",),
        embedding_norm=True,
        mlm_head=True,
        layer_pattern=(
            LayerSpec(rotary_base=160000.0, first_norm=False),
            LayerSpec(window=5, rotary_base=10000.0),
        ),
    ),
}
NOT_FIRST = ("opt", "roberta")  # another family computes the same


@pytest.mark.parametrize("name", OWN)
def test_the_first_family_that_computes_the_same_is_written(name):
    family = name.split()[0]
    model = dataclasses.replace(OWN[name], dropout_rate=0.1, attention_impl="xla")
    if name == "falcon in turn":
        with pytest.raises(ValueError, match=r"falcon cannot .* model.parallel_residual=none"):
            config_of(model, family="falcon")
        return
    config = config_of(model, family=family if family in NOT_FIRST else None)
    assert config["model_type"] == family
    assert meaning(model_of(config)) == meaning(model)
    assert model_of(config).dropout_rate == (0.1 if family == "gpt2" else 0)


def test_a_family_is_chosen_or_refused_by_name():
    assert config_of(OWN["bert"])["model_type"] == "bert"
    assert config_of(OWN["llama"], family="mistral")["model_type"] == "mistral"
    with pytest.raises(ValueError, match=r"opt cannot .* model.bias=\(\) \(opt: \('qkv', 'out'"):
        config_of(OWN["llama"], family="opt")
    with pytest.raises(ValueError, match="unknown family='lama'; choose one of bert, bloom"):
        config_of(OWN["llama"], family="lama")


@pytest.mark.parametrize("name", NAMES)
def test_fixtures_are_expressed_by_their_family(name):
    config = json.loads((HERE / "families" / name / "config.json").read_text())
    model = model_of(config)
    assert config_of(model, config) == config
    found = config_of(model)
    assert differences(model_of(found), model, found["model_type"]) == []
    assert found["model_type"] == config["model_type"]


def test_only_what_changed_is_written_into_the_original():
    config = json.loads((HERE / "families/llama3/config.json").read_text())
    longer = dataclasses.replace(model_of(config), max_position_embeddings=128)
    assert config_of(longer, config) == config | {"max_position_embeddings": 128}
    other = dataclasses.replace(model_of(config), qk_layernorm="head")
    assert config_of(other, config)["model_type"] == "qwen3"
    assert config_of(other, config)["architectures"] == ["Qwen3ForCausalLM"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Return a function that makes a run of a family with random parameters."""

    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family) / "run"
        rng = np.random.default_rng(0)
        from mtnlg_jax.data.tokenizer import train_tokenizer

        if family == "roberta":
            tokenizer = load_tokenizer(_padded_with_1(folder.parent))
        else:
            tokenizer = train_tokenizer(["The cat sat on the mat.\n"] * 20, 290)
        model = dataclasses.replace(OWN[family], vocab_size=320)
        params = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(0.1, 0.3, leaf.shape), jnp.float32),
            abstract_model(model)[1],
        )
        meta = {"config": json.loads(to_json(Config(model=model)))}
        checkpoints = Checkpoints(folder / "checkpoints")
        checkpoints.save(3, {"params": params}, meta, wait=True)
        checkpoints.close()
        tokenizer.save(folder / "tokenizer")
        return folder

    return make


def _padded_with_1(folder: Path) -> Path:
    """Write a tokenizer whose pad token has the id that RoBERTa needs."""
    import tokenizers

    names = ["<s>", "<pad>", "</s>", "<mask>"]
    words = {word: index for index, word in enumerate([*names, "_", *"abcdefgh"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="_"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    made.add_special_tokens(names)
    made.save(os.fspath(folder / "tokenizer.json"))
    return folder


def test_roberta_needs_its_pad_token(own, tmp_path):
    folder = own("bert")
    with pytest.raises(ValueError, match="the pad token, which must be token 1; .* --family=bert"):
        convert(folder, tmp_path / "model", family="roberta")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("family", ["llama", "mixtral", "bert", "bloom"])
def test_a_run_trained_here_comes_back_with_the_same_parameters(own, tmp_path, family):
    folder = own(family)
    convert(folder, tmp_path / "model", max_shard_size=2e-5)
    model, params, _ = read_model(tmp_path / "model")
    run = load_run(folder)
    assert meaning(model) == meaning(run.config.model)
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(run.params), strict=True):
        assert np.array_equal(left, right)


# --- without conversion


# Quick: each family and each kind of weights once.
@pytest.mark.parametrize(
    ("name", "dtype", "weights"),
    [
        pytest.param(*case, marks=[] if index in (2, 4, 6) else pytest.mark.slow)
        for index, case in enumerate(
            (name, *how)
            for name in ("gemma3", "gpt_oss", "gpt_neox")
            for how in (("float32", None), ("bfloat16", None), ("float32", "int8"))
        )
    ],
)
def test_a_folder_is_decoded_as_its_run_is(folder, tmp_path, name, dtype, weights):
    source = folder(name)
    convert(source, tmp_path / "run")
    one = load_decoder(source, dtype=dtype, weights=weights)
    other = load_decoder(tmp_path / "run", dtype=dtype, weights=weights)
    same = jax.tree.map(np.array_equal, one[1].params, other[1].params)
    assert all(jax.tree.leaves(same))
    assert one[0].config.model == other[0].config.model and one[0].meta == other[0].meta
    prompts = ["the cat", "a"]
    decode = DecodeConfig(max_new_tokens=6)
    found = [generate(decoder, run.tokenizer, prompts, decode) for run, decoder in (one, other)]
    assert [each.tokens for each in found[0]] == [each.tokens for each in found[1]]


def test_a_folder_is_loaded_on_a_mesh(folder):
    source = folder("gpt_neox")
    mesh = make_mesh(MeshConfig(data=4), jax.devices()[:4])
    plain = load_run(source)
    spread = load_run(source, mesh=mesh, zero=3)
    assert plain.tokenizer.fingerprint == spread.tokenizer.fingerprint
    for left, right in zip(
        jax.tree.leaves(plain.params), jax.tree.leaves(spread.params), strict=True
    ):
        assert np.array_equal(left, right) and right.sharding.mesh == mesh


def test_a_folder_is_a_config_for_planning(folder):
    source = folder("llama3")
    config = load_config(os.fspath(source), ["train.steps=7"])
    assert config.model == Source(source).model and config.train.steps == 7


def test_the_scripts_take_a_folder(folder):
    source = folder("llama3")

    def launch(script, *flags):
        done = subprocess.run(
            [sys.executable, ROOT / f"launch/{script}.py", *flags],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.fspath(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    (source / "text.txt").write_text("the cat sat on the mat. " * 10)
    prompt = "--prompt=the cat"
    assert launch("generate", f"--workdir={source}", prompt, "--max_new_tokens=4")
    assert "7" in launch("generate", f"--workdir={source}", "--mode=tokens", "--prompt=abc")
    assert "perplexity" in launch(
        "evaluate", f"--workdir={source}", f"--input={source / 'text.txt'}"
    )
    assert "llama3" in launch("plan", f"--config={source}")


# --- memory


MEASURE = """
    import resource, sys
    import jax
    from mtnlg_jax.interop import huggingface
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    huggingface.convert(sys.argv[1], sys.argv[3])  # compiles and imports everything
    before = peak()
    huggingface.convert(sys.argv[2], sys.argv[4])
    print(peak() - before)
"""


def test_memory_holds_one_shard_and_one_layer(tmp_path, letters):
    """A model of 300 MB in float32, in shards of 20 MB."""

    def make(name: str, layers: int) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((HERE / "families/llama3/config.json").read_text())
        config |= {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": layers,
            "head_dim": 128,
            "vocab_size": 1024,
        }
        (folder / "config.json").write_text(json.dumps(config))
        shutil.copyfile(letters / "tokenizer.json", folder / "tokenizer.json")
        from mtnlg_jax.interop.interchange import Interchange

        table = Interchange(model_of(config), FAMILIES["llama"]).table
        sizes = {key: 4 * int(np.prod(entry.shape)) for key, entry in table.items()}
        write_shards(folder, sizes, lambda key: np.full(table[key].shape, 0.5, np.float32), 20e-3)
        return folder

    small = make("small", 1)
    large = make("large", 20)
    assert sum(path.stat().st_size for path in large.glob("*.safetensors")) > 3e8
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(MEASURE),
            *map(str, (small, large, tmp_path / "small run", tmp_path / "large run")),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.fspath(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100
    run = load_run(tmp_path / "large run")
    assert all((np.asarray(leaf) == 0.5).all() for leaf in jax.tree.leaves(run.params))


# --- against transformers

READ = """
    import sys, numpy, torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
    folder, tokens, target = sys.argv[1:]
    config = AutoConfig.from_pretrained(folder)
    masked = "Masked" in config.architectures[0]
    kind = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        logits = model.eval()(torch.tensor(numpy.load(tokens))).logits
    numpy.save(target, logits.numpy())
"""


@pytest.fixture(scope="module")
def transformers_python():
    """Return a Python with torch and transformers: this one, or TRANSFORMERS_PYTHON."""
    python = os.environ.get("TRANSFORMERS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip("needs torch and transformers: set TRANSFORMERS_PYTHON to a Python with both")
    return python


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("llama3", "gemma3", "gpt_oss", "bert"),
        *(f"own {family}" for family in OWN if family != "falcon in turn"),
    ],
)
def test_transformers_reads_the_written_models(transformers_python, own, folder, tmp_path, name):
    if name.startswith("own "):
        wanted = name.removeprefix("own ")
        run_folder = own(wanted)
        wanted = wanted.split()[0]
    else:
        wanted = None
        run_folder = tmp_path / "run"
        convert(folder(name), run_folder)
    model = tmp_path / "model"
    convert(run_folder, model, max_shard_size=2e-5, dtype="float32", family=wanted)
    run = load_run(run_folder)
    tokens = np.random.default_rng(0).integers(3, run.config.model.vocabulary, (2, 24))
    np.save(tmp_path / "tokens.npy", tokens)
    subprocess.run(
        [
            transformers_python,
            "-c",
            textwrap.dedent(READ),
            tmp_path / "model",
            tmp_path / "tokens.npy",
            tmp_path / "logits.npy",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    family = json.loads((tmp_path / "model/config.json").read_text())["model_type"]
    causal = not FAMILIES[family].masked
    ours = logits_of(run.config.model, run.params, tokens, causal)
    np.testing.assert_allclose(ours, np.load(tmp_path / "logits.npy"), rtol=0, atol=1e-4)


# --- training from a folder


def test_a_run_starts_from_a_folder(tmp_path):
    source = HERE / "fixtures/tied"
    config = load_config(os.fspath(source), [f"train.init={source}"])
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    closed = load_run(source)
    refuse_other_runs(config, closed.tokenizer)
    start = load_start(config, mesh)
    for left, right in zip(jax.tree.leaves(start), jax.tree.leaves(closed.params), strict=True):
        assert np.array_equal(left, right)
    other = load_tokenizer(FOLDERS["characters"](tmp_path / "other"))
    with pytest.raises(ValueError, match="has another tokenizer .*prepare the data with"):
        refuse_other_runs(config, other)
    wider = dataclasses.replace(config.model, norm_epsilon=1e-6)
    with pytest.raises(ValueError, match="model.norm_epsilon is 1e-05 there and 1e-06"):
        refuse_other_runs(dataclasses.replace(config, model=wider), closed.tokenizer)
