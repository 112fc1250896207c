"""Rows of a running batch equal what `generate` writes for each alone."""

import dataclasses

import jax
import numpy as np
import pytest

from mtnlg_jax.config import DecodeConfig, MeshConfig
from mtnlg_jax.decode import slots
from mtnlg_jax.decode.batch import Batch
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.parallel.mesh import make_mesh

ROUNDING = 1e-5
SHAPES = {"slots": 2, "chunks": (16,), "least": 64}


def _requests(tokenizer, count=10):
    """Return (tokens, settings, seed), of all kinds and many lengths."""
    draws = np.random.default_rng(0)
    found = []
    for number in range(count):
        new = DecodeConfig(max_new_tokens=int(draws.integers(2, 20)))
        settings = [
            new,
            dataclasses.replace(new, temperature=1.0),
            dataclasses.replace(
                new,
                temperature=1.3,
                top_p=0.9,
                top_k=30,
                repetition_penalty=1.2,
                no_repeat_ngram_size=2,
            ),
            dataclasses.replace(
                new,
                temperature=0.9,
                stop_strings=("a",),
                presence_penalty=0.5,
                logit_bias=((30, 2.0),),
                mirostat_tau=6.0,
            ),
            dataclasses.replace(
                new,
                min_new_tokens=2,
                frequency_penalty=0.7,
                stop_token_ids=(40, 41, 42),
                dry_multiplier=3.0,
                dry_allowed_length=1,
            ),
        ][number % 5]
        length = int(draws.integers(1, 40))
        tokens = draws.integers(20, tokenizer.vocab_size - 20, length).tolist()
        found.append((tokens, settings, number))
    return found


def _written(batch, requests, stagger=1):
    """Return the row of each request and its tokens, admitted one every ``stagger`` turns."""
    waiting = list(requests)
    rows = []
    told = {}
    turns = 0
    while waiting or batch.busy or batch.filling:
        if waiting and batch.free and not batch.filling and turns % stagger == 0:
            rows.append(batch.admit(*waiting.pop(0)))
        batch.fill()
        for row, tokens in batch.turn(3):
            told.setdefault(row, []).extend(tokens)
        turns += 1
    return [(row, told.get(row, [])) for row in rows]


def _alone(decoder, tokenizer, tokens, settings, seed):
    if settings.temperature:
        settings = dataclasses.replace(settings, seed=seed)
    return generate(decoder, tokenizer, [tokens], settings)[0]


def _check_alone(decoder, tokenizer, requests, found):
    for request, (row, told) in zip(requests, found, strict=True):
        expected = _alone(decoder, tokenizer, *request)
        assert tuple(row.new) == expected.tokens
        assert row.text == expected.text
        assert row.reason == expected.finish_reason
        assert "".join(each.text for each in told) + row.tail == row.text
        logprobs = [each.logprob for each in told]
        np.testing.assert_allclose(logprobs, expected.logprobs, atol=ROUNDING)


@pytest.fixture(scope="module")
def batch(learned, tokenizer):
    batch = Batch(learned.decoder, tokenizer, **SHAPES)
    batch.warm()
    return batch


def test_rows_equal_generate_alone_and_compile_nothing(batch, learned, tokenizer):
    requests = _requests(tokenizer)
    flat = slots.programs()
    found = _written(batch, requests, stagger=2)
    assert slots.programs() == flat
    assert {row.reason for row, _ in found} == {"stop", "length"}
    _check_alone(learned.decoder, tokenizer, requests, found)
    # The comparison can fail: another seed draws other tokens.
    tokens, settings, seed = requests[1]
    assert _alone(learned.decoder, tokenizer, tokens, settings, seed + 1).tokens != tuple(
        found[1][0].new
    )


