"""Answers: JSON at once, or server-sent events, both given up when the client is gone."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mtnlg_jax.serve.refusals import Refused

# A comment of the protocol after this many seconds of silence keeps proxies from hanging up.
PING_SECONDS = 15.0
# A client that takes nothing for so long is gone.
SEND_SECONDS = 30.0
_DONE = b"data: [DONE]\n\n"

log = logging.getLogger("mtnlg_jax.serve")


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return ``value`` as JSON."""
    return Response(
        msgspec.json.encode(value), status, headers=headers, media_type="application/json"
    )


def refusal(error: Refused) -> Response:
    return answer(error.body(), error.status, error.headers)


def failure(error: BaseException) -> Refused:
    """Write an unexpected error to the log, and return an answer that shows none of it."""
    number = secrets.token_hex(4)
    log.error("request failed (%s)", number, exc_info=error)
    return Refused(
        f"the server failed; its log tells why under {number}. Try again, or report that number",
        status=500,
        kind="server_error",
    )


class Gone(Exception):
    """The client went away before its answer."""


async def unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """Return what ``work`` returns; cancel it and raise Gone if the client goes away first."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_gone(request.receive))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Gone
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        # The work frees its slots before the answer ends.
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: each value as ``data: JSON``, [DONE] at the end.

    ``values``: an asynchronous generator; None is a ping. An error in it becomes an event with
    OpenAI's error shape. It is closed, and ``close`` called, at the end, or when the client goes
    away or takes nothing for SEND_SECONDS.
    """

    def __init__(self, values: AsyncIterator[Any], close: Callable[[], None] = lambda: None):
        super().__init__(
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        # Its length is not known.
        del self.headers["content-length"]
        self._values = values
        self._closing = [close]

    def at_end(self, function: Callable[[], None]) -> None:
        """Call ``function`` when the stream has ended, in whatever way."""
        self._closing.append(function)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except (OSError, TimeoutError):
            pass  # the client is gone, or reads nothing
        finally:
            for task in (sending, leaving):
                task.cancel()
            # A generator that never began does not run its own clean-up.
            for close in self._closing:
                close()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        async def put(data: bytes, more: bool = True) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        values: Any = self._values
        async with contextlib.aclosing(values):
            try:
                async for value in values:
                    await put(b": ping\n\n" if value is None else _event(value))
            except Refused as error:
                await put(_event(error.body()))
            except (OSError, TimeoutError):
                raise
            except Exception as error:
                await put(_event(failure(error).body()))
        await put(_DONE)
        await put(b"", more=False)


def at_end(response: Response, function: Callable[[], None]) -> None:
    """Call ``function`` when ``response`` has ended: at once unless it is a stream."""
    if isinstance(response, EventStream):
        response.at_end(function)
    else:
        function()


def _event(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
