"""Chat, ranking, filling, tokens, grammars, keys, limits and errors over a socket."""

import asyncio
import dataclasses
import json
import math
import os
import re
import threading
import time

import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.infill import fill
from mtnlg_jax.decode.pool import ScorerOptions
from mtnlg_jax.decode.rank import rank
from mtnlg_jax.decode.scoring import score_rows
from mtnlg_jax.serve import chat as chat_module
from mtnlg_jax.serve import patterns
from mtnlg_jax.serve.http import Limits
from mtnlg_jax.serve.keys import VARIABLE, load_keys
from mtnlg_jax.serve.refusals import Refused

MESSAGES = [{"role": "user", "content": "The cat"}]
KEY = "k" * 24


# --- chat


def test_an_answer_continues_the_template(served):
    body = {"messages": MESSAGES, "max_completion_tokens": 8, "temperature": 0}
    told = served.post("/v1/chat/completions", logprobs=True, top_logprobs=2, **body)
    (choice,) = told["choices"]
    plain = served.post(
        "/v1/completions",
        prompt=served.model.chat.prompt(MESSAGES),
        max_tokens=8,
        temperature=0,
    )
    assert choice["message"]["content"] == plain["choices"][0]["text"]
    assert choice["message"]["role"] == "assistant" and told["object"] == "chat.completion"
    content = choice["logprobs"]["content"]
    text = b"".join(bytes(each["bytes"]) for each in content).decode("utf-8", "replace")
    assert text.startswith(choice["message"]["content"])
    assert all(len(each["top_logprobs"]) == 2 for each in content)
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "cat"}]
    events = served.stream(
        "/v1/chat/completions", **(body | {"messages": [{"role": "user", "content": parts}]})
    )
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    joined = "".join(each.get("content", "") for each in deltas)
    assert joined == choice["message"]["content"]
    assert events[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("messages", [], "empty"),
        ("messages", [{"role": "assistant", "content": "a"}], "assistant"),
        ("messages", [{"role": "user"}], "content"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "image_url"),
        ("messages", [{"role": "user", "content": "cat " * 200}], "context"),
        ("top_logprobs", 2, "logprobs=true"),
        ("max_tokens", 0, "outside 1"),
        ("chat_template_kwargs", {"messages": 1}, "sets"),
        ("tools", [{"type": "function"}], "not known"),
    ],
)
def test_a_wrong_field_of_chat_is_named(served, field, value, words):
    status, error = served.error(
        "/v1/chat/completions", **({"messages": MESSAGES} | {field: value})
    )
    assert (status, error["param"]) == (400, field) and words in error["message"], error


def test_without_a_template_chat_is_not_found(served, monkeypatch):
    monkeypatch.setattr(served.model, "chat", None)
    status, error = served.error("/v1/chat/completions", messages=MESSAGES)
    assert status == 404 and "/v1/completions" in error["message"]


def test_a_template_that_loops_is_ended(served, monkeypatch):
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    chat = type(served.model.chat)(served.model.tokenizer, loops)
    monkeypatch.setattr(served.model, "chat", chat)
    monkeypatch.setattr(chat_module, "TEMPLATE_SECONDS", 0.2)
    before = threading.active_count()
    status, error = served.error("/v1/chat/completions", messages=MESSAGES)
    assert status == 400 and "template took more than" in error["message"]
    end = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before


# --- ranking and filling


def test_a_ranking_is_that_of_rank(served):
    model = served.model
    candidates = [" sat on the mat", " sat on the log", " sat on the mat"]
    told = served.post(
        "/v1/rank",
        prompt="The cat",
        candidates=candidates,
        scorers={"logprob": 1, "pmi": 0.5},
        options={"neutral": "In"},
    )
    wanted = rank(
        model.decoder,
        model.tokenizer,
        "The cat",
        candidates,
        scorers={"logprob": 1, "pmi": 0.5},
        options=ScorerOptions(neutral="In"),
    )
    assert told["size"] == 3 and told["duplicates"] == 1
    assert told["candidates"] == json.loads(
        json.dumps([dataclasses.asdict(each) for each in wanted])
    )


def test_written_candidates_are_those_of_rank(served):
    model = served.model
    told = served.post("/v1/rank", prompt="The cat", n=3, max_tokens=5, seed=4)
    decode = DecodeConfig(max_new_tokens=5, temperature=1.0, seed=4, num_return_sequences=3)
    wanted = rank(model.decoder, model.tokenizer, "The cat", decode=decode)
    assert [each["text"] for each in told["candidates"]] == [each.text for each in wanted]
    scores = [each["score"] for each in told["candidates"]]
    assert scores == pytest.approx([each.score for each in wanted], abs=1e-4)
    assert told["seed"] == 4 and told["usage"]["completion_tokens"] >= 3


