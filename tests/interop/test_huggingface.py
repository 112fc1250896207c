"""Convert GPT-2 from and to Hugging Face: exact round trips, the numbers of transformers, errors.

fixtures/ holds files that transformers itself wrote (make_fixtures.py).
"""

import base64
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
import optax
import pytest
import tokenizers
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mtnlg_jax.config import Config, MeshConfig, ModelConfig, from_json, load_config, to_json
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.data.tokenizer import load_tokenizer, train_tokenizer
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.decode.generate import DecodeConfig, generate
from mtnlg_jax.interop import huggingface
from mtnlg_jax.interop.export import config_of
from mtnlg_jax.interop.families import model_of
from mtnlg_jax.interop.huggingface import convert, read_model
from mtnlg_jax.interop.written import Written
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train.checkpoint import Checkpoints, load_run
from mtnlg_jax.train.loop import train
from mtnlg_jax.train.state import abstract_state, init_state

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VARIANTS = ("tied", "untied")


def tensors_of(folder) -> dict[str, np.ndarray]:
    return {
        name: values
        for path in sorted(Path(folder).glob("*.safetensors"))
        for name, values in load_file(path).items()
    }


def same_tensors(one, other) -> bool:
    one = tensors_of(one)
    other = tensors_of(other)
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].tobytes() == other[name].tobytes()
        for name in one
    )


