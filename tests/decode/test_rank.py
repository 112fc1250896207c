"""Check rankings: scores of full forward passes, sorted, for candidates of any length and
boundary."""

import copy
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtnlg_jax.config import DecodeConfig, ModelConfig
from mtnlg_jax.decode import cache, pool, scoring
from mtnlg_jax.decode import rank as module
from mtnlg_jax.decode.cache import Decoder, unstack
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.rank import rank
from mtnlg_jax.decode.results import encode_prompt
from mtnlg_jax.model.transformer import abstract_model

ROUNDING = 1e-5
SAMPLED = DecodeConfig(max_new_tokens=9, temperature=1.2, num_return_sequences=7)


def _full_scores(tiny, prefix, tokens):
    """Return the log-probability of each of ``tokens`` after ``prefix``, from one full forward
    pass."""
    logits = tiny.logits([[*prefix, *tokens]])[0].astype(np.float64)
    logits = logits[len(prefix) - 1 : -1]
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[
        np.arange(len(tokens)), list(tokens)
    ]


CANDIDATES = [
    " sat on the mat",
    " the",
    " and the dog sat on the log.\nIn the town",
    ".",
    " 你好",
    " and",
]


@pytest.mark.parametrize(
    "prompt", ["The cat", "天地玄黄,", "In the town where I was born lived a man"]
)
def test_scores_equal_full_forward_passes(tiny, tokenizer, prompt):
    ranked = rank(tiny.decoder, tokenizer, prompt, CANDIDATES)
    assert {each.text for each in ranked} == set(CANDIDATES)
    assert {len(each.tokens) for each in ranked} >= {1}, (
        "one-token candidates are a case of their own"
    )
    for each in ranked:
        assert CANDIDATES[each.index] == each.text
        whole = encode_prompt(tokenizer, prompt + each.text)
        assert whole[-len(each.tokens) :] == list(each.tokens)
        total = _full_scores(tiny, whole[: -len(each.tokens)], each.tokens).sum()
        assert each.sum == pytest.approx(total, abs=ROUNDING * len(each.tokens))
        assert each.per_token == each.sum / len(each.tokens) == each.score
        assert each.per_char == each.sum / len(each.text)
        assert each.per_byte == each.sum / len(each.text.encode())
    assert [each.score for each in ranked] == sorted((each.score for each in ranked), reverse=True)


@pytest.mark.parametrize("normalise", module.NORMALIZATIONS)
def test_candidates_are_sorted_by_the_requested_score(learned, tokenizer, normalise):
    ranked = rank(learned.decoder, tokenizer, "The cat", CANDIDATES, normalise=normalise)
    assert [each.score for each in ranked] == sorted([getattr(each, normalise) for each in ranked])[
        ::-1
    ]


def test_each_token_of_a_block_and_an_empty_prompt(tiny, tokenizer):
    """After <bos> alone, no key of the shared prefix is visible to the block."""
    prefix = cache.prefill(tiny.decoder, [[tokenizer.bos_id]], 64)
    candidates = [[50], list(range(60, 90)), [70, 80, 90]]
    for scored, tokens in zip(
        scoring.score(tiny.decoder, prefix, candidates), candidates, strict=True
    ):
        np.testing.assert_allclose(
            scored, _full_scores(tiny, [tokenizer.bos_id], tokens), atol=ROUNDING
        )


def test_a_block_up_to_the_end_of_the_context(tiny):
    prefix_tokens = list(range(50, 100))
    tokens = list(range(200, 214))
    prefix = cache.prefill(tiny.decoder, [prefix_tokens], 64)
    (scored,) = scoring.score(tiny.decoder, prefix, [tokens])
    np.testing.assert_allclose(scored, _full_scores(tiny, prefix_tokens, tokens), atol=ROUNDING)