def test_rerank_is_the_likelihood_of_the_query(served):
    model = served.model
    documents = ["The rain", {"text": "The cat sat"}, "天地"]
    told = served.post("/v1/rerank", query="the cat", documents=documents, return_documents=True)
    words = model.tokenizer.encode(" the cat")
    texts = ["The rain", "The cat sat", "天地"]
    rows = [[*model.encode(text + "\n"), *words] for text in texts]
    numbers = score_rows(model.decoder, rows, [len(row) - len(words) for row in rows])
    wanted = {text: math.exp(float(each.mean())) for text, each in zip(texts, numbers, strict=True)}
    found = {each["document"]["text"]: each["relevance_score"] for each in told["results"]}
    assert found == pytest.approx(wanted, rel=1e-4)
    scores = [each["relevance_score"] for each in told["results"]]
    assert scores == sorted(scores, reverse=True)
    (best,) = served.post("/rerank", query="the cat", documents=documents, top_n=1)["results"]
    assert best == {"index": told["results"][0]["index"], "relevance_score": scores[0]}


def test_filling_is_that_of_fill(served):
    model = served.model
    told = served.post("/v1/fill", text="The <mask> sat on the [MASK].", top_k=3)
    wanted = fill(model.decoder, model.tokenizer, "The <mask> sat on the [MASK].", 3)
    assert told["text"] == wanted.text
    assert [[guess["token"] for guess in mask] for mask in told["masks"]] == [
        [guess.token for guess in mask] for mask in wanted.masks
    ]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/rank", {}, "not both"),
        ("/v1/rank", {"candidates": ["a"], "n": 2}, "not both"),
        ("/v1/rank", {"candidates": []}, "1 to 256"),
        ("/v1/rank", {"candidates": ["a", ""]}, "empty"),
        ("/v1/rank", {"candidates": ["a"], "scorers": ["best"]}, "unknown scorer"),
        ("/v1/rank", {"candidates": ["a"], "scorers": {"logprob": 0}}, "all weights are 0"),
        ("/v1/rank", {"candidates": ["a"], "scorers": ["mbr"]}, "1 candidate"),
        ("/v1/rank", {"candidates": ["a"], "options": {"depth": 1}}, "choose from"),
        ("/v1/rank", {"candidates": ["a"], "options": {"neutral": 1}}, "not a str"),
        ("/v1/rank", {"candidates": ["cat " * 200]}, "context"),
        (
            "/v1/rank",
            {
                # Neither repeats a repetition in plain sight.
                "candidates": ["a" * 40 + "b"],
                "scorers": ["self_consistency"],
                "options": {"answer": "(?:a|a)*$"},
            },
            "takes more than 0.25 s",
        ),
        ("/v1/rank", {"n": 2, "temperature": 0}, "same text"),
        ("/v1/rerank", {"query": " ", "documents": ["a"]}, "query is empty"),
        ("/v1/rerank", {"query": "a", "documents": []}, "1 to 256"),
        ("/v1/rerank", {"query": "a", "documents": ["cat " * 200]}, "document 1"),
        ("/v1/fill", {"text": "nothing"}, "no mask"),
        ("/v1/fill", {"text": "<mask>", "top_k": 0}, "outside 1"),
        ("/tokenize", {}, "not both"),
        ("/detokenize", {"tokens": [10**6]}, "vocabulary"),
    ],
)
def test_what_cannot_be_done_says_why(served, path, body, words):
    body = {"prompt": "The"} | body if path == "/v1/rank" else body
    status, error = served.error(path, **body)
    assert status == 400 and words in error["message"], error


# --- tokens


def test_tokens_and_back(served):
    tokenizer = served.model.tokenizer
    told = served.post("/tokenize", prompt="The 天地", return_token_strs=True)
    assert told["tokens"] == list(served.model.encode("The 天地"))
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    plain = served.post("/tokenize", prompt="The 天地", add_special_tokens=False)["tokens"]
    assert served.post("/detokenize", tokens=plain)["prompt"] == "The 天地"
    _, _, info = served.ask("GET", "/tokenizer_info")
    # lm-evaluation-harness asks so for the id of the end.
    asked = served.post("/tokenize", prompt=info["eos_token"], add_special_tokens=False)
    assert asked["tokens"] == [tokenizer.eos_id]