def edit_json(path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(
        json.dumps({key: value for key, value in content.items() if value != "REMOVED"})
    )


@pytest.fixture
def model(tmp_path):
    """Copy the tied model, so that a test can change it."""
    return Path(shutil.copytree(HERE / "fixtures/tied", tmp_path / "model"))


@pytest.fixture(scope="module", params=VARIANTS)
def converted(request, tmp_path_factory):
    """Return (folder of transformers, run folder converted from it)."""
    run = tmp_path_factory.mktemp("converted") / request.param
    convert(HERE / "fixtures" / request.param, run)
    return HERE / "fixtures" / request.param, run


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Return a run as launch/pretrain.py writes it, with SentencePiece, a padded vocabulary and our
    own special tokens."""
    folder = tmp_path_factory.mktemp("own") / "run"
    texts = [
        "The cat sat on the mat and the dog sat on the log.\n",
        "天地玄黄,宇宙洪荒。日月盈昃。\n",
    ] * 20
    tokenizer = train_tokenizer(texts, 310)
    config = Config(
        model=ModelConfig(
            num_layers=2,
            hidden_size=16,
            num_attention_heads=2,
            vocab_size=512,
            max_position_embeddings=32,
            ffn_hidden_size=24,
        )
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.1, 0.3, leaf.shape), jnp.float32),
        abstract_model(config.model)[1],
    )
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(
        3,
        {"params": params, "step": jnp.int32(3)},
        {"config": json.loads(to_json(config))},
        wait=True,
    )
    checkpoints.close()
    tokenizer.save(folder / "tokenizer")
    (folder / "config.json").write_text(to_json(config))
    return folder


# --- the same numbers


def test_logits_loss_and_gradients_equal_transformers(converted):
    source, workdir = converted
    run = load_run(workdir)
    expected = np.load(source / "expected.npz")
    graph = abstract_model(run.config.model)[0]

    @jax.jit
    def losses(params):
        def loss(params):
            logits = nnx.merge(graph, params)(jnp.asarray(expected["tokens"], jnp.int32))
            nats = optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :-1], expected["tokens"][:, 1:]
            )
            return nats.mean(), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, logits), gradients = losses(run.params)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, expected["loss"], rtol=0, atol=1e-4)
    read = Written(run.config.model, "gpt2", gradients)
    names = read.names
    assert len(names) == sum(name.startswith("gradient.") for name in expected.files)
    for name in names:
        wanted = expected[f"gradient.{name}"]
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(read[name], wanted, rtol=0, atol=1e-4, err_msg=name)


def test_greedy_text_equals_transformers(converted):
    source, workdir = converted
    run = load_run(workdir)
    greedy = json.loads((source / "expected.json").read_text())["greedy"]
    decoder = unstack(run.config.model, run.params, "float32")
    found = generate(
        decoder, run.tokenizer, [each["prompt"] for each in greedy], DecodeConfig(max_new_tokens=16)
    )
    end = run.tokenizer.eos_id
    for each, result in zip(greedy, found, strict=True):
        prompt = run.tokenizer.encode(each["prompt"])
        assert (
            prompt + list(result.tokens)
            == each["tokens"][: len(each["tokens"]) - (each["tokens"][-1] == end)]
        )
        assert each["prompt"] + result.text == each["text"]


def test_a_small_real_model_sorts(shared, tmp_path):
    """gpt_nano_sort has three symbols and was trained with minGPT, with matrices [out, in]."""
    stored = json.loads(
        (shared / "data/weights/gpt_nano_sort/gpt-nano-sort-model.json").read_text()
    )
    config = stored.pop("config")
    tensors = {
        name: np.frombuffer(base64.b64decode(each["data"]), np.float32).reshape(each["shape"])
        for name, each in stored.items()
    }
    conv = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    source = tmp_path / "model"
    workdir = tmp_path / "run"
    back = tmp_path / "back"
    source.mkdir()
    save_file(
        {
            name: np.ascontiguousarray(values.T if name.endswith(conv) else values)
            for name, values in tensors.items()
        },
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    (source / "config.json").write_text(
        json.dumps(
            {
                "model_type": "gpt2",
                "n_layer": config["n_layer"],
                "n_head": config["n_head"],
                "n_embd": config["n_embd"],
                "vocab_size": 3,
                "n_positions": config["block_size"],
                "tie_word_embeddings": False,
                "activation_function": "gelu_new",
            }
        )
    )
    model, params, _ = read_model(source)

    @jax.jit
    def next_tokens(tokens):
        return nnx.merge(abstract_model(model)[0], params)(tokens).argmax(-1)

    for numbers in ([0, 0, 2, 1, 0, 1], [2, 2, 1, 1, 0, 0], [1, 0, 2, 1, 2, 0]):
        row = numbers + [0] * 5
        for at in range(5, 11):
            guess = int(next_tokens(np.array([row]))[0, at])
            row = row[: at + 1] + [guess] + row[at + 2 :]
        assert row[6:] == sorted(numbers)
    with pytest.raises(FileNotFoundError, match="--tokenizer=FOLDER"):
        convert(source, workdir)
    with pytest.raises(ValueError, match="has 268 tokens and the model vocab_size=3"):
        convert(source, workdir, tokenizer=HERE / "fixtures/tied")
    symbols = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"0": 0, "1": 1, "2": 2}, unk_token="0")
    )
    symbols.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    symbols.decoder = tokenizers.decoders.Fuse()
    symbols.save(os.fspath(source / "tokenizer.json"))
    assert "there is no end token" in convert(source, workdir)
    tokenizer = load_run(workdir).tokenizer
    assert tokenizer.encode("002101") == [0, 0, 2, 1, 0, 1] and tokenizer.decode([2, 1, 0]) == "210"
    read = Written(model, "gpt2", params)
    back = {name: read[name] for name in tensors if not name.endswith(".attn.bias")}
    written = load_file(source / "model.safetensors")
    assert all(back[name].tobytes() == written[name].tobytes() for name in back) and len(back) == 41


# --- round trips


def rewrite(folder, change) -> None:
    """Apply ``change``, {name: array} -> {name: array}, to the tensors in a folder of one file."""
    path = folder / "model.safetensors"
    save_file(
        {name: np.ascontiguousarray(values) for name, values in change(load_file(path)).items()},
        path,
        metadata={"format": "pt"},
    )


def bare(tensors):
    """Store tensors as the published gpt2: no prefix, and the causal mask among the weights."""
    made = {name.removeprefix("transformer."): values for name, values in tensors.items()}
    return made | {
        "h.0.attn.bias": np.tril(np.ones((1, 1, 48, 48), np.uint8)),
        "h.0.attn.masked_bias": np.float32(-1e4).reshape(()),
    }


SOURCES = {
    "float32": lambda tensors: tensors,
    "float16": lambda tensors: {
        name: values.astype(np.float16) for name, values in tensors.items()
    },
    "bfloat16": lambda tensors: {
        name: values.astype(jnp.bfloat16) for name, values in tensors.items()
    },
    "mixed": lambda tensors: {
        name: values.astype(np.float16 if values.ndim > 1 else np.float32)
        for name, values in tensors.items()
    },
    "bare": bare,
    "head written out": lambda tensors: (
        tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_round_trip_is_exact(model, tmp_path, source):
    rewrite(model, SOURCES[source])
    if source in ("float16", "bfloat16"):
        edit_json(model / "config.json", dtype=source)
    report = convert(model, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    if source == "bare":  # masks are recreated by whoever needs them
        rewrite(
            model,
            lambda tensors: {
                name: values
                for name, values in tensors.items()
                if ".attn.bias" not in name and "masked" not in name
            },
        )
    assert same_tensors(model, tmp_path / "back")
    assert json.loads((model / "config.json").read_text()) == json.loads(
        (tmp_path / "back/config.json").read_text()
    )
    for name in ("vocab.json", "merges.txt", "generation_config.json"):
        assert (model / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    assert {"mixed": "float16 and float32", "bfloat16": "bfloat16"}.get(source, "float") in report


def test_another_dtype_is_written_on_request(converted, tmp_path):
    source, run = converted
    convert(run, tmp_path / "half", dtype="bfloat16")
    wanted = {name: values.astype(jnp.bfloat16) for name, values in tensors_of(source).items()}
    found = tensors_of(tmp_path / "half")
    assert (
        all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)
        and found.keys() == wanted.keys()
    )
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="--dtype=float16 is for tensors of Hugging Face's"):
        convert(source, tmp_path / "run", dtype="float16")


def test_values_too_large_for_a_dtype_raise_an_error(model, tmp_path):
    rewrite(
        model, lambda tensors: tensors | {"transformer.ln_f.bias": np.full(16, 1e5, np.float32)}
    )
    convert(model, tmp_path / "run")
    with pytest.raises(
        ValueError, match="16 values of transformer.ln_f.bias are too large for float16"
    ):
        convert(tmp_path / "run", tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()


def test_shards_are_written_and_read(converted, tmp_path):
    source, run = converted
    convert(run, tmp_path / "sharded", max_shard_size=16e-6)
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 2
    # Who may read config.json may read the weights.
    modes = {path.stat().st_mode for path in (tmp_path / "sharded").iterdir()}
    assert len(modes) == 1
    index = json.loads((tmp_path / "sharded/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        values.nbytes for values in tensors_of(source).values()
    )
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "sharded" / file, "np") as shard:
            assert name in shard.keys() and shard.metadata() == {"format": "pt"}
    assert all(
        sum(values.nbytes for values in load_file(tmp_path / "sharded" / name).values()) <= 16e3
        for name in files
        if "wte" not in str(load_file(tmp_path / "sharded" / name).keys())
        and "lm_head" not in str(load_file(tmp_path / "sharded" / name).keys())
    )
    convert(tmp_path / "sharded", tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    assert same_tensors(source, tmp_path / "back")

    (tmp_path / "sharded" / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{files[1]} is missing"):
        convert(tmp_path / "sharded", tmp_path / "other")


def test_our_own_run_survives_a_round_trip(own, tmp_path):
    report = convert(own, tmp_path / "model")
    assert "202 more rows" in report and "checkpoint of step 3" in report
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert (
        config["architectures"] == ["GPT2LMHeadModel"]
        and config["n_inner"] == 24
        and config["dtype"] == "float32"
    )
    model, params, _ = read_model(tmp_path / "model")
    run = load_run(own)
    shape = run.config.model
    assert model == shape
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(run.params), strict=True)
    assert all(np.asarray(one).tobytes() == np.asarray(other).tobytes() for one, other in pairs)
    # Tokens never written here are suppressed there: special ones except the end, and the padding.
    generation = json.loads((tmp_path / "model/generation_config.json").read_text())
    special = set(np.flatnonzero(run.tokenizer.is_special)) - {run.tokenizer.eos_id}
    assert generation["suppress_tokens"] == sorted(map(int, special | set(range(310, 512))))


@pytest.mark.parametrize("kind", ["bpe", "unigram", "gpt2"])
def test_our_tokenizers_encode_the_same_in_transformers_format(kind, tmp_path):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeinorst"), rng.integers(1, 9))) for _ in range(400)]
    source = "\n".join(" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(300))
    ours = (
        load_tokenizer(HERE / "fixtures/tied")
        if kind == "gpt2"
        else train_tokenizer([source], 600, kind)
    )
    files, how = huggingface.vocabulary.write_tokenizer(ours, 64)
    assert how == "as tokenizer.json"
    there = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    lines = [source, *source.split("\n"), "a  b\n\n\tc ", "naïve 🙂 天地", "the the thethe"]
    read = [there.encode(line).ids for line in lines]
    assert [there.decode(ids, skip_special_tokens=True) for ids in read] == lines
    other = [
        line
        for line, ids in zip(lines, read, strict=True)
        if ids != [ours.bos_id, *ours.encode(line)]
    ]
    # Under a unigram model two segmentations may be equally likely, as of a repeated letter.
    assert len(other) <= (8 if kind == "unigram" else 0), other
    settings = json.loads(files["tokenizer_config.json"])
    for role in ("bos", "eos", "pad"):
        assert there.token_to_id(settings[f"{role}_token"]) == getattr(ours, f"{role}_id")


# --- training a converted run


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_converted_run_starts_with_the_optimizer_of_a_fresh_one(converted, tmp_path, optimizer):
    _, workdir = converted
    workdir = Path(shutil.copytree(workdir, tmp_path / "run"))
    config = load_config(os.fspath(workdir / "config.py"), [f"optimizer.name={optimizer}"])
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    identity = {
        "model": {"hidden_size": 16},
        "tokenizer": {"sha256": load_run(workdir).tokenizer.fingerprint},
        "data": {"source 0": "any"},
    }
    checkpoints = Checkpoints(workdir / "checkpoints")
    try:
        abstract = abstract_state(config, mesh)
        step, state, _ = checkpoints.restore(abstract, identity)
        fresh = init_state(config, mesh)
        assert step == 0 and jax.tree.structure(state) == jax.tree.structure(fresh)
        for key in set(fresh._fields) - {"params"}:
            for here, there in zip(
                jax.tree.leaves(getattr(state, key)),
                jax.tree.leaves(getattr(fresh, key)),
                strict=True,
            ):
                assert (
                    here.dtype == there.dtype
                    and np.asarray(here).tobytes() == np.asarray(there).tobytes()
                )
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
            lambda leaf: leaf.sharding, abstract
        )
        with pytest.raises(ValueError, match="hidden_size: 16 -> 17"):
            checkpoints.restore(abstract, identity | {"model": {"hidden_size": 17}})
        with pytest.raises(ValueError, match="tokenizer.sha256"):
            checkpoints.restore(abstract, identity | {"tokenizer": {"sha256": "other"}})
    finally:
        checkpoints.close()


@pytest.mark.slow
def test_a_converted_run_is_trained_and_converted_back(converted, tmp_path):
    source, workdir = converted
    workdir = Path(shutil.copytree(workdir, tmp_path / "run"))
    (tmp_path / "text.txt").write_text("the man in the town where I was born\n" * 400)
    prepare(tmp_path / "text.txt", tmp_path / "data", tokenizer=workdir / "tokenizer", heldout=0.0)
    config = load_config(
        os.fspath(workdir / "config.py"),
        [
            f"data.path={tmp_path / 'data'}",
            "train.steps=20",
            "train.global_batch_size=8",
            "optimizer.learning_rate=1e-2",
            "train.save_every=0",
        ],
    )
    train(config, os.fspath(workdir), show_progress=False)
    losses = [
        json.loads(line)["loss"]
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
        if '"train"' in line
    ]
    assert losses[0] > 4 and losses[-1] < losses[0] - 1
    assert "checkpoint of step 20" in convert(workdir, tmp_path / "back")
    assert tensors_of(tmp_path / "back").keys() == tensors_of(source).keys()
    assert not same_tensors(source, tmp_path / "back")
    assert (tmp_path / "back/vocab.json").read_bytes() == (source / "vocab.json").read_bytes()


def test_the_tokenizer_of_a_converted_run(converted):
    tokenizer = load_run(converted[1]).tokenizer
    assert tokenizer.vocab_size == 268 and not tokenizer.prompt_bos
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.pad_id == 267
    assert load_tokenizer(
        HERE / "fixtures/tied"
    ).prompt_bos  # the same files, for a model trained here
    with pytest.raises(ValueError, match="no mask token"):
        _ = tokenizer.mask_id


# --- invalid models


def without(name):
    return lambda tensors: {key: values for key, values in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("transformer.h.1.ln_1.bias"), r"h\.1\.ln_1\.bias is missing \(expected \[16\]\)"),
        (
            lambda t: t | {"transformer.h.2.ln_1.bias": np.zeros(16, np.float32)},
            r"h\.2\.ln_1\.bias \[16\] is not part",
        ),
        (
            lambda t: t | {"score.weight": np.zeros((2, 16), np.float32)},
            r"score\.weight \[2, 16\] is not part",
        ),
        (
            lambda t: t | {"transformer.h.0.attn.c_attn.weight": np.zeros((48, 16), np.float32)},
            r"h\.0\.attn\.c_attn\.weight is \[48, 16\] \(expected \[16, 48\]\)",
        ),
        (
            lambda t: t | {"transformer.wte.weight": np.zeros((267, 16), np.float32)},
            r"\[267, 16\] \(expected \[268, 16\]",
        ),
        (
            lambda t: t | {"lm_head.weight": np.zeros((268, 16), np.float32)},
            "lm_head.weight .* differs from transformer.wte.weight",
        ),
        (
            lambda t: t | {"transformer.ln_f.bias": np.zeros(16)},
            "transformer.ln_f.bias in .* is F64",
        ),
        (
            lambda t: t | {"transformer.ln_f.bias": np.zeros(16, np.int8)},
            "transformer.ln_f.bias in .* is I8",
        ),
    ],
)
def test_a_wrong_tensor_raises_an_error(model, tmp_path, change, message):
    rewrite(model, change)
    with pytest.raises(ValueError, match=message):
        convert(model, tmp_path / "run")
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=True of config.json is not supported",
        ),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"activation_function": "gelu_10"}, "the activation 'gelu_10' of config.json.*gelu_new"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"model_type": "mamba"}, "model_type is 'mamba' in config.json; supported are bert, "),
        ({"n_head": 3}, "num_attention_heads=3"),
        ({"n_layer": "2"}, "n_layer='2' of config.json must be a whole number"),
        ({"n_embd": None}, r"ln_1.bias is \[16\] \(expected \[768\]\)"),
        ({"tie_word_embeddings": False}, r"lm_head.weight is missing \(expected \[268, 16\]\)"),
        ({"layer_norm_epsilon": 0}, "norm_epsilon=0"),
    ],
)
def test_an_unsupported_config_raises_an_error(model, tmp_path, changes, message):
    edit_json(model / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        convert(model, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "rmsnorm"}, "nearest is gpt2.*model.normalization=rmsnorm"),
        (
            {"activation": "swiglu", "add_bias": False},
            r"model\.activation=swiglu \(gpt2: silu\)",
        ),
        ({"num_query_groups": 2}, r"model\.num_query_groups=2 \(gpt2: 4\)"),
        ({"kv_channels": 6}, r"model\.kv_channels=6 \(gpt2: 4\)"),
        ({"qk_layernorm": "head"}, r"model\.qk_layernorm=head \(gpt2: none\)"),
        ({"position_embedding_type": "none"}, r"model\.position_embedding_type=none \(gpt2"),
    ],
)
def test_a_run_that_no_family_can_express_raises_an_error(changes, message):
    model = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=4, vocab_size=8)
    assert model_of(config_of(model) | {"n_ctx": 1}).hidden_size == 16
    with pytest.raises(ValueError, match=message):
        config_of(dataclasses.replace(model, **changes))


def test_older_spellings_of_a_config(model, tmp_path):
    names = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
    }
    config = json.loads((model / "config.json").read_text())
    edit_json(
        model / "config.json",
        n_inner=64,
        reorder_and_upcast_attn=True,
        **{new: config[old] for old, new in names.items()},
        **dict.fromkeys(names, "REMOVED"),
    )
    convert(model, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    assert json.loads((model / "config.json").read_text()) == json.loads(
        (tmp_path / "back/config.json").read_text()
    )


def tokenizer_json(folder, *, prefix_space=False, template=False, added=()) -> None:
    """Replace vocab.json and merges.txt of ``folder`` by one tokenizer.json."""
    merges = [
        tuple(line.split()) for line in (folder / "merges.txt").read_text().split("\n")[1:] if line
    ]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(json.loads((folder / "vocab.json").read_text()), merges)
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.add_special_tokens(["<|endoftext|>", *added])
    if template:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 267)]
        )
    made.save(os.fspath(folder / "tokenizer.json"))
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()


def test_tokenizer_json_alone_is_read(model, tmp_path):
    before = load_tokenizer(model)
    tokenizer_json(model, template=True)
    convert(model, tmp_path / "run")
    tokenizer = load_run(tmp_path / "run").tokenizer
    assert tokenizer.prompt_bos  # as in its template
    assert tokenizer.encode("In the wan thing 12 天") == before.encode("In the wan thing 12 天")
    convert(tmp_path / "run", tmp_path / "back")
    assert (model / "tokenizer.json").read_bytes() == (
        tmp_path / "back/tokenizer.json"
    ).read_bytes()


def test_added_tokens_keep_their_ids(tmp_path):
    model = Path(shutil.copytree(HERE / "fixtures/untied", tmp_path / "model"))
    tokenizer_json(model, added=["<pad>", "<mask>"])
    edit_json(model / "generation_config.json", pad_token_id=268, eos_token_id=[267, 5])
    assert "generation_config.json has it: eos_token_id=(267, 5)" in convert(
        model, tmp_path / "run"
    )
    run = load_run(tmp_path / "run")
    assert run.config.decode.eos_token_id == (267, 5)
    tokenizer = run.tokenizer
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.eos_id, tokenizer.vocab_size) == (
        268,
        269,
        267,
        270,
    )
    assert tokenizer.is_special[[267, 268, 269]].all()


def test_an_unsupported_tokenizer_raises_an_error(model, tmp_path):
    edit_json(model / "generation_config.json", bos_token_id=None)
    tokenizer_json(model, template=True)
    whole = json.loads((model / "tokenizer.json").read_text())
    whole["post_processor"]["single"][0]["SpecialToken"]["id"] = "a"
    whole["post_processor"]["special_tokens"] = {"a": {"id": "a", "ids": [64], "tokens": ["a"]}}
    (model / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(
        ValueError, match=r"puts the tokens \[64\] before each text; only bos \(267\)"
    ):
        convert(model, tmp_path / "run")
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json"):
        convert(model, tmp_path / "run")
    (model / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        convert(model, tmp_path / "run")
    convert(model, tmp_path / "run", tokenizer=HERE / "fixtures/tied")


# --- incomplete output


def test_a_failed_conversion_leaves_the_target_unchanged(converted, tmp_path, monkeypatch):
    source, run = converted
    target = tmp_path / "model"
    convert(run, target)
    with pytest.raises(ValueError, match="is not empty; give --overwrite"):
        convert(run, target)
    with monkeypatch.context() as patch:
        patch.setattr(
            huggingface,
            "write_shards",
            lambda *args: (_ for _ in ()).throw(OSError("the disk is full")),
        )
        with pytest.raises(OSError, match="the disk is full"):
            convert(run, target, overwrite=True)
    assert os.listdir(tmp_path) == ["model"] and same_tensors(source, target)
    convert(run, target, dtype="bfloat16", overwrite=True)
    assert os.listdir(tmp_path) == ["model"] and not same_tensors(source, target)
    for folder in (run, run / "inside", run.parent):
        with pytest.raises(ValueError, match="contains the other"):
            convert(run, folder, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").touch()
    with pytest.raises(ValueError, match="neither a run nor a model"):
        convert(run, tmp_path / "mine", overwrite=True)
    with pytest.raises(ValueError, match="neither checkpoints/"):
        convert(tmp_path / "mine", tmp_path / "other")


def test_damaged_files_raise_an_error(model, tmp_path):
    path = model / "model.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-3], whole[:5], b"", b"not a tensor" * 9):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors is damaged"):
            convert(model, tmp_path / "run")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        convert(model, tmp_path / "run")
    for index in ("[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}'):
        (model / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match="is not an index of shards"):
            convert(model, tmp_path / "run")
    (model / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        convert(model, tmp_path / "run")


def test_the_convert_script(tmp_path):
    def launch(*flags):
        return subprocess.run(
            [sys.executable, ROOT / "launch/convert.py", *flags],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.fspath(ROOT)},
        )

    done = launch(f"--from={HERE / 'fixtures/tied'}", f"--to={tmp_path / 'run'}")
    assert done.returncode == 0 and "11,648 parameters" in done.stdout, done.stderr
    assert from_json((tmp_path / "run/config.json").read_text()).model.vocab_size == 268
    refused = launch(f"--from={tmp_path / 'none'}", f"--to={tmp_path / 'run'}")
    assert (
        refused.returncode == 2
        and refused.stderr.startswith("error: ")
        and refused.stderr.count("\n") == 1
    )


# --- against transformers itself

READ = """
    import json, sys, torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder, prompts = sys.argv[1], json.loads(sys.argv[2])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # A model from elsewhere may have more rows than its tokenizer has tokens. transformers would
    # write them, unlike our decoding.
    beyond = list(range(len(tokenizer), model.config.vocab_size))
    never = model.generation_config.suppress_tokens or beyond or None
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        greedy = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": never}
        written = model.generate(**ids, **greedy)[0].tolist()
        logits = model(ids["input_ids"]).logits[0].tolist()
        print(json.dumps([written, tokenizer.decode(written, skip_special_tokens=True), logits]))
"""


@pytest.fixture(scope="module")
def transformers_python():
    """Return a Python with torch and transformers: this one, or TRANSFORMERS_PYTHON."""
    python = os.environ.get("TRANSFORMERS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip(
            "needs torch and transformers: pip install '.[benchmarks]', or set TRANSFORMERS_PYTHON"
        )
    return python


@pytest.mark.slow
def test_the_fixtures_equal_those_of_installed_transformers(transformers_python, tmp_path):
    subprocess.run(
        [transformers_python, HERE / "make_fixtures.py", tmp_path], check=True, capture_output=True
    )
    for variant in VARIANTS:
        old = HERE / "fixtures" / variant
        new = tmp_path / variant
        assert same_tensors(old, new)
        expected = np.load(old / "expected.npz")
        found = np.load(new / "expected.npz")
        assert expected.files == found.files
        for name in expected.files:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=2e-5, err_msg=name)
        greedy = [
            json.loads((folder / "expected.json").read_text())["greedy"] for folder in (old, new)
        ]
        assert greedy[0] == greedy[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own", *VARIANTS])
def test_transformers_reads_the_written_models(transformers_python, own, tmp_path, name):
    run_folder = own
    if name != "own":
        run_folder = tmp_path / "run"
        convert(HERE / "fixtures" / name, run_folder)
    convert(run_folder, tmp_path / "model", max_shard_size=2e-5)
    run = load_run(run_folder)
    prompts = ["The cat", "天地", " the dog sat,\n"]
    done = subprocess.run(
        [transformers_python, "-c", textwrap.dedent(READ), tmp_path / "model", json.dumps(prompts)],
        check=True,
        capture_output=True,
        text=True,
    )
    decoder = unstack(run.config.model, run.params, "float32")
    results = generate(decoder, run.tokenizer, prompts, DecodeConfig(max_new_tokens=12))
    graph = abstract_model(run.config.model)[0]
    for prompt, result, line in zip(prompts, results, done.stdout.strip().split("\n"), strict=True):
        written, text, logits = json.loads(line)
        ids = [run.tokenizer.bos_id] * run.tokenizer.prompt_bos + run.tokenizer.encode(prompt)
        end = [run.tokenizer.eos_id] * (result.finish_reason == "stop")
        assert written == [*ids, *result.tokens, *end]
        if "\ufffd" not in text + result.text:
            assert text == prompt + result.text
        np.testing.assert_allclose(
            nnx.merge(graph, run.params)(jnp.array([ids]))[0], logits, rtol=0, atol=1e-4
        )
