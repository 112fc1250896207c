"""Runs and models from which another one may start (train.init)."""

import dataclasses

import pytest

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.train import init_from

MODEL = ModelConfig(
    num_layers=1,
    hidden_size=32,
    num_attention_heads=4,
    vocab_size=128,
    max_position_embeddings=16,
)
# Where None stands for a value: that value, and another one.
DERIVED = {
    "num_query_groups": (4, 2),
    "kv_channels": (8, 16),
    "ffn_hidden_size": (128, 64),
    "bias": (("qkv", "out", "mlp", "norm"), ("qkv",)),
}
# Where None is off.
OFF = {
    "attn_logit_softcapping": 30.0,
    "final_logit_softcapping": 30.0,
    "mup_base_hidden_size": 16,
    "mup_base_kv_channels": 4,
}


def refuse(theirs, ours):
    init_from._refuse_other_model("--init=other", theirs, ours)


def test_every_setting_without_a_default_is_known():
    optional = {each.name for each in dataclasses.fields(ModelConfig) if each.default is None}
    assert optional == DERIVED.keys() | OFF.keys() | {"vocab_size"}
    assert optional - OFF.keys() == set(init_from._DERIVED)


@pytest.mark.parametrize("key", DERIVED)
def test_a_derived_setting_may_be_written_out(key):
    same, other = (dataclasses.replace(MODEL, **{key: value}) for value in DERIVED[key])
    refuse(MODEL, same)
    refuse(same, MODEL)
    with pytest.raises(ValueError, match="parameter .* there and .* in this config; give "):
        refuse(other, MODEL)


@pytest.mark.parametrize("key", OFF)
def test_a_setting_that_is_off_is_not_one_that_is_on(key):
    on = dataclasses.replace(MODEL, **{key: OFF[key]})
    refuse(on, on)
    for theirs, ours in ((on, MODEL), (MODEL, on)):
        values = [getattr(each, key) for each in (theirs, ours)]
        words = f"model.{key} is {values[0]} there and {values[1]} in this config"
        with pytest.raises(ValueError, match=f"{words}.*give --set=model.{key}={values[0]}$"):
            refuse(theirs, ours)
