"""Provide a server on a loopback port with a tiny random model.

The engine of ``served`` runs the real `generate` in a thread, one request after another, so that
the tests of the API need nothing of the scheduling; the tests of the engine have that. ``live`` has
the real engine, for the tests with clients.
"""

import contextlib
import http.client
import json
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

for package in ("starlette", "uvicorn", "msgspec", "prometheus_client"):
    pytest.importorskip(package)

# The folder of the tests is not in the import path, but own_engine.py is there.
sys.path.append(str(Path(__file__).parent))

from own_engine import OwnEngine  # noqa: E402

from mtnlg_jax.config import ModelConfig  # noqa: E402
from mtnlg_jax.data.tokenizer import train_tokenizer  # noqa: E402
from mtnlg_jax.data.tokenizer.chat import Chat  # noqa: E402
from mtnlg_jax.decode.cache import unstack  # noqa: E402
from mtnlg_jax.model.transformer import abstract_model  # noqa: E402
from mtnlg_jax.serve.engine import Engine  # noqa: E402
from mtnlg_jax.serve.http import Api, Limits  # noqa: E402
from mtnlg_jax.serve.keys import Keys  # noqa: E402
from mtnlg_jax.serve.listening import Server, bind  # noqa: E402
from mtnlg_jax.serve.models import Model, Models  # noqa: E402

CONTEXT = 128
TEXTS = [
    "The cat sat on the mat and the dog sat on the log.\n",
    'In the town {"name": "Anna", "age": 12, "tags": ["a", "b"]} lived a man.\n',
    "天地玄黄,宇宙洪荒。日月盈昃,辰宿列张。\n",
] * 8
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Served(NamedTuple):
    """A running server."""

    port: int
    api: Any
    model: Model
    engine: Any

    def ask(self, method: str, path: str, body: Any = None, **headers: str):
        """Return (status, headers, body); a body that is not text is sent as JSON."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        with contextlib.closing(link):
            data = body if isinstance(body, bytes | str) or body is None else json.dumps(body)
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            link.request(method, path, data, {"Content-Type": "application/json"} | named)
            reply = link.getresponse()
            content = reply.read()
            kind = reply.headers.get("Content-Type", "")
            return reply.status, reply.headers, json.loads(content) if "json" in kind else content

    def post(self, path: str, **body: Any):
        """Return the body of a 200."""
        status, _, answer = self.ask("POST", path, body)
        assert status == 200, answer
        return answer

    def error(self, path: str, **body: Any) -> tuple[int, dict]:
        status, _, answer = self.ask("POST", path, body)
        return status, answer["error"]

    def stream(self, path: str, **body: Any) -> list[Any]:
        """Return the events of a streamed answer, without [DONE], which must end it."""
        status, headers, content = self.ask("POST", path, body | {"stream": True})
        assert status == 200 and headers["X-Accel-Buffering"] == "no", content
        lines = [line for line in content.decode().split("\n\n") if line.startswith("data: ")]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


@contextlib.contextmanager
def serving(model: Model, keys: Keys | None = None, limits: Limits | None = None):
    """Serve ``model`` in a thread until the block ends."""
    api = Api(Models([model]), keys, limits)
    bound = bind("127.0.0.1", 0, api.keys)
    server = Server(api, drain_seconds=5)
    thread = threading.Thread(target=server.run_until_signal, args=(bound,))
    thread.start()
    try:
        yield Served(bound.getsockname()[1], api, model, model.engine)
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def parts():
    """Return a tokenizer and a decoder whose distributions are peaked."""
    tokenizer = train_tokenizer(TEXTS, 400)
    config = ModelConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=CONTEXT,
    )
    rng = np.random.default_rng(5)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), abstract_model(config)[1]
    )
    return tokenizer, unstack(config, params)


def _model(engine) -> Model:
    tokenizer = engine.tokenizer
    chat = Chat(tokenizer, TEMPLATE)
    return Model("tiny", engine, engine.decoder, tokenizer, chat=chat, chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def make(parts):
    """Return a factory of models with an engine of their own."""
    tokenizer, decoder = parts

    def new(**options) -> Model:
        engine = OwnEngine(decoder, tokenizer, **options)
        engine.start()
        return _model(engine)

    return new


@pytest.fixture(scope="session")
def served(make):
    with serving(make()) as server:
        yield server


@pytest.fixture(scope="session")
def make_live(parts):
    """Return a factory of models with the real engine, which compiles what a request first needs.

    The server that gets the model closes the engine.
    """
    tokenizer, decoder = parts

    def new(**options) -> Model:
        engine = Engine(decoder, tokenizer, slots=4, waiting=8, warm=False, **options)
        engine.start()
        engine.wait_ready()
        return _model(engine)

    return new


@pytest.fixture(scope="session")
def live(make_live):
    with serving(make_live()) as server:
        yield server


@pytest.fixture(scope="session")
def serving_of():
    """Return `serving`: a server of its own for a test."""
    return serving