def test_sampled_candidates_come_from_one_prefill_and_score_as_given_ones(
    learned, tokenizer, monkeypatch
):
    calls = []
    monkeypatch.setattr(
        module,
        "prefill",
        lambda *args, **ahead: calls.append(args) or cache.prefill(*args, **ahead),
    )
    ranked = rank(learned.decoder, tokenizer, "The cat", decode=SAMPLED)
    assert len(calls) == 1 and len(calls[0][1]) == 1
    assert sum(each.count for each in ranked) == 7 and len(ranked) > 3
    for each in ranked:
        total = _full_scores(learned, encode_prompt(tokenizer, "The cat"), each.tokens).sum()
        assert each.sum == pytest.approx(total, abs=ROUNDING * len(each.tokens))
        assert 1 <= len(each.tokens) <= 9


def test_equal_candidates_are_merged_and_ties_keep_their_order(learned, tokenizer, monkeypatch):
    ranked = rank(learned.decoder, tokenizer, "The cat", [" sat", " on", " sat", " sat"])
    assert {(each.text, each.count, each.index) for each in ranked} == {
        (" sat", 3, 0),
        (" on", 1, 1),
    }
    monkeypatch.setattr(
        module, "score_from", lambda decoder, prefix, rows, starts: [np.full(1, -1.0) for _ in rows]
    )
    ranked = rank(learned.decoder, tokenizer, "The cat", [" dog", " and", " cat"], normalise="sum")
    assert [each.text for each in ranked] == [" dog", " and", " cat"]


# Prompts with some candidates that join the prompt's last tokens, and others that do not.
SEAMS = [
    ("The ca", ["t sat", " on", "n", "t"]),
    ("天地", ["玄黄,好", "好", "玄", "天"]),
    ("The", ["y", " rain", " r", "n"]),
    ("In the town wh", ["ere I was", "at", "ere", "o "]),
    ("The cat 你", ["好", "!", " sat"]),
]


@pytest.mark.parametrize(("prompt", "candidates"), SEAMS)
def test_a_score_does_not_depend_on_the_other_candidates(learned, tokenizer, prompt, candidates):
    """Alone, among others, in another order and with another one added, it has the same tokens,
    text and scores."""
    alone = {text: rank(learned.decoder, tokenizer, prompt, [text])[0] for text in candidates}
    for ranked in (
        rank(learned.decoder, tokenizer, prompt, candidates),
        rank(learned.decoder, tokenizer, prompt, candidates[::-1]),
        rank(learned.decoder, tokenizer, prompt, [*candidates[1:], " and the dog", candidates[1]]),
    ):
        for each in ranked:
            one = alone.get(each.text, each)
            assert (each.tokens, each.scored) == (one.tokens, one.scored)
            assert each.sum == pytest.approx(one.sum, abs=1e-4)
            assert each.score == pytest.approx(one.score, abs=1e-4)
    before = encode_prompt(tokenizer, prompt)
    for text, each in alone.items():
        whole = encode_prompt(tokenizer, prompt + text)
        prefix = whole[: len(whole) - len(each.tokens)]
        assert prefix == before[: len(prefix)] and whole[len(prefix) :] == list(each.tokens)
        assert each.sum == pytest.approx(_full_scores(learned, prefix, each.tokens).sum(), abs=1e-4)
        # All four scores are of one text that ends with the candidate.
        assert each.scored == tokenizer.decode(each.tokens) and each.scored.endswith(text)
        assert each.per_token == each.sum / len(each.tokens)
        assert each.per_char == each.sum / len(each.scored)
        assert each.per_byte == each.sum / len(each.scored.encode())
        if whole[: len(before)] == before:
            assert (each.scored, len(prefix)) == (text, len(before)), (
                "nothing of the prompt is scored"
            )


def test_the_cases_include_candidates_that_join_the_prompt(tokenizer):
    joining = [
        encode_prompt(tokenizer, prompt + text)[: len(encode_prompt(tokenizer, prompt))]
        != encode_prompt(tokenizer, prompt)
        for prompt, candidates in SEAMS
        for text in candidates
    ]
    assert 4 <= sum(joining) <= len(joining) - 4


