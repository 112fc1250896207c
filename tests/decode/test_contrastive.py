"""Contrastive search beside a search that recomputes everything, and beside Hugging Face's."""

import dataclasses
import json
from pathlib import Path

import jax
import make_contrastive as theirs
import numpy as np
import peer
import pytest
from flax import nnx

from mtnlg_jax.config import DecodeConfig, MeshConfig
from mtnlg_jax.decode.cache import prefill, unstack
from mtnlg_jax.decode.generate import continue_prefix, generate
from mtnlg_jax.decode.repetition import sequence_repetition
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import make_mesh

FILE = Path(__file__).parent / "fixtures" / "contrastive.npz"
PROMPTS = ["The cat sat", "In the town where I was born", "天地"]
SEARCH = DecodeConfig(penalty_alpha=0.6, top_k=4, max_new_tokens=12)


@pytest.mark.parametrize("number", range(len(theirs.made.MODELS)))
def test_tokens_equal_hugging_face(number):
    with np.load(FILE) as file:
        found = dict(file)
    assert json.loads(str(found["settings"])) == theirs.SETTINGS, "run make_contrastive.py again"
    prompts = []
    configs = []
    expected = []
    for at, settings in enumerate(theirs.SETTINGS):
        prompts += theirs.prompts_of(settings)
        configs += [DecodeConfig(max_new_tokens=theirs.made.NEW, **settings)] * len(
            theirs.prompts_of(settings)
        )
        expected += list(map(peer.cut, found[f"{number}/{at}"]))
    # One batch: rows with different numbers of candidates share the step.
    results = generate(peer.decoder(number), peer.Letters(), prompts, configs)
    assert [result.tokens for result in results] == expected
    assert len(set(expected)) > len(expected) / 2


def _recomputed(tiny, tokenizer, prompt, config) -> list[int]:
    """Search by the definition; every step reads every candidate's whole text anew."""
    model = nnx.merge(abstract_model(tiny.config)[0], tiny.params)
    hidden = jax.jit(lambda tokens: model.hidden(tokens))
    known = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    start = len(known)
    never = tokenizer.is_special.copy()
    never[tokenizer.eos_id] = False
    while len(known) < start + config.max_new_tokens:
        logits = tiny.logits([known])[0, -1].astype(np.float64)[: tokenizer.vocab_size]
        logits[never] = -np.inf
        odds = np.exp(logits - logits.max())
        odds /= odds.sum()
        best = {}
        for token in np.argsort(-odds, kind="stable")[: config.top_k].tolist():
            text = np.zeros((1, 64), np.int32)
            text[0, : len(known) + 1] = [*known, token]
            states = np.asarray(hidden(text), np.float64)[0, : len(known) + 1]
            states /= np.linalg.norm(states, axis=-1, keepdims=True)
            worst = max(states[-1] @ each for each in states[:-1])
            alpha = config.penalty_alpha
            best[token] = (1 - alpha) * odds[token] - alpha * worst
        token = max(best, key=best.__getitem__)
        if token == tokenizer.eos_id:
            break
        known.append(token)
    return known[start:]


@pytest.mark.parametrize(
    "model", ["learned", "windowed", pytest.param("rotary", marks=pytest.mark.slow)]
)
def test_equals_a_search_that_recomputes_everything(request, tokenizer, model):
    tiny = request.getfixturevalue(model)
    others = [SEARCH, dataclasses.replace(SEARCH, penalty_alpha=0.2, top_k=7), SEARCH]
    results = generate(tiny.decoder, tokenizer, PROMPTS, others)
    for prompt, config, result in zip(PROMPTS, others, results, strict=True):
        assert list(result.tokens) == _recomputed(tiny, tokenizer, prompt, config)
    # The comparison can fail: without the penalty the text is another one.
    greedy = generate(tiny.decoder, tokenizer, PROMPTS, DecodeConfig(max_new_tokens=12))
    assert [each.tokens for each in greedy] != [each.tokens for each in results]


def test_log_probabilities_are_the_model_s_own(learned, tokenizer):
    (result,) = generate(learned.decoder, tokenizer, PROMPTS[:1], SEARCH)
    row = [tokenizer.bos_id, *tokenizer.encode(PROMPTS[0]), *result.tokens]
    logits = learned.logits([row])[0].astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    start = len(row) - len(result.tokens)
    expected = [logits[at - 1, row[at]] for at in range(start, len(row))]
    np.testing.assert_allclose(result.logprobs, expected, atol=1e-4)


