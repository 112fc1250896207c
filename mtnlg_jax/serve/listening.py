"""Listen, and end well: SIGTERM lets what runs finish, and a second signal ends it."""

import asyncio
import contextlib
import socket
from types import FrameType

import uvicorn

from mtnlg_jax.serve.connections import Connection, raise_file_limit
from mtnlg_jax.serve.http import Api, is_loopback
from mtnlg_jax.serve.keys import Keys

# Seconds in which running requests may finish after SIGTERM.
DRAIN_SECONDS = 120.0
_BACKLOG = 4096


def bind(host: str, port: int, keys: Keys) -> socket.socket:
    """Return a socket that is bound, before a model is loaded for nothing.

    Raises ValueError on an address of the network without API keys, and on a port in use.
    """
    if not keys and not is_loopback(host):
        raise ValueError(
            f"--host={host} lets others call this server, and there are no API keys; give "
            "--api_keys=FILE or MTNLG_API_KEYS, or leave --host out to serve this machine alone"
        )
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ValueError(f"--host={host} is not an address here ({error}); give another") from None
    bound = socket.socket(family, kind, number)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        # Another process that listens there makes listen fail where bind did not.
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise ValueError(
            f"--port={port} of {host} cannot be used ({error.strerror}); end what listens there, "
            "or give another --port"
        ) from None
    return bound


class Server(uvicorn.Server):
    """uvicorn with a drain: it goes on listening, and answers 503, while requests finish."""

    def __init__(self, api: Api, drain_seconds: float = DRAIN_SECONDS):
        config = uvicorn.Config(
            api.app,
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            # uvloop accepts one connection a turn of its loop, so that a burst overflows the queue
            # of the kernel, which then forgets connections that clients believe to have.
            loop="asyncio",
            server_header=False,
            date_header=False,
            timeout_keep_alive=30,
            # After the drain the connections that are left are idle.
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=64 << 10,
            backlog=_BACKLOG,
        )
        super().__init__(config)
        self.api = api
        self.drain_seconds = drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        Connection.most = raise_file_limit()
        await super().serve(sockets)

    async def on_tick(self, counter: int) -> bool:
        """End when an engine has stopped by itself: whoever watches the process starts it again."""
        if self.api.models.failure is not None:
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the drain at the first signal; end at once at the second."""
        if self.api.draining:
            self.should_exit = True
            self.force_exit = True
            return
        self.api.draining = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        # The API takes no new request. The engines still take what accepted ones need.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.drain_seconds):
                while self.api.running:
                    await asyncio.sleep(0.05)
        self.should_exit = True

    def run_until_signal(self, bound: socket.socket) -> None:
        """Serve until SIGTERM or Ctrl-C, and close the engines.

        Raises RuntimeError if an engine stopped by itself.
        """
        try:
            self.run(sockets=[bound])
        finally:
            for engine in self.api.models.engines:
                engine.close()
        failure = self.api.models.failure
        if failure is not None:
            raise RuntimeError(f"the engine stopped: {failure}") from failure
