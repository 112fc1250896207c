"""DecodeConfig: what it takes, how it is written down and read, and the arrays that rows become."""

import dataclasses

import numpy as np
import pytest

from mtnlg_jax.config import Config, DecodeConfig, from_json, override, to_json, validate, validate_decode
from mtnlg_jax.decode.rows import rows_and_families

FULL = DecodeConfig(
    logit_bias={5: -1, 6: 2.5}, sequence_bias={(5, 6): 1.5}, bad_words_ids=[[7], [8, 9]], suppress_tokens=[1],
    eos_token_id=3, stop_sequences=[[4, 5]], forced_tokens=[[0, 9]], stop_strings=["\n"], num_beams=1, max_time=2.5)


def test_lists_dicts_and_single_ids_become_tuples_and_stay_so_in_json():
    assert (FULL.logit_bias, FULL.sequence_bias) == (((5, -1), (6, 2.5)), (((5, 6), 1.5),))
    assert (FULL.bad_words_ids, FULL.eos_token_id, FULL.stop_strings) == (((7,), (8, 9)), (3,), ("\n",))
    config = Config(decode=dataclasses.replace(FULL, stop_strings=(), num_beams=2, early_stopping="never"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=128))
    validate(config)
    assert from_json(to_json(config)) == config
    hash(config)


def test_values_from_the_command_line():
    for text, value in (("never", "never"), ("true", True), ("False", False)):
        assert override(Config(), f"decode.early_stopping={text}").decode.early_stopping is value or text == "never"
    config = override(Config(), "decode.logit_bias=((5, 1.0),)", "decode.eos_token_id=(3, 4)", "decode.max_time=2")
    assert config.decode == DecodeConfig(logit_bias=((5, 1.0),), eos_token_id=(3, 4), max_time=2.0)
    assert isinstance(config.decode.max_time, float)
    with pytest.raises(ValueError, match="'sometimes'"):
        validate_decode(override(Config(), "decode.early_stopping=sometimes").decode)


def test_tables_are_padded_to_powers_of_two():
    rows, families = rows_and_families([FULL, DecodeConfig()])
    assert families.names == {"bias", "forced", "ends", "stops"}
    # Two logit biases, a sequence, two bad words, a suppressed token: six, in a table of eight.
    assert rows.bias.shape == (2, 8) and rows.bias_before.shape == (2, 8, 1)
    assert rows.stops.tolist() == [[[4, 5]], [[-1, -1]]] and rows.stop_lengths.tolist() == [[2], [0]]
    assert rows.ends.tolist() == [[3], [-2]] and not rows.bias[1].any()


def test_rows_of_defaults_carry_no_tables():
    rows, families = rows_and_families([DecodeConfig()] * 3)
    assert not families.names and not families.ngrams
    tables = {name: value for name, value in rows._asdict().items() if np.ndim(value) > 1}
    assert [name for name, value in tables.items() if value.size] == ["ends"]