def test_a_distant_boundary_has_its_own_block(learned, tokenizer, monkeypatch):
    """Tokens are read again only if starts are close together; otherwise nothing changes."""
    rows = [[2, *range(40, 70), 5], [2, *range(40, 62), 9, 9], [2, *range(40, 70), 7, 8]]
    starts = [31, 23, 31]
    blocks = []
    original = scoring.score
    prefix = cache.prefill(learned.decoder, [rows[0][:31]], 64)
    monkeypatch.setattr(
        scoring, "score", lambda *args: blocks.append(len(args[2])) or original(*args)
    )
    for near, expected in ((16, [3]), (4, [1, 2])):
        monkeypatch.setattr(scoring, "NEAR", near)
        blocks.clear()
        found = scoring.score_from(learned.decoder, prefix, rows, starts)
        for row, start, scored in zip(rows, starts, found, strict=True):
            np.testing.assert_allclose(
                scored, _full_scores(learned, row[:start], row[start:]), atol=ROUNDING
            )
        assert blocks == expected


def test_characters_split_across_tokens_count_once(learned, tokenizer):
    """The bytes of a character that the vocabulary lacks are tokens; lengths count characters and
    bytes."""
    (each,) = rank(learned.decoder, tokenizer, "The", [" 你好"])
    assert len(each.tokens) > 5 and each.scored == " 你好"
    assert each.sum == pytest.approx(each.per_char * 3) == pytest.approx(each.per_byte * 7)


def test_generated_candidates_are_scored_by_the_text_of_their_tokens(learned, letters):
    """This also holds if a stop is removed from the shown text."""
    tokenizer = letters
    stop = tokenizer.encode(" the")[0]
    ranked = rank(
        learned.decoder,
        tokenizer,
        "The cat",
        normalise="per_char",
        decode=dataclasses.replace(
            SAMPLED, stop_token_ids=(stop,), logit_bias=((stop, 6.0),), num_return_sequences=12
        ),
    )
    assert any(each.tokens[-1] == stop for each in ranked)
    for each in ranked:
        content = b"".join(map(tokenizer.token_bytes, each.tokens))
        assert each.per_byte == pytest.approx(each.sum / max(len(content), 1))
        if each.tokens[-1] == stop:
            assert each.scored == each.text + " the"


def test_a_space_at_the_end_of_the_prompt_moves_to_the_candidates(learned, tokenizer):
    """Scores equal those with the space before each candidate."""
    for space in (" ", "  ", "\n"):
        ours, theirs = (
            rank(
                learned.decoder,
                tokenizer,
                prompt,
                candidates,
                scorers={"logprob": 1, "pmi": 1},
                normalise="per_char",
                options=pool.ScorerOptions(neutral="In the town"),
            )
            for prompt, candidates in (
                (f"The{space}", ["cat", "dog"]),
                ("The", [f"{space}cat", f"{space}dog"]),
            )
        )
        for one, other in zip(ours, theirs, strict=True):
            assert space + one.text == other.text == one.scored == other.scored
            assert (one.sum, one.per_char, one.score) == (other.sum, other.per_char, other.score)


