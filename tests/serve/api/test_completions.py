"""/v1/completions over a socket, beside `generate` and `score_rows`."""

import json
import math
import socket
import time

import numpy as np
import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.scoring import score_rows

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def greedy(served):
    return served.post(PATH, prompt="The cat", max_tokens=12, temperature=0, logprobs=2)


def test_greedy_text_is_that_of_generate(served, greedy):
    model = served.model
    config = DecodeConfig(max_new_tokens=12)
    (made,) = generate(model.decoder, model.tokenizer, ["The cat"], config)
    (choice,) = greedy["choices"]
    assert (choice["text"], choice["finish_reason"]) == (made.text, made.finish_reason)
    assert choice["logprobs"]["tokens"] == [model.piece(token) for token in made.tokens]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(made.logprobs, abs=1e-4)
    assert greedy["usage"]["completion_tokens"] == len(made.tokens)
    assert greedy["object"] == "text_completion" and greedy["model"] == "tiny"


def test_the_chosen_token_is_the_best_one_bit_for_bit(greedy):
    logprobs = greedy["choices"][0]["logprobs"]
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert len(top) == 2 and top[token] == logprob == max(top.values())


def test_a_stream_joins_to_the_whole_text(served, greedy):
    events = served.stream(
        PATH,
        prompt="The cat",
        max_tokens=12,
        temperature=0,
        logprobs=2,
        stream_options={"include_usage": True},
    )
    usage = events.pop()
    assert usage["choices"] == [] and usage["usage"] == greedy["usage"]
    assert all(event["usage"] is None for event in events)
    choices = [event["choices"][0] for event in events]
    assert "".join(each["text"] for each in choices) == greedy["choices"][0]["text"]
    assert [each["finish_reason"] for each in choices[:-1]] == [None] * (len(choices) - 1)
    told = [name for each in choices if each["logprobs"] for name in each["logprobs"]["tokens"]]
    assert told == greedy["choices"][0]["logprobs"]["tokens"]
    offsets = [at for each in choices if each["logprobs"] for at in each["logprobs"]["text_offset"]]
    assert offsets == greedy["choices"][0]["logprobs"]["text_offset"] == sorted(offsets)


def test_prompts_times_samples_by_seed(served):
    body = {"prompt": ["The cat", "The dog"], "n": 2, "max_tokens": 6, "seed": 7}
    first = served.post(PATH, **body)
    assert [each["index"] for each in first["choices"]] == [0, 1, 2, 3]
    assert first["seed"] == 7
    again = served.post(PATH, **body)
    assert [each["text"] for each in again["choices"]] == [e["text"] for e in first["choices"]]
    other = served.post(PATH, **(body | {"seed": 8}))
    assert [each["text"] for each in other["choices"]] != [e["text"] for e in first["choices"]]
    # Without a seed the answer names the one that repeats it.
    free = served.post(PATH, prompt="The cat", max_tokens=6)
    repeated = served.post(PATH, prompt="The cat", max_tokens=6, seed=free["seed"])
    assert repeated["choices"] == free["choices"]


def test_best_of_returns_the_most_probable(served):
    body = {"prompt": "The", "max_tokens": 5, "seed": 1, "logprobs": 0}
    drawn = served.post(PATH, n=4, **body)["choices"]
    means = [np.mean(each["logprobs"]["token_logprobs"]) for each in drawn]
    (best,) = served.post(PATH, n=1, best_of=4, **body)["choices"]
    assert best["text"] == drawn[int(np.argmax(means))]["text"]


def test_echo_scores_the_prompt(served):
    model = served.model
    prompts = ["The cat sat on the mat", "天地 日"]
    told = served.post(PATH, prompt=prompts, max_tokens=0, echo=True, logprobs=1)
    assert told["usage"]["completion_tokens"] == 0
    rows = [model.encode(prompt) for prompt in prompts]
    wanted = score_rows(model.decoder, rows, [1] * 2)
    for prompt, row, each, numbers in zip(prompts, rows, told["choices"], wanted, strict=True):
        assert each["text"] == prompt
        logprobs = each["logprobs"]
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:] == pytest.approx(numbers, abs=1e-4)
        assert logprobs["tokens"] == [model.piece(token) for token in row]
        assert len(set(logprobs["tokens"])) == len(set(row))


