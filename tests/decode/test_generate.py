"""Check that rows get the model's own tokens for every batch, chunk and setting of other rows."""

import copy
import dataclasses
import itertools
import types

import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.config import DecodeConfig, acting
from mtnlg_jax.decode import cache
from mtnlg_jax.decode import generate as module
from mtnlg_jax.decode import rows as rows_module
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.results import CHUNK, encode_prompt

ROUNDING = 1e-5
GREEDY = DecodeConfig(max_new_tokens=20, min_new_tokens=20)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.5, seed=5)
PROMPTS = ["The cat", "In the town where I was", "天地", ""]


def _argmax_loop(tiny, tokenizer, prompt, count):
    """Return greedy tokens and their log-probabilities, each from a full forward pass; ends are not
    written."""
    tokens = list(prompt)
    logprobs = []
    for _ in range(count):
        logits = tiny.logits([tokens])[0, -1].astype(np.float64)
        allowed = logits.copy()
        allowed[tokenizer.vocab_size :] = -np.inf
        allowed[: tokenizer.vocab_size][tokenizer.is_special] = -np.inf
        tokens.append(int(allowed.argmax()))
        logprobs.append(logits[tokens[-1]] - np.log(np.exp(logits).sum()))
    return tokens[len(prompt) :], logprobs


def test_greedy_equals_argmax_of_full_forward_passes(tiny, tokenizer):
    results = generate(tiny.decoder, tokenizer, PROMPTS, GREEDY)
    assert len({result.tokens for result in results}) == len(PROMPTS)
    for number, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        tokens, logprobs = _argmax_loop(tiny, tokenizer, encode_prompt(tokenizer, prompt), 20)
        assert list(result.tokens) == tokens
        np.testing.assert_allclose(result.logprobs, logprobs, atol=ROUNDING)
        assert (result.prompt, result.finish_reason) == (number, "length")
        whole = b"".join(map(tokenizer.token_bytes, tokens)).decode("utf-8", "replace")
        assert result.text in (whole, whole[:-1]), (
            "only a character cut in two at the end may be missing"
        )


def test_greedy_with_a_bias_of_experts_equals_argmax_of_full_forward_passes(balanced, tokenizer):
    settings = dataclasses.replace(GREEDY, max_new_tokens=8, min_new_tokens=8)
    prompt = encode_prompt(tokenizer, PROMPTS[1])
    (result,) = generate(balanced.decoder, tokenizer, PROMPTS[1:2], settings)
    tokens, logprobs = _argmax_loop(balanced, tokenizer, prompt, 8)
    assert list(result.tokens) == tokens
    np.testing.assert_allclose(result.logprobs, logprobs, atol=ROUNDING)
    # Without the bias, other experts compute another text.
    unbiased = balanced.with_bias([0.0] * 4)
    (plain,) = generate(unbiased.decoder, tokenizer, PROMPTS[1:2], settings)
    assert plain.tokens != result.tokens
    # The weights are the scores alone: moved for all experts alike, the bias changes nothing.
    shifted = balanced.with_bias([0.25, 0.55, -0.05, 0.85])
    (moved,) = generate(shifted.decoder, tokenizer, PROMPTS[1:2], settings)
    np.testing.assert_allclose(moved.logprobs, result.logprobs, atol=ROUNDING)


def test_a_prompt_without_tokens_starts_from_bos(learned, tokenizer):
    empty, bos, text = generate(learned.decoder, tokenizer, [[], [tokenizer.bos_id], ""], GREEDY)
    assert empty.tokens == bos.tokens == text.tokens


def test_a_row_does_not_depend_on_the_batch(learned, tokenizer):
    alone = [generate(learned.decoder, tokenizer, [prompt], SAMPLED)[0] for prompt in PROMPTS]
    others = dataclasses.replace(SAMPLED, temperature=0.7, top_k=9, seed=77, repetition_penalty=1.2)
    batch = generate(
        learned.decoder, tokenizer, [*PROMPTS[::-1], *PROMPTS], [SAMPLED] * 4 + [others] * 4
    )
    assert [result.tokens for result in batch[:4]] == [result.tokens for result in alone[::-1]]
    assert all(a.tokens != b.tokens for a, b in zip(batch[4:], alone, strict=True))


