"""Beams over the API, beside those of `generate`."""

import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.best import score_best
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.serve import slices as slices_module
from mtnlg_jax.serve.slices import in_slices

PATH = "/v1/completions"
BEAMS = {"use_beam_search": True, "n": 3, "max_tokens": 10}
PROMPTS = ["The cat", "天地"]


def _wanted(model, prompt, **settings):
    config = DecodeConfig(
        **({"max_new_tokens": 10, "num_beams": 3, "num_return_sequences": 3} | settings)
    )
    return generate(model.decoder, model.tokenizer, [prompt], config)


@pytest.fixture(scope="module")
def ended(served):
    """Return settings under which beams end at different lengths, so that the penalty matters."""
    (best, *_) = _wanted(served.model, PROMPTS[0])
    return {"length_penalty": 0.5, "stop_token_ids": [best.tokens[3]]}


@pytest.fixture(scope="module")
def searched(served, ended):
    return served.post(PATH, prompt=PROMPTS, **ended, **BEAMS)


def test_beams_are_those_of_generate(served, searched, ended):
    model = served.model
    wanted = [each for text in PROMPTS for each in _wanted(model, text, **ended)]
    told = searched["choices"]
    assert [each["index"] for each in told] == list(range(6))
    assert [each["text"] for each in told] == [each.text for each in wanted]
    assert [each["finish_reason"] for each in told] == [each.finish_reason for each in wanted]
    other = served.post(PATH, prompt=PROMPTS, **(ended | {"length_penalty": 8.0}), **BEAMS)
    assert [each["text"] for each in other["choices"]] != [each["text"] for each in told]
    assert searched["usage"]["completion_tokens"] == sum(len(each.tokens) for each in wanted)


@pytest.mark.slow
def test_tokens_of_beams_have_alternatives(served, ended):
    model = served.model
    told = served.post(PATH, prompt=PROMPTS[0], logprobs=2, **ended, **BEAMS)["choices"]
    (first, *_) = _wanted(model, PROMPTS[0], **ended)
    prompt = model.encode(PROMPTS[0])
    *_, (score,) = score_best(model.decoder, [(*prompt, *first.tokens)], 2)
    logprobs = told[0]["logprobs"]
    assert logprobs["tokens"] == [model.piece(token) for token in first.tokens]
    assert logprobs["token_logprobs"] == pytest.approx(first.logprobs, abs=1e-4)
    for top, best in zip(logprobs["top_logprobs"], score.best[len(prompt) - 1 :], strict=True):
        assert {model.piece(token) for token in best.tolist()} <= set(top)


def test_a_stream_of_beams_joins_to_the_texts(served, searched, ended):
    options = {"include_usage": True}
    events = served.stream(PATH, prompt=PROMPTS, stream_options=options, **ended, **BEAMS)
    assert events.pop()["usage"]["completion_tokens"] == searched["usage"]["completion_tokens"]
    texts = [""] * 6
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == [each["text"] for each in searched["choices"]]


@pytest.mark.slow
def test_a_temperature_draws_the_beams(served):
    body = {"prompt": PROMPTS[0], "temperature": 1.0, "seed": 5} | BEAMS
    told = [each["text"] for each in served.post(PATH, **body)["choices"]]
    wanted = _wanted(served.model, PROMPTS[0], temperature=1.0, seed=5)
    assert told == [each.text for each in wanted] and len(set(told)) == 3
    other = served.post(PATH, **(body | {"seed": 6}))["choices"]
    assert told != [each["text"] for each in other]


@pytest.mark.slow
def test_best_of_beams_tells_the_best(served):
    told = served.post(PATH, prompt=PROMPTS[0], **(BEAMS | {"n": 1, "best_of": 3}))["choices"]
    assert [each["text"] for each in told] == [_wanted(served.model, PROMPTS[0])[0].text]


@pytest.mark.slow
def test_beams_answer_a_chat(served):
    messages = [{"role": "user", "content": "The cat"}]
    told = served.post("/v1/chat/completions", messages=messages, **BEAMS)["choices"]
    model = served.model
    prompt = model.chat.prompt(messages)
    wanted = _wanted(model, prompt, eos_token_id=model.chat.ends())
    assert [each["message"]["content"] for each in told] == [each.text for each in wanted]


@pytest.mark.slow
def test_beams_have_the_form_of_each_grammar(served):
    """Check that the second grammar is not the first one, though the program is the same."""
    for choices in (["yes", "no"], ["true", "false"]):
        told = served.post(
            PATH, prompt="The", structured_outputs={"choice": choices}, **(BEAMS | {"n": 2})
        )["choices"]
        assert sorted(each["text"] for each in told) == sorted(choices)


@pytest.mark.slow
def test_a_search_lets_others_write_in_between(served, monkeypatch):
    """Check that a search of 40 tokens is several slices, not one."""
    # None also stands for a slice that is late.
    monkeypatch.setattr(slices_module, "PATIENCE", None)
    model = served.model
    config = DecodeConfig(max_new_tokens=40, min_new_tokens=40, num_beams=2, max_time=1e6)

    def search(decoder):
        return generate(decoder, model.tokenizer, ["The cat"], config)

    slices = list(in_slices(search)(model.decoder))
    assert len(slices) > 40 / 8 and slices[-1][0].finish_reason == "length"


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"n": 1}, "n", "2 beams or more"),
        ({"stop": "a"}, "stop", "stop_token_ids"),
        ({"use_beam_search": False, "length_penalty": 2}, "length_penalty", "beams only"),
        ({"early_stopping": "soon"}, "early_stopping", "early_stopping"),
        ({"n": 99}, "n", "1 to 16"),
    ],
)
def test_a_wrong_field_of_beams_is_named(served, body, field, words):
    status, error = served.error(PATH, prompt="The", **(BEAMS | body))
    assert (status, error["param"]) == (400, field) and words in error["message"], error
