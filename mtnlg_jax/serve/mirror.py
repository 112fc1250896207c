"""A model of several processes: process 0 serves, and the others repeat what its devices do.

A program of a mesh must be started by all processes, in one order. Process 0 has the engines. It
tells the others each call of `Slots` and each slice of a job before it does the same, over one
connection to each. While nothing happens nothing is sent, so idle devices do not spin.
"""

import io
import logging
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import jax

from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.slots import Slots
from mtnlg_jax.serve.requests import close

log = logging.getLogger(__name__)

END = "end"


class Leader:
    """Process 0's connections to the others."""

    def __init__(self, connections: Sequence[Connection]):
        # Objects that every process has: their names are sent instead.
        self.named: dict[str, Any] = {}
        self.whole = True  # whether no other process is known to be gone
        self._connections = connections
        # Several engines share the devices, and all processes must see one order of calls.
        self.lock = threading.RLock()

    def tell(self, model: int, call: str, *arguments) -> None:
        """Send a call. Raise OSError if another process is gone."""
        data = _pickled((model, call, arguments), self.named)
        try:
            for connection in self._connections:
                connection.send_bytes(data)
        except OSError:
            self.whole = False
            raise

    def mirror(self, model: int) -> "Mirror":
        """Return what the engine of model number ``model`` needs."""
        return Mirror(self, model)

    def end(self) -> None:
        """Let the other processes end."""
        if self.whole:
            with self.lock:
                self.tell(0, END)


class Mirror:
    """What the engine of model number ``model`` calls instead of `Slots` and of a job."""

    def __init__(self, leader: Leader, model: int):
        self._leader = leader
        self._model = model
        self._jobs = 0

    def make_slots(self, *arguments) -> Slots:
        """Return `Slots` whose calls the other processes repeat."""
        return _ToldSlots(self._leader, self._model, *arguments)

    def slices(
        self, run: Callable[[Decoder], Iterator[object]], decoder: Decoder
    ) -> Iterator[object]:
        """Yield what ``run(decoder)`` yields. The other processes do the same slices."""
        self._jobs += 1
        number = self._jobs
        with self._leader.lock:
            self._leader.tell(self._model, "job", number, run, decoder.block_tokens)
        slices = iter(run(decoder))
        try:
            while True:
                with self._leader.lock:
                    self._leader.tell(self._model, "slice", number)
                    try:
                        value = next(slices)
                    except StopIteration:
                        return
                yield value
        finally:
            with self._leader.lock:
                self._leader.tell(self._model, "close", number)
                close(slices)


class _ToldSlots(Slots):
    def __init__(self, leader: Leader, model: int, decoder: Decoder, *arguments):
        self._leader = leader
        self._model = model
        with leader.lock:
            leader.tell(model, "slots", *arguments)
            super().__init__(decoder, *arguments)


def _told(name: str) -> Callable:
    method = getattr(Slots, name)

    def call(self, *arguments):
        with self._leader.lock:
            self._leader.tell(self._model, name, *arguments)
            return method(self, *arguments)

    return call


for _name in ("fill", "swap", "copy", "resize", "hold", "advance"):
    setattr(_ToldSlots, _name, _told(_name))


def follow(connection: Connection, decoders: Sequence[Decoder], named: dict[str, Any]) -> None:
    """Repeat the calls of process 0 until it ends. Raise EOFError if it is gone.

    ``decoders`` and ``named`` are those of process 0, loaded here.
    """
    slots: dict[int, Slots] = {}
    jobs: dict[tuple[int, int], Iterator] = {}
    while True:
        model, call, arguments = _unpickled(connection.recv_bytes(), named)
        if call == END:
            return
        if call in ("job", "slice", "close"):
            try:
                _follow_job(jobs, (model, arguments[0]), call, decoders[model], arguments[1:])
            except Exception:
                # Process 0 meets the same mistake and tells whoever asked.
                log.exception("a repeated job failed")
        elif call == "slots":
            slots.pop(model, None)  # frees the old cache first, as process 0 does
            slots[model] = Slots(decoders[model], *arguments)
        else:
            # What fails here alone must end this process: the others wait for its part.
            getattr(slots[model], call)(*arguments)


def _follow_job(
    jobs: dict[tuple[int, int], Iterator],
    key: tuple[int, int],
    call: str,
    decoder: Decoder,
    arguments: Sequence[Any],
) -> None:
    if call == "job":
        run, block_tokens = arguments
        jobs[key] = iter(run(decoder._replace(block_tokens=block_tokens)))
    elif call == "slice":
        next(jobs[key], None)
    else:
        close(jobs.pop(key, None))


def connect(on_first: Callable[[Callable[[], Any]], Any]) -> Any:
    """Return the `Leader` in process 0, and the connection to it in the others.

    ``on_first(f)`` returns what ``f`` returns in process 0 (JSON), in every process; all call it
    together.
    """
    listeners: list[Listener] = []

    def listen() -> list:
        key = os.urandom(32)
        listeners.append(Listener((_address(), 0), backlog=jax.process_count(), authkey=key))
        return [*listeners[0].address, key.hex()]

    host, port, key = on_first(listen)
    if not listeners:
        return Client((host, port), authkey=bytes.fromhex(key))
    with listeners[0] as listener:
        return Leader([listener.accept() for _ in range(jax.process_count() - 1)])


def _address() -> str:
    """Return the address of this host that others of its network reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: this asks which interface leads out.
            probe.connect(("10.254.254.254", 1))
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def _pickled(message: Any, named: dict[str, Any]) -> bytes:
    names = {id(value): name for name, value in named.items()}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return names.get(id(value))

    buffer = io.BytesIO()
    Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(message)
    return buffer.getvalue()


def _unpickled(data: bytes, named: dict[str, Any]) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, name):
            return named[name]

    # From process 0 of this job, which knows the key.
    return Unpickler(io.BytesIO(data)).load()
