"""Connections that send or take nothing are ended."""

import contextlib
import http.client
import socket
import time

import pytest

from mtnlg_jax.serve import connections
from mtnlg_jax.serve.connections import Connection


@pytest.fixture
def quick(make, serving_of, monkeypatch):
    """Return a server that waits a quarter of a second."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.25)
    monkeypatch.setattr(connections, "STUCK_SECONDS", 0.25)
    with serving_of(make()) as server:
        yield server


def _ends_within(link: socket.socket, seconds: float) -> bytes:
    """Return all that comes until the other side hangs up."""
    link.settimeout(seconds)
    found = b""
    with contextlib.suppress(ConnectionError):
        while data := link.recv(1 << 16):
            found += data
    return found


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: loc"])
def test_a_connection_without_a_request_is_ended(quick, sent):
    with socket.create_connection(("127.0.0.1", quick.port)) as link:
        link.sendall(sent)
        assert _ends_within(link, 20) == b""


def test_a_second_half_request_is_ended_too(quick):
    with socket.create_connection(("127.0.0.1", quick.port)) as link:
        link.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP")
        # The rest keeps coming, but slowly.
        time.sleep(0.1)
        link.sendall(b"/1.1\r\n")
        assert _ends_within(link, 20).count(b"200 OK") == 1


def test_a_client_that_takes_nothing_is_ended(quick):
    """Ask for far more than the buffers of both sides hold, and read none of it."""
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect(("127.0.0.1", quick.port))
        request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        end = time.monotonic() + 20
        link.settimeout(0.5)
        with contextlib.suppress(ConnectionError, TimeoutError):
            while time.monotonic() < end:
                link.sendall(request * 20)
        # Its buffers are full now. Only an end of the connection makes this fail.
        with pytest.raises(ConnectionError):
            while time.monotonic() < end:
                with contextlib.suppress(TimeoutError):
                    link.send(b"x")


def test_a_connection_too_many_is_told_to_come_later(make, serving_of, monkeypatch):
    with serving_of(make()) as server:
        # The server sets the limit when it starts.
        assert server.ask("GET", "/health")[0] == 200
        monkeypatch.setattr(Connection, "most", 2)
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                held = http.client.HTTPConnection("127.0.0.1", server.port)
                stack.callback(held.close)
                # An answer shows that the server counts it.
                held.request("GET", "/health")
                assert held.getresponse().read()
            with socket.create_connection(("127.0.0.1", server.port)) as link:
                told = _ends_within(link, 20)
        assert told.startswith(b"HTTP/1.1 503 ") and b"retry-after: " in told.lower()
        assert b"ulimit -n" in told
        end = time.monotonic() + 20
        while server.ask("GET", "/health")[0] != 200:
            assert time.monotonic() < end


def test_the_limit_of_files_is_raised_to_the_hard_one():
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        most = connections.raise_file_limit()
        now = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert now > 512 or hard == 512
        assert most is None or most == now - 128
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