def test_candidates_of_an_empty_prompt_follow_bos(learned, tokenizer):
    """As with GPT-2's tokenizer: an empty prompt, or a candidate that changes the first token of
    the prompt."""
    other = copy.copy(tokenizer)
    other.prompt_bos = False
    seen = []
    for prompt, candidates in (("", ["The cat", "天地", "on"]), ("T", ["he cat", "own", "."])):
        ranked = rank(learned.decoder, other, prompt, candidates)
        assert len(ranked) == 3
        for each in ranked:
            whole = tokenizer.encode(prompt + each.text)
            before = whole[: -len(each.tokens)]
            assert before == tokenizer.encode(prompt)[: len(before)] and whole[
                len(before) :
            ] == list(each.tokens)
            total = _full_scores(learned, before or [tokenizer.bos_id], each.tokens).sum()
            assert each.sum == pytest.approx(total, abs=1e-4)
            seen.append(bool(before))
    assert sorted(set(seen[3:])) == [False, True], (
        "one joins the first token of the prompt, the others do not"
    )
    (each,) = rank(learned.decoder, other, "The cat", [" sat"])
    total = _full_scores(learned, tokenizer.encode("The cat"), each.tokens).sum()
    assert each.sum == pytest.approx(total, abs=1e-4), "no <bos> where none is due"


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="beams", marks=pytest.mark.slow),
        pytest.param({"num_beam_groups": 2, "diversity_penalty": 0.5}, id="diverse"),
    ],
)
def test_beams_are_candidates_in_one_call(learned, tokenizer, settings):
    """All beams are candidates if num_return_sequences is not set."""
    decode = DecodeConfig(max_new_tokens=5, min_new_tokens=1, num_beams=4, **settings)
    written = generate(
        learned.decoder, tokenizer, ["The cat"], dataclasses.replace(decode, num_return_sequences=4)
    )
    ranked = rank(learned.decoder, tokenizer, "The cat", decode=decode)
    assert ranked.size == 4 == len(written)
    assert {each.tokens for each in ranked} == {result.tokens for result in written}
    for each in ranked:
        total = _full_scores(learned, encode_prompt(tokenizer, "The cat"), each.tokens).sum()
        assert each.sum == pytest.approx(total, abs=ROUNDING * len(each.tokens))
    two = rank(
        learned.decoder,
        tokenizer,
        "The cat",
        decode=dataclasses.replace(decode, num_return_sequences=2),
    )
    assert {each.tokens for each in two} == {result.tokens for result in written[:2]}


class Letters:
    """A tokenizer of three letters."""

    prompt_bos = False
    bos_id = 0
    eos_id = 0
    eos_ids = (0,)

    def encode(self, text):
        return ["abc".index(letter) for letter in text]

    def token_bytes(self, token):
        return "abc"[token].encode()


def test_ranking_all_sequences_finds_the_most_probable():
    """With three tokens all sequences of a length can be ranked: their probabilities sum to 1, the
    first is the most probable one, and greedy search does not find it."""
    config = ModelConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        vocab_size=3,
        max_position_embeddings=16,
    )
    rng = np.random.default_rng(14)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), abstract_model(config)[1]
    )
    texts = ["".join(letters) for letters in itertools.product("abc", repeat=4)]
    ranked = rank(unstack(config, params), Letters(), "ab", texts, normalise="sum")
    rows = np.array([Letters().encode("ab" + text) for text in texts])
    logits = np.asarray(nnx.merge(abstract_model(config)[0], params)(rows)).astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    true = np.take_along_axis(logs[:, 1:5], rows[:, 2:, None], 2).sum((1, 2))
    assert np.exp([each.sum for each in ranked]).sum() == pytest.approx(1, abs=1e-4)
    behind_bos = [
        each.parts["pmi.neutral"]
        for each in rank(unstack(config, params), Letters(), "ab", texts, scorers="pmi")
    ]
    assert np.exp(behind_bos).sum() == pytest.approx(1, abs=1e-4)
    assert ranked[0].text == texts[int(true.argmax())]
    assert [each.index for each in ranked] == np.argsort(-true, kind="stable").tolist()
    greedy = "ab"
    for _ in range(4):
        greedy += "abc"[int(logs[texts.index((greedy[2:] + "aaaa")[:4]), len(greedy) - 1].argmax())]
    assert ranked[0].text != greedy[2:], (
        "the seed should fool the greedy choice, else this tests little"
    )


