"""A server in a process of its own, and clients over plain sockets, for serve_load.py.

Plain sockets, since the clients of a load must also be able to misbehave: leave, read slowly, close
one half, send half a request.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass
class Answer:
    """What a client was told."""

    status: int  # 0: the connection ended without an answer
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    events: list[Any] = dataclasses.field(default_factory=list)
    first: float = 0.0  # seconds to the first event with a choice
    seconds: float = 0.0

    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """launch/serve.py with the flags given, until ``stop``."""

    def __init__(self, port: int, flags: list[str]):
        self.port = port
        self.errors = b""
        command = [sys.executable, str(ROOT / "launch" / "serve.py"), f"--port={port}", *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)

    async def wait_ready(self, seconds: float = 600.0) -> float:
        """Wait for /ready, and return how long it took."""
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with {self.process.returncode}: {self.log()}")
            with contextlib.suppress(OSError):
                if (await get(self.port, "/ready")).status == 200:
                    return time.monotonic() - begun
            await asyncio.sleep(0.2)
        raise SystemExit(f"the server was not ready after {seconds} s")

    def memory(self) -> float:
        """Return the memory in MB that the process has made its own.

        Pages of libraries come and go with what the system reclaims.
        """
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return sum(map(int, re.findall(r"(?:RssAnon|VmSwap):\s+(\d+)", status))) / 1024

    def files(self) -> int:
        """Return how many files, and so connections, are open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def log(self) -> str:
        """Return what the server has written to standard error."""
        with contextlib.suppress(OSError, TypeError):
            while found := self.process.stderr.read():
                self.errors += found
        return self.errors.decode("utf-8", "replace")

    def stop(self, seconds: float = 60.0) -> tuple[int, float]:
        """Send SIGTERM, and return the exit code and how long it took."""
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return self.process.returncode, time.monotonic() - begun


def request_of(path: str, body: Any = None, **headers: str) -> bytes:
    """Return the bytes of a request; a body makes it a POST."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + data


async def get(port: int, path: str) -> Answer:
    return await ask(port, request_of(path, Connection="close"))


async def ask(port: int, request: bytes, pause: float = 0.0, seconds: float = 300.0) -> Answer:
    """Send a request and read the whole answer. ``pause``: seconds before each read, for a slow
    reader."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        begun = time.monotonic()
        writer.write(request)
        async with asyncio.timeout(seconds):
            return await read_answer(reader, begun, pause)
    finally:
        writer.close()


async def read_answer(reader: asyncio.StreamReader, begun: float, pause: float = 0.0) -> Answer:
    """Return the next answer of a connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return Answer(0, seconds=time.monotonic() - begun)
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    answer = Answer(int(first.split()[1]), headers)
    if headers.get("transfer-encoding") == "chunked":
        async for chunk in _chunks(reader):
            answer.body += chunk
            if not answer.first and b'"choices":[{' in chunk:
                answer.first = time.monotonic() - begun
            if pause:
                await asyncio.sleep(pause)
    else:
        answer.body = await reader.readexactly(int(headers.get("content-length", 0)))
    answer.seconds = time.monotonic() - begun
    if headers.get("content-type", "").startswith("text/event-stream"):
        answer.events = list(_events(answer.body))
    return answer


async def _chunks(reader: asyncio.StreamReader):
    while size := int(await reader.readline(), 16):
        yield await reader.readexactly(size)
        await reader.readline()
    await reader.readline()


def _events(body: bytes):
    """Yield the values of a stream; the last one is "[DONE]" if it ended well."""
    for line in body.decode().split("\n\n"):
        if line.startswith("data: "):
            value = line.removeprefix("data: ")
            yield value if value == "[DONE]" else json.loads(value)


async def metrics(port: int) -> dict[str, float]:
    """Return the numbers of /metrics by name, those of labels added up."""
    found: dict[str, float] = {}
    for line in (await get(port, "/metrics")).body.decode().splitlines():
        match = re.fullmatch(r"(\w+)(?:\{.*\})? ([-+\d.e]+)", line)
        if match:
            found[match[1]] = found.get(match[1], 0.0) + float(match[2])
    return found


async def until_idle(port: int, seconds: float = 60.0) -> dict[str, float]:
    """Wait until no request is answered, and return /metrics."""
    end = time.monotonic() + seconds
    while True:
        now = await metrics(port)
        busy = ("writing_requests", "filling_requests", "waiting_requests", "running_jobs")
        idle = not any(now[f"mtnlg_engine_{name}"] for name in busy)
        if (idle and not now["mtnlg_requests_in_flight"]) or time.monotonic() > end:
            return now
        await asyncio.sleep(0.1)