def test_sequences_of_one_prompt_have_consecutive_seeds(learned, tokenizer):
    three = dataclasses.replace(SAMPLED, num_return_sequences=3)
    several = generate(learned.decoder, tokenizer, PROMPTS[:2], three)
    assert [result.prompt for result in several] == [0, 0, 0, 1, 1, 1]
    single = [
        generate(learned.decoder, tokenizer, [prompt], dataclasses.replace(SAMPLED, seed=5 + i))[0]
        for prompt in PROMPTS[:2]
        for i in range(3)
    ]
    assert [result.tokens for result in several] == [result.tokens for result in single]
    assert len({result.tokens for result in several}) == 6


def test_the_step_compiles_once_for_mixed_requests_and_all_lengths(learned, tokenizer):
    def batch(rng):
        values = [
            acting(
                DecodeConfig(
                    max_new_tokens=int(rng.integers(2, 30)),
                    temperature=t,
                    top_k=k,
                    top_p=0.9,
                    min_p=0.01,
                    typical_p=0.95,
                    repetition_penalty=1.1,
                    presence_penalty=0.1,
                    frequency_penalty=0.1,
                    no_repeat_ngram_size=n,
                    min_new_tokens=1,
                    seed=int(k),
                    epsilon_cutoff=0.001,
                    eta_cutoff=0.001,
                    stop_token_ids=(int(k),),
                    # Three or four entries of up to two tokens make one table of four.
                    logit_bias={int(k) + i: 0.5 for i in range(rng.integers(1, 3))},
                    bad_words_ids=((int(k), 9),),
                    suppress_tokens=(4,),
                )
            )
            for t, k, n in ((0.0, rng.integers(1, 50), 3), (1.3, rng.integers(1, 50), 0))
        ]
        prompts = [rng.integers(10, 400, rng.integers(1, 30)).tolist() for _ in values]
        return generate(learned.decoder, tokenizer, prompts, values)

    rng = np.random.default_rng(0)
    steps = rows_module.advance._cache_size()
    prefills = cache.prefill_rows._cache_size()
    for _ in range(6):
        batch(rng)
    assert rows_module.advance._cache_size() == steps + 1
    assert cache.prefill_rows._cache_size() <= prefills + 2  # prompts of 16 and of 32


def test_special_tokens_and_padding_ids_are_never_written(learned, tokenizer):
    hot = DecodeConfig(max_new_tokens=60, temperature=50.0, num_return_sequences=40)
    results = generate(learned.decoder, tokenizer, [""], hot)
    tokens = np.concatenate([result.tokens for result in results]).astype(int)
    assert len(tokens) > 1500 and tokens.max() < tokenizer.vocab_size
    assert not tokenizer.is_special[tokens].any()
    assert {result.finish_reason for result in results} == {"stop", "length"}, (
        "some rows should draw the end"
    )


def _ending_with(tokenizer, token):
    """Return the tokenizer with another token as its end."""
    other = copy.copy(tokenizer)
    other.eos_id = token
    return other


def test_the_end_token_stops_a_row_and_is_not_part_of_it(learned, tokenizer):
    free = generate(learned.decoder, tokenizer, PROMPTS, GREEDY)
    end = free[0].tokens[11]
    ending = dataclasses.replace(GREEDY, min_new_tokens=0)
    for result, whole in zip(
        generate(learned.decoder, _ending_with(tokenizer, end), PROMPTS, ending), free, strict=True
    ):
        at = whole.tokens.index(end) if end in whole.tokens else None
        assert result.tokens == whole.tokens[:at]
        assert result.finish_reason == ("length" if at is None else "stop")
        assert len(result.logprobs) == len(result.tokens)