def test_echo_goes_before_the_text(served):
    body = {"prompt": "The cat", "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 1}
    whole = served.post(PATH, **body)["choices"][0]
    joined = "".join(each["choices"][0]["text"] for each in served.stream(PATH, **body))
    assert whole["text"].startswith("The cat") and joined == whole["text"]


def test_a_stop_string_is_not_shown(served, greedy):
    text = greedy["choices"][0]["text"]
    stop = text[4:6]
    whole = served.post(PATH, prompt="The cat", max_tokens=12, temperature=0, stop=stop)
    assert whole["choices"][0]["text"] == text[: text.index(stop)]
    assert whole["choices"][0]["finish_reason"] == "stop"
    events = served.stream(PATH, prompt="The cat", max_tokens=12, temperature=0, stop=[stop])
    assert "".join(each["choices"][0]["text"] for each in events) == text[: text.index(stop)]


def test_token_prompts_and_fields_without_effect(served):
    ids = list(served.model.encode("The cat"))
    body = {"max_tokens": 4, "temperature": 0, "top_p": 0.5, "user": "me", "store": None}
    (text,) = served.post(PATH, prompt="The cat", **body)["choices"]
    (same,) = served.post(PATH, prompt=ids, suffix="", **body)["choices"]
    assert text["text"] == same["text"]
    told = served.post(PATH, prompt=[ids, ids[:2]], max_tokens=1)
    assert told["usage"]["prompt_tokens"] == len(ids) + 2


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -1, "outside 0 to 100"),
        ("temperature", "hot", "Expected"),
        ("top_p", 1.5, "outside 0 to 1"),
        ("n", 17, "outside 1 to 16"),
        ("n", 0, "outside 1 to 16"),
        ("best_of", 0, "best_of"),
        ("logprobs", 6, "outside 0 to 5"),
        ("max_tokens", 0, "echo"),
        ("max_tokens", -3, "outside 0"),
        ("stop", ["a"] * 5, "4 are the most"),
        ("stop", "", "1 to 256"),
        ("seed", 2**64, "64 bits"),
        ("logit_bias", {"x": 1}, "token ids"),
        ("logit_bias", {"5": 101}, "-100 to 100"),
        ("logit_bias", {"99999": 1}, "vocabulary"),
        ("stop_token_ids", [99999], "vocabulary"),
        ("min_p", 1.0, "min_p"),
        ("min_tokens", 17, "min_tokens"),
        ("repetition_penalty", 0, "repetition_penalty"),
        ("presence_penalty", 3, "outside -2 to 2"),
        ("suffix", "x", "left to right"),
        ("prompt", [], "1 to 128"),
        ("prompt", ["a"] * 129, "1 to 128"),
        ("prompt", [5] * 128, "context"),
        ("prompt", [5, "a"], "mixes"),
        ("prompt", [99999], "vocabulary"),
        ("prompt", 3, "Expected"),
        ("model", "gpt-4", "tiny"),
        ("tools", [{"type": "function"}], "not known"),
        ("max_time", 0, "max_time"),
        ("response_format", {"type": "json_schema"}, "json_schema.schema"),
        ("structured_outputs", {}, "one of"),
    ],
)
def test_a_wrong_field_is_named(served, field, value, words):
    status, error = served.error(PATH, **({"prompt": "The"} | {field: value}))
    assert status == (404 if field == "model" else 400)
    assert error["param"] == field and words in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "not an object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "\xff"}', "not JSON"),
        (b'{"prompt": "a", "max_tokens": 1e400}', "JSON"),
    ],
)
def test_a_body_that_is_no_request(served, body, words):
    status, _, told = served.ask("POST", PATH, body)
    assert status == 400 and words in told["error"]["message"]


def open_stream(server, **body) -> socket.socket:
    """Send a request for a stream and return its socket when the first token has come."""
    data = json.dumps({"stream": True} | body).encode()
    link = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    link.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
    )
    seen = b""
    while b"data: " not in seen:
        seen += link.recv(4096)
    assert b"200 OK" in seen
    return link


def until(condition, seconds=15.0):
    """Wait for a condition, and return whether it came."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_a_client_that_leaves_is_cancelled(served):
    served.engine.pause = 0.02
    before = served.engine.cancelled
    try:
        with open_stream(served, prompt="The cat", max_tokens=100, ignore_eos=True):
            pass
        assert until(lambda: served.engine.cancelled > before)
        assert until(lambda: served.api.running == 0)
        # One that waits for the whole answer, too.
        with socket.create_connection(("127.0.0.1", served.port), timeout=30) as link:
            data = b'{"prompt": "The", "max_tokens": 100, "ignore_eos": true}'
            link.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
                % (len(data), data)
            )
            assert until(lambda: served.api.running == 1)
        assert until(lambda: served.engine.cancelled > before + 1)
        assert until(lambda: served.api.running == 0)
    finally:
        served.engine.pause = 0.0


def test_scores_are_probabilities(greedy):
    for top in greedy["choices"][0]["logprobs"]["top_logprobs"]:
        assert 0 < sum(map(math.exp, top.values())) <= 1 + 1e-5
