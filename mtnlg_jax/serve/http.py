"""The HTTP API: routes, keys, limits, errors and the drain.

Everything that can be checked is checked before a request is queued. Answers never show a path, a
stack or a key; the log never shows a prompt.
"""

import asyncio
import dataclasses
import functools
import ipaddress
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from mtnlg_jax import __version__
from mtnlg_jax.serve import schema
from mtnlg_jax.serve.answers import Gone, answer, at_end, failure, refusal
from mtnlg_jax.serve.chat import chat
from mtnlg_jax.serve.completions import completions
from mtnlg_jax.serve.following import refusal_of
from mtnlg_jax.serve.keys import Account, Keys
from mtnlg_jax.serve.metrics import Metrics
from mtnlg_jax.serve.models import Model, Models
from mtnlg_jax.serve.openapi import document
from mtnlg_jax.serve.ranking import rank_texts, rerank
from mtnlg_jax.serve.refusals import Refused, later, not_found
from mtnlg_jax.serve.requests import Busy
from mtnlg_jax.serve.texts import detokenize, fill_masks, tokenize, tokenizer_info
from mtnlg_jax.serve.writing import Call

# Seconds in which a body must have come.
BODY_SECONDS = 30.0
PAGE = Path(__file__).parent / "page"
_FILES = {
    "index.html": "text/html; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "words.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

# (path, body, handler) of what the model answers.
POSTS: tuple[tuple[str, type[msgspec.Struct], Callable[..., Awaitable[Response]]], ...] = (
    ("/v1/completions", schema.Completion, completions),
    ("/v1/chat/completions", schema.Chat, chat),
    ("/v1/rank", schema.Rank, rank_texts),
    ("/v1/rerank", schema.Rerank, rerank),
    ("/v2/rerank", schema.Rerank, rerank),
    ("/rerank", schema.Rerank, rerank),
    ("/v1/fill", schema.Fill, fill_masks),
    ("/tokenize", schema.Tokenize, tokenize),
    ("/detokenize", schema.Detokenize, detokenize),
)


_WITHOUT_ENGINE = (schema.Tokenize, schema.Detokenize)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the server lets a request take."""

    body_bytes: int = 1 << 20
    request_seconds: float = 600.0


class Api:
    """The application and its state."""

    def __init__(self, models: Models, keys: Keys | None = None, limits: Limits | None = None):
        """``keys``: none lets everybody in, and then only requests to a loopback name."""
        self.models = models
        self.keys = keys or Keys()
        self.limits = limits or Limits()
        self.metrics = Metrics(models)
        self.draining = False
        self.running = 0
        self.app = Starlette(
            routes=self._routes(),
            exception_handlers={HTTPException: _http_error, Exception: _unexpected},
        )

    def _routes(self) -> list[Route]:
        routes = [
            Route(path, self._guarded(path, self._post(kind, handler)), methods=["POST"])
            for path, kind, handler in POSTS
        ]
        gets: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/v1/models": self._keyed(self._list),
            "/v1/models/{name:path}": self._keyed(self._one),
            "/tokenizer_info": self._keyed(self._info),
            "/metrics": self._keyed(self._metrics),
            "/health": self._health,
            "/ready": self._ready,
            "/version": self._version,
            "/openapi.json": self._openapi,
            "/": self._page,
            "/page/{name}": self._page,
        }
        return routes + [
            Route(path, self._guarded(path, handler), methods=["GET"])
            for path, handler in gets.items()
        ]

    # --- around every request

    def _guarded(self, route: str, handler: Callable[[Request], Awaitable[Response]]) -> Callable:
        """Return the handler with the checks of every request, and errors as answers."""

        async def run(request: Request) -> Response:
            begun = time.monotonic()

            def answered(status: int) -> None:
                self.metrics.answered(route, status, time.monotonic() - begun)

            try:
                self._check_origin(request)
                response = await handler(request)
            except (Gone, ClientDisconnect):
                # nginx's number for it; nobody reads the answer.
                response = Response(status_code=499)
            except Refused as error:
                response = refusal(error)
            except Exception as error:
                response = refusal(failure(error))
            except BaseException:  # it is cancelled
                answered(500)
                raise
            at_end(response, functools.partial(answered, response.status_code))
            return response

        return run

    def _check_origin(self, request: Request) -> None:
        """Refuse what a page of another site makes a browser send."""
        host = request.headers.get("host", "")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refused(
                f"a page of {origin[:100]!r} may not call this server; open the server's own page",
                status=403,
                kind="permission_error",
            )
        # A name that another site points at this machine (DNS rebinding).
        if not self.keys and not is_loopback(_name_of(host)):
            raise Refused(
                f"without API keys this server answers to loopback names only, not to "
                f"{host[:100]!r}; call 127.0.0.1 or localhost, or start it with --api_keys",
                status=403,
                kind="permission_error",
            )

    def _account(self, request: Request) -> Account:
        return self.keys.account(request.headers.get("authorization"))

    def _keyed(self, handler: Callable[[Request], Response]) -> Callable:
        async def run(request: Request) -> Response:
            self._account(request)
            return handler(request)

        return run

    def _post(self, kind: type[msgspec.Struct], handler: Callable) -> Callable:
        """Return the handler of a body: key, limits, body, model, then the work."""

        async def run(request: Request) -> Response:
            account = self._account(request)
            if self.draining:
                raise later("the server is shutting down; try again, or ask another one", 5)
            self._check_engines()
            if kind not in _WITHOUT_ENGINE:
                self._check_room()
            account.enter()
            self._enter()
            entered = True

            def leave() -> None:
                nonlocal entered
                if entered:
                    account.leave()
                    self._leave()
                entered = False

            try:
                query = schema.parse(await self._body(request), kind)
                model = self.models.get(getattr(query, "model", None))
                deadline = time.monotonic() + self.limits.request_seconds
                call = Call(account.name, deadline)
                response = await handler(request, query, model, call, self.metrics)
            except BaseException:
                leave()
                raise
            at_end(response, leave)
            return response

        return run

    def _check_engines(self) -> None:
        """Raise Refused (503) while an engine compiles, and when one has stopped by itself."""
        if self.models.failure is not None:
            raise later("the model has stopped and the server ends; its log tells why", 30)
        if not self.models.ready:
            raise later("the model is still loading; /ready says when it is not", 5)

    def _check_room(self) -> None:
        """Raise Refused (429) if no engine takes anything: a flood then costs no reading of bodies,
        no tokens and no grammars."""
        refused = None
        for engine in self.models.engines:
            try:
                engine.check_room()
            except Busy as error:
                refused = error
            else:
                return
        if refused is not None:
            raise refusal_of(refused)

    def _enter(self) -> None:
        self.running += 1
        self.metrics.in_flight.inc()

    def _leave(self) -> None:
        self.running -= 1
        self.metrics.in_flight.dec()

    async def _body(self, request: Request) -> bytes:
        """Return the body. Raise Refused if it is too large or too slow."""
        limit = self.limits.body_bytes
        too_large = Refused(f"the body is over {limit} bytes; send less", status=413)
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise Refused(
                f"the body did not come within {BODY_SECONDS:g} s; send it faster", status=408
            ) from None
        return bytes(body)

    # --- what costs no work of the model

    def _list(self, request: Request) -> Response:
        return answer({"object": "list", "data": [_card(model) for model in self.models.all]})

    def _one(self, request: Request) -> Response:
        return answer(_card(self.models.get(request.path_params["name"])))

    def _info(self, request: Request) -> Response:
        return tokenizer_info(self.models.get(request.query_params.get("model")))

    def _metrics(self, request: Request) -> Response:
        text, kind = self.metrics.text()
        return Response(text, media_type=kind)

    async def _health(self, request: Request) -> Response:
        if self.models.failure is not None:
            self._check_engines()
        return answer({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        """Answer 200 while requests are taken, and 503 before that and during the drain."""
        if self.draining:
            raise later("the server is shutting down", 5)
        self._check_engines()
        return answer({"status": "ready"})

    async def _version(self, request: Request) -> Response:
        return answer({"version": __version__})

    async def _openapi(self, request: Request) -> Response:
        bodies = {path: kind for path, kind, _ in POSTS}
        return answer(document(bodies, __version__, bool(self.keys)))

    async def _page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in _FILES:
            raise not_found("there is no such file; / is the page")
        content = await asyncio.to_thread((PAGE / name).read_bytes)
        return Response(
            content,
            media_type=_FILES[name],
            headers={
                "Content-Security-Policy": _POLICY,
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-cache",
            },
        )


def _card(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "mtnlg_jax",
        "root": model.base or model.name,
        "parent": model.base,
        "max_model_len": model.decoder.context,
        # For the page: which of its parts work.
        "chat": model.chat is not None,
        "fill": model.stages is None or any(stage.masked for stage in model.stages),
    }


def _name_of(host: str) -> str:
    """Return the name of a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_loopback(name: str) -> bool:
    """Return whether a host name or address means this machine."""
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    if error.status_code == 404:
        known = ", ".join(path for path, _, _ in POSTS)
        return refusal(not_found(f"there is nothing at {path!r}; POST to one of {known}"))
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return refusal(
            Refused(
                f"{path} does not take {request.method[:20]}; use {allowed}",
                status=405,
                headers=error.headers,
            )
        )
    return refusal(Refused(str(error.detail), status=error.status_code, headers=error.headers))


async def _unexpected(request: Request, error: Exception) -> Response:
    return refusal(failure(error))
