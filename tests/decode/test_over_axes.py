"""Compare decoding over the mesh axes ``expert`` and ``context`` with one device."""

import re

import jax
import numpy as np
import pytest
from test_over_mesh import (
    GREEDY,
    PROMPTS,
    SAMPLED,
    WAYS,
    beams,
    check,
    draft,
    filled,
    look_up,
    mesh_of,
    perplexity,
    ranked,
    rows,
    stochastic,
)

from mtnlg_jax.decode import cache, sampling
from mtnlg_jax.decode.batched_settings import batch_settings
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.positions import lengthened, write
from mtnlg_jax.decode.results import encode_prompt
from mtnlg_jax.decode.sharding import Placement
from mtnlg_jax.parallel.auto import padded, padded_positions

# (data, tensor, expert, context)
EXPERTS = [(2, 2, 2, 1), (1, 2, 4, 1), (1, 1, 2, 1), (2, 1, 2, 2)]
CONTEXTS = [(2, 2, 1, 2), (1, 1, 1, 8), (1, 2, 1, 3), (1, 4, 1, 2)]
LONG = ["The cat sat on the mat and the dog sat on the log. In the town where I was", *PROMPTS]


def gathered(program: str) -> list[int]:
    """Return how many numbers each all-gather of a compiled program makes."""
    found = []
    for shapes in re.findall(r"= ([^=]*?) all-gather(?:-start)?\(", program):
        for dims in re.findall(r"\[([\d,]*)\]", shapes):
            found.append(int(np.prod([int(each) for each in dims.split(",") if each])))
    return found


def local(x) -> int:
    """Return the numbers of ``x`` that one device holds."""
    return x.addressable_shards[0].data.size


def started(over, tokenizer, prompts):
    """Return the state of greedy rows after their prompts, and what ``advance`` takes with it."""
    tokens = [encode_prompt(tokenizer, each) for each in prompts]
    tokens += [tokens[0]] * (padded(len(tokens), over.mesh) - len(tokens))
    prefix = cache.prefill(over, tokens, over.context)
    settings = batch_settings(
        [GREEDY] * len(tokens), np.ones(over.config.vocabulary, bool), tokenizer.eos_ids, None
    )
    numbers = np.arange(len(tokens), dtype=np.int32)
    state, limits = sampling.begin(
        prefix, numbers, np.full_like(numbers, 4), numbers.astype(np.uint32), settings
    )
    return state, limits, settings, np.int32(1)


def greedy(decoder, tokenizer):
    return _told(generate(decoder, tokenizer, LONG, GREEDY))


def _told(results):
    return [(each.tokens, each.text, each.finish_reason, each.logprobs) for each in results]


def test_experts_and_caches_are_split_and_stay_where_they_are(balanced, tokenizer):
    over = check(greedy, balanced, tokenizer, (1, 2, 2, 2))
    experts = over.params[1][0]["mlp"]
    for name in ("w_in_EDF", "w_gate_EDF", "w_out_EFD"):
        weight = experts[name][...]
        assert local(weight) * 2 * 2 == weight.size  # expert x tensor
    with jax.set_mesh(over.mesh):
        arguments = started(over, tokenizer, LONG)
        program = sampling.advance.lower(over.params, *arguments, config=over.config).compile()
    keys = arguments[0].cache[0][0]
    assert local(keys) * 2 * 2 * 2 == keys.size  # expert (rows) x tensor x context
    # A gather over one of the axes of two makes twice what a device holds.
    made = 2 * min(local(keys), local(experts["w_in_EDF"][...]))
    assert max(gathered(program.as_text()), default=0) < made


def test_positions_of_a_cache_are_written_where_they_are_held():
    """Also those that no device holds, and by devices whose first position is not 0."""
    draws = np.random.default_rng(0)
    layer = tuple(draws.normal(size=(3, 2, 12, 4)).astype("f4") for _ in range(2))
    new = tuple(draws.normal(size=(3, 2, 2, 4)).astype("f4") for _ in range(2))
    at = np.array([[0, 1], [5, 6], [11, 12]])
    with jax.set_mesh(mesh_of(1, 1, 1, 4)):
        found = jax.jit(write)(layer, *new, at)
    want = [x.copy() for x in layer]
    for row, places in enumerate(at):
        for number, place in enumerate(places):
            if place < 12:
                for old, x in zip(want, new, strict=True):
                    old[row, :, place] = x[row, number]
    np.testing.assert_array_equal(found, want)


def test_a_cache_is_lengthened_by_moving_its_parts():
    x = np.arange(2 * 16 * 3, dtype=np.float32).reshape(1, 2, 16, 3)
    with jax.set_mesh(mesh_of(1, 1, 1, 4)):
        assert padded_positions(22) == 24
        program = jax.jit(lambda x: lengthened(x, 24)).lower(x).compile()
        found = program(x)
    assert not gathered(program.as_text())
    assert local(found) * 4 == found.size
    np.testing.assert_array_equal(found, np.pad(x, ((0, 0), (0, 0), (0, 8), (0, 0))))


def test_meshes_that_do_not_fit_the_model_are_refused(balanced, rotary):
    with pytest.raises(ValueError, match="mesh.expert=2 splits experts, and this .* mesh.expert=1"):
        Placement(rotary.config, cache.split_abstract(rotary.config), mesh_of(1, 1, 2))
    with pytest.raises(ValueError, match="E=4 is not divisible by expert=3; try mesh.expert=2"):
        Placement(balanced.config, cache.split_abstract(balanced.config), mesh_of(1, 1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("sizes", EXPERTS, ids=str)
def test_every_way_over_experts_equals_one_device(balanced, tokenizer, way, sizes):
    check(way, balanced, tokenizer, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("sizes", CONTEXTS, ids=str)
def test_every_way_over_context_equals_one_device(rotary, tokenizer, way, sizes):
    check(way, rotary, tokenizer, sizes)


def long_rows(decoder, tokenizer):
    return _told(generate(decoder, tokenizer, LONG, [GREEDY, *[SAMPLED] * 3]))


@pytest.mark.slow
@pytest.mark.parametrize("held", [{"weights": "int8"}, {"weights": "int8", "cache": "int8"}])
def test_int8_over_experts_and_context_equals_one_device(balanced, tokenizer, held):
    for way in (rows, look_up, perplexity, long_rows):
        over = check(way, balanced, tokenizer, (1, 2, 2, 2), **held)
    weight = over.params[1][0]["mlp"]["w_out_EFD"][...]
    assert local(weight.number_EIO) * 4 == weight.number_EIO.size
    assert local(weight.scale_EO) * 2 == weight.scale_EO.size


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 2, 1, 4), (2, 1, 1, 3)], ids=str)
@pytest.mark.parametrize("model", ["windowed", "learned"])
def test_other_models_over_context_equal_one_device(request, tokenizer, model, sizes):
    tiny = request.getfixturevalue(model)
    if tiny.config.vocabulary % sizes[1]:
        sizes = (sizes[0] * sizes[1], 1, *sizes[2:])
    for way in (long_rows, look_up, draft, beams, stochastic, ranked, perplexity, filled):
        check(way, tiny, tokenizer, sizes)