# --- grammars

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 3},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", [1, 2])
def test_answers_have_the_form_of_a_schema(served, seed):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    told = served.post(
        "/v1/completions", prompt="The", max_tokens=90, seed=seed, response_format=form
    )
    (choice,) = told["choices"]
    assert choice["finish_reason"] == "stop", choice
    value = json.loads(choice["text"])
    assert set(value) == {"name", "tags"} and set(value["tags"]) <= {"a", "b"}


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[ab]{3}"}, r"[ab]{3}"),
        ({"choice": ["cat", "dog"]}, r"cat|dog"),
        ({"grammar": 'start: "x" NUMBER\nNUMBER: /[0-9]{2}/'}, r"x\d\d"),
        ({"grammar": 'root ::= "y" [0-9]'}, r"y\d"),
    ],
)
def test_answers_have_the_form_of_a_grammar(served, form, pattern):
    pytest.importorskip("llguidance")
    told = served.post("/v1/completions", prompt="The", structured_outputs=form, seed=3)
    assert re.fullmatch(pattern, told["choices"][0]["text"]), told


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"patternProperties": {"^a": {}}},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"enum": []},
        False,
    ],
)
def test_a_schema_that_cannot_be_met_is_refused(served, schema):
    pytest.importorskip("llguidance")
    if schema is False:
        body = {"structured_outputs": {"regex": "("}}
    else:
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        body = {"response_format": form}
    status, error = served.error("/v1/completions", prompt="The", **body)
    assert status == 400 and "correct it" in error["message"], error


# --- keys, limits, what is around


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# of tests\n{KEY} name=one per_minute=2 concurrent=1\n{'m' * 16}\n")
    path.chmod(0o600)
    return path


def test_keys_are_needed_and_have_limits(make, key_file, serving_of):
    with serving_of(make(), load_keys(str(key_file), {})) as server:
        status, headers, told = server.ask("GET", "/v1/models")
        assert status == 401 and headers["WWW-Authenticate"] == "Bearer"
        assert KEY not in json.dumps(told)
        for wrong in ("Bearer wrong", KEY, f"Basic {KEY}"):
            assert server.ask("GET", "/v1/models", Authorization=wrong)[0] == 401
        right = {"Authorization": f"Bearer {KEY}"}
        assert server.ask("GET", "/v1/models", **right)[0] == 200
        assert server.ask("GET", "/health")[0] == 200
        body = {"prompt": "a"}
        statuses = [server.ask("POST", "/tokenize", body, **right)[0] for _ in range(3)]
        assert statuses == [200, 200, 429]
        other = {"Authorization": "Bearer " + "m" * 16}
        assert server.ask("POST", "/tokenize", body, **other)[0] == 200


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        (KEY, 0o644, "chmod 600"),
        ("short", 0o600, "16 are the fewest"),
        (f"{KEY}\n{KEY}", 0o600, "repeats"),
        (f"{KEY} concurrent=0", 0o600, "at least 1"),
        ("# none", 0o600, "no API key"),
    ],
)
def test_a_wrong_key_file_is_told(tmp_path, text, mode, words):
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(ValueError, match=words) as raised:
        load_keys(str(path), {})
    assert KEY not in str(raised.value)


def test_keys_of_the_environment():
    assert not load_keys(None, {})
    keys = load_keys(None, {VARIABLE: f"{KEY} name=me,{'n' * 16}"})
    assert keys.account(f"Bearer {KEY}").name == "me"


def test_a_full_queue_says_when_to_ask_again(make, serving_of):
    with serving_of(make(waiting=1, pause=0.05)) as server:
        done = []
        body = {"prompt": "The", "max_tokens": 20, "ignore_eos": True}
        first = threading.Thread(target=lambda: done.append(server.post("/v1/completions", **body)))
        first.start()
        while server.api.running == 0:
            time.sleep(0.01)
        status, headers, told = server.ask("POST", "/v1/completions", body)
        assert status == 429 and int(headers["Retry-After"]) >= 3
        assert told["error"]["type"] == "rate_limit_error"
        # A flood costs nothing: not even the mistake in this body is looked for.
        assert server.ask("POST", "/v1/completions", {"prompt": 1})[0] == 429
        # What needs no model is answered.
        assert server.ask("POST", "/tokenize", {"prompt": "a"})[0] == 200
        first.join()
        assert done[0]["usage"]["completion_tokens"] == 20


