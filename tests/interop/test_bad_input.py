"""Damaged, incomplete and contradictory models: one line that names the value, and nothing
written."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mtnlg_jax.errors import BAD_INPUT, explain
from mtnlg_jax.interop.families import model_of
from mtnlg_jax.interop.generation import decode_of
from mtnlg_jax.interop.huggingface import convert
from mtnlg_jax.interop.shards import INDEX, write_shards
from mtnlg_jax.interop.vocabulary import read_tokenizer

HERE = Path(__file__).parent
TIED = HERE / "fixtures/tied"


def config_of(name: str) -> dict:
    return json.loads((HERE / "families" / name / "config.json").read_text())


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama3", {"num_hidden_layers": 2.5}, "num_hidden_layers=2.5 .* a whole number"),
        ("llama3", {"num_key_value_heads": "2"}, "num_key_value_heads='2' .* a whole number"),
        ("llama3", {"head_dim": [8]}, r"head_dim=\[8\] of config.json must be a whole number"),
        ("llama3", {"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6' .* a number; correct it"),
        ("llama3", {"tie_word_embeddings": "false"}, "tie_word_embeddings='false' .* true or"),
        ("llama3", {"hidden_act": ["silu"]}, r"hidden_act=\['silu'\] .* a string"),
        ("llama3", {"model_type": ["llama"]}, r"model_type=\['llama'\] .* a string"),
        ("llama3", {"rope_parameters": [1]}, r"rope_parameters=\[1\] of config.json .* an object"),
        ("llama3", {"rope_parameters": {"full_attention": 1}}, "full_attention=1 of rope_param"),
        (
            "llama3",
            {"rope_parameters": {"rope_type": "linear"}},
            "rope_scaling of config.json has the type linear and no factor",
        ),
        (
            "llama3",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "the type llama3 and no low_freq_factor, high_freq_factor",
        ),
        (
            "llama3",
            {"rope_parameters": {"rope_type": "ntk-magic", "factor": 8.0}},
            "rope_type 'ntk-magic' .* known are the types default, linear",
        ),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types .* 1 entries for num_hidden"),
        ("gemma3", {"layer_types": "full"}, "layer_types='full' of config.json must be a list"),
        ("gemma3", {"model_type": "gemma3", "text_config": [1]}, r"text_config=\[1\] .* an object"),
        ("gemma3", {"layer_types": None, "sliding_window_pattern": 0}, "ZeroDivisionError"),
    ],
)
def test_a_value_of_config_json_is_refused_by_name(family, changes, message):
    config = config_of(family)
    assert model_of(config)
    with pytest.raises(ValueError, match=message):
        model_of(config | changes)


def test_an_unknown_activation_of_falcon_is_refused():
    falcon = {"model_type": "falcon", "num_hidden_layers": 1, "hidden_size": 16}
    falcon |= {"num_attention_heads": 2, "vocab_size": 8}
    assert model_of(falcon).activation == "gelu_exact"
    with pytest.raises(ValueError, match="the activation 'tanhshrink' of config.json"):
        model_of(falcon | {"activation": "tanhshrink"})


# --- folders


def shards(folder: Path) -> list[Path]:
    """Split the tensors into several files; return them without the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_shards(folder, {name: t.nbytes for name, t in tensors.items()}, tensors.get, 2e-5)
    return sorted(folder.glob("model-*.safetensors"))


def edit_index(folder: Path, change) -> None:
    path = folder / INDEX
    placed = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": change(placed)}))


def a_shard_is_not_in_the_index(folder):
    last = shards(folder)[-1].name
    edit_index(folder, lambda placed: {k: file for k, file in placed.items() if file != last})


def a_tensor_is_not_in_the_index(folder):
    shards(folder)
    edit_index(folder, lambda placed: dict(sorted(placed.items())[1:]))


def a_shard_is_cut(folder):
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-10])


def no_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "x"}))
    text = (folder / "config.json").read_text().replace('"model_type"', '"kind"')
    (folder / "config.json").write_text(text)


def two_families(folder):
    tensors = load_file(folder / "model.safetensors")
    others = load_file(HERE / "families/gpt_neox/model.safetensors")
    save_file(tensors | others, folder / "model.safetensors", metadata={"format": "pt"})


