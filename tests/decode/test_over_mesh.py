"""Compare every way of decoding over meshes of the eight virtual devices with one device."""

import dataclasses
import math

import jax
import pytest

from mtnlg_jax.config import DecodeConfig, MeshConfig
from mtnlg_jax.decode import cache
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.infill import fill
from mtnlg_jax.decode.pool import ScorerOptions
from mtnlg_jax.decode.rank import rank, rank_many
from mtnlg_jax.decode.sharding import Placement
from mtnlg_jax.evaluate.perplexity import evaluate_texts
from mtnlg_jax.parallel.auto import padded
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.tasks.run import perform
from mtnlg_jax.tasks.templates import task_of

ROUNDING = 1e-5
# Activations are rounded to 16 bits: the last bit of a sum may move one by 1 / (2 x 127 x 254).
INT8_ROUNDING = 1e-4
PROMPTS = ["The cat", "In the town where I was", "天地"]  # not a multiple of data
GREEDY = DecodeConfig(max_new_tokens=12, min_new_tokens=12)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.5, seed=5)
MESHES = [(8, 1), (4, 2), (2, 4), (1, 4)]  # (data, tensor)


def mesh_of(data: int, tensor: int, expert: int = 1, context: int = 1):
    config = MeshConfig(data=data, tensor=tensor, expert=expert, context=context)
    return make_mesh(config, jax.devices()[: data * tensor * expert * context])


def _generated(results):
    return [
        (each.prompt, each.tokens, each.text, each.finish_reason, each.logprobs, each.score)
        for each in results
    ]


def rows(decoder, tokenizer):
    configs = [
        GREEDY,
        dataclasses.replace(SAMPLED, top_k=40, top_p=0.9, repetition_penalty=1.2),
        dataclasses.replace(SAMPLED, num_return_sequences=3, no_repeat_ngram_size=2),
    ]
    return _generated(generate(decoder, tokenizer, PROMPTS, configs))


def chunks(decoder, tokenizer):
    """Return to the host after every chunk."""
    shown = []
    config = dataclasses.replace(SAMPLED, max_new_tokens=20, min_p=0.02, typical_p=0.9)
    found = generate(decoder, tokenizer, PROMPTS, config, on_text=lambda *args: shown.append(args))
    return _generated(found), shown


def beams(decoder, tokenizer):
    return _generated(
        generate(
            decoder,
            tokenizer,
            PROMPTS,
            dataclasses.replace(GREEDY, num_beams=3, num_return_sequences=2),
        )
    )


def groups(decoder, tokenizer):
    config = dataclasses.replace(GREEDY, num_beams=4, num_beam_groups=2, diversity_penalty=0.5)
    return _generated(generate(decoder, tokenizer, PROMPTS, config))


def stochastic(decoder, tokenizer):
    config = dataclasses.replace(SAMPLED, num_beams=4, num_return_sequences=4)
    return _generated(generate(decoder, tokenizer, PROMPTS, [config, config, GREEDY]))


def look_up(decoder, tokenizer):
    config = dataclasses.replace(GREEDY, prompt_lookup_num_tokens=3)
    results = generate(decoder, tokenizer, ["the cat the cat the", *PROMPTS], config)
    return _generated(results), [(each.guessed, each.accepted) for each in results]


def draft(decoder, tokenizer):
    """Guess with the model itself, greedily and by drawing."""
    results = generate(decoder, tokenizer, PROMPTS, [GREEDY, SAMPLED, SAMPLED], draft=decoder)
    return _generated(results), [(each.guessed, each.accepted) for each in results]


def ranked(decoder, tokenizer):
    found = rank(
        decoder,
        tokenizer,
        "The cat",
        [" sat on the mat", " the dog", " 天地", " sat", " in Spain"],
        scorers=["logprob", "gnmt", "pmi", "noisy_channel", "pseudo_log_likelihood", "mbr"],
        options=ScorerOptions(utility="token_f1"),
    )
    return [dataclasses.asdict(each) for each in found]


def ranked_many(decoder, tokenizer):
    """Rank behind three prompts, which the rows of most meshes do not divide."""
    prompts = ["The cat", "In the town where I was born lived", "天地"]
    candidates = [[" sat", " on the mat"], [" a", " sat", " in Spain", " the"], ["玄", " sat"]]
    found = rank_many(decoder, tokenizer, prompts, candidates, scorers=["logprob", "gnmt"])
    return [dataclasses.asdict(each) for of_prompt in found for each in of_prompt]


def ranked_samples(decoder, tokenizer):
    decode = dataclasses.replace(
        SAMPLED, num_return_sequences=5, max_new_tokens=6, min_new_tokens=6
    )
    options = ScorerOptions(answer=r"\w", votes="probability")
    scorers = {"logprob": 1.0, "self_consistency": 0.5}
    found = rank(decoder, tokenizer, "The", decode=decode, scorers=scorers, options=options)
    return [dataclasses.asdict(each) for each in found]


