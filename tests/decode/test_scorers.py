"""Compare each scorer with its definition, by full forward passes or by sacrebleu."""

import math
import types

import numpy as np
import pytest
import sacrebleu

from mtnlg_jax.config import DecodeConfig, StageConfig
from mtnlg_jax.decode import pool as pool_module
from mtnlg_jax.decode import rank as rank_module
from mtnlg_jax.decode.pool import ScorerOptions
from mtnlg_jax.decode.rank import rank
from mtnlg_jax.decode.results import encode_prompt

ROUNDING = 1e-5
CANDIDATES = [
    " sat on the mat",
    " the",
    " and the dog sat on the log",
    ".",
    " 你好",
    " sat on the mat",
    " the dog",
]
DIVISORS = {
    "sum": lambda text, tokens: 1,
    "per_token": lambda text, tokens: len(tokens),
    "per_char": lambda text, tokens: len(text),
    "per_byte": lambda text, tokens: len(text.encode()),
}


def _behind(tiny, prefix, tokens):
    """Return log p of ``tokens`` after ``prefix``, by one full forward pass."""
    logits = tiny.logits([[*prefix, *tokens]])[0].astype(np.float64)[len(prefix) - 1 : -1]
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[
        np.arange(len(tokens)), list(tokens)
    ].sum()


def test_gnmt(learned, tokenizer):
    for alpha in (0.6, -1.0):
        ranked = rank(
            learned.decoder,
            tokenizer,
            "The cat",
            CANDIDATES,
            scorers="gnmt",
            options=ScorerOptions(gnmt_alpha=alpha) if alpha != 0.6 else None,
        )
        for each in ranked:
            length = len(each.tokens)
            total = _behind(learned, encode_prompt(tokenizer, "The cat"), each.tokens)
            assert each.score * ((5 + length) / 6) ** alpha == pytest.approx(
                total, abs=ROUNDING * length
            )
            assert each.score == pytest.approx(each.sum / each.parts["gnmt.penalty"])


@pytest.mark.parametrize(("neutral", "normalise"), [("", "per_token"), ("In the town", "per_byte")])
def test_pmi(tiny, tokenizer, neutral, normalise):
    ranked = rank(
        tiny.decoder,
        tokenizer,
        "The cat",
        CANDIDATES,
        scorers="pmi",
        normalise=normalise,
        options=ScorerOptions(neutral=neutral),
    )
    for each in ranked:
        with_it = _behind(tiny, encode_prompt(tokenizer, "The cat"), each.tokens)
        without = _behind(tiny, encode_prompt(tokenizer, neutral), each.tokens)
        divisor = DIVISORS[normalise](each.text, each.tokens)
        rounding = ROUNDING * len(each.tokens)
        assert each.parts["pmi.neutral"] == pytest.approx(without, abs=rounding)
        assert each.score * divisor == pytest.approx(with_it - without, abs=2 * rounding)
        assert each.score == pytest.approx((each.sum - each.parts["pmi.neutral"]) / divisor)


@pytest.mark.parametrize("normalise", ["per_token", "per_char", "sum"])
def test_noisy_channel(learned, tokenizer, normalise):
    options = ScorerOptions(
        source=" the dog",
        reverse="In {candidate} lived a{",
        neutral="天地",
        channel_weight=0.7,
        language_weight=0.3,
    )
    prompt = "The cat"
    source = tokenizer.encode(" the dog")
    ranked = rank(
        learned.decoder,
        tokenizer,
        prompt,
        CANDIDATES,
        scorers="noisy_channel",
        normalise=normalise,
        options=options,
    )
    for each in ranked:
        direct = _behind(learned, encode_prompt(tokenizer, prompt), each.tokens)
        channel = _behind(learned, encode_prompt(tokenizer, f"In {each.text} lived a{{"), source)
        language = _behind(learned, encode_prompt(tokenizer, "天地"), each.tokens)
        divisor = DIVISORS[normalise]
        expected = direct / divisor(each.text, each.tokens) + (
            0.7 * channel + 0.3 * language
        ) / divisor(" the dog", source)
        part = {name.partition(".")[2]: value for name, value in each.parts.items()}
        assert part["channel"] == pytest.approx(channel, abs=ROUNDING * len(source))
        assert part["language"] == pytest.approx(language, abs=ROUNDING * len(each.tokens))
        assert each.score == pytest.approx(
            expected, abs=ROUNDING * (len(source) + 2 * len(each.tokens))
        )
        assert each.score == pytest.approx(
            part["direct"]
            + (0.7 * part["channel"] + 0.3 * part["language"]) / part["source_length"]
        )


