"""Check the lock of a run's folder, and the signals that save its state and end it."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest

from mtnlg_jax.train import lifetime

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60  # seconds, on a busy machine

HOLDS = """
    import fcntl, sys
    with open(sys.argv[1], "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        print("held", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """Start a process that holds the lock of tmp_path until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDS), str(tmp_path / ".lock-0")],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_the_lock_names_its_holder_and_start(tmp_path):
    with lifetime.own(str(tmp_path)):
        said = (tmp_path / ".lock-0").read_text()
        assert re.fullmatch(
            rf"{os.getpid()} on {socket.gethostname()} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\n",
            said,
        )
        with pytest.raises(
            OSError, match=rf"another run is writing in .*: process {os.getpid()} on .* since 2"
        ):
            with lifetime.own(str(tmp_path)):
                pass
    with lifetime.own(str(tmp_path)):  # the file of a process that ended does not block
        pass


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (
            "{pid} on {host} since 2026-01-01 00:00:00\n",
            "process {pid} on {host} since 2026-01-01 00:00:00",
        ),
        ("{pid} on elsewhere\n", "process {pid} on elsewhere"),
        ("", "an unknown process"),
        ("\0\0", "an unknown process"),
    ],
)
def test_a_held_lock_raises_an_error_after_a_while(
    tmp_path, held, monkeypatch, capsys, owner, name
):
    monkeypatch.setattr(lifetime, "PATIENCE_HERE", 0.1)
    monkeypatch.setattr(lifetime, "PATIENCE_ELSEWHERE", 0.1)
    words = {"pid": held.pid, "host": socket.gethostname()}
    (tmp_path / ".lock-0").write_text(owner.format(**words))
    with pytest.raises(OSError, match=re.escape(name.format(**words))), lifetime.own(str(tmp_path)):
        pass
    assert "waiting 0.1 s" in capsys.readouterr().err


def test_a_lock_that_is_released_is_acquired(tmp_path, held, monkeypatch):
    clock = types.SimpleNamespace(
        monotonic=time.monotonic, sleep=lambda _: held.communicate()
    )  # which ends it
    monkeypatch.setattr(lifetime, "time", clock)
    with lifetime.own(str(tmp_path)):
        assert (tmp_path / ".lock-0").read_text().startswith(f"{os.getpid()} on ")


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_second_signal_is_ignored_unless_it_is_ctrl_c(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with lifetime.signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.is_set()
        if name == "SIGINT":
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
                signal.pause()
        else:
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_the_signal_of_the_profiler_does_not_stop_the_run():
    with lifetime.signals("SIGUSR1") as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.profile.is_set() and not stop.is_set()
        # The other one stays what schedulers send before they kill.
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.is_set()
    with lifetime.signals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.is_set() and not stop.profile.is_set()


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_an_ignored_signal_stays_ignored(name):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)  # as nohup does
    try:
        with lifetime.signals() as stop:
            os.kill(os.getpid(), number)
            assert not stop.is_set()
    finally:
        signal.signal(number, before)
