"""Shards on their way between the hosts of a run: over TCP, from host memory to host memory.

Not over the devices: a copy takes many steps, and a collective would hold up the step behind it and
need device memory for a second state. A random secret of the start keeps others out: it comes
first, and nothing of a stranger is read behind it. Data are as readable on the network as those of
gloo and NCCL are.
"""

import contextlib
import hashlib
import hmac
import json
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from absl import logging

from mtnlg_jax import compat

TIMEOUT = 300  # seconds without a byte after which an exchange has failed; a sync may take some
GREETING = 10  # seconds that a connection and the secret may take
PIECE = 1 << 22  # bytes read at once
_LENGTH = struct.Struct("!I")

# Take the header of a copy that a peer sends and its bytes; return the header of the answer.
Take = Callable[[dict, Iterator[bytes]], dict]
# Take the header of a request; return the header of the answer and its bytes.
Give = Callable[[dict], tuple[dict, list]]


class Server:
    """Answers the other processes of a run in threads of its own, until `close`."""

    def __init__(self, secret: str, take: Take, give: Give) -> None:
        class Handler(socketserver.StreamRequestHandler):
            timeout = GREETING

            def handle(self) -> None:
                # A peer that ends, or a stranger, must not print a stack trace here.
                with contextlib.suppress(OSError, ValueError):
                    key = _key(secret)
                    if not hmac.compare_digest(b"".join(receive(self.rfile, len(key))), key):
                        return
                    self.connection.settimeout(TIMEOUT)
                    request = _receive_header(self.rfile)
                    if request.pop("kind", None) == "take":
                        parts = receive(self.rfile, request["bytes"])
                        _send_header(self.wfile, take(request, parts))
                        return
                    answer, data = give(request)
                    _send_header(self.wfile, answer)
                    for part in data:
                        self.wfile.write(part)

        # Loopback alone where the whole run is on this machine.
        self._names = compat.addresses_for_others()
        alone = self._names == ["localhost"]
        self._server = socketserver.ThreadingTCPServer(("localhost" if alone else "", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="near tier", daemon=True).start()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """The addresses at which others may reach this one, the likeliest first."""
        return [(name, self._server.server_address[1]) for name in self._names]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def connected(addresses: list[tuple[str, int]]) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield the two directions of a connection to the first of ``addresses`` that answers.

    That one is moved to the front, for the next exchange.
    """
    failure: OSError | None = None
    for address in list(addresses):
        name, port = address
        try:
            link = socket.create_connection((name, port), GREETING)
        except OSError as error:
            failure = error
            continue
        link.settimeout(TIMEOUT)
        addresses[:] = [address, *(each for each in addresses if each != address)]
        with link, link.makefile("rb") as reading, link.makefile("wb", buffering=0) as writing:
            yield reading, writing  # type: ignore[misc]
        return
    raise failure or OSError("no address")


def send_copy(addresses: list[tuple[str, int]], secret: str, header: dict, parts: list) -> dict:
    """Send ``parts`` to a peer, and return its answer."""
    size = sum(len(part) for part in parts)
    with connected(addresses) as (reading, writing):
        _write(writing, _key(secret))
        _send_header(writing, header | {"kind": "take", "bytes": size})
        for part in parts:
            _write(writing, part)
        return _receive_header(reading)


def fetch(addresses: list[tuple[str, int]], secret: str, header: dict) -> tuple[dict, bytes]:
    """Return the answer to a request, and the bytes that it names."""
    with connected(addresses) as (reading, writing):
        _write(writing, _key(secret))
        _send_header(writing, header | {"kind": "give"})
        answer = _receive_header(reading)
        return answer, b"".join(receive(reading, answer["bytes"]))


def _key(secret: str) -> bytes:
    """Return the bytes with which a connection begins, as many for every secret."""
    return hashlib.sha256(secret.encode()).digest()


def receive(reading: Any, size: int) -> Iterator[bytes]:
    """Yield ``size`` bytes in pieces. Raise ConnectionError where they end too early."""
    while size:
        piece = reading.read(min(size, PIECE))
        if not piece:
            raise ConnectionError("the other process ended in the middle of a copy")
        size -= len(piece)
        yield piece


def _write(writing: Any, part: Any) -> None:
    view = memoryview(part)
    # An unbuffered write may write a part.
    while view:
        view = view[writing.write(view) :]


def _send_header(writing: Any, header: dict) -> None:
    text = json.dumps(header).encode()
    _write(writing, _LENGTH.pack(len(text)) + text)


def _receive_header(reading: Any) -> dict:
    length = _LENGTH.unpack(b"".join(receive(reading, _LENGTH.size)))[0]
    return json.loads(b"".join(receive(reading, length)))


def warn_of(error: Exception, what: str) -> None:
    """Log that ``what`` failed; the run goes on."""
    logging.warning("%s: %s", what, getattr(error, "strerror", None) or error)