def test_the_noisy_channel_explains_the_prompt_by_default(learned, tokenizer):
    (each,) = rank(learned.decoder, tokenizer, "The cat", [" sat"], scorers="noisy_channel")
    expected = _behind(learned, encode_prompt(tokenizer, " sat\n"), tokenizer.encode("The cat"))
    assert each.parts["noisy_channel.channel"] == pytest.approx(expected, abs=1e-4)
    expected = _behind(learned, [tokenizer.bos_id], each.tokens)
    assert each.parts["noisy_channel.language"] == pytest.approx(expected, abs=1e-4)


def _masked_one_at_a_time(tiny, tokenizer, prefix, tokens, within_word):
    row = [*prefix, *tokens, tokenizer.eos_id]
    segments = np.zeros((1, 64), np.int32)
    segments[0, : len(row)] = 1
    total = 0.0
    hidden = []
    for place in range(len(prefix), len(row) - 1):
        masked = list(row)
        at = place
        while at == place or (
            within_word and at < len(row) - 1 and not tokenizer.starts_word[row[at]]
        ):
            masked[at] = tokenizer.mask_id
            at += 1
        hidden.append(at - place)
        logits = tiny.logits([masked], causal=False, segment_ids_BS=segments)[0, place].astype(
            np.float64
        )
        total += logits[row[place]] - np.log(np.exp(logits).sum())
    return total, hidden


@pytest.mark.parametrize("within_word", [False, True])
def test_pseudo_log_likelihood(tiny, tokenizer, within_word):
    ranked = rank(
        tiny.decoder,
        tokenizer,
        "The cat",
        CANDIDATES,
        scorers="pseudo_log_likelihood",
        options=ScorerOptions(within_word_l2r=within_word),
        stages=[StageConfig(masked=0.5)],
    )
    most = 0
    for each in ranked:
        expected, hidden = _masked_one_at_a_time(
            tiny, tokenizer, encode_prompt(tokenizer, "The cat"), each.tokens, within_word
        )
        assert each.parts["pseudo_log_likelihood.sum"] == pytest.approx(
            expected, abs=ROUNDING * len(each.tokens)
        )
        assert each.score == pytest.approx(expected / len(each.tokens), abs=ROUNDING)
        most = max(most, *hidden)
    assert (most > 1) == within_word, (
        "a word should have several pieces, else the option is not tested"
    )


@pytest.mark.parametrize(
    ("utility", "direct"),
    [
        ("chrf", sacrebleu.sentence_chrf),
        ("bleu", sacrebleu.sentence_bleu),
        (
            "bleu_zh",
            lambda text, references: sacrebleu.sentence_bleu(text, references, tokenize="zh"),
        ),
    ],
)
def test_mbr_equals_sacrebleu(learned, tokenizer, utility, direct):
    candidates = [*CANDIDATES, "天地玄黄,宇宙", "天地玄黄,日月", " the dog"]
    ranked = rank(
        learned.decoder,
        tokenizer,
        "The cat",
        candidates,
        scorers="mbr",
        options=ScorerOptions(utility=utility),
    )
    for each in ranked:
        others = [other for i, other in enumerate(candidates) if i != each.index]
        expected = np.mean([direct(each.text, [other]).score for other in others]) / 100
        assert each.score == pytest.approx(expected, abs=1e-9)
        # From the parts: every other candidate, as often as it occurred.
        row = ranked.utilities[each.rank - 1]
        again = sum(
            u * (other.count - (other is each)) for u, other in zip(row, ranked, strict=True)
        )
        assert each.score == pytest.approx(again / (ranked.size - 1))
    assert 0 < ranked[0].score <= 1


def test_other_utilities(learned, tokenizer):
    def best(candidates, utility):
        ranked = rank(
            learned.decoder,
            tokenizer,
            "The",
            candidates,
            scorers="mbr",
            options=ScorerOptions(utility=utility),
        )
        return {each.text: each.score for each in ranked}

    scores = best([" the cat sat", " The cat", " dogs, cat"], "token_f1")
    assert scores[" the cat sat"] == pytest.approx((2 * 2 / 5 + 2 * 1 / 5) / 2)
    assert scores[" The cat"] == pytest.approx((2 * 2 / 5 + 2 * 1 / 4) / 2)
    assert best(["天地玄", "天 地"], "token_f1")["天地玄"] == pytest.approx(2 * 2 / 5)
    assert best([".", "!", "."], "token_f1")["."] == pytest.approx(0.5)
    assert best([" a", "a", " b"], "exact") == {" a": 0.5, "a": 0.5, " b": 0.0}
    assert best([" aa", " b"], lambda text, reference: len(text) - len(reference)) == {
        " aa": 1.0,
        " b": -1.0,
    }