def test_the_drain_finishes_what_runs(make, serving_of):
    with serving_of(make(pause=0.05)) as server:
        done = []
        body = {"prompt": "The", "max_tokens": 20, "ignore_eos": True}
        first = threading.Thread(target=lambda: done.append(server.post("/v1/completions", **body)))
        first.start()
        while server.api.running == 0:
            time.sleep(0.01)
        server.api.draining = True
        status, headers, told = server.ask("POST", "/v1/completions", body)
        assert status == 503 and headers["Retry-After"] and "shutting down" in str(told)
        assert server.ask("GET", "/ready")[0] == 503 and server.ask("GET", "/health")[0] == 200
        first.join()
        assert done[0]["usage"]["completion_tokens"] == 20


def test_bodies_methods_paths_and_origins(make, serving_of):
    with serving_of(make(), limits=Limits(body_bytes=2048)) as server:
        large = {"prompt": "a" * 4096}
        assert server.ask("POST", "/v1/completions", large)[0] == 413
        for method, path, wanted in (
            ("GET", "/v1/completions", 405),
            ("POST", "/v1/nothing", 404),
            ("GET", "/page/../keys.py", 404),
            ("GET", "/page/keys.py", 404),
        ):
            status, _, told = server.ask(method, path)
            assert status == wanted and told["error"]["message"], (path, told)
        for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
            status, _, told = server.ask("POST", "/tokenize", {"prompt": "a"}, **headers)
            assert status == 403 and "evil.example" in told["error"]["message"]


def test_a_failure_shows_no_path(served, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError(f"secret at {os.getcwd()}")

    monkeypatch.setattr(served.model.tokenizer, "encode", fail)
    status, error = served.error("/tokenize", prompt="a")
    assert status == 500 and "secret" not in error["message"] and "/" not in error["message"]
    number = error["message"].split("under ")[1].split(".")[0]
    assert number in caplog.text and "secret at" in caplog.text


async def _trial(text: str) -> None:
    await patterns.check_time("answer", "(a|a)*b", [text])


def test_a_trial_of_a_pattern_that_fails_is_not_told_as_too_long(monkeypatch):
    asyncio.run(_trial("aab"))
    with pytest.raises(Refused, match="takes more than 0.25 s"):
        asyncio.run(_trial("a" * 40))
    monkeypatch.setattr(patterns, "_TRY", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="ended with 3"):
        asyncio.run(_trial("aab"))


def test_metrics_count(served):
    served.post("/tokenize", prompt="a")
    _, _, text = served.ask("GET", "/metrics")
    page = text.decode()
    assert 'mtnlg_requests_total{route="/tokenize",status="200"}' in page
    assert 'mtnlg_engine_turns_total{model="tiny"} 3.0' in page
    assert 'mtnlg_engine_step_seconds_bucket{le="+Inf",model="tiny"} 2.0' in page
    assert "mtnlg_time_to_first_token_seconds_count" in page


def test_a_stream_counts_once_with_all_its_time(served, monkeypatch):
    counted = []
    metrics = served.api.metrics
    monkeypatch.setattr(metrics, "answered", lambda *values: counted.append(values))
    tokens = []
    monkeypatch.setattr(metrics, "next_token", lambda seconds: tokens.append(seconds))
    served.stream("/v1/completions", prompt="The cat", max_tokens=4, ignore_eos=True)
    served.post("/tokenize", prompt="a")
    until = time.monotonic() + 60
    while len(counted) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    routes = {route: (status, seconds) for route, status, seconds in counted}
    assert len(counted) == 2 and routes.keys() == {"/v1/completions", "/tokenize"}
    status, seconds = routes["/v1/completions"]
    # The headers are sent before the first token.
    assert status == 200 and len(tokens) == 3 and seconds > sum(tokens)


def test_the_page_asks_nobody_else(served):
    status, headers, page = served.ask("GET", "/")
    assert status == 200 and headers["Content-Security-Policy"].startswith("default-src 'none'")
    files = ["page/app.js", "page/words.js", "page/style.css", "page/icon.svg"]
    for name in files:
        assert name in page.decode()
        status, _, content = served.ask("GET", "/" + name)
        assert status == 200 and b"http://" not in content.replace(b"http://www.w3.org/", b"")
        assert b"https://" not in content
    assert "style=" not in page.decode() and "onclick" not in page.decode()


def test_the_openapi_document_names_every_route(served):
    _, _, told = served.ask("GET", "/openapi.json")
    assert {"/v1/completions", "/v1/chat/completions", "/v1/rank", "/rerank"} <= set(told["paths"])
    assert "Completion" in told["components"]["schemas"]