def test_rows_do_not_depend_on_their_batch(learned, tokenizer):
    """Contrastive rows, sampled rows and beams of one call are what each is alone."""
    configs = [
        SEARCH,
        DecodeConfig(temperature=1.0, num_return_sequences=2, max_new_tokens=9),
        dataclasses.replace(SEARCH, top_k=9, dry_multiplier=0.8, stop_strings=("e",)),
        DecodeConfig(num_beams=2, max_new_tokens=6),
    ]
    prompts = [*PROMPTS, "The"]
    pieces = {}
    together = generate(
        learned.decoder,
        tokenizer,
        prompts,
        configs,
        on_text=lambda row, text: pieces.update({row: pieces.get(row, "") + text}),
    )
    assert [result.prompt for result in together] == [0, 1, 1, 2, 3]
    assert pieces == {row: result.text for row, result in enumerate(together) if result.text}
    for number, row in ((0, 0), (2, 3)):
        (alone,) = generate(
            learned.decoder, tokenizer, prompts[number : number + 1], configs[number]
        )
        assert dataclasses.replace(alone, prompt=number).tokens == together[row].tokens
        assert alone.finish_reason == together[row].finish_reason


def test_a_forbidden_token_is_no_candidate(learned, tokenizer):
    """Where one token alone may come, it comes, however much it repeats."""
    forced = tuple((at, 30) for at in range(6))
    settings = dataclasses.replace(SEARCH, forced_tokens=forced, max_new_tokens=6)
    (result,) = generate(learned.decoder, tokenizer, PROMPTS[:1], settings)
    assert result.tokens == (30,) * 6


def test_a_row_ends_with_the_context(learned, tokenizer):
    prompts = [[25] * 60, [25] * 64]
    results = generate(learned.decoder, tokenizer, prompts, SEARCH)
    assert [len(each.tokens) for each in results] == [4, 0]
    assert {each.finish_reason for each in results} == {"length"}


def test_it_repeats_less_than_greedy_decoding(learned, tokenizer):
    long = {"max_new_tokens": 50, "min_new_tokens": 50}
    found = []
    for config in (DecodeConfig(**long), dataclasses.replace(SEARCH, **long)):
        results = generate(learned.decoder, tokenizer, PROMPTS, config)
        found.append(np.mean([sequence_repetition(each.tokens) for each in results]))
    assert found[0] > 0.5 > 2 * found[1]


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param({"data": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"pipe": 2}, marks=pytest.mark.slow),
        pytest.param({"context": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"pipe": 2, "data": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda axes: "-".join(axes),
)
def test_over_a_mesh_equals_one_device(learned, tokenizer, axes):
    mesh = make_mesh(
        MeshConfig(**{"data": 1} | axes), jax.devices()[: np.prod(list(axes.values()))]
    )
    split = unstack(learned.config, learned.params, mesh=mesh)
    settings = dataclasses.replace(SEARCH, dry_multiplier=0.5)
    expected = generate(learned.decoder, tokenizer, PROMPTS, settings)
    found = generate(split, tokenizer, PROMPTS, settings)
    assert [each.tokens for each in found] == [each.tokens for each in expected]


def test_what_it_cannot_do_is_refused(learned, windowed, tokenizer):
    for settings, named in (
        ({"temperature": 1.0}, "temperature=1.0"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"top_k": 1}, "top_k=1"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"seed": 1}, "seed=1"),
        ({"num_return_sequences": 2}, "num_return_sequences=2"),
    ):
        with pytest.raises(ValueError, match=f"{named}.*(set|leave|ask)"):
            generate(learned.decoder, tokenizer, ["a"], dataclasses.replace(SEARCH, **settings))
    with pytest.raises(ValueError, match="penalty_alpha=0.6 .* draft model"):
        generate(learned.decoder, tokenizer, ["a"], SEARCH, draft=learned.decoder)
    rounded = learned.decoder._replace(int8_cache=True)
    with pytest.raises(ValueError, match="int8 cache, and penalty_alpha=0.6"):
        generate(rounded, tokenizer, ["a"], SEARCH)
    prefix = prefill(windowed.decoder, [[25] * 9], 64, rolling=True)
    with pytest.raises(ValueError, match="keeps only the last keys.*penalty_alpha"):
        continue_prefix(windowed.decoder, tokenizer, prefix, [SEARCH])