def filled(decoder, tokenizer):
    return dataclasses.asdict(fill(decoder, tokenizer, "The <mask> sat on the <mask>."))


def perplexity(decoder, tokenizer):
    texts = ["The cat sat on the mat and the dog sat on the log.\n" * 6, "The rain in Spain"]
    return [dataclasses.asdict(each) for each in evaluate_texts(decoder, tokenizer, texts)]


def task(decoder, tokenizer):
    decode = dataclasses.replace(GREEDY, max_new_tokens=4, min_new_tokens=4)
    answers = perform(decoder, tokenizer, task_of("continue"), PROMPTS, decode=decode)
    return [dataclasses.asdict(each) for each in answers]


WAYS = [
    rows,
    chunks,
    beams,
    groups,
    stochastic,
    look_up,
    draft,
    ranked,
    ranked_many,
    ranked_samples,
    filled,
    perplexity,
    task,
]


def assert_same(one, other, rounding=ROUNDING):
    """Compare nested results: numbers within ``rounding``, relative above 1, the rest exactly."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one = list(one.values())
        other = list(other.values())
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair, rounding)
    elif isinstance(one, float):
        assert math.isclose(one, other, rel_tol=rounding, abs_tol=rounding), (one, other)
    else:
        assert one == other


_ONE: dict = {}


def check(way, tiny, tokenizer, sizes, **held):
    """Compare ``way`` over a mesh with one device; see `compare`."""
    rounding = INT8_ROUNDING if held else ROUNDING
    return compare(way, tiny, tokenizer, mesh_of(*sizes), rounding, **held)


def compare(way, tiny, tokenizer, mesh, rounding, **held):
    """Return the decoder on ``mesh`` once ``way`` gives the same as on one device.

    The results of one device are kept for other meshes.
    """
    key = way.__name__, tiny.config, tuple(held.items())
    if key not in _ONE:
        _ONE[key] = way(unstack(tiny.config, tiny.params, **held), tokenizer)
    over = unstack(tiny.config, tiny.params, **held, mesh=mesh)
    assert_same(way(over, tokenizer), _ONE[key], rounding)
    return over


def test_rows_over_data_and_tensor_equal_one_device(rotary, tokenizer):
    over = check(rows, rotary, tokenizer, (2, 4))
    split = {tuple(each.sharding.spec) for each in jax.tree.leaves(over.params)}
    assert {("tensor", None), (None, "tensor")} <= split  # so the sides differ


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_way_over_every_mesh_equals_one_device(rotary, tokenizer, way, sizes):
    check(way, rotary, tokenizer, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_with_a_vocabulary_that_is_not_divisible(learned, tokenizer, way):
    check(way, learned, tokenizer, (2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("held", [{"weights": "int8"}, {"weights": "int8", "cache": "int8"}])
@pytest.mark.parametrize("sizes", [(2, 4), (4, 2)], ids=str)
def test_int8_over_a_mesh_equals_one_device(rotary, tokenizer, held, sizes):
    for way in (rows, look_up, perplexity):
        check(way, rotary, tokenizer, sizes, **held)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 4), (2, 2)], ids=str)
def test_windows_over_a_mesh_equal_one_device(windowed, tokenizer, sizes):
    for way in (rows, look_up, beams, ranked, ranked_many):
        check(way, windowed, tokenizer, sizes)


def test_a_vocabulary_that_tensor_does_not_divide_splits_the_width(learned):
    assert learned.config.vocabulary % 2
    abstract = cache.split_abstract(learned.config)
    place = Placement(learned.config, abstract, mesh_of(1, 2))
    table = place.shardings(
        "tokens_VD", jax.ShapeDtypeStruct((learned.config.vocabulary, 32), "f4")
    )
    assert tuple(table.spec) == (None, "tensor")


def test_sizes_that_do_not_divide_are_named(rotary):
    abstract = cache.split_abstract(rotary.config)
    with pytest.raises(ValueError, match="N=4 is not divisible by tensor=8; try"):
        Placement(rotary.config, abstract, mesh_of(1, 8))
    mesh = make_mesh(MeshConfig(data=2, pipe=2, context=2))
    with pytest.raises(ValueError, match="mesh.pipe=2 and mesh.context=2: .* set one of them to 1"):
        Placement(rotary.config, abstract, mesh)


def test_a_draft_on_other_devices_is_refused(learned, tokenizer):
    other = learned.decoder._replace(mesh=mesh_of(1, 2))
    with pytest.raises(ValueError, match="load both with the same mesh"):
        generate(learned.decoder, tokenizer, PROMPTS, GREEDY, draft=other)


def test_rows_are_padded_to_a_multiple_of_data():
    assert [padded(each, mesh_of(4, 2)) for each in (1, 4, 5)] == [4, 4, 8]
    assert padded(5, None) == 5