def test_self_consistency(learned, tokenizer):
    candidates = [" is 3", " was 4", " is 4", " or", " is 3", " it is 4, or 3", " be 4"]
    for pattern in (r"\d", r" (\d)"):
        ranked = rank(
            learned.decoder,
            tokenizer,
            "The",
            candidates,
            scorers="self_consistency",
            options=ScorerOptions(answer=pattern),
        )
        # 3, 4, 4, none, 3, 3 (its last), 4: a tie, which keeps the order of the candidates.
        assert [each.text for each in ranked] == [
            " is 3",
            " was 4",
            " is 4",
            " it is 4, or 3",
            " be 4",
            " or",
        ]
        assert [each.score for each in ranked] == [0.5] * 5 + [0.0]
        assert [each.answer for each in ranked] == ["3", "4", "4", "3", "4", None]
        assert [each.parts["self_consistency.votes"] for each in ranked] == [2, 1, 1, 1, 1, 0]
    weighted = rank(
        learned.decoder,
        tokenizer,
        "The",
        candidates,
        scorers="self_consistency",
        normalise="per_char",
        options=ScorerOptions(answer=r"is (\d)|be", votes="probability"),
    )
    votes = {each.text: each.count * math.exp(each.per_char) for each in weighted if each.answer}
    assert votes.keys() == {" is 3", " is 4", " it is 4, or 3"}, (
        "' be 4' matches, and has no group 1"
    )
    fours = votes[" is 4"] + votes[" it is 4, or 3"]
    for each in weighted:
        expected = {"3": votes[" is 3"], "4": fours, None: 0}[each.answer] / sum(votes.values())
        assert each.score == pytest.approx(expected)
    by_function = rank(
        learned.decoder,
        tokenizer,
        "The",
        candidates,
        scorers="self_consistency",
        options=ScorerOptions(answer=lambda text: "yes" if "is" in text else None),
    )
    assert by_function[0].score == 1.0 and by_function[-1].answer is None


ALL = {
    "logprob": 1.0,
    "gnmt": -0.5,
    "pmi": 0.5,
    "noisy_channel": 0.25,
    "pseudo_log_likelihood": 0.3,
    "mbr": 2.0,
    "self_consistency": 3.0,
}


def test_mixtures_permutations_and_blocks(learned, tokenizer):
    """A mixture is the weighted sum of its scorers. The order of candidates and the ends of blocks
    do not matter."""
    options = ScorerOptions(answer=" the")

    def of(candidates, weights, **held):
        chosen = options if "self_consistency" in weights else None
        return {
            each.text: each
            for each in rank(
                learned.decoder._replace(**held),
                tokenizer,
                "The cat",
                candidates,
                scorers=weights,
                options=chosen,
            )
        }

    mixed = of(CANDIDATES, ALL)
    alone = {name: of(CANDIDATES, name) for name in ALL}
    for text, each in mixed.items():
        assert each.score == pytest.approx(
            sum(weight * each.parts[name] for name, weight in ALL.items())
        )
        for name in ALL:
            assert each.parts[name] == pytest.approx(alone[name][text].score)
            assert alone[name][text].parts.items() <= each.parts.items()
    assert [each.rank for each in sorted(mixed.values(), key=lambda each: -each.score)] == list(
        range(1, 7)
    )

    def same(found):
        assert found.keys() == mixed.keys()
        for text, each in found.items():
            assert (each.rank, each.count) == (mixed[text].rank, mixed[text].count)
            assert each.parts == pytest.approx(mixed[text].parts, abs=1e-4)

    same(of(CANDIDATES[::-1], ALL))
    same(of(CANDIDATES, ALL, block_tokens=64))