def test_each_of_several_ends_of_a_tokenizer_stops_a_row(learned, tokenizer):
    """As the ends of a chat model do; a config's own ends replace all of them."""
    free = generate(learned.decoder, tokenizer, PROMPTS, GREEDY)
    other = next(token for token in free[1].tokens if token not in free[0].tokens)
    ends = (free[0].tokens[11], other)
    several = _ending_with(tokenizer, ends[0])
    several._more_ends = ends
    assert several.eos_ids == ends
    ending = dataclasses.replace(GREEDY, min_new_tokens=0)
    results = generate(learned.decoder, several, PROMPTS, ending)
    stopped = set()
    for result, whole in zip(results, free, strict=True):
        found = [whole.tokens.index(end) for end in ends if end in whole.tokens]
        at = min(found, default=None)
        assert result.tokens == whole.tokens[:at]
        assert result.finish_reason == ("length" if at is None else "stop")
        stopped |= set() if at is None else {whole.tokens[at]}
    assert stopped == set(ends)
    own = dataclasses.replace(ending, eos_token_id=ends[1:])
    (first, *_) = generate(learned.decoder, several, PROMPTS, own)
    assert first.tokens == free[0].tokens
    for beams in generate(
        learned.decoder, several, PROMPTS, dataclasses.replace(ending, num_beams=3)
    ):
        assert not set(beams.tokens) & set(ends)


def test_rows_have_their_own_ends_and_stops(learned, letters):
    """One batch with several other ends, a stop token, and a stop sequence across two chunks."""
    free = generate(learned.decoder, letters, PROMPTS, SAMPLED)
    tokens = [result.tokens for result in free]
    ends = (tokens[0][9], tokens[0][5])
    stops = (tokens[2][CHUNK - 1 : CHUNK + 2], (tokens[2][3], 9999 % letters.vocab_size))
    settings = [
        dataclasses.replace(SAMPLED, min_new_tokens=0, eos_token_id=ends),
        dataclasses.replace(SAMPLED, stop_token_ids=(tokens[1][6],)),
        dataclasses.replace(SAMPLED, stop_sequences=stops),
        SAMPLED,
    ]
    pieces = {}
    results = generate(
        learned.decoder,
        letters,
        PROMPTS,
        settings,
        on_text=lambda row, text: pieces.setdefault(row, []).append(text),
    )
    first = min(map(tokens[0].index, ends))
    second = tokens[1].index(tokens[1][6]) + 1
    third = CHUNK + 2
    assert [result.tokens for result in results] == [
        tokens[0][:first],
        tokens[1][:second],
        tokens[2][:third],
        tokens[3],
    ]
    assert [result.finish_reason for result in results] == ["stop", "stop", "stop", "length"]
    texts = [tokens[0][:first], tokens[1][: second - 1], tokens[2][: third - 3], tokens[3]]
    assert [result.text for result in results] == list(map(letters.decode, texts))
    assert ["".join(pieces[row]) for row in range(4)] == [result.text for result in results]
    assert results == generate(learned.decoder, letters, PROMPTS, settings)


def test_stops_in_the_prompt_are_ignored(learned, letters):
    """A stop that the prompt contains, or begins, is searched only in the text after it."""
    prompt = "The cat"
    (free,) = generate(learned.decoder, letters, [prompt], SAMPLED)
    known = encode_prompt(letters, prompt)
    stops = dataclasses.replace(
        SAMPLED,
        stop_strings=(prompt, prompt[-2:] + free.text[0]),
        stop_token_ids=tuple(set(known) - set(free.tokens)),
        stop_sequences=(tuple(known), (known[-1], free.tokens[0])),
    )
    assert generate(learned.decoder, letters, [prompt], stops) == [free]


def test_a_stop_string_of_the_prompt_ends_the_text_when_written_again(learned, letters):
    known = [*encode_prompt(letters, "The cat"), *letters.encode("ogi")]
    stop = letters.encode("ogi")
    written = dataclasses.replace(SAMPLED, forced_tokens=tuple(enumerate(stop, 3)))
    (free,) = generate(learned.decoder, letters, [known], written)
    at = free.text.index("ogi")
    assert at > 0
    (result,) = generate(
        learned.decoder, letters, [known], dataclasses.replace(written, stop_strings=("ogi",))
    )
    assert result.text == free.text[:at] and result.finish_reason == "stop"


def test_max_time_ends_only_its_row(learned, tokenizer, monkeypatch):
    """The clock advances a second each time it is read: once at the start, then before every chunk
    of tokens."""
    free = generate(learned.decoder, tokenizer, PROMPTS, GREEDY)
    ticks = itertools.count()
    monkeypatch.setattr(
        rows_module, "time", types.SimpleNamespace(monotonic=lambda: float(next(ticks)))
    )
    settings = [
        dataclasses.replace(GREEDY, max_time=1.5),
        GREEDY,
        dataclasses.replace(GREEDY, max_time=99.0),
        GREEDY,
    ]
    results = generate(learned.decoder, tokenizer, PROMPTS, settings)
    assert results[1:] == free[1:]
    assert (
        results[0].finish_reason == "timeout" and results[0].tokens == free[0].tokens[: 1 + CHUNK]
    )


