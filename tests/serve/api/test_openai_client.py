"""The openai package against the server; skipped where it is not installed."""

import asyncio
import contextlib
import json
import threading
import time

import pytest

openai = pytest.importorskip("openai")

from mtnlg_jax.serve.keys import load_keys  # noqa: E402

pytestmark = pytest.mark.slow
PROMPT = "The cat"
GREEDY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
MESSAGES = [{"role": "user", "content": "The cat sat"}]
LONG = {"model": "tiny", "prompt": PROMPT, "max_tokens": 100, "extra_body": {"ignore_eos": True}}


def _url(server) -> str:
    return f"http://127.0.0.1:{server.port}/v1"


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=_url(live), api_key="none", timeout=900, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def greedy(client):
    return client.completions.create(**GREEDY)


def _idle(server, seconds=30.0):
    """Wait until nothing is answered and no slot is in use."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        gauges = server.engine.statistics()["gauges"]
        busy = gauges["writing_requests"] + gauges["filling_requests"] + gauges["waiting_requests"]
        if not busy and not server.api.running:
            return True
        time.sleep(0.02)
    return False


# --- completions


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_stream_is_the_whole_answer(client, greedy):
    chunks = list(
        client.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == greedy.choices[0].text
    assert chunks[-1].choices == []
    # The keys of the prompt may be there by now, so cached_tokens differ.
    assert chunks[-1].usage.total_tokens == greedy.usage.total_tokens
    assert chunks[-2].choices[0].finish_reason == greedy.choices[0].finish_reason


def test_async_requests_at_once(live, greedy):
    async def ask():
        async with openai.AsyncOpenAI(base_url=_url(live), api_key="none") as client:
            whole = [client.completions.create(**GREEDY) for _ in range(6)]
            stream = await client.completions.create(**GREEDY, stream=True)
            text = "".join([chunk.choices[0].text async for chunk in stream])
            return [each.choices[0].text for each in await asyncio.gather(*whole)], text

    texts, streamed = asyncio.run(ask())
    assert {*texts, streamed} == {greedy.choices[0].text}


def test_n_best_of_echo_and_logprobs(client, greedy):
    asked = {**GREEDY, "temperature": 1.0, "seed": 3}
    drawn = client.completions.create(**asked, n=3, best_of=4, logprobs=2, echo=True)
    assert [each.index for each in drawn.choices] == [0, 1, 2]
    for choice in drawn.choices:
        assert choice.text.startswith(PROMPT)
        logprobs = choice.logprobs
        assert logprobs.token_logprobs[0] is None and len(logprobs.tokens) > 3
        for token, number, top in zip(
            logprobs.tokens[1:],
            logprobs.token_logprobs[1:],
            logprobs.top_logprobs[1:],
            strict=True,
        ):
            assert top[token] == number <= max(top.values())
    again = client.completions.create(**asked, n=3, best_of=4, logprobs=2, echo=True)
    assert again.choices == drawn.choices


def test_stop_and_logit_bias(client, greedy):
    text = greedy.choices[0].text
    stop = text[3:5]
    stopped = client.completions.create(**GREEDY, stop=[stop])
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    tokenized = client.post("../tokenize", body={"prompt": " dog"}, cast_to=object)
    token = tokenized["tokens"][-1]
    biased = client.completions.create(**GREEDY, logit_bias={str(token): 100}, logprobs=0)
    assert len(set(biased.choices[0].logprobs.tokens)) == 1


# --- chat


def test_chat_with_alternatives(client):
    asked = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 6, "seed": 1}
    told = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    (choice,) = told.choices
    assert choice.message.role == "assistant"
    for each in choice.logprobs.content:
        assert len(each.top_logprobs) == 3
        best = max(top.logprob for top in each.top_logprobs)
        assert each.logprob <= best and each.bytes is not None
    stream = client.chat.completions.create(**asked, stream=True)
    joined = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert joined == choice.message.content


def test_chat_by_a_json_schema(client):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["age"],
        "additionalProperties": False,
    }
    told = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_completion_tokens=60,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": schema, "strict": True},
        },
    )
    assert set(json.loads(told.choices[0].message.content)) == {"age"}


# --- errors


def test_the_classes_of_errors(client):
    with pytest.raises(openai.BadRequestError, match="temperature") as raised:
        client.completions.create(**(GREEDY | {"temperature": -1}))
    assert raised.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="there is no model") as raised:
        client.completions.create(**(GREEDY | {"model": "other"}))
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(**(GREEDY | {"prompt": "cat " * 500}))
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="a")
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )


def test_a_wrong_key_is_told(make_live, serving_of, tmp_path):
    path = tmp_path / "keys"
    path.write_text("k" * 16 + " per_minute=1\n")
    path.chmod(0o600)
    with serving_of(make_live(), load_keys(str(path), {})) as server:
        client = openai.OpenAI(base_url=_url(server), api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="API key"):
            client.completions.create(**GREEDY)
        right = openai.OpenAI(base_url=_url(server), api_key="k" * 16, max_retries=0)
        assert right.completions.create(**GREEDY).choices
        with pytest.raises(openai.RateLimitError) as raised:
            right.completions.create(**GREEDY)
        assert int(raised.value.response.headers["retry-after"]) >= 1


def test_a_full_queue_is_tried_again(live, client):
    """Fill the queue, and check that one try fails and that a client with retries gets through."""
    with openai.OpenAI(base_url=_url(live), api_key="none", max_retries=0) as other:
        done = []

        def many():
            with contextlib.suppress(openai.RateLimitError):
                done.append(other.completions.create(**LONG, n=8))

        # Each asks for as many rows as may wait, so together they fill the queue.
        threads = [threading.Thread(target=many) for _ in range(4)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 60
        refused = None
        while refused is None and time.monotonic() < end and any(t.is_alive() for t in threads):
            try:
                other.completions.create(**GREEDY)
            except openai.RateLimitError as error:
                refused = error
        assert refused is not None, "the queue was never full"
        assert int(refused.response.headers["retry-after"]) >= 1
        patient = client.with_options(max_retries=10)
        assert patient.completions.create(**GREEDY).choices
        for thread in threads:
            thread.join()
        assert done


def test_leaving_a_stream_frees_its_slot(live, client):
    before = live.engine.statistics()["counters"].get("requests_cancelled", 0)
    stream = client.completions.create(**LONG, stream=True)
    next(iter(stream))
    stream.close()
    assert _idle(live)
    assert live.engine.statistics()["counters"]["requests_cancelled"] == before + 1


def test_a_timeout_of_the_client_frees_its_slot(live, client):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(**LONG, n=8)
    assert _idle(live)
