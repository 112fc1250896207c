"""What a run holds while it lives: the lock of its folder, and the signals that end it with its
state saved."""

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
from datetime import datetime

import jax

# Seconds to wait for the lock of a run that is about to end: one on this host that was told to, as
# by the end of its launcher; one on a host that died, whose lock the file system still holds for a
# while (NFS: 90 s).
PATIENCE_HERE = 10
PATIENCE_ELSEWHERE = 120

# Of these the first two are always handled; the others stay ignored where they were, as SIGHUP is
# under nohup.
ASKED = ("SIGTERM", "SIGINT")
WARNED = (
    "SIGHUP",
    "SIGUSR1",
    "SIGUSR2",
    "SIGXCPU",
)  # a closed terminal; what schedulers send before they kill


@contextlib.contextmanager
def own(workdir: str):
    """Makes ``workdir`` and holds it for this run; the lock goes with the process, however it dies.
    Raises OSError where that is not possible, and where another run holds it, which it names."""
    path = os.path.join(workdir, f".lock-{jax.process_index()}")
    try:
        os.makedirs(workdir, exist_ok=True)
        file = open(path, "ab", buffering=0)
    except OSError as error:
        raise OSError(
            f"cannot write in {workdir}: {error.strerror}; give another --workdir"
        ) from error
    with file:
        _lock(file, workdir)
        with contextlib.suppress(
            OSError
        ):  # a full disk: the lock holds without a word on its owner, too
            file.truncate(0)
            file.write(
                f"{os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n".encode()
            )
        yield


def _lock(file, workdir: str) -> None:
    began = time.monotonic()
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # A file system without locks: it is up to the person not to start two.
        with open(file.name, errors="replace") as current:
            owner = re.fullmatch(r"(\d+) on (\S+)(?: since (.+))?\n?", current.read())
        patience = PATIENCE_ELSEWHERE
        name = "an unknown process"
        if owner:
            name = f"process {owner[1]} on {owner[2]}" + (f" since {owner[3]}" if owner[3] else "")
            here = owner[2] == socket.gethostname()
            patience = (
                0
                if here and int(owner[1]) == os.getpid()
                else PATIENCE_HERE
                if here
                else PATIENCE_ELSEWHERE
            )
        if time.monotonic() - began >= patience:
            raise OSError(
                f"another run is writing in {workdir}: {name}; wait for its end, end it with kill, or give "
                "another --workdir"
            )
        if not told:
            print(
                f"{name} is writing in {workdir}: waiting {patience} s for its end",
                file=sys.stderr,
                flush=True,
            )
            told = True
        time.sleep(0.2)


@contextlib.contextmanager
def signals():
    """An event that any of ASKED and WARNED sets; a SIGINT after that interrupts at once, the
    others do nothing more."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number, frame):
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {}
    for name in ASKED + WARNED:
        number = getattr(signal, name, None)
        if number is not None and (name in ASKED or signal.getsignal(number) != signal.SIG_IGN):
            before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