def test_permuted_candidates_give_permuted_results(learned, tokenizer):
    order = [3, 0, 5, 1, 4, 2]
    first = rank(learned.decoder, tokenizer, "The cat", CANDIDATES)
    second = rank(learned.decoder, tokenizer, "The cat", [CANDIDATES[i] for i in order])
    assert [each.text for each in first] == [each.text for each in second]
    assert [each.rank for each in first] == [1, 2, 3, 4, 5, 6]
    assert [order[each.index] for each in second] == [each.index for each in first]
    np.testing.assert_allclose(
        [each.score for each in first], [each.score for each in second], atol=ROUNDING
    )


def test_a_ranking_reports_its_pool(learned, tokenizer):
    ranked = rank(learned.decoder, tokenizer, "The cat", [" sat", " on", " sat", " sat", " on"])
    assert (ranked.size, ranked.duplicates, len(ranked)) == (5, 3, 2)
    assert ranked.weights == {"logprob": 1.0} and ranked.normalise == "per_token"


def test_lengths_of_chinese_text_are_exact(learned, tokenizer):
    (each,) = rank(learned.decoder, tokenizer, "天地", ["玄黄,好"])
    assert each.scored == "天地玄黄,好", "one token: the candidate joins the prompt"
    assert each.sum == pytest.approx(each.per_char * 6) == pytest.approx(each.per_byte * 16)
    (each,) = rank(learned.decoder, tokenizer, "天", ["黄,好"])
    assert each.sum == pytest.approx(each.per_char * 3) == pytest.approx(each.per_byte * 7)


@pytest.mark.parametrize(
    ("lengths", "limit"),
    [([3, 70, 5, 5, 200], 256), (list(range(1, 65)) * 20, 64), ([900], 1000), ([7] * 5000, 16)],
)
@pytest.mark.parametrize("block_tokens", [4096, 1024])
def test_blocks_are_bounded_and_have_few_shapes(lengths, limit, block_tokens):
    decoder = Decoder(ModelConfig(max_position_embeddings=limit), (), block_tokens=block_tokens)
    blocks = list(scoring.blocks(lengths, decoder))
    assert sorted(i for chosen, _, _ in blocks for i in chosen) == list(range(len(lengths)))
    for chosen, rows, width in blocks:
        assert len(chosen) <= rows < 2 * len(chosen) and rows & (rows - 1) == 0
        assert max(lengths[i] for i in chosen) <= width <= limit
        assert rows * width <= block_tokens or rows == 1
    assert len({block[1:] for block in blocks}) <= 6


def test_invalid_arguments_raise_an_error(learned, tokenizer, monkeypatch):
    for room in (module, pool):
        monkeypatch.setattr(room, "prefill", lambda *args: pytest.fail("the model began to work"))

    def refused(message, *args, **options):
        with pytest.raises(ValueError, match=message):
            rank(learned.decoder, tokenizer, *args, **options)

    refused("candidate 2 of 3 is empty", "The", [" cat", "", " dog"])
    refused("no candidates", "The", [])
    refused("candidates=' cat' is one text", "The", " cat")
    refused("candidate 2 of 2, .* is not Unicode", "The", [" cat", " \udc80"])
    refused("normalise='mean'", "The", [" cat"], normalise="mean")
    refused(
        "num_return_sequences=3 .* would write the same text",
        "The",
        decode=DecodeConfig(num_return_sequences=3),
    )
    refused("tokens .* 64; shorten", "The", [" cat", " mat" * 70])
    refused("tokens .* 64; shorten", "天" * 64, decode=SAMPLED)
    refused("decode writes candidates, and 1 are given", "The", [" cat"], decode=SAMPLED)
    refused("num_beams", "The", decode=DecodeConfig(num_beams=2, num_return_sequences=3))
    refused("token 9999", "The", decode=dataclasses.replace(SAMPLED, suppress_tokens=(9999,)))