def test_generated_candidates_accept_every_scorer(learned, letters):
    ranked = rank(
        learned.decoder,
        letters,
        "The cat",
        scorers={"logprob": 1.0, "pmi": 0.5, "mbr": 1.0},
        decode=DecodeConfig(max_new_tokens=9, temperature=1.2, num_return_sequences=7),
    )
    assert ranked.size == 7 and len(ranked.utilities) == len(ranked)
    # Up to the end of the context, where the bidirectional model needs one position for the end.
    prompt = "The cat sat on the mat and the dog"
    room = 64 - len(encode_prompt(letters, prompt))
    for name, length in (("logprob", room), ("pseudo_log_likelihood", room - 1)):
        (each,) = rank(
            learned.decoder, letters, prompt, scorers=name, decode=DecodeConfig(min_new_tokens=128)
        )
        assert len(each.tokens) == length


def test_invalid_arguments_raise_an_error(learned, tokenizer, monkeypatch):
    for room in (rank_module, pool_module):
        monkeypatch.setattr(room, "prefill", lambda *args: pytest.fail("the model began to work"))
    pool = [" cat", " dog"]

    def refused(
        message, candidates, by, prompt="The", decode=None, using=tokenizer, stages=None, **options
    ):
        with pytest.raises(ValueError, match=message):
            rank(
                learned.decoder,
                using,
                prompt,
                candidates,
                scorers=by,
                decode=decode,
                stages=stages,
                options=ScorerOptions(**options),
            )

    refused("unknown scorer 'bleurt'; choose from logprob, gnmt", pool, "bleurt")
    refused("no scorer to rank by", pool, [])
    refused("no scorer to rank by", pool, {})
    refused("the weight of pmi is nan", pool, {"logprob": 1, "pmi": math.nan})
    refused("the weight of pmi is '1'", pool, {"pmi": "1"})
    refused(r"all weights are 0 \(logprob, pmi\)", pool, {"logprob": 0, "pmi": 0.0})
    refused("gnmt_alpha=inf", pool, "gnmt", gnmt_alpha=math.inf)
    refused("gnmt_alpha=1.0 acts in gnmt alone", pool, "logprob", gnmt_alpha=1.0)
    refused("utility='bleu' acts in mbr alone", pool, ["logprob", "pmi"], utility="bleu")
    refused("neutral='' is read as what .* pmi is 0", pool, "pmi", prompt="")
    refused("the neutral context with candidate ' cat' has .* 64", pool, "pmi", neutral="天" * 63)
    refused("source=None for the prompt ''", pool, "noisy_channel", prompt="")
    refused("reverse='because' has no place", pool, "noisy_channel", reverse="because")
    refused(
        "the source behind reverse with ' cat' has .* 64", pool, "noisy_channel", source="天" * 63
    )
    refused("channel_weight=nan", pool, "noisy_channel", channel_weight=math.nan)
    refused("unknown utility='rouge'; choose one of chrf", pool, "mbr", utility="rouge")
    refused("there is 1 candidate; give or sample more", [" cat"], "mbr")
    refused(
        "num_return_sequences=1; ask for more", None, "mbr", decode=DecodeConfig(temperature=1.0)
    )
    refused("answer=None; give a pattern", pool, "self_consistency")
    refused(r"answer='\(' is not a regular expression", pool, "self_consistency", answer="(")
    refused(
        r"answer='\[0-9\]' finds none in any of the 2 candidates, such as ' cat'",
        pool,
        "self_consistency",
        answer="[0-9]",
    )
    refused("unknown votes='most'", pool, "self_consistency", answer="a", votes="most")
    refused(
        "every stage of this one is causal .*warm: masked=0.*; train a stage with masked",
        pool,
        "pseudo_log_likelihood",
        stages=[StageConfig("warm")],
    )
    refused("and the end has 65 tokens", [" sat", "天" * 62], "pseudo_log_likelihood", prompt=".")

    class Closed(types.SimpleNamespace):
        @property
        def mask_id(self):
            raise ValueError("this tokenizer has no mask token")

    refused(
        "pseudo_log_likelihood hides tokens: this tokenizer has no mask",
        pool,
        "pseudo_log_likelihood",
        using=Closed(encode=tokenizer.encode, prompt_bos=True, bos_id=tokenizer.bos_id),
    )


def test_a_score_that_is_not_finite_raises_an_error(learned, tokenizer):
    with pytest.raises(
        ValueError, match="the score of ' cat' is nan; look for numbers that are not finite"
    ):
        rank(
            learned.decoder,
            tokenizer,
            "The",
            [" cat", " dog"],
            scorers="mbr",
            options=ScorerOptions(utility=lambda text, reference: math.nan),
        )
