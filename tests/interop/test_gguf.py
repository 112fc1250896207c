"""GGUF files of llama.cpp: written here with the package gguf, as its converter writes them."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mtnlg_jax.config import load_config
from mtnlg_jax.decode.load import names_of
from mtnlg_jax.interop import registry
from mtnlg_jax.interop.families import FAMILIES, model_of
from mtnlg_jax.interop.gguf_file import _BLOCK, _OUTER, _SANDWICH, GGUF, llama_3_factors
from mtnlg_jax.interop.huggingface import convert, read_model
from mtnlg_jax.interop.interchange import Interchange
from mtnlg_jax.interop.source import Source
from mtnlg_jax.train.checkpoint import load_run

gguf = pytest.importorskip("gguf", reason="needs the extra gguf: pip install '.[gguf]'")
registry.register()
BASE = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"sliding_window": 8, "query_pre_attn_scalar": 64}
CONFIGS = {
    "llama": BASE | {"tie_word_embeddings": False},
    "qwen2": BASE | {"tie_word_embeddings": True},
    "qwen3": BASE | {"tie_word_embeddings": True},
    "gemma2": BASE | GEMMA | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "gemma3": BASE | GEMMA | {"rope_theta": 1e6, "model_type": "gemma3_text"},
}


def llama_cpp_name(name: str, gemma: bool) -> str:
    """Return the name that llama.cpp gives a tensor of Hugging Face's."""
    if not name.startswith("model.layers."):
        stem, _, end = name.rpartition(".")
        return f"{next(key for key, theirs in _OUTER.items() if theirs == stem)}.{end}"
    _, _, number, rest = name.split(".", 3)
    stem, _, end = rest.rpartition(".")
    names = _BLOCK | (_SANDWICH if gemma else {})
    return f"blk.{number}.{next(key for key, theirs in names.items() if theirs == stem)}.{end}"


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows as convert_hf_to_gguf.py does for Llama's queries and keys."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


class Model:
    """A random model, in Hugging Face's names and as the arrays of a GGUF file."""

    def __init__(self, architecture: str):
        self.architecture = architecture
        self.config = {"model_type": architecture} | CONFIGS[architecture]
        self.gemma = architecture.startswith("gemma")
        self.kind = self.config["model_type"]
        interchange = Interchange(model_of(self.config), FAMILIES[self.kind])
        rng = np.random.default_rng(0)
        self.tensors = {
            name: (rng.integers(-64, 65, entry.shape) / 64).astype(np.float32)
            for name, entry in interchange.table.items()
        }
        self.params = names_of(interchange.parameters(self.tensors.__getitem__))

    def arrays(self) -> dict[str, np.ndarray]:
        made = {}
        for name, values in self.tensors.items():
            if self.gemma and "norm.weight" in name:
                values = values + 1
            if self.architecture == "llama" and ".q_proj." in name:
                values = permute(values, self.config["num_attention_heads"])
            if self.architecture == "llama" and ".k_proj." in name:
                values = permute(values, self.config["num_key_value_heads"])
            made[llama_cpp_name(name, self.gemma)] = values
        return made

    def write(self, path: Path, kind=None, extra=None, **metadata) -> Path:
        """Write a file whose matrices are of ``kind``."""
        kind = gguf.GGMLQuantizationType.F32 if kind is None else kind
        writer = gguf.GGUFWriter(path, self.architecture)
        c = self.config
        writer.add_block_count(c["num_hidden_layers"])
        writer.add_context_length(c["max_position_embeddings"])
        writer.add_embedding_length(c["hidden_size"])
        writer.add_feed_forward_length(c["intermediate_size"])
        writer.add_head_count(c["num_attention_heads"])
        writer.add_head_count_kv(c["num_key_value_heads"])
        writer.add_key_length(c["head_dim"])
        writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
        writer.add_rope_freq_base(c["rope_theta"])
        writer.add_bos_token_id(c["bos_token_id"])
        writer.add_eos_token_id(c["eos_token_id"])
        if self.gemma:
            writer.add_sliding_window(c["sliding_window"])
        if self.architecture == "gemma2":
            writer.add_attn_logit_softcapping(c["attn_logit_softcapping"])
            writer.add_final_logit_softcapping(c["final_logit_softcapping"])
        for key, value in metadata.items():
            writer.add_uint32(key.replace("__", "."), value)
        for name, values in (self.arrays() | (extra or {})).items():
            if isinstance(values, tuple):
                writer.add_tensor(name, values[0], raw_dtype=values[1])
            elif values.ndim > 1 and kind != gguf.GGMLQuantizationType.F32:
                writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_is_read_as_it_was(tmp_path, architecture):
    made = Model(architecture)
    source = Source(made.write(tmp_path / "model.gguf"))
    assert source.model == model_of(made.config) and source.kind == made.kind
    params = names_of(source.interchange.parameters(source.tensor))
    for name, leaf in made.params.items():
        assert np.array_equal(params[name], leaf), name
    assert source.texts["bos_token_id"] == 1 and source.texts["eos_token_id"] == 2
    assert load_config(os.fspath(tmp_path / "model.gguf")).model == source.model