def test_a_prompt_reads_only_what_a_slot_does_not_hold(batch, learned, tokenizer):
    tokens = _requests(tokenizer)[0][0]
    tokens = (tokens * 40)[:39]
    settings = DecodeConfig(max_new_tokens=4)
    ((first, _),) = _written(batch, [(tokens, settings, 0)])
    again = [*tokens, *first.new, 25, 26]
    # Of a free slot, and of a row that is still writing.
    ((second, _),) = _written(batch, [(again, settings, 0)])
    assert second.cached == len(tokens) + len(first.new) - 1
    both = _written(batch, [(again, settings, 0), (again, settings, 0)])
    assert both[1][0].cached == len(again) - 1
    expected = _alone(learned.decoder, tokenizer, again, settings, 0).tokens
    assert {tuple(row.new) for row, _ in both} == {tuple(second.new)} == {expected}


def test_alternatives_have_the_chosen_number_bit_for_bit(batch, learned, tokenizer):
    tokens, settings, seed = _requests(tokenizer)[0]
    row = batch.admit(tokens, settings, seed, alternatives=3)
    told = []
    while not row.reason:
        batch.fill()
        told += [token for _, tokens in batch.turn(4) for token in tokens]
    assert told
    for each in told:
        assert len(each.top) == 3
        assert list(each.top) == sorted(each.top, key=lambda pair: -pair[1])
        assert dict(each.top)[each.token] == each.logprob


class OnlyTwo:
    """Allows two ids in turn, then the end."""

    def __init__(self, end):
        self.written = []
        self._end = end

    def allowed(self):
        allowed = np.zeros(200, bool)
        allowed[self._end if len(self.written) == 3 else 50 + len(self.written) % 2] = True
        return allowed

    def accept(self, token):
        self.written.append(token)


def test_a_constraint_says_what_comes_next(batch, learned, tokenizer):
    requests = _requests(tokenizer)[:2]
    free = batch.admit(*requests[0])
    batch.fill()
    batch.fill()
    batch.fill()
    held = batch.admit(
        [25], DecodeConfig(max_new_tokens=9), 0, constraint=OnlyTwo(tokenizer.eos_id)
    )
    while batch.busy or batch.filling:
        batch.fill()
        batch.turn(4)
    assert (held.new, held.reason) == ([50, 51, 50], "stop")
    assert tuple(free.new) == _alone(learned.decoder, tokenizer, *requests[0]).tokens


def test_a_constraint_that_fails_ends_its_row_alone(batch, learned, tokenizer):
    requests = _requests(tokenizer)[:1]
    broken = OnlyTwo(tokenizer.eos_id)
    broken.accept = lambda token: 1 / 0
    row = batch.admit([25], requests[0][1], 0, constraint=broken)
    (other,) = _written(batch, requests)
    assert (row.reason, row.error) == ("error", "the constraint failed: division by zero")
    _check_alone(learned.decoder, tokenizer, requests, [other])


@pytest.mark.parametrize("when", ["filling", "writing"])
def test_a_row_that_is_dropped_frees_its_slot(batch, learned, tokenizer, when):
    tokens, settings, seed = _requests(tokenizer)[5]
    dropped = batch.admit(tokens[::-1] * 2, DecodeConfig(max_new_tokens=30), 0)
    if when == "filling":
        assert batch.fill() and batch.filling == 1
    else:
        while not dropped.new:
            batch.fill()
            batch.turn(1)
        # The last row moves into the slot of the one that leaves.
        kept = batch.admit(tokens, settings, seed)
        while not kept.placed:
            batch.fill()
    batch.drop(dropped)
    assert dropped.reason == "cancelled" and batch.free == (2 if when == "filling" else 1)
    if when == "writing":
        while not kept.reason:
            batch.turn(3)
        assert tuple(kept.new) == _alone(learned.decoder, tokenizer, tokens, settings, seed).tokens
    assert batch.free == 2


