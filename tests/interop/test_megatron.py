"""Checkpoints of Megatron-LM: written by megatron-core, which also computed the logits.

`make_megatron.py` makes the fixtures of tests/interop/megatron. The slow test makes them anew:
MEGATRON_PYTHON=PYTHON pytest --slow tests/interop/test_megatron.py, with a Python that has
megatron-core and torch. Nothing else here needs either.
"""

import argparse
import collections
import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from mtnlg_jax.config import LayerSpec, load_config
from mtnlg_jax.data.tokenizer import load_tokenizer
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.interop import megatron_ranks, registry, torch_file
from mtnlg_jax.interop.huggingface import convert
from mtnlg_jax.interop.megatron_file import Megatron
from mtnlg_jax.interop.megatron_settings import family_of, model_of, renamed
from mtnlg_jax.interop.source import Source
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.train.checkpoint import load_run

HERE = Path(__file__).parent
FIXTURES = HERE / "megatron"
CASES = ("dist", "ranks", "chunks", "experts", "singles", "expert_ranks", "balanced")
VOCABULARY = 59
LOGITS = 1e-4
registry.register()


def logits(source: Source, tokens: np.ndarray, changed=None) -> np.ndarray:
    graph, _ = abstract_model(source.model)
    params = source.interchange.parameters(changed or source.tensor)
    return np.asarray(_logits(graph, params, jnp.asarray(tokens.astype(np.int32))))


@jax.jit(static_argnums=0)
def _logits(graph, params, tokens):
    return nnx.merge(graph, params)(tokens)


@pytest.fixture
def copied(tmp_path):
    """Return a function that copies a fixture, so that a test can damage it."""
    return lambda case: Path(shutil.copytree(FIXTURES / case, tmp_path / case))