FOLDERS = {
    "config.json is missing, so that nothing names the family of the model in model.safetensors": (
        lambda folder: (folder / "config.json").unlink()
    ),
    "config.json has no model_type": no_type,
    "config.json is not valid JSON": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
    "config.json holds a JSON list": lambda f: (f / "config.json").write_text("[1]"),
    "index.json names no tensor in model-00003-of-00003": a_shard_is_not_in_the_index,
    "index.json and its shards disagree: 0 .* 1 in the shards alone": a_tensor_is_not_in_the_index,
    "model-00002-of-00003.safetensors is missing, and": lambda folder: shards(folder)[1].unlink(),
    "model-00002-of-00003.safetensors is damaged": a_shard_is_cut,
    "a gpt2: embed_out.weight .* is not part of the model": two_families,
    "neither model.safetensors nor .* copy the whole folder": (
        lambda folder: (folder / "model.safetensors").unlink()
    ),
    "eos_token_id='x' must be ids of tokens; correct it there": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    ),
    "tokenizer_config.json is not valid JSON": (
        lambda folder: (folder / "tokenizer_config.json").write_text("{")
    ),
}


@pytest.mark.parametrize("message", FOLDERS)
def test_a_wrong_folder_is_refused_and_nothing_written(tmp_path, message):
    folder = Path(shutil.copytree(TIED, tmp_path / "model"))
    FOLDERS[message](folder)
    with pytest.raises((ValueError, OSError), match=message) as refused:
        convert(folder, tmp_path / "run")
    line, code = explain(refused.value)
    assert code == BAD_INPUT and "\n" not in line
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"do_sample": True, "temperature": -1}, "temperature=-1 is below 0"),
        ({"do_sample": True, "top_k": "5"}, "top_k='5' must be a number"),
        ({"num_beams": [4]}, r"num_beams=\[4\] must be a number"),
        ({"suppress_tokens": ["a"]}, r"suppress_tokens=\['a'\] must be ids of tokens"),
    ],
)
def test_settings_of_generation_of_the_wrong_type_are_named(generation, message):
    tokenizer = read_tokenizer(TIED, {"eos_token_id": 267}, {}, 268)[0]
    with pytest.raises(ValueError, match=f"generation_config.json cannot be .*{message}"):
        decode_of(generation, tokenizer, 268)


def test_tensors_of_a_wrong_shape_and_type_are_named_together(tmp_path):
    folder = Path(shutil.copytree(TIED, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:-1]
    tensors["transformer.h.0.extra.weight"] = np.zeros(2, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"extra.weight \[2\] is not .*wte.weight is \[267, 16\]"):
        convert(folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_shard_size": 0.0}, "--max_shard_size=0 GB holds no tensor; set it above 0"),
        ({"max_shard_size": -1.0}, "--max_shard_size=-1 GB holds no tensor"),
        ({"max_shard_size": float("nan")}, "--max_shard_size=nan GB holds no tensor"),
        (
            {"max_shard_size": 5.0},
            "--max_shard_size=5 is for a run .* becomes a run, so leave it out",
        ),
        ({"which": "best"}, "--checkpoint=best is for a run .* becomes a run, so leave it out"),
        ({"family": "llama"}, "--family=llama is for a run .* becomes a run, so leave it out"),
    ],
)
def test_arguments_without_a_use_on_the_way_to_a_run_are_refused(tmp_path, given, message):
    adapter = HERE / "adapters/llama"
    for source in (TIED, adapter):
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "run", **given)
    assert not os.listdir(tmp_path)


def test_arguments_without_a_use_on_the_way_from_a_run_are_refused(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for given, message in [
        ({"max_shard_size": 0.0}, "--max_shard_size=0 GB holds no tensor"),
        ({"max_shard_size": 5.0, "adapters": "keep"}, "--max_shard_size=5 .* becomes an adapter"),
        ({"tokenizer": "x"}, "--tokenizer=x is for a model without one; .* leave it out"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert(run, tmp_path / "model", **given)
    assert os.listdir(tmp_path) == ["run"]
