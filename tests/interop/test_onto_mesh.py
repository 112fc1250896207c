"""Load models of Hugging Face's onto meshes: padding of the vocabulary, memory of the host."""

import dataclasses
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mtnlg_jax.config import load_config, to_json
from mtnlg_jax.data.tokenizer import files, hub, load_tokenizer, roles, tokenizer_for_data
from mtnlg_jax.data.tokenizer.files import parse_tokenizer
from mtnlg_jax.decode.load import load_decoder, names_of
from mtnlg_jax.interop import registry
from mtnlg_jax.interop.families import FAMILIES, model_of
from mtnlg_jax.interop.huggingface import convert
from mtnlg_jax.interop.interchange import Interchange
from mtnlg_jax.interop.recognize import is_model
from mtnlg_jax.interop.shards import Shards, write_shards
from mtnlg_jax.interop.source import Source
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train.checkpoint import Checkpoints, load_run
from mtnlg_jax.train.init_from import load_start

FAMILY_FOLDERS = Path(__file__).parent / "families"

registry.register()


@pytest.fixture
def folder(tmp_path):
    """Return a function that copies a fixture and adds a tokenizer of 31 letters."""
    import tokenizers

    def copy(name: str) -> Path:
        made = tmp_path / name
        made.mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(FAMILY_FOLDERS / name / file, made / file)
        letters = {letter: index for index, letter in enumerate("_\n .,abcdefghijklmnopqrstuvwxyz")}
        fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="_"))
        fast.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        fast.decoder = tokenizers.decoders.Fuse()
        fast.save(os.fspath(made / "tokenizer.json"))
        return made

    return copy


def _save(params, config, tokenizer, run: Path) -> None:
    """Make a run of parameters on a mesh, as training saves it."""
    with_meta = {"config": json.loads(to_json(config)), "samples": 0, "metrics": {}}
    checkpoints = Checkpoints(run / "checkpoints")
    checkpoints.save(0, {"params": params}, with_meta, wait=True)
    checkpoints.close()
    tokenizer.save(run / "tokenizer")


@pytest.mark.parametrize("tensor", [2, 3])
def test_a_padded_vocabulary_survives_the_round_trip(folder, tmp_path, tensor):
    source = folder("gpt_neox")  # 61 rows, a head of its own
    config = load_config(os.fspath(source), ["mesh.data=1", "train.init=" + os.fspath(source)])
    assert config.model.vocabulary == 61
    model = dataclasses.replace(config.model, vocab_size_divisible_by=1).padded(tensor)
    assert model.vocabulary == 62 + (tensor == 3)
    # Only the vocabulary is split three ways: other dims of the fixture are not divisible by 3.
    mesh = make_mesh(dataclasses.replace(config.mesh, tensor=2), jax.devices()[:2])
    start = dataclasses.replace(config, model=model)
    if tensor == 3:
        mesh = make_mesh(dataclasses.replace(config.mesh, data=3), jax.devices()[:3])
        start = dataclasses.replace(start, mesh=dataclasses.replace(start.mesh, zero=0))
    params = load_start(start, mesh)
    table = names_of(params)["tokens_VD"]
    assert table.shape[0] == model.vocabulary and not np.asarray(table[61:]).any()
    tokenizer = load_tokenizer(source)
    _save(params, start, tokenizer, tmp_path / "run")
    again = load_run(tmp_path / "run", vocab_padding=7)  # another mesh has another padding
    assert names_of(again.params)["head_VD"].shape[0] == 68
    convert(os.fspath(tmp_path / "run"), os.fspath(tmp_path / "back"))
    back = load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in load_file(source / "model.safetensors").items():
        assert back[name].astype(np.float32).tobytes() == tensor.astype(np.float32).tobytes(), name


def test_a_folder_on_a_mesh_is_padded_by_itself(folder):
    source = os.fspath(folder("gptj"))
    model = load_config(source, ["mesh.tensor=2"]).model
    assert model.vocab_size == 61 and model.vocab_padding == 67  # to 128
    assert load_config(source, ["mesh.tensor=2", "model.vocab_padding=1"]).model.vocab_padding == 1
    assert load_config(source).model.vocab_padding == 0


def test_a_model_is_known_by_its_config_and_its_weights(folder):
    source = folder("gptj")
    for name in ("", "config.json", "model.safetensors"):
        assert is_model(source / name), name
        assert load_config(os.fspath(source / name)).name == "gptj"
    assert not is_model(source / "tokenizer.json")


def test_data_for_a_model_without_rows_for_roles_gets_its_own_tokenizer(folder):
    source = folder("gptj")
    assert load_tokenizer(source).vocab_size == 36  # with five roles
    assert tokenizer_for_data(source).vocab_size == 36
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": 33}
    (source / "config.json").write_text(json.dumps(config))
    assert tokenizer_for_data(source).vocab_size == 31
    assert tokenizer_for_data(source / "tokenizer.json").vocab_size == 36


def test_the_host_holds_one_layer_of_a_model_of_many_shards(folder):
    source = folder("llama3")
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": 24, "hidden_size": 128, "intermediate_size": 512}
    config |= {"vocab_size": 20_000}
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").unlink()
    model = model_of(config)
    table = Interchange(model, FAMILIES["llama"]).table
    sizes = {name: 4 * int(np.prod(entry.shape)) for name, entry in table.items()}
    random = np.random.default_rng(0)
    made: dict = {}

    def make(name):
        made[name] = random.standard_normal(table[name].shape, np.float32)
        return made[name]

    assert len(write_shards(source, sizes, make, max_shard_size=0.001)) > 10
    config = load_config(os.fspath(source), ["mesh.data=2", "mesh.tensor=2"])
    mesh = make_mesh(config.mesh, jax.devices()[:4])
    load_run(source, mesh=mesh, zero=3)  # imports and compiles
    tracemalloc.start()
    run = load_run(source, mesh=mesh, zero=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    arrays = names_of(run.params)
    stacked = arrays["blocks.mlp.w_in_DF"]
    piece = 4 * 128 * 4096  # rows of the table that are read at once
    # Read, made contiguous, and sent: some copies of a piece. A stacked parameter is 24 layers.
    assert peak < 6 * piece < min(stacked.nbytes, arrays["tokens_VD"].nbytes) * 3, peak
    name = "model.layers.20.mlp.up_proj.weight"
    assert np.array_equal(np.asarray(stacked[20]).T, made[name])
    assert np.array_equal(np.asarray(arrays["tokens_VD"]), made["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["gpt_neox", "llama3", "gemma3"])
def test_a_folder_is_read_from_its_start_to_its_end(folder, monkeypatch, name):
    source = folder(name)
    read = []
    part = Shards._part

    def record(self, tensor, start, last):
        read.append((*self.position(tensor), start))
        return part(self, tensor, start, last)

    monkeypatch.setattr(Shards, "_part", record)
    load_run(source)
    assert len(read) > 10 and read == sorted(set(read))
    read.clear()
    load_decoder(source, dtype="bfloat16")
    assert len(read) > 10 and read == sorted(set(read))


def test_a_tokenizer_is_parsed_once(folder, monkeypatch):
    source = folder("gptj")
    parsed = []

    def record(content):
        parsed.append(content)
        return parse_tokenizer(content)

    for module in (files, hub, roles):
        monkeypatch.setattr(module, "parse_tokenizer", record)
    assert Source(source).settings().tokenizer.encode("a cat")
    assert len(parsed) == 1