@pytest.fixture
def words(tmp_path):
    """Write a WordPiece tokenizer of VOCABULARY tokens."""
    folder = tmp_path / "words"
    folder.mkdir()
    letters = [chr(97 + number) for number in range(26)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    folder.joinpath("vocab.txt").write_text("\n".join([*pieces, "0", "1"]) + "\n")
    folder.joinpath("tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    return folder


def save(path: Path, state: object) -> None:
    """Write what torch.save writes, arrays as tensors, without torch."""
    arrays: list[np.ndarray] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if not isinstance(value, _Storage):
                return None
            arrays.append(value.array)
            kind = getattr(fake, f"{_KINDS[value.array.dtype.name]}Storage")
            return ("storage", kind, str(len(arrays) - 1), "cpu", value.array.size)

        def reducer_override(self, value):
            if not isinstance(value, np.ndarray):
                return NotImplemented
            array = np.ascontiguousarray(value)
            strides = tuple(stride // array.itemsize for stride in array.strides)
            hooks: dict = collections.OrderedDict()
            made = (_Storage(array.reshape(-1)), 0, array.shape, strides, False, hooks)
            return _rebuild_tensor_v2, made

    fake = types.ModuleType("torch")
    utils = types.ModuleType("torch._utils")

    def _rebuild_tensor_v2(*arguments):
        raise AssertionError("only its name is pickled")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    setattr(utils, "_rebuild_tensor_v2", _rebuild_tensor_v2)  # noqa: B010
    for kind in _KINDS.values():
        setattr(fake, f"{kind}Storage", type(f"{kind}Storage", (), {"__module__": "torch"}))
    buffer = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", fake)
        patch.setitem(sys.modules, "torch._utils", utils)
        Pickler(buffer, 2).dump(state)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        archive.writestr("archive/byteorder", "little")
        for number, array in enumerate(arrays):
            archive.writestr(f"archive/data/{number}", array.tobytes())


class _Storage:
    def __init__(self, array):
        self.array = array


_KINDS = {"float32": "Float", "bfloat16": "BFloat16", "int64": "Long"}


def args_of(case: str) -> dict:
    return dict(Megatron(FIXTURES / case).args)


# --- equality


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_megatron_core(case):
    expected = np.load(FIXTURES / f"{case}.npz")
    source = Source(FIXTURES / case)
    assert source.model.vocab_size == VOCABULARY  # of 64 rows
    computed = logits(source, expected["tokens"])
    np.testing.assert_allclose(computed, expected["logits"], atol=LOGITS)


def planted(case: str, name: str, change) -> float:
    """Return by how much the logits move if the tensor ``name`` were read otherwise."""
    expected = np.load(FIXTURES / f"{case}.npz")
    source = Source(FIXTURES / case)

    def read(other):
        return change(source.tensor(other)) if name in other else source.tensor(other)

    return np.abs(logits(source, expected["tokens"], read) - expected["logits"]).max()


def test_parts_that_are_joined_otherwise_move_the_logits():
    """Two mistakes of other readers: gate and up joined over parts as one, and queries first."""

    def as_one(rows):  # of two parts
        return rows.reshape(2, 2, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)

    assert planted("chunks", "linear_fc1.weight", as_one) > 1e-2
    by_kind = np.r_[0:12, 24:36, 12:18, 36:42, 18:24, 42:48]
    assert planted("chunks", "linear_qkv.weight", lambda rows: rows[by_kind]) > 1e-2


def test_the_bias_that_chooses_experts_moves_the_logits():
    assert planted("balanced", "expert_bias", np.zeros_like) > 1e-2
    # It is no part of the weights: moved alike for all experts, it chooses the same ones.
    assert planted("balanced", "expert_bias", lambda bias: bias + np.float32(0.25)) < LOGITS


def test_the_bias_that_chooses_experts_is_read_from_expert_parts(copied):
    folder = copied("expert_ranks")
    biases = np.arange(8, dtype=np.float32).reshape(2, 4)
    for path in folder.glob("iter_*/mp_rank_*/*.pt"):
        state = _arrays(torch_file.load(path))
        state["args"].moe_router_enable_expert_bias = True
        state["args"].moe_router_score_function = "sigmoid"
        for layer, bias in enumerate(biases):
            # Every rank has the biases of all experts.
            state["model"][f"decoder.layers.{layer}.mlp.router.expert_bias"] = bias
        save(path, state)
    source = Source(folder)
    for layer, bias in enumerate(biases):
        np.testing.assert_array_equal(source.read("blocks.mlp.b_balance_E", layer), bias)


def test_the_layout_of_the_writer_does_not_matter():
    """Chunks in turn over stages: every layer is at its place, none is there twice."""
    stored = Megatron(FIXTURES / "chunks").stored
    layers = [name for name in stored.shapes if name.endswith("input_layernorm.weight")]
    assert layers == [f"decoder.layers.{number}.input_layernorm.weight" for number in range(4)]
    values = [stored[name].tobytes() for name in layers]
    assert len(set(values)) == 4 and set(stored.dtypes.values()) == {"bfloat16"}


@pytest.mark.parametrize("version", [0, 1])
def test_earlier_orders_of_queries_keys_and_values_are_turned(version, copied):
    """Version 0 has the three outermost, 1 innermost (fix_query_key_value_ordering)."""
    folder = copied("ranks")
    expected = Source(folder).tensor("decoder.layers.0.self_attention.linear_qkv.weight")
    for path in folder.glob("iter_*/mp_rank_*/*.pt"):
        state = _arrays(torch_file.load(path))
        state["checkpoint_version"] = version
        for name, array in state["model"].items():
            if "linear_qkv" in name and array is not None:
                grouped = array.reshape(2, 3, 4, -1)  # heads of a part, kinds, width
                order = (1, 0, 2, 3) if version == 0 else (0, 2, 1, 3)
                state["model"][name] = grouped.transpose(order).reshape(array.shape)
        save(path, state)
    found = Source(folder).tensor("decoder.layers.0.self_attention.linear_qkv.weight")
    np.testing.assert_array_equal(found, expected)


def _arrays(value):
    if isinstance(value, torch_file.Tensor):
        array = np.array(value.numpy())  # the file is written again
        return array.astype(np.int64) if array.dtype == np.uint8 else array
    if isinstance(value, dict):
        return {key: _arrays(each) for key, each in value.items() if key not in ("rng_state",)}
    if isinstance(value, torch_file.Inert) or isinstance(value, type):
        return None
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**_arrays(vars(value)))
    return value


def test_the_names_of_older_models_and_of_transformer_engine_are_read():
    for theirs, ours in {
        "language_model.encoder.layers.3.self_attention.query_key_value.bias": (
            "decoder.layers.3.self_attention.linear_qkv.bias"
        ),
        "language_model.transformer.layers.0.attention.dense.weight": (
            "decoder.layers.0.self_attention.linear_proj.weight"
        ),
        "language_model.encoder.layers.1.post_attention_layernorm.weight": (
            "decoder.layers.1.pre_mlp_layernorm.weight"
        ),
        "language_model.encoder.final_norm.weight": "decoder.final_layernorm.weight",
        "language_model.embedding.position_embeddings.weight": (
            "embedding.position_embeddings.weight"
        ),
        "word_embeddings_for_head.weight": "output_layer.weight",
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": (
            "decoder.layers.0.input_layernorm.weight"
        ),
        "module.decoder.layers.0.mlp.experts.linear_fc1.weight12": (
            "decoder.layers.0.mlp.experts.local_experts.12.linear_fc1.weight"
        ),
    }.items():
        assert renamed(theirs) == ours


def test_a_model_before_megatron_core_is_read(copied):
    folder = copied("ranks")
    expected = Source(folder).interchange.shapes
    there = {
        "decoder.": "encoder.",
        "self_attention.linear_qkv": "self_attention.query_key_value",
        "self_attention.linear_proj": "self_attention.dense",
        "linear_fc1": "dense_h_to_4h",
        "linear_fc2": "dense_4h_to_h",
        "pre_mlp_layernorm": "post_attention_layernorm",
    }
    for path in folder.glob("iter_*/mp_rank_*/*.pt"):
        state = _arrays(torch_file.load(path))
        model: dict = {"language_model": {"encoder": {}, "embedding": {}}}
        inside = model["language_model"]
        for name, array in state["model"].items():
            for ours, theirs in there.items():
                name = name.replace(ours, theirs)
            if name.startswith("encoder."):
                inside["encoder"][name.removeprefix("encoder.")] = array
            elif name.startswith("embedding."):
                stem = name.split(".")[1]
                inside["embedding"][stem] = {"weight": array}
            elif array is not None:
                model["word_embeddings_for_head"] = {"weight": array}
        state["model"] = model
        save(path, state)
    tokens = np.load(FIXTURES / "ranks.npz")
    source = Source(folder)
    assert source.interchange.shapes == expected
    np.testing.assert_allclose(logits(source, tokens["tokens"]), tokens["logits"], atol=LOGITS)


def test_grouped_products_of_experts_are_taken_apart():
    rng = np.random.default_rng(0)
    experts = rng.normal(size=(3, 5, 8)).astype(np.float32)  # outputs 5, inputs 8

    class Tensor:
        shape = (8, 15)
        dtype = experts.dtype

        def numpy(self):
            return experts.swapaxes(1, 2).reshape(8, 15)

    one = megatron_ranks._OfGroup(Tensor(), 3, 2, 8, "1")
    assert one.shape == (5, 8)
    np.testing.assert_array_equal(one.numpy(), experts[2])


# --- through the product


def test_convert_writes_a_run_and_cuts_the_padding(tmp_path, words):
    report = convert(str(FIXTURES / "ranks"), str(tmp_path / "run"), tokenizer=str(words))
    assert "59 rows for 59 tokens" in report and "optimizer" in report
    run = load_run(tmp_path / "run")
    assert run.config.model == Source(FIXTURES / "ranks").model and run.step == 0
    expected = np.load(FIXTURES / "ranks.npz")
    graph, _ = abstract_model(run.config.model)
    computed = _logits(graph, run.params, jnp.asarray(expected["tokens"].astype(np.int32)))
    np.testing.assert_allclose(computed, expected["logits"], atol=LOGITS)
    assert load_tokenizer(tmp_path / "run/tokenizer").vocab_size == 59
    convert(str(tmp_path / "run"), str(tmp_path / "back"))
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == "gpt2"


def test_a_checkpoint_takes_the_place_of_a_run(copied, words):
    folder = copied("ranks")
    for path in words.iterdir():
        shutil.copy(path, folder)
    assert load_config(str(folder)).model == Source(folder).model
    run, decoder = load_decoder(str(folder))
    assert run.tokenizer.vocab_size == 59 and decoder is not None
    one = folder / "iter_0000007"
    assert load_config(str(one)).model.num_layers == run.config.model.num_layers


def test_the_files_of_the_args_are_the_tokenizer(tmp_path, copied):
    folder = copied("dist")
    tied = HERE / "fixtures/tied"
    model = Megatron(folder)
    model.args |= {
        "vocab_file": str(tied / "vocab.json"),
        "merge_file": str(tied / "merges.txt"),
    }
    found, left_out = model.tokenizer({}, {}, 1000)
    assert not left_out
    assert found.encode("a b") == load_tokenizer(tied).encode("a b")


# --- args


def changed(case: str, **changes) -> dict:
    return args_of(case) | changes


def test_args_become_fields():
    def read(case="dist", rows=59, **changes):
        return model_of(changed(case, **changes), "CKPT", rows)

    assert read().num_query_groups == 2 and read().rope_scaling.rope_type == "llama3"
    assert read(group_query_attention=False).num_query_groups is None
    assert read("ranks").activation == "gelu"
    assert read("ranks", bias_gelu_fusion=False).activation == "gelu_exact"
    assert read("ranks", squared_relu=True).activation == "squared_relu"
    assert read("ranks", hidden_dropout=0.1).dropout_rate == 0.1
    assert read("ranks", position_embedding_type="none").position_embedding_type == "none"
    assert read("ranks", use_rotary_position_embeddings=True).rotary_base == 10000
    assert read("chunks").bias == ("qkv",)
    assert read(softmax_type="learnable").attention_sink
    assert read(use_rope_scaling=False, rotary_seq_len_interpolation_factor=4).rope_scaling == (
        dataclasses.replace(read().rope_scaling.__class__(), rope_type="linear", factor=4.0)
    )
    oai = read(
        swiglu=False, quick_geglu=True, glu_linear_offset=1.0, activation_func_clamp_value=7.0
    )
    assert oai.activation == "swiglu_oai"
    windows = read(window_size=(7, 0), window_attn_skip_freq=3).layer_pattern
    assert windows == (LayerSpec(window=8), LayerSpec(window=8), LayerSpec())
    bare = read(no_rope_freq=[0, 1, 0]).layer_pattern
    assert [spec.rotary for spec in bare] == [True, False]  # and True again
    # Of data, and of experts that the model does not have.
    same = {"reset_attention_mask": True, "create_attention_mask_in_dataloader": True}
    assert read(**same, moe_layer_freq=2, moe_router_num_groups=8) == read()
    assert read("experts", moe_layer_freq=[1, 1]) == read("experts")
    moe = read("experts", moe_router_score_function="sigmoid").moe
    assert moe.moe_router_norm and moe.moe_router_pre_softmax
    moe = read("balanced").moe
    assert moe.moe_router_enable_expert_bias and moe.moe_router_bias_update_rate == 2e-3
    assert read("balanced", num_experts=None).moe == read().moe


def test_scales_that_are_stored_less_1_are_undone():
    plain = changed("dist", apply_layernorm_1p=False)
    less = changed("dist", apply_layernorm_1p=True)
    model = model_of(less, "CKPT", 59)
    for name, tensor in family_of(less, model).block.items():
        assert tensor.plus_one == ("norm" in name and name.endswith("weight")), name
    assert not any(each.plus_one for each in family_of(plain, model).block.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"multi_latent_attention": True}, "multi_latent_attention=True"),
        ({"qk_l2_norm": True}, "qk_l2_norm=True"),
        ({"num_experts": 4, "moe_layer_freq": [0, 1, 1]}, "moe_layer_freq"),
        (
            {"num_experts": 4, "moe_router_enable_expert_bias": True},
            "enable_expert_bias=True .* moe_router_score_function=sigmoid alone",
        ),
        ({"use_mup": True}, "use_mup=True"),
        ({"apply_residual_connection_post_layernorm": True}, "post_layernorm=True"),
        ({"position_embedding_type": "mrope"}, "position_embedding_type='mrope'"),
        ({"normalization": "DyT"}, "normalization='DyT'"),
        ({"window_size": (7, 3)}, "window_size"),
        ({"attention_temperature_tuning": 0.1}, "attention_temperature_tuning=0.1"),
        ({"activation_func_clamp_value": 7.0}, "activation_func_clamp_value"),
        ({"num_layers": None, "encoder_num_layers": None}, "num_layers=None"),
        ({"softmax_type": "off-by-one"}, "off-by-one"),
        ({"use_parallel_residual": True}, "use_parallel_residual=True"),
    ],
)
def test_args_that_change_the_function_are_refused_by_name(change, said):
    with pytest.raises(ValueError, match=said):
        model_of(changed("dist", **change), "CKPT", 59)


