"""Check DecodeConfig: accepted values, JSON, and the arrays of batched settings."""

import dataclasses

import numpy as np
import pytest

from mtnlg_jax.config import (
    Config,
    DecodeConfig,
    acting,
    from_json,
    override,
    to_json,
    validate,
    validate_decode,
)
from mtnlg_jax.decode.batched_settings import batch_settings

FULL = DecodeConfig(
    logit_bias={5: -1, 6: 2.5},
    sequence_bias={(5, 6): 1.5},
    bad_words_ids=[[7], [8, 9]],
    suppress_tokens=[1],
    eos_token_id=3,
    stop_sequences=[[4, 5]],
    forced_tokens=[[0, 9]],
    stop_strings=["\n"],
    num_beams=1,
    max_time=2.5,
)


def test_lists_dicts_and_single_ids_become_tuples():
    assert (FULL.logit_bias, FULL.sequence_bias) == (((5, -1), (6, 2.5)), (((5, 6), 1.5),))
    assert (FULL.bad_words_ids, FULL.eos_token_id, FULL.stop_strings) == (
        ((7,), (8, 9)),
        (3,),
        ("\n",),
    )
    config = Config(
        decode=dataclasses.replace(FULL, stop_strings=(), num_beams=2, early_stopping="never")
    )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=128))
    validate(config)
    assert from_json(to_json(config)) == config
    hash(config)


def test_values_from_the_command_line():
    for text, value in (("never", "never"), ("true", True), ("False", False)):
        assert (
            override(Config(), f"decode.early_stopping={text}").decode.early_stopping is value
            or text == "never"
        )
    config = override(
        Config(), "decode.logit_bias=((5, 1.0),)", "decode.eos_token_id=(3, 4)", "decode.max_time=2"
    )
    assert config.decode == DecodeConfig(logit_bias=((5, 1.0),), eos_token_id=(3, 4), max_time=2.0)
    assert isinstance(config.decode.max_time, float)
    with pytest.raises(ValueError, match="'sometimes'"):
        validate_decode(override(Config(), "decode.early_stopping=sometimes").decode)


def test_tables_are_padded_to_powers_of_two():
    settings = batch_settings([FULL, DecodeConfig()], np.ones(100, bool), eos=(0,))
    rows = settings.rows
    assert settings.static_options.names == {"bias", "forced", "ends", "stops"}
    # Two logit biases, a sequence, two bad words, a suppressed token: six, in a table of eight.
    assert rows.bias.shape == (2, 8) and rows.bias_before.shape == (2, 8, 1)
    assert rows.stops.tolist() == [[[4, 5]], [[-1, -1]]] and rows.stop_lengths.tolist() == [
        [2],
        [0],
    ]
    assert rows.ends.tolist() == [[3], [0]] and not rows.bias[1].any()


def test_default_settings_have_no_tables():
    settings = batch_settings([DecodeConfig()] * 3, np.ones(100, bool), eos=(0,))
    assert not settings.static_options.names and not settings.static_options.ngrams
    tables = {name: value for name, value in settings.rows._asdict().items() if np.ndim(value) > 1}
    assert [name for name, value in tables.items() if value.size] == ["ends"]


IDLE = [
    ({"top_k": 5}, "top_k=5"),
    ({"top_p": 0.9}, "top_p=0.9"),
    ({"min_p": 0.1}, "min_p=0.1"),
    ({"typical_p": 0.9}, "typical_p=0.9"),
    ({"epsilon_cutoff": 0.1}, "epsilon_cutoff=0.1"),
    ({"eta_cutoff": 0.1}, "eta_cutoff=0.1"),
    ({"seed": 3}, "seed=3"),
    ({"seed": 3, "num_beams": 2}, "seed=3"),
    ({"num_return_sequences": 3}, "num_return_sequences=3"),
    ({"length_penalty": 2.0}, "length_penalty=2.0"),
    ({"early_stopping": True}, "early_stopping=True"),
    ({"length_penalty_type": "gnmt"}, "length_penalty_type"),
    ({"max_matching_ngram_size": 3}, "max_matching_ngram_size=3"),
    ({"top_k": 5, "num_beams": 2}, "top_k=5"),
    ({"temperature": 1.0, "num_beams": 2, "length_penalty": 2.0}, "length_penalty=2.0"),
]


@pytest.mark.parametrize(("settings", "named"), IDLE)
def test_settings_without_effect_raise_unless_they_are_those_of_a_run(settings, named):
    decode = DecodeConfig(**settings)
    with pytest.raises(ValueError, match=f"{named}.*(set|leave|ask)"):
        validate_decode(decode)
    # Settings of a run, as from a generation_config.json with top_k=50 and do_sample=false, take
    # effect once others allow it.
    model = dataclasses.replace(Config().model, vocab_size=128)
    config = Config(decode=decode, model=model)
    validate(config)
    assert from_json(to_json(config)) == config
    used = acting(decode)
    validate_decode(used)
    assert used.temperature == decode.temperature and used.num_beams == decode.num_beams
    name = next(key for key in settings if named.startswith(key))
    assert getattr(used, name) == getattr(DecodeConfig(), name)
    with pytest.raises(ValueError, match=named):
        validate_decode(acting(decode, [name]))


def test_settings_with_effect_are_accepted():
    for settings in (
        {"temperature": 1.0, "top_k": 5, "seed": 3, "num_return_sequences": 2},
        {"num_beams": 4, "length_penalty": 0.5, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 4},
        {"repetition_penalty": 1.5},
    ):
        decode = DecodeConfig(**settings)
        validate_decode(decode)
        assert acting(decode) == decode


def test_inactive_settings_are_still_checked():
    model = dataclasses.replace(Config().model, vocab_size=128)
    for settings in (
        {"top_p": 2.0},
        {"min_p": 1.0},
        {"diversity_penalty": -1.0},
        {"num_beam_groups": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            validate(Config(decode=DecodeConfig(**settings), model=model))
