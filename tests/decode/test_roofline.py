"""Compare the bytes that a step reads with counts by hand."""

import jax
import pytest

from mtnlg_jax.decode.cache import prefill, to_int8, unstack
from mtnlg_jax.decode.roofline import copy_bandwidth, roofline, step_bytes


@pytest.mark.parametrize(
    "held", [{}, {"dtype": "bfloat16"}, {"weights": "int8", "cache": "int8"}], ids=str
)
def test_bytes_of_a_step(tiny, held):
    decoder = unstack(tiny.config, tiny.params, **held)
    config = tiny.config
    read = step_bytes(decoder, 3, 40)
    cache = prefill(decoder, [[1]] * 3, 64).cache  # the capacity for 40 tokens is the context
    cache = to_int8(cache) if decoder.int8_cache else cache
    assert read["cache"] == sum(x.nbytes for x in jax.tree.leaves(cache))
    # All parameters are read except tables for look-up; a tied table is read as the head.
    tables = (not config.tie_embeddings) * config.vocab_size
    tables += (config.position_embedding_type == "learned") * config.max_position_embeddings
    products = sum(x.size for x in jax.tree.leaves(tiny.params)) - tables * config.hidden_size
    each = {"{}": (4, 4), "{'dtype': 'bfloat16'}": (2, 2)}.get(str(held), (1, 1.25))
    assert each[0] * products <= read["weights"] <= each[1] * products


@pytest.mark.parametrize("rolling", [True, False])
def test_windowed_layers_hold_their_window(windowed, rolling):
    cache = prefill(windowed.decoder, [[1]] * 3, 64, rolling=rolling).cache
    read = step_bytes(windowed.decoder, 3, 40, rolling=rolling)
    assert read["cache"] == sum(x.nbytes for x in jax.tree.leaves(cache))


def test_tokens_per_second_at_the_roofline(learned):
    line = roofline(learned.decoder, 2, 40, 1e9)
    read = step_bytes(learned.decoder, 2, 40)
    assert line["roofline_tokens_per_second"] == pytest.approx(
        2e9 / (read["weights"] + read["cache"]), rel=1e-4
    )
    assert 1e8 < copy_bandwidth(2**22, 2) < 1e13
