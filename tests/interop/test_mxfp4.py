"""Experts in MXFP4 against transformers' own unpacking and logits; make_mxfp4.py writes them."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mtnlg_jax.interop.export import config_of
from mtnlg_jax.interop.source import Source
from mtnlg_jax.model.transformer import abstract_model

FOLDER = Path(__file__).parent / "mxfp4"


@pytest.fixture(scope="module")
def source():
    return Source(FOLDER)


def expected():
    return dict(np.load(FOLDER / "expected.npz"))


def test_tensors_and_logits_equal_transformers(source):
    wanted = expected()
    seen = 0
    for name, values in wanted.items():
        if name.endswith("proj"):
            found = source.tensor(name.replace("model.layers.0.", "model.layers.0."))
            np.testing.assert_array_equal(np.float32(found), values)
            assert source.dtypes[name] == "bfloat16"
            seen += 1
    assert seen == 2
    model = nnx.merge(abstract_model(source.model)[0], source.interchange.parameters(source.tensor))
    np.testing.assert_allclose(model(jnp.asarray(wanted["tokens"])), wanted["logits"], atol=1e-4)


def test_rows_of_a_tensor_are_those_of_its_experts(source):
    name = "model.layers.0.mlp.experts.down_proj"
    whole = source.stored[name]
    assert whole.shape == source.stored.shapes[name]
    np.testing.assert_array_equal(source.stored.rows(name, 1, 9), whole[1:])


def test_a_config_that_is_written_back_says_nothing_of_quantization(source):
    assert "quantization_config" in source.original
    assert "quantization_config" not in config_of(source.model, source.original)


def changed(tmp_path, change):
    shutil.copytree(FOLDER, tmp_path / "model")
    tensors = load_file(FOLDER / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


DOWN = "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(DOWN + "_scales"), "down_proj_scales is missing; copy all shards"),
        (lambda t: t.pop(DOWN + "_blocks"), "down_proj_blocks is missing; copy all shards"),
        (
            lambda t: t.update({DOWN + "_scales": t[DOWN + "_scales"][:2]}),
            r"down_proj has MXFP4 blocks of \[3, 32, 2, 16\] and scales of \[2, 32, 2\]",
        ),
        (
            lambda t: t.update({"lm_head.weight": np.zeros((40, 32), np.uint8)}),
            "lm_head.weight in .* is U8",
        ),
    ],
)
def test_halves_that_do_not_fit_are_named(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        Source(changed(tmp_path, change))


def test_a_scale_that_is_not_a_number_is_refused(tmp_path):
    def change(tensors):
        tensors[DOWN + "_scales"][1, 2, 0] = 255

    with pytest.raises(ValueError, match="down_proj of .* has 32 values that are not finite"):
        Source(changed(tmp_path, change)).tensor(DOWN)


def test_other_quantized_models_are_refused(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantization_config=.*gptq"):
        Source(tmp_path / "model")