def test_what_cannot_be_written_is_refused(batch):
    with pytest.raises(ValueError, match="prompt has 64 tokens and the context holds 64"):
        batch.admit([30] * 64, DecodeConfig(), 0)
    with pytest.raises(ValueError, match="token 99999 is outside"):
        batch.admit([99999], DecodeConfig(), 0)
    with pytest.raises(ValueError, match="no_repeat_ngram_size=17 is above 16"):
        batch.admit([30], DecodeConfig(no_repeat_ngram_size=17), 0)
    with pytest.raises(ValueError, match="penalty_alpha=0.6 computes top_k candidates"):
        batch.admit([30], DecodeConfig(penalty_alpha=0.6, top_k=4), 0)
    many = tuple((token % 400, 1.0) for token in range(513))
    with pytest.raises(ValueError, match="logit_bias.* more than 512 entries"):
        batch.admit([30], DecodeConfig(logit_bias=many), 0)
    with pytest.raises(ValueError, match="0 slots hold no row"):
        Batch(batch.decoder, batch.tokenizer, slots=0)
    assert batch.free == 2


@pytest.mark.parametrize(
    ("tensor", "count"),
    # Two requests need few programs.
    [
        (2, 2),
        pytest.param(4, 10, marks=pytest.mark.slow),
        pytest.param(8, 10, marks=pytest.mark.slow),
    ],
)
def test_rows_over_a_mesh_equal_one_device(learned, tokenizer, tensor, count):
    mesh = make_mesh(MeshConfig(data=1, tensor=tensor), jax.devices()[:tensor])
    decoder = unstack(learned.config, learned.params, mesh=mesh)
    batch = Batch(decoder, tokenizer, **SHAPES)
    held = jax.tree.leaves(batch._device.cache)
    # Four heads: two devices have two each.
    assert all(x.sharding.shard_shape(x.shape)[1] == max(4 // tensor, 4 % tensor) for x in held)
    requests = _requests(tokenizer, count)
    _check_alone(learned.decoder, tokenizer, requests, _written(batch, requests, 2))
    again = slots.programs()
    _check_alone(learned.decoder, tokenizer, requests, _written(batch, requests, 2))
    assert slots.programs() == again, "arrays that a program gives fit the next one"


def test_a_mesh_that_splits_rows_is_refused(learned, tokenizer):
    decoder = learned.decoder._replace(mesh=make_mesh(MeshConfig(data=8), jax.devices()))
    with pytest.raises(ValueError, match="mesh.data=8, but rows that come and go .*=1, or start"):
        Batch(decoder, tokenizer, **SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["windowed", "rotary"])
def test_other_models_equal_generate(request, tokenizer, model):
    tiny = request.getfixturevalue(model)
    batch = Batch(tiny.decoder, tokenizer, **SHAPES)
    requests = _requests(tokenizer, 15)
    _check_alone(tiny.decoder, tokenizer, requests, _written(batch, requests, 2))


@pytest.mark.slow
def test_a_cache_that_grows_and_shrinks_keeps_its_rows(windowed, tokenizer):
    options = {"slots": 3, "chunks": (4, 8), "least": 16}
    batch = Batch(windowed.decoder, tokenizer, **options)
    programs = batch.warm()
    requests = _requests(tokenizer, 15)
    # Long enough with few tokens that the cache is cut, twice.
    requests += [([25 + each], DecodeConfig(max_new_tokens=4), each) for each in range(30)]
    lengths = []
    fit = batch._fit
    batch._fit = lambda positions: (fit(positions), lengths.append(batch.length))
    found = _written(batch, requests)
    assert set(lengths) == {16, 32, 64} and lengths[-1] == 16
    assert slots.programs() == programs
    _check_alone(windowed.decoder, tokenizer, requests, found)


@pytest.mark.slow
def test_an_int8_cache_tells_the_same_alone_and_in_company(learned, tokenizer):
    """`generate` reads prompts in floats, so its log-probabilities are close, not equal."""
    decoder = unstack(learned.config, learned.params, cache="int8")
    batch = Batch(decoder, tokenizer, **SHAPES)
    requests = _requests(tokenizer)
    together = _written(batch, requests, 2)
    for request, (row, _) in zip(requests, together, strict=True):
        ((alone, told),) = _written(Batch(decoder, tokenizer, **SHAPES), [request])
        assert (alone.new, alone.text, alone.reason) == (row.new, row.text, row.reason)
        expected = _alone(decoder, tokenizer, *request)
        assert abs(told[0].logprob - expected.logprobs[0]) < 0.1 if told else True