def _words_of_three(tokens_BS, lengths_B, prompts_B):
    """Constrain tokens by a grammar: two of 100 to 109, one of 110 to 119, and so on; nothing after
    seven."""
    place_B1 = (lengths_B - prompts_B)[:, None]
    low_B1 = jnp.where(place_B1 % 3 == 2, 110, 100)
    ids_1V = jnp.arange(437)[None, :]
    return (ids_1V >= low_B1) & (ids_1V < low_B1 + 10) & (place_B1 < 7)


def test_a_constraint_enforces_its_grammar(learned, tokenizer):
    results = generate(
        learned.decoder, tokenizer, PROMPTS, [SAMPLED, GREEDY] * 2, constraint=_words_of_three
    )
    for result in results:
        assert [token // 10 for token in result.tokens] == [10, 10, 11, 10, 10, 11, 10]
        assert result.finish_reason == "stop"
        assert max(result.logprobs) < 0, "of the model's own distribution"


def test_min_new_tokens_delays_the_end(learned, tokenizer):
    end = generate(learned.decoder, tokenizer, ["The cat"], GREEDY)[0].tokens[0]
    (result,) = generate(
        learned.decoder,
        _ending_with(tokenizer, end),
        ["The cat"],
        dataclasses.replace(GREEDY, min_new_tokens=6),
    )
    assert len(result.tokens) >= 6 and end not in result.tokens


def test_a_row_without_allowed_tokens_ends(learned, tokenizer):
    """All but three tokens are special, so no token is left for the fourth position."""
    narrow = copy.copy(tokenizer)
    narrow.is_special = np.ones(tokenizer.vocab_size, bool)
    narrow.is_special[[100, 101, 102]] = False
    (result,) = generate(
        learned.decoder, narrow, [""], dataclasses.replace(GREEDY, no_repeat_ngram_size=1)
    )
    assert sorted(result.tokens) == [100, 101, 102] and result.finish_reason == "stop"


def test_generation_ends_at_the_end_of_the_context(learned, tokenizer):
    tokens = np.random.default_rng(2).integers(10, 300, 64).tolist()
    short, full = generate(learned.decoder, tokenizer, [tokens[:59], tokens], GREEDY)
    assert len(short.tokens) == 5 and short.finish_reason == "length"
    assert full.tokens == () and full.finish_reason == "length"
    assert list(short.tokens) == _argmax_loop(learned, tokenizer, tokens[:59], 5)[0]


@pytest.mark.parametrize("decode", [GREEDY, SAMPLED])
def test_streamed_text_equals_text_at_once(learned, tokenizer, decode):
    pieces = {}
    streamed = generate(
        learned.decoder,
        tokenizer,
        PROMPTS,
        decode,
        on_text=lambda row, text: pieces.setdefault(row, []).append(text),
    )
    assert streamed == generate(learned.decoder, tokenizer, PROMPTS, decode)
    assert [result.text for result in streamed] == [
        "".join(pieces[row]) for row in range(len(PROMPTS))
    ]
    assert all(len(parts) > 3 for parts in pieces.values())


def test_stop_strings_span_tokens_and_chunks(learned, letters):
    (free,) = generate(learned.decoder, letters, ["The cat"], SAMPLED)
    before = letters.decode(free.tokens[: CHUNK + 1])  # one token comes before the first chunk
    for width in (1, 2, 4):
        stop = free.text[len(before) - width : len(before) + width]
        end = free.text.index(stop)
        shown = []
        (result,) = generate(
            learned.decoder,
            letters,
            ["The cat"],
            dataclasses.replace(SAMPLED, stop_strings=(stop, "never written")),
            on_text=lambda _, text, shown=shown: shown.append(text),
        )
        assert result.text == "".join(shown) == free.text[:end]
        assert result.finish_reason == "stop"
        assert result.tokens == free.tokens[: len(result.tokens)]
        assert len(result.logprobs) == len(result.tokens)


def test_work_ends_when_all_rows_have_stopped(learned, letters, monkeypatch):
    calls = []
    advance = rows_module.advance
    monkeypatch.setattr(
        rows_module, "advance", lambda *args, **static: calls.append(1) or advance(*args, **static)
    )
    (free,) = generate(
        learned.decoder, letters, ["The cat"], SAMPLED, on_text=lambda row, text: None
    )
    assert len(calls) == 3  # 1 + 3 x CHUNK reach 20 tokens
    calls.clear()
    generate(
        learned.decoder,
        letters,
        ["The cat"],
        dataclasses.replace(SAMPLED, stop_strings=(free.text[:2],)),
    )
    assert len(calls) <= 1


def test_a_row_that_stops_does_not_end_the_others(learned, letters):
    free = generate(learned.decoder, letters, PROMPTS, SAMPLED)
    stop = free[0].text[3:8]
    assert not any(stop in result.text for result in free[1:])
    first, *others = generate(
        learned.decoder, letters, PROMPTS, dataclasses.replace(SAMPLED, stop_strings=(stop,))
    )
    assert first.text == free[0].text[:3] and others == free[1:]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": 1.0}, "min_p=1.0"),
        ({"typical_p": 0.0}, "typical_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"min_new_tokens": 200}, "min_new_tokens=200"),
        ({"stop_strings": ("",)}, "stop string"),
        ({"seed": -1}, "seed=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"epsilon_cutoff": 1.0}, "epsilon_cutoff=1.0"),
        ({"eta_cutoff": -0.1}, "eta_cutoff=-0.1"),
        ({"min_length": -1}, "min_length=-1"),
        ({"max_time": 0.0}, "max_time=0.0"),
        ({"bad_words_ids": ((5,), ())}, "bad_words_ids has a sequence without tokens"),
        ({"stop_sequences": ((),)}, "stop_sequences has a sequence without tokens"),
        ({"sequence_bias": (((), 1.0),)}, "sequence_bias has a sequence without tokens"),
        ({"bad_words_ids": (5,)}, r"bad_words_ids=5 is int; it must be tuple\[int"),
        ({"logit_bias": {5: float("nan")}}, "bias of 5=nan"),
        ({"logit_bias": {5: float("inf")}}, "bias of 5=inf"),
        ({"forced_tokens": ((128, 5),)}, "forced_tokens.*128"),
        (
            {"forced_bos_token_id": 5, "suppress_tokens": (4, 5)},
            "token 5 is both forced and in suppress_tokens",
        ),
        ({"eos_token_id": 9999}, "eos_token_id has token 9999.* 0 to "),
        ({"eos_token_id": (3, -1)}, "eos_token_id .*-1"),
        ({"stop_token_ids": (9999,)}, "stop_token_ids has token 9999"),
        ({"logit_bias": {9999: 1.0}}, "logit_bias .*9999"),
        ({"stop_sequences": ((1, 9999),)}, "stop_sequences .*9999"),
        ({"forced_eos_token_id": 9999}, "forced_eos.*9999"),
        ({"bad_words_ids": ((1, 9999),)}, "bad_words_ids .*9999"),
        ({"suppress_tokens": (9999,)}, "suppress_tokens .*9999"),
        ({"sequence_bias": {(1, 9999): 1.0}}, "sequence_bias .*9999"),
    ],
)
def test_settings_out_of_range_raise_an_error(learned, tokenizer, monkeypatch, setting, message):
    monkeypatch.setattr(module, "prefill", None)  # raised before any work
    with pytest.raises(ValueError, match=message):
        generate(learned.decoder, tokenizer, ["The"], DecodeConfig(**setting))


def test_invalid_prompts_raise_an_error(learned, tokenizer):
    with pytest.raises(ValueError, match="65 tokens .* 64; shorten"):
        generate(learned.decoder, tokenizer, [[5] * 65], GREEDY)
    with pytest.raises(ValueError, match="token 9999 .* 0 to"):
        generate(learned.decoder, tokenizer, [[5, 9999]], GREEDY)
    with pytest.raises(ValueError, match="1 settings for 2 prompts"):
        generate(learned.decoder, tokenizer, ["a", "b"], [GREEDY])
    assert generate(learned.decoder, tokenizer, [], GREEDY) == []
