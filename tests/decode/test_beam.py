"""Compare beam search with a search by loops and full forward passes, alone and in a batch.

test_peer.py compares it with Hugging Face.
"""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import make_fixtures as made
import numpy as np
import peer
import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode import beam as module
from mtnlg_jax.decode import beams, stochastic
from mtnlg_jax.decode.cache import prefill
from mtnlg_jax.decode.forward import run_layers
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.results import CHUNK, encode_prompt
from mtnlg_jax.model.attention import attention

ROUNDING = 1e-5
BEAMS = DecodeConfig(max_new_tokens=10, num_beams=4, num_return_sequences=4)
DRAWN = dataclasses.replace(BEAMS, temperature=1.0, seed=3)
PROMPTS = ["The cat", "In the town where I was", "天地", ""]


def _log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnames="config")
def _full(config, params, tokens_BS):
    positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
    x_BSD, head = run_layers(
        config, params, tokens_BS, positions_BS, lambda _, q, k, v: attention(q, k, v)
    )
    return x_BSD @ head.table_VD.T


def _next(number, sequences) -> np.ndarray:
    """Return log-probabilities (B, V) of the next token of each sequence, by a full forward pass of
    model ``number``."""
    padded = np.zeros((16 * -(-len(sequences) // 16), 24), np.int32)
    for row, tokens in zip(padded, sequences, strict=False):
        row[: len(tokens)] = tokens
    logits = np.asarray(_full(peer.CONFIG, peer.decoder(number).params, padded))
    return _log_softmax([logits[row, len(tokens) - 1] for row, tokens in enumerate(sequences)])


# Settings that differ in everything that a batch may mix.
MIXED = [
    dataclasses.replace(BEAMS, repetition_penalty=1.1),
    dataclasses.replace(
        BEAMS, length_penalty=2.0, early_stopping="never", max_new_tokens=7, repetition_penalty=0.9
    ),
    dataclasses.replace(BEAMS, early_stopping=True, num_return_sequences=2, repetition_penalty=1.5),
    dataclasses.replace(
        BEAMS, length_penalty=0.6, length_penalty_type="gnmt", repetition_penalty=1.3
    ),
]


@pytest.mark.parametrize(
    ("name", "settings"),
    [pytest.param("learned", MIXED, marks=pytest.mark.slow), ("rotary", BEAMS)],
    ids=["learned", "rotary"],
)
def test_log_probabilities_equal_full_forward_passes(request, tokenizer, name, settings):
    """Prompts of different lengths share a cache with all beams; the rotary model also shares key
    heads."""
    tiny = request.getfixturevalue(name)
    results = generate(tiny.decoder, tokenizer, PROMPTS, settings)
    assert len({(result.prompt, result.tokens) for result in results}) == len(results) >= 14
    for result in results:
        prompt = encode_prompt(tokenizer, PROMPTS[result.prompt])
        ends = (tokenizer.eos_id,) if result.finish_reason == "stop" else ()
        whole = [*prompt, *result.tokens, *ends]
        logprobs = _log_softmax(tiny.logits([whole])[0])[
            np.arange(len(prompt) - 1, len(whole) - 1), whole[len(prompt) :]
        ]
        np.testing.assert_allclose(result.logprobs, logprobs[: len(result.tokens)], atol=ROUNDING)
        if settings is BEAMS:
            assert result.score == pytest.approx(logprobs.sum() / len(logprobs), abs=ROUNDING)
        text = b"".join(map(tokenizer.token_bytes, result.tokens)).decode("utf-8", "replace")
        assert result.text in (text, text[:-1]), (
            "only a character cut in two at the end may be missing"
        )


@pytest.mark.parametrize("kind", ["searched", pytest.param("drawn", marks=pytest.mark.slow)])
def test_a_search_does_not_depend_on_the_batch(learned, tokenizer, kind):
    settings = (
        MIXED
        if kind == "searched"
        else [
            dataclasses.replace(DRAWN, temperature=temperature, seed=seed)
            for temperature, seed in ((1.0, 5), (0.7, 6), (1.5, 5), (1.0, 9))
        ]
    )
    alone = [
        generate(learned.decoder, tokenizer, [prompt], each)
        for prompt, each in zip(PROMPTS, settings, strict=True)
    ]
    batch = generate(learned.decoder, tokenizer, PROMPTS[::-1], settings[::-1])
    for prompt in range(4):
        together = [result for result in batch if result.prompt == 3 - prompt]
        assert [result.tokens for result in together] == [result.tokens for result in alone[prompt]]
        np.testing.assert_allclose(
            [result.score for result in together],
            [result.score for result in alone[prompt]],
            rtol=1e-4,
        )


def test_the_step_compiles_once_for_mixed_settings_and_all_lengths(learned, tokenizer):
    rng = np.random.default_rng(0)
    for turn in range(4):
        prompts = [rng.integers(10, 400, rng.integers(1, 16)).tolist() for _ in range(4)]
        settings = [
            dataclasses.replace(each, max_new_tokens=int(rng.integers(2, 16))) for each in MIXED
        ]
        generate(learned.decoder, tokenizer, prompts, settings)
        if turn == 0:
            before = module.advance._cache_size()
    assert module.advance._cache_size() == before


def test_one_call_mixes_greedy_sampled_and_beam_rows():
    kinds = [
        DecodeConfig(max_new_tokens=9, num_return_sequences=2, temperature=1.0),
        dataclasses.replace(BEAMS, num_return_sequences=3),
        DRAWN,
    ]
    # Long enough that alone and together they need caches of the same size.
    prompts = made.prompts((50, 53, 52))
    pieces = {}
    together = generate(
        peer.decoder(4),
        peer.Letters(),
        prompts,
        kinds,
        on_text=lambda row, text: pieces.setdefault(row, []).append(text),
    )
    assert [result.prompt for result in together] == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert [result.text for result in together] == [
        "".join(pieces.get(row, [])) for row in range(len(together))
    ]
    apart = [
        result
        for prompt, kind in zip(prompts, kinds, strict=True)
        for result in generate(peer.decoder(4), peer.Letters(), [prompt], kind)
    ]
    assert [result.tokens for result in together] == [result.tokens for result in apart]


def _all_sequences(number, prompt, longest):
    """Return (tokens, log-probability of each, ended) of every sequence of at most ``longest``
    tokens."""
    found = []
    open_ = [((), 0.0)]
    for place in range(longest):
        logprobs = _next(number, [[*prompt, *tokens] for tokens, _ in open_])
        grown = [
            ((*tokens, token), total + row[token])
            for (tokens, total), row in zip(open_, logprobs, strict=True)
            for token in range(made.VOCABULARY)
        ]
        found += [each for each in grown if each[0][-1] == made.END or place == longest - 1]
        open_ = [each for each in grown if each[0][-1] != made.END]
    return found


@pytest.mark.parametrize(
    ("kind", "exponent"), [("hf", 1.0), ("hf", 0.0), ("gnmt", 0.6), ("gnmt", 3.0)]
)
def test_beams_as_wide_as_the_vocabulary_find_the_best_sequence(kind, exponent):
    """With two tokens and a vocabulary of 13, 13 beams are an exhaustive search."""
    prompt = made.prompts((6,))[0]
    decode = DecodeConfig(
        max_new_tokens=2,
        num_beams=13,
        num_return_sequences=13,
        length_penalty=exponent,
        length_penalty_type=kind,
        early_stopping="never",
    )

    def score(each):
        length = len(each[0]) if kind == "hf" else (5 + len(each[0])) / 6
        return each[1] / length**exponent

    for number in (0, 3):
        best = sorted(_all_sequences(number, prompt, 2), key=score, reverse=True)
        results = generate(peer.decoder(number), peer.Letters(), [prompt], decode)
        assert [result.tokens for result in results[:5]] == [
            peer.cut(np.array(each[0])) for each in best[:5]
        ]
        np.testing.assert_allclose(
            [result.score for result in results[:5]], [score(each) for each in best[:5]], rtol=1e-4
        )


def _reference(number, prompt, decode):
    """Return [(tokens, score)] of a group beam search with lists and loops, also for a search
    without groups."""
    groups = decode.num_beam_groups
    beams = decode.num_beams // decode.num_beam_groups
    running = [[((), 0.0)] for _ in range(groups)]
    ended = [[] for _ in range(groups)]
    is_open = [True] * groups
    for length in range(1, decode.max_new_tokens + 1):
        written = np.zeros(made.VOCABULARY)
        for group in range(groups):
            logprobs = _next(number, [[*prompt, *tokens] for tokens, _ in running[group]])
            candidates = [
                ((*tokens, token), total + row[token] - decode.diversity_penalty * written[token])
                for (tokens, total), row in zip(running[group], logprobs, strict=True)
                for token in range(made.VOCABULARY)
            ]
            candidates = sorted(candidates, key=lambda each: -each[1])[: 2 * beams]
            hits = [
                tokens[-1] == made.END or length == decode.max_new_tokens
                for tokens, _ in candidates
            ]
            full = len(ended[group]) == beams and decode.early_stopping is True
            if is_open[group] and not full:
                ended[group] += [
                    (tokens, total / length**decode.length_penalty)
                    for (tokens, total), hit in list(zip(candidates, hits, strict=True))[:beams]
                    if hit
                ]
                ended[group] = sorted(ended[group], key=lambda each: -each[1])[:beams]
            running[group] = [each for each in candidates if each[0][-1] != made.END][:beams]
            for tokens, _ in running[group]:
                written[tokens[-1]] += 1
            if len(ended[group]) == beams:
                longest = decode.max_new_tokens if decode.early_stopping == "never" else length
                best = running[group][0][1] / longest**decode.length_penalty
                is_open[group] &= best > ended[group][-1][1]
    results = [each for group in ended for each in group]
    return sorted(results, key=lambda each: -each[1])[: decode.num_return_sequences]


def test_the_search_by_loops_equals_hugging_face():
    for early, place in ((False, 6), (True, 1), ("never", 11)):
        penalty = made.LENGTH_PENALTIES[place // 3]
        decode = DecodeConfig(
            max_new_tokens=made.NEW,
            num_beams=3,
            num_return_sequences=3,
            early_stopping=early,
            length_penalty=penalty,
        )
        found = _reference(2, made.prompts(made.PROMPTS)[0], decode)
        expected = [peer.cut(row) for row in peer.fixtures()["2/beams_3"][place, :3]]
        assert [peer.cut(np.array(tokens)) for tokens, _ in found] == expected


@pytest.mark.parametrize("groups", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_groups_equal_a_search_by_loops(groups):
    settings = [
        DecodeConfig(
            max_new_tokens=8,
            num_beams=6,
            num_return_sequences=6,
            num_beam_groups=groups,
            diversity_penalty=penalty,
            early_stopping=early,
            length_penalty=exponent,
        )
        for penalty in (0.4, 100.0)
        for early, exponent in ((False, 1.0), (True, 0.0), ("never", 2.0))
    ]
    for number in (2, 4):
        pairs = list(itertools.product(made.prompts((3, 6)), settings))
        results = generate(
            peer.decoder(number),
            peer.Letters(),
            [prompt for prompt, _ in pairs],
            [each for _, each in pairs],
        )
        for place, (prompt, decode) in enumerate(pairs):
            own = [result for result in results if result.prompt == place]
            expected = _reference(number, prompt, decode)
            assert [result.tokens for result in own] == [
                peer.cut(np.array(tokens)) for tokens, _ in expected
            ]
            np.testing.assert_allclose(
                [result.score for result in own], [score for _, score in expected], rtol=1e-4
            )


# --- stochastic beams

# With three tokens, one of them the end, two steps make seven sequences. The first step has more
# candidates than the two beams can hold.
FEW = DecodeConfig(
    max_new_tokens=2,
    temperature=0.7,
    num_beams=2,
    num_return_sequences=2,
    suppress_tokens=tuple(t for t in range(made.VOCABULARY) if t not in (2, 9, made.END)),
)


def _few_sequences(number, prompt):
    """Return {tokens with their end: probability} of the seven sequences."""
    allowed = [2, 9, made.END]

    def choices(tokens):
        logits = _next(number, [[*prompt, *tokens]])[0][allowed] / FEW.temperature
        return zip(allowed, np.exp(_log_softmax(logits)), strict=True)

    found = {}
    for first, share in choices(()):
        if first == made.END:
            found[first,] = share
        else:
            found |= {(first, second): share * rest for second, rest in choices((first,))}
    return found


def test_stochastic_beams_are_draws_without_replacement():
    """Chi-square over 2,000 draws of the first sequence, and of the ordered pairs of the first
    two."""
    prompt = made.prompts((6,))[0]
    count = 2000
    share = _few_sequences(2, prompt)
    assert (
        len(share) == 7 and min(share.values()) > 1e-3 and sum(share.values()) == pytest.approx(1)
    )
    results = generate(
        peer.decoder(2),
        peer.Letters(),
        [prompt] * count,
        [dataclasses.replace(FEW, seed=seed) for seed in range(count)],
    )
    assert len(results) == 2 * count

    def whole(result):
        return (*result.tokens, made.END) if result.finish_reason == "stop" else result.tokens

    pairs = {}
    for first, second in zip(results[::2], results[1::2], strict=True):
        assert whole(first) != whole(second)
        pairs[whole(first), whole(second)] = pairs.get((whole(first), whole(second)), 0) + 1
        for result in (first, second):
            assert result.score == pytest.approx(np.log(share[whole(result)]), abs=1e-4)
    statistic = {1: 0.0, 2: 0.0}
    for a in share:
        firsts = sum(number for (first, _), number in pairs.items() if first == a)
        statistic[1] += (firsts - share[a] * count) ** 2 / (share[a] * count)
        for b in share:
            if a != b:
                expected = count * share[a] * share[b] / (1 - share[a])
                statistic[2] += (pairs.get((a, b), 0) - expected) ** 2 / expected
    # One seed in 1,000 exceeds these with 6 and with 41 degrees of freedom.
    assert statistic[1] < 22.5 and statistic[2] < 74.7


def test_stochastic_beams_with_a_limit_draw_only_kept_tokens():
    prompt = made.prompts((6,))[0]
    limited = dataclasses.replace(
        FEW, suppress_tokens=(), top_k=2, max_new_tokens=1, num_beams=3, num_return_sequences=3
    )
    results = generate(
        peer.decoder(2),
        peer.Letters(),
        [prompt] * 20,
        [dataclasses.replace(limited, seed=seed) for seed in range(20)],
    )
    best = set(np.argsort(-_next(2, [prompt])[0])[:2].tolist())
    # Three beams were requested, but there are only two sequences.
    assert len(results) == 40
    for first, second in zip(results[::2], results[1::2], strict=True):
        assert {(*result.tokens, made.END)[0] for result in (first, second)} == best
        assert np.exp(first.score) + np.exp(second.score) == pytest.approx(1, abs=1e-4)
    assert len({result.tokens for result in results[::2]}) == 2


# --- stopping and limits


def _by_turns(tokens_BS, lengths_B, prompts_B):
    """Allow 2 and 9 alternately; after a prompt of five tokens allow nothing."""
    turn_B = jnp.where((lengths_B - prompts_B) % 2 == 1, 9, 2)
    ids_1V = jnp.arange(made.VOCABULARY)[None, :]
    return (ids_1V == turn_B[:, None]) & (prompts_B != 5)[:, None]


def test_ends_stop_sequences_and_constraints_within_beams():
    """Only one sequence is possible, so only one is returned."""
    decode = DecodeConfig(max_new_tokens=6, num_beams=3, num_return_sequences=3)
    stopping = dataclasses.replace(decode, stop_sequences=((9, 2), (4,)))
    ending = dataclasses.replace(decode, eos_token_id=(7, 9))
    free, stopped, ended, nothing = generate(
        peer.decoder(2),
        peer.Letters(),
        made.prompts((6, 6, 6, 5)),
        [decode, stopping, ending, decode],
        constraint=_by_turns,
    )
    assert (free.tokens, free.finish_reason, free.text) == ((2, 9, 2, 9, 2, 9), "length", "cjcjcj")
    assert (stopped.tokens, stopped.finish_reason, stopped.text) == ((2, 9, 2), "stop", "c")
    assert (ended.tokens, ended.finish_reason) == ((2,), "stop")
    assert (nothing.tokens, nothing.finish_reason, nothing.score) == ((), "stop", 0)


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_max_time_ends_beams(learned, tokenizer, monkeypatch, temperature):
    """The clock advances a second each time it is read: once at the start, then before every chunk
    of tokens."""
    ticks = itertools.count()
    for each in (module, stochastic, beams):
        monkeypatch.setattr(
            each, "time", types.SimpleNamespace(monotonic=lambda: float(next(ticks)))
        )
    long = dataclasses.replace(BEAMS, max_new_tokens=30, min_new_tokens=30, temperature=temperature)
    prompts = np.random.default_rng(2).integers(10, 300, (2, 33)).tolist()
    whole = generate(learned.decoder, tokenizer, prompts, long)
    results = generate(
        learned.decoder, tokenizer, prompts, [dataclasses.replace(long, max_time=1.5), long]
    )
    assert [result.finish_reason for result in results] == ["timeout"] * 4 + ["length"] * 4
    assert {len(result.tokens) for result in results[:4]} == {CHUNK + 1}
    assert results[4:] == whole[4:]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_beams_end_at_the_end_of_the_context(learned, tokenizer, temperature):
    tokens = np.random.default_rng(2).integers(10, 300, 64).tolist()
    long = dataclasses.replace(BEAMS, max_new_tokens=30, min_new_tokens=30, temperature=temperature)
    results = generate(learned.decoder, tokenizer, [tokens[:40], tokens], long)
    assert [len(result.tokens) for result in results] == [24, 24, 24, 24, 0]
    assert {result.finish_reason for result in results} == {"length"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 5}, "top_k=5 .* temperature=0 .*above 0"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"min_p": 0.1}, "min_p=0.1"),
        ({"typical_p": 0.9}, "typical_p=0.9"),
        ({"epsilon_cutoff": 0.1}, "epsilon_cutoff"),
        ({"eta_cutoff": 0.1}, "eta_c"),
        ({"num_return_sequences": 5}, "num_return_sequences=5 is above num_beams=4"),
        (
            {"num_beam_groups": 3, "diversity_penalty": 1.0},
            "num_beams=4 .* num_beam_groups=3; try num_beam_groups=2 or 4",
        ),
        ({"num_beam_groups": 2}, "num_beam_groups=2 with diversity_penalty=0"),
        ({"diversity_penalty": 1.0}, "diversity_penalty=1.0 .* num_beam_groups=1; set"),
        ({"diversity_penalty": -1.0}, "diversity_penalty=-1.0"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"length_penalty_type": "bert"}, "'bert'.* hf, gnmt"),
        ({"early_stopping": "always"}, "'always'.* never"),
        ({"length_penalty": float("nan")}, "length_penalty=nan"),
        (
            {"num_beams": 1, "num_return_sequences": 1, "length_penalty": 0.6},
            "length_penalty=0.6 .* num_beams=1; set",
        ),
        (
            {"num_beams": 1, "num_return_sequences": 1, "early_stopping": True},
            "early_stopping=True .* num_beams=1",
        ),
        ({"temperature": 1.0, "length_penalty": 0.6}, "length_penalty=0.6 .* temperature=1.0"),
        (
            {"temperature": 1.0, "num_beam_groups": 2, "diversity_penalty": 0.1},
            "num_beam_groups=2 .* temperature=1.0",
        ),
        ({"stop_strings": ("a",)}, "stop_strings .* num_beams=4 .*stop_sequences"),
    ],
)
def test_conflicting_settings_raise_an_error(learned, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(learned.decoder, tokenizer, ["The"], dataclasses.replace(BEAMS, **settings))


def test_the_cache_holds_a_prompt_once_for_all_beams(learned):
    prefix = prefill(learned.decoder, [list(range(20, 53))] * 2, 64)
    static = module.Static(beams=4, groups=1, size=16)
    search_params = module.SearchParams(
        *map(
            np.array,
            ([33, 33], [10, 10], [1.0, 1.0], [False] * 2, [False] * 2, [False] * 2, [0.0, 0.0]),
        )
    )
    state = jax.eval_shape(functools.partial(module.begin, static=static), prefix, search_params)
    # Four heads of width 8. Each prompt has 4 beams of 16 new tokens; copies of the prompts would
    # add 4 of 64 each.
    assert {x.shape for x in jax.tree.leaves(state.cache.layers)} == {(2, 4, 4 * 16, 8)}
