"""The lock of a run folder, and the signals that stop a run after it has saved its state."""

import contextlib
import errno
import fcntl
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from types import FrameType
from typing import BinaryIO

import jax

# Seconds to wait for the lock of a run that is about to end. On this host it may be stopping, for
# example because its launcher ended. On a host that died, the file system holds its lock for a
# while (NFS: 90 s).
PATIENCE_HERE = 10
PATIENCE_ELSEWHERE = 120

# Always handled: requests to stop.
STOP_SIGNALS = ("SIGTERM", "SIGINT")
# A closed terminal, and what schedulers send before they kill. Handled unless they were ignored
# when the process started, as SIGHUP is under nohup.
WARNING_SIGNALS = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


@contextlib.contextmanager
def own(workdir: str) -> Iterator[None]:
    """Create ``workdir`` and lock it for this run.

    The lock ends with the process, however it ends. Raise OSError where the folder cannot be
    written, and where another run holds the lock, naming that run.
    """
    # One lock for each process of a run, since all of them share the folder.
    path = os.path.join(workdir, f".lock-{jax.process_index()}")
    try:
        os.makedirs(workdir, exist_ok=True)
        # Appending does not truncate: the file names its owner until the lock is ours.
        file = open(path, "ab", buffering=0)
    except OSError as error:
        raise OSError(
            f"cannot write in {workdir}: {error.strerror}; give another --workdir"
        ) from error
    with file:
        _lock(file, workdir)
        # On a full disk the lock still holds, but its file does not name the owner.
        with contextlib.suppress(OSError):
            now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()} since {now}\n".encode())
        yield


def _lock(file: BinaryIO, workdir: str) -> None:
    began = time.monotonic()
    reported = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                # File systems without locks: starting two runs is the user's responsibility.
                return
        # Read again each time: the owner may change while this run waits.
        name, patience = _owner(file.name)
        if time.monotonic() - began >= patience:
            raise OSError(
                f"another run is writing in {workdir}: {name}; wait for its end, end it with kill, "
                "or give another --workdir"
            )
        if not reported:
            print(
                f"{name} is writing in {workdir}: waiting {patience} s for its end",
                file=sys.stderr,
                flush=True,
            )
            reported = True
        time.sleep(0.2)


def _owner(path: str) -> tuple[str, float]:
    """Return (name of the process that holds the lock, seconds to wait for it)."""
    with open(path, errors="replace") as file:
        owner = re.fullmatch(r"(\d+) on (\S+)(?: since (.+))?\n?", file.read())
    if not owner:
        return "an unknown process", PATIENCE_ELSEWHERE
    process, host, since = owner.groups()
    name = f"process {process} on {host}" + (f" since {since}" if since else "")
    if host != socket.gethostname():
        return name, PATIENCE_ELSEWHERE
    # Another call of train in this very process holds it, so waiting would not help.
    return name, 0 if int(process) == os.getpid() else PATIENCE_HERE


class Requests(threading.Event):
    """Set by a signal that stops the run; ``profile`` is set by the one that opens a window of the
    profiler."""

    def __init__(self) -> None:
        super().__init__()
        self.profile = threading.Event()


@contextlib.contextmanager
def signals(profile: str = "none") -> Iterator[Requests]:
    """Yield an event that any of STOP_SIGNALS and WARNING_SIGNALS sets.

    A SIGINT after that raises KeyboardInterrupt; further other signals do nothing. The signal
    ``profile`` of WARNING_SIGNALS does not stop the run: it sets the event of that name.
    """
    stop = Requests()
    # Python lets only the main thread set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    asks_for_profile = getattr(signal, profile, None)

    def handle(number: int, frame: FrameType | None) -> None:
        if number == asks_for_profile:
            stop.profile.set()
            return
        # A second Ctrl-C: the user does not want to wait for the end of the step.
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        # Only a flag: the step in progress ends normally, and the loop saves between steps.
        stop.set()

    before = {}
    for name in STOP_SIGNALS + WARNING_SIGNALS:
        number = getattr(signal, name, None)
        if number is None:
            continue
        if name in STOP_SIGNALS or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