@pytest.mark.parametrize(
    ("kind", "error"), [("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 1e-2), ("Q4_0", 0.15)]
)
def test_formats_that_round_are_near(tmp_path, kind, error):
    made = Model("llama")
    path = made.write(tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind])
    source = Source(path)
    for name, leaf in names_of(source.interchange.parameters(source.tensor)).items():
        difference = np.abs(np.asarray(leaf) - np.asarray(made.params[name])).max()
        assert difference <= error, name
        assert difference > 0 or "scale" in name or kind in ("F16", "BF16")
    rows = np.concatenate([rows for _, rows in source.blocks("tokens_VD")])
    assert np.array_equal(rows, source.read("tokens_VD"))


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_blocks_of_256_are_those_of_gguf(tmp_path, kind):
    """gguf reads these formats and does not write them, so the bytes are random."""
    made = Model("qwen3")
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    rows = made.config["vocab_size"]
    blocks = rng.integers(0, 256, (rows, made.config["hidden_size"] // block, size), np.uint8)
    scales = np.full((*blocks.shape[:2], 1), 0.01, np.float16).view(np.uint8)
    starts = (208,) if kind.name == "Q6_K" else (0, 2)
    for start in starts:
        blocks[:, :, start : start + 2] = scales
    raw = blocks.reshape(rows, -1)
    path = made.write(tmp_path / "model.gguf", extra={"token_embd.weight": (raw, kind)})
    wanted = gguf.quants.dequantize(raw, kind)
    assert np.isfinite(wanted).all() and np.abs(wanted).max() > 0.05
    assert np.array_equal(Source(path).read("tokens_VD"), wanted)


def test_the_factors_of_llama_3_are_recognized(tmp_path):
    made = Model("llama")
    factors = llama_3_factors(64, 10000.0, 32.0, 8192)
    path = made.write(tmp_path / "model.gguf", extra={"rope_freqs.weight": factors})
    scaling = Source(path).model.rope_scaling
    assert (scaling.rope_type, scaling.factor) == ("llama3", 32.0)
    assert scaling.original_max_position_embeddings == 8192 and scaling.high_freq_factor == 4
    made.write(path, extra={"rope_freqs.weight": factors + 1})
    with pytest.raises(ValueError, match="rope_freqs.weight of .* are not those of Llama 3.1"):
        Source(path)


def test_a_file_is_converted_and_goes_to_a_folder(tmp_path):
    made = Model("gemma3")
    path = made.write(tmp_path / "model.gguf")
    with pytest.raises(FileNotFoundError, match="--tokenizer=FOLDER"):
        convert(path, tmp_path / "run")
    vocabulary = {letter: index for index, letter in enumerate("_\n .,abcdefghijklmnopqrstuvwxyz")}
    import tokenizers

    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="_"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    letters.decoder = tokenizers.decoders.Fuse()
    (tmp_path / "letters").mkdir()
    letters.save(os.fspath(tmp_path / "letters/tokenizer.json"))
    report = convert(path, tmp_path / "run", tokenizer=tmp_path / "letters")
    assert "from F32 to float32, exact" in report
    # A tokenizer may lie beside the file.
    shutil.copyfile(tmp_path / "letters/tokenizer.json", tmp_path / "tokenizer.json")
    here = load_run(path)
    there = load_run(tmp_path / "run")
    assert here.config.model == there.config.model
    same = jax.tree.map(np.array_equal, here.params, there.params)
    assert all(jax.tree.leaves(same))
    convert(tmp_path / "run", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == "gemma3_text"
    back = load_file(tmp_path / "back/model.safetensors")
    for name, values in made.tensors.items():
        np.testing.assert_allclose(back[name], values, rtol=0, atol=2e-7)
    assert read_model(tmp_path / "back")[0] == here.config.model


@pytest.mark.parametrize("cut", [0, 3, 20, 400, -100])
def test_a_truncated_file_is_refused(tmp_path, cut):
    path = Model("qwen2").write(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="model.gguf (is damaged or not|ends after)"):
        convert(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_not_supported_is_named(tmp_path):
    made = Model("qwen2")
    path = made.write(tmp_path / "model.gguf", split__count=3)
    with pytest.raises(ValueError, match="is one of 3 parts"):
        Source(path)
    made.write(path, extra={"blk.0.attn_sinks.weight": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match=r"blk.0.attn_sinks.weight \[4\] is not part of the model"):
        Source(path)
    made.architecture = "mamba"
    made.write(path)
    with pytest.raises(ValueError, match="architecture of .* is 'mamba'; supported are llama"):
        GGUF(path)
