"""The exchange of near copies: what its server does with strangers."""

import contextlib
import socket
import struct
import threading

import pytest

from mtnlg_jax.train.near import wire


@pytest.fixture
def served():
    """Return (a server, the requests that it has answered)."""
    requests = []

    def give(request):
        requests.append(request)
        return {"bytes": 3}, [memoryview(b"abc")]

    def take(request, parts):
        requests.append(request | {"data": b"".join(parts)})
        return {}

    server = wire.Server("secret", take, give)
    yield server, requests
    server.close()


def test_both_directions(served):
    server, requests = served
    assert wire.fetch(server.addresses, "secret", {"file": "x"})[1] == b"abc"
    assert wire.send_copy(server.addresses, "secret", {"step": 2}, [b"12", b"3"]) == {}
    assert requests[1]["data"] == b"123"


def test_the_address_that_answers_is_the_first_of_the_next_exchange(served, monkeypatch):
    server, _ = served
    addresses = [("nowhere", 1), *server.addresses]
    tried = []
    real = socket.create_connection

    def connect(address, timeout):
        tried.append((address, timeout))
        if address == ("nowhere", 1):
            raise OSError("no route")
        links.append(real(address, timeout))
        return links[-1]

    links = []
    monkeypatch.setattr(socket, "create_connection", connect)
    for _ in range(2):
        with wire.connected(addresses):
            assert links[-1].gettimeout() == wire.TIMEOUT
    good = server.addresses[0]
    assert tried == [(each, wire.GREETING) for each in (("nowhere", 1), good, good)]
    assert sorted(addresses) == sorted([("nowhere", 1), good])


# A header, which is read by its length, with a secret that is not ASCII.
HEADER = b'{"secret": "\\u00e9", "kind": "give", "file": "x"}'


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: somewhere.else.example\r\n\r\n",
        struct.pack("!I", 2**32 - 1) + b"{" * 100,
        struct.pack("!I", len(HEADER)) + HEADER,
    ],
    ids=["http", "size", "header"],
)
def test_a_stranger_is_cut_off_at_once_and_quietly(served, said, capfd):
    server, requests = served
    with socket.create_connection(server.addresses[0], 5) as link:
        # The end of the stream, or a reset: not the wait for the rest of a header.
        with contextlib.suppress(ConnectionError):
            link.sendall(said)
            assert link.recv(1) == b""
    assert not requests
    assert "Traceback" not in capfd.readouterr().err


def test_the_end_of_a_run_does_not_wait_for_a_silent_stranger(served):
    server, _ = served
    with socket.create_connection(server.addresses[0], 10):
        closing = threading.Thread(target=server.close)
        closing.start()
        closing.join(5)
        assert not closing.is_alive()