# --- bad input


def raised(folder, kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        Source(folder)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_damaged_folders_are_named(copied):
    folder = copied("ranks")
    inside = folder / "iter_0000007"
    (folder / "latest_checkpointed_iteration.txt").write_text("9000")
    assert "iter_0009000 is missing" in raised(folder, FileNotFoundError)
    (folder / "latest_checkpointed_iteration.txt").write_text("soon")
    assert "'soon'" in raised(folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("release\n")
    inside.rename(folder / "release")
    assert Megatron(folder).iteration == folder / "release"
    (folder / "release").rename(inside)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    shutil.move(inside / "mp_rank_01_001", folder / "kept")
    assert "mp_rank_01_001 is missing (1 of 4" in raised(folder, FileNotFoundError)
    shutil.move(folder / "kept", inside / "mp_rank_01_001")
    shutil.copytree(inside / "mp_rank_00_000", inside / "mp_rank_02_000")
    assert "mp_rank_02_000 belongs to another layout" in raised(folder)
    shutil.rmtree(inside / "mp_rank_02_000")
    file = inside / "mp_rank_01_000/model_optim_rng.pt"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert "mp_rank_01_000/model_optim_rng.pt is cut off" in raised(folder)
    file.write_bytes(b"")
    assert "ends after 0" in raised(folder)
    other = FIXTURES / "chunks/iter_0000007/mp_rank_01_000/model_optim_rng.pt"
    shutil.copy(other, file)
    assert "virtual_pipeline_model_parallel_size" in raised(folder)
    file.unlink()
    assert "model_optim_rng.pt is missing" in raised(folder, FileNotFoundError)


def test_damaged_distributed_folders_are_named(copied, tmp_path):
    folder = copied("dist")
    inside = folder / "iter_0000007"
    file = sorted(inside.glob("*.distcp"))[0]
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert f"{file.name} ends after" in raised(folder)
    file.unlink()
    assert f"{file.name} is missing" in raised(folder, FileNotFoundError)
    file.write_bytes(content)
    metadata = (inside / ".metadata").read_bytes()
    (inside / ".metadata").write_bytes(metadata[:200])
    assert ".metadata is damaged" in raised(folder)
    (inside / ".metadata").unlink()
    assert ".metadata is missing" in raised(folder, FileNotFoundError)
    (inside / ".metadata").write_bytes(metadata)
    about = (inside / "metadata.json").read_text()
    (inside / "metadata.json").write_text(about.replace("torch_dist", "zarr"))
    assert "the format is zarr" in raised(folder)
    (inside / "metadata.json").write_text(about)
    state = _arrays(torch_file.load(inside / "common.pt"))
    del state["args"]
    save(inside / "common.pt", state)
    assert "holds no args" in raised(folder)


def test_tensors_that_the_args_do_not_have_are_refused(copied):
    folder = copied("dist")
    path = folder / "iter_0000007/common.pt"
    state = _arrays(torch_file.load(path))
    state["args"].qk_layernorm = False
    save(path, state)
    assert "q_layernorm.weight [4] is not part of the model" in raised(folder)
    state["args"].qk_layernorm = True
    state["args"].add_qkv_bias = True
    save(path, state)
    assert "linear_qkv.bias is missing" in raised(folder)


class Planted:
    def __reduce__(self):
        return os.system, ("touch planted",)


def test_a_file_that_asks_to_run_code_is_refused(copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = copied("ranks")
    path = folder / "iter_0000007/mp_rank_00_000/model_optim_rng.pt"
    save(path, {"args": Planted(), "model": {}})
    line = raised(folder)
    assert "asks to run posix.system" in line and "model_optim_rng.pt" in line
    for name in ("eval", "exec", "__import__", "getattr"):
        data = f'cbuiltins\n{name}\n(S\'open("planted", "w")\'\ntR.'.encode()
        if name == "getattr":  # named by enums; never called
            assert isinstance(torch_file.unpickle(data, "FILE"), torch_file.Inert)
            continue
        with pytest.raises(ValueError, match=f"asks to run builtins.{name}"):
            torch_file.unpickle(data, "FILE")
    assert not (tmp_path / "planted").exists()
    # Setting attributes of the functions that rebuild tensors, too.
    with pytest.raises(ValueError, match="it would set x"):
        torch_file.unpickle(b"ctorch._utils\n_rebuild_parameter\n(N}S'x'\nI1\nstb.", "FILE")


def test_a_checkpoint_without_tokenizer_says_how_to_give_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="gpt2-vocab.json.*give --tokenizer=FOLDER"):
        convert(str(FIXTURES / "ranks"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# --- torch.save


def test_tensors_of_torch_are_read_as_they_are(tmp_path):
    values = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.arange(5).astype(ml_dtypes.bfloat16),
        "c": {"d": np.array([2**40])},
        "empty": np.zeros((0, 4), np.float32),
    }
    save(tmp_path / "a.pt", values)
    found = torch_file.load(tmp_path / "a.pt")
    np.testing.assert_array_equal(found["a"].numpy(), values["a"])
    assert found["b"].numpy().dtype == ml_dtypes.bfloat16
    assert found["c"]["d"].numpy()[0] == 2**40 and found["empty"].numpy().shape == (0, 4)
    storage = torch_file.Tensor(found["a"]._storage, 4, (2, 3), (1, 2))
    np.testing.assert_array_equal(storage.numpy(), [[4, 6, 8], [5, 7, 9]])
    beyond = torch_file.Tensor(found["a"]._storage, 4, (3, 4), (4, 1))
    with pytest.raises(ValueError, match="beyond its storage"):
        beyond.numpy()
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="not a zip file"):
        torch_file.load(tmp_path / "text.pt")


# --- megatron-core


@pytest.mark.slow
def test_the_fixtures_are_made_again_and_are_read(tmp_path):
    """Needs MEGATRON_PYTHON, a Python with megatron-core and torch."""
    python = os.environ.get("MEGATRON_PYTHON")
    if python is None:
        pytest.skip("needs MEGATRON_PYTHON, a Python that has megatron-core and torch")
    subprocess.run(
        [python, HERE / "make_megatron.py", tmp_path], check=True, capture_output=True, text=True
    )
    for case in CASES:
        expected = np.load(tmp_path / f"{case}.npz")
        computed = logits(Source(tmp_path / case), expected["tokens"])
        np.testing.assert_allclose(computed, expected["logits"], atol=LOGITS)
        np.testing.assert_allclose(
            expected["logits"], np.load(FIXTURES / f"{case}.npz")["logits"], atol=LOGITS
        )
