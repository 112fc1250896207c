"""Bound what one connection may cost: time to send a request, time to take an answer, their number.

uvicorn closes a connection that is idle behind an answer. It waits for ever for a first request,
for the rest of a half-sent one, and for a client that takes no bytes; all three end here.
"""

import asyncio
import socket
import sys

import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from mtnlg_jax.serve.refusals import later

# Seconds in which the headers of a request must have come.
HEAD_SECONDS = 30.0
# Seconds in which a client must take something of an answer that waits for it.
STUCK_SECONDS = 30.0
# Files that the process needs beside connections: weights, logs, libraries, the page.
_SPARE_FILES = 128
_MOST_FILES = 1 << 16


def raise_file_limit() -> int | None:
    """Raise the soft limit of open files to the hard one, and return how many connections fit.

    Returns None where the system has no such limit.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return None if soft == resource.RLIM_INFINITY else max(soft - _SPARE_FILES, 1)


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 with the bounds of this module."""

    # Of the process; set when the server starts.
    most: int | None = None

    _head: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        _find_the_dead(transport.get_extra_info("socket"))
        if self.most is not None and len(self.connections) > self.most:
            transport.write(_full(self.most))
            transport.close()
            return
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def _expect_head(self) -> None:
        """Start the clock of a request's headers, and stop it while one is answered.

        Between an answer and the first byte of the next request uvicorn's own clock runs.
        """
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.transport.is_closing():
            self._stop("_head")
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._no_head)

    def _no_head(self) -> None:
        self._head = None
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_buffer()

    def _watch_buffer(self, left: int | None = None) -> None:
        """Abort unless the client takes something of what is ``left`` in each STUCK_SECONDS."""
        self._stop("_stuck")
        size = self.transport.get_write_buffer_size()
        if left is not None and size >= left:
            self.transport.abort()
        else:
            self._stuck = self.loop.call_later(STUCK_SECONDS, self._watch_buffer, size)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("_stuck")

    def timeout_keep_alive_handler(self) -> None:
        # close() would wait until the client has taken what is left of the last answer.
        if self.transport.get_write_buffer_size():
            self._watch_buffer()
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_head")
        self._stop("_stuck")
        super().connection_lost(exc)

    def _stop(self, name: str) -> None:
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)


def _find_the_dead(link: socket.socket) -> None:
    """Let the kernel end a connection whose other side is gone without a word."""
    if link.family not in (socket.AF_INET, socket.AF_INET6):
        return
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        options = {
            socket.TCP_KEEPIDLE: 60,
            socket.TCP_KEEPINTVL: 10,
            socket.TCP_KEEPCNT: 3,
            socket.TCP_USER_TIMEOUT: int(1000 * STUCK_SECONDS),
        }
        for option, value in options.items():
            link.setsockopt(socket.IPPROTO_TCP, option, value)


def _full(most: int) -> bytes:
    """Return the answer to a connection too many, before it has sent anything."""
    refused = later(
        f"the server holds {most} connections, its limit of open files (ulimit -n); try again "
        "later, or raise the limit",
        5,
    )
    body = msgspec.json.encode(refused.body())
    head = [
        "HTTP/1.1 503 Service Unavailable",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        *(f"{name}: {value}" for name, value in refused.headers.items()),
    ]
    return ("\r\n".join(head) + "\r\n\r\n").encode() + body
