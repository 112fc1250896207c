"""Start-up, agreement and shutdown of multi-process runs; no-ops with one process.

Crash-only: a process that fails exits at once, without the JAX shutdown barrier, which the others
would never reach. They notice in their next collective (gloo), through the heartbeat (JAX aborts
them, exit code 134, if they cannot end by themselves) or through their watchdogs. Whoever started
the processes starts all of them again, and they resume from the last checkpoint.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtnlg_jax import compat, errors
from mtnlg_jax.config import Config, to_json
from mtnlg_jax.train.state import TrainState

# Process 0 hosts the coordination service: JAX aborts the others as soon as it exits. It waits this
# long, so that they can still report their own errors.
EXIT_DELAY_SECONDS = 3
_ending = threading.Lock()  # held by the thread that reports why this process ends
LOOK_SECONDS = 1  # between looks at whether the others go on
# Seconds after which a process 0 that does not answer counts as lost; less than JAX waits before it
# aborts this process.
_longest_silence = math.inf


def start(
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    heartbeat_seconds: int,
    local_devices: int | None = None,
    distributed: str = "auto",
    timeout: int = 300,
) -> None:
    """Join the other processes of the run. Call this before the first use of a device.

    With ``coordinator`` ("HOST:PORT" of process 0), ``processes`` and ``process_id``, join those.
    Otherwise join the processes that SLURM, Open MPI, a TPU pod or GKE started, if any;
    ``distributed`` "off" disables the detection, "on" requires it to succeed.

    Wait up to ``timeout`` seconds for process 0 and for all processes to connect; then exit with
    code 2. ``local_devices`` simulates devices on the CPU. Raise ValueError on invalid arguments.
    """
    if local_devices is not None:
        if local_devices < 1:
            raise ValueError(f"--local_devices={local_devices} must be at least 1")
        # Both must be set before JAX starts its backend, which the first use of a device does.
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", local_devices)
    global _longest_silence
    arguments = _initialize_arguments(coordinator, processes, process_id, distributed)
    if arguments is None:
        return
    _longest_silence = 0.8 * heartbeat_seconds
    with _deadline(timeout, coordinator, process_id):
        try:
            # When its own time is over, JAX aborts without a readable message: ours comes first.
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=timeout + 60,
                heartbeat_timeout_seconds=heartbeat_seconds,
            )
        except RuntimeError as error:
            raise ValueError(
                f"process {process_id} could not listen on or connect to {coordinator}: "
                f"{str(error).splitlines()[0]}; choose another port in --coordinator"
            ) from None


def _initialize_arguments(
    coordinator: str | None, processes: int | None, process_id: int | None, distributed: str
) -> dict[str, Any] | None:
    """Return the arguments of ``jax.distributed.initialize``; None for a run of one process."""
    given = {"--coordinator": coordinator, "--processes": processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if coordinator is not None and processes is not None and process_id is not None:
        _check_address(coordinator)
        if processes < 1 or not 0 <= process_id < processes:
            raise ValueError(
                f"--process_id={process_id} does not exist with --processes={processes}; "
                "the first is 0"
            )
        return {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process_id,
            # Explicit arguments win over what SLURM or a TPU pod would say.
            "cluster_detection_method": "deactivate",
        }
    if len(missing) < len(given):
        raise ValueError(
            f"{' and '.join(missing)} missing: --coordinator=HOST:PORT, --processes and "
            "--process_id go together; omit all three on SLURM, TPU pods and GKE TPUs"
        )
    # A job that silently trains alone on each host would cost more than an error.
    if distributed == "on" and not compat.cluster_processes():
        raise ValueError(
            "--distributed=on, but no SLURM, Open MPI, TPU pod or GKE was found here; start under "
            "one, or give --coordinator=HOST:PORT, --processes and --process_id"
        )
    if distributed == "on" or (distributed == "auto" and compat.cluster_processes() > 1):
        # Empty arguments: JAX detects all of them from the cluster.
        return {}
    return None


def _check_address(coordinator: str) -> None:
    if (
        # Checked before JAX sees it, so that the message names the flag.
        not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):[0-9]+", coordinator)
        or int(coordinator.split(":")[-1]) > 65535
    ):
        raise ValueError(f"--coordinator={coordinator!r} is not HOST:PORT, such as 10.0.0.1:1234")


@contextlib.contextmanager
def _deadline(seconds: float, coordinator: str | None, process_id: int | None) -> Iterator[None]:
    """Exit with code 2 and one line unless the body ends within ``seconds``."""
    connected = threading.Event()

    def wait() -> None:
        if connected.wait(seconds):
            return
        # Asked only where it tells two causes apart: a missing process 0 and a missing peer.
        answers = process_id == 0 or coordinator is None or _is_listening(coordinator)
        problem = (
            "not every process connected to process 0"
            if answers
            else f"no process 0 answers at {coordinator}"
        )
        print(
            f"error: {problem} within {seconds} s; check that all are started with the same "
            "--coordinator, which each of them can reach, or raise --coordinator_timeout",
            file=sys.stderr,
        )
        # From this thread an exception would not reach the main one, which is inside JAX.
        exit_now(errors.BAD_INPUT)

    # The call into JAX blocks the main thread, so the limit needs another one.
    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        connected.set()


def _is_listening(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        # A port that accepts a connection is enough; nothing is sent.
        socket.create_connection((host.strip("[]"), int(port)), 1).close()
    except OSError:
        return False
    return True


def several() -> bool:
    """Return whether this run has more than one process."""
    # In this order: `process_count` starts the backend.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Return whether this process writes what only one process writes: logs, curves, metadata."""
    return jax.process_index() == 0


def exit_now(code: int) -> NoReturn:
    """End this process immediately: no cleanup handler waits for another process."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    # sys.exit would run JAX's shutdown barrier, and wait for processes that may never come.
    os._exit(code)


@contextlib.contextmanager
def exit_on_failure(
    advice: str = "start all of them again to resume from the last checkpoint",
) -> Iterator[None]:
    """With several processes, end this one on an exception; ``advice`` is for a lost process.

    The others did not see the exception, so nobody may wait for them. Exceptions that all processes
    raise together (they have an ``exit_code``) pass, and with one process every exception does.
    A process that waits for others ends as well, as soon as one of them tells that it ends.
    """
    if not several():
        yield
        return
    over = threading.Event()
    compat.hold_aborts()
    watch = threading.Thread(target=_watch_others, args=(over, advice), name="others", daemon=True)
    watch.start()
    try:
        yield
    except Exception as error:
        if hasattr(error, "exit_code"):
            raise
        _ending.acquire()
        if _is_from_lost_process(error):
            _end_after_others(f"{advice} ({str(error).splitlines()[0]})")
        line, code = errors.explain(error)
        text = f"{_name()}: {line}" if line else "".join(traceback.format_exception(error))
        _end(text, code)
    finally:
        over.set()


def _watch_others(over: threading.Event, advice: str) -> None:
    """End this process once another one ends or process 0 does not answer.

    Do nothing if the body is ``over`` or the process is ending already.
    """
    lost = 0
    asking = threading.Event()

    def look() -> None:
        nonlocal lost
        while not over.wait(LOOK_SECONDS):
            asking.set()
            try:
                # This waits as long as process 0 is stopped.
                lost = 0 if compat.others_go_on() else lost + 1
            finally:
                asking.clear()

    threading.Thread(target=look, name="looks", daemon=True).start()
    poll = LOOK_SECONDS / 4
    # Waits are counted, not seconds: those in which this process itself was stopped do not count.
    silent = 0.0
    # Twice, since a call may fail by itself, and the main thread often reports the same by then.
    while lost < 2 and silent < _longest_silence:
        if over.wait(poll):
            return
        silent = silent + poll if asking.is_set() else 0.0
    if not over.is_set() and _ending.acquire(blocking=False):
        what = "another process ended" if lost else "process 0 does not answer"
        _end_after_others(advice, what)


def _end_after_others(advice: str, what: str = "another process ended") -> NoReturn:
    line = f"{_name()}: {what}, so this one ends; {advice}"
    _end(line, errors.PROCESS_LOST)


def _name() -> str:
    # All processes may write to one terminal, so each line says whose it is.
    return f"process {jax.process_index()} of {jax.process_count()}"


def _end(text: str, code: int) -> NoReturn:
    """Print ``text`` and exit with ``code``, process 0 after the others."""
    print(text, file=sys.stderr, flush=True)
    # In a thread, since process 0 may be the one that does not answer.
    tell = threading.Thread(target=compat.tell_others_that_this_ends, daemon=True)
    tell.start()
    tell.join(LOOK_SECONDS)
    # The others must be able to report first: they are aborted when process 0 ends.
    if is_first():
        time.sleep(EXIT_DELAY_SECONDS)
    exit_now(code)


def _is_from_lost_process(error: Exception) -> bool:
    # JAX reports a lost peer in the words of the library that noticed it.
    words = (
        "gloo",
        "connection closed",
        "connection reset",
        "nccl",
        "coordination service",
        "heartbeat",
        "barrier",
    )
    text = str(error).lower()
    # JAX raises some of these as ValueError, which is ours for bad input.
    if isinstance(error, ValueError):
        return "gloo" in text
    return isinstance(error, jax.errors.JaxRuntimeError) and any(word in text for word in words)


# --- agreement


def run_on_first(function: Callable[[], Any]) -> Any:
    """Call ``function`` in process 0 and return its result (JSON) in every process.

    A ValueError or OSError of ``function`` is raised in every process; a failure that may pass is
    raised as PassingError.
    """
    if jax.process_count() == 1:
        return function()
    # The others send an empty outcome into the broadcast, which ignores it.
    outcome: dict[str, Any] = {}
    if is_first():
        try:
            outcome = {"value": function()}
        except Exception as error:
            # Only the class and the text cross to the other processes. Anything else is a fault of
            # the program, and ends process 0 at once (`exit_on_failure`).
            if errors.is_passing(error):
                kind = "passing"
            elif isinstance(error, ValueError):
                kind = "value"
            elif isinstance(error, OSError):
                kind = "system"
            else:
                raise
            outcome = {"error": str(error), "kind": kind}
    text = json.dumps(outcome).encode()
    # A broadcast needs the same shape in every process: first the size, then the bytes.
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = np.frombuffer(text[:size].ljust(size), np.uint8)
    outcome = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8).tobytes())
    if "error" in outcome:
        kinds = {"passing": errors.PassingError, "value": ValueError, "system": OSError}
        raise kinds[outcome["kind"]](outcome["error"])
    return outcome["value"]


def barrier(name: str) -> None:
    """Return once every process has called this."""
    if several():
        multihost_utils.sync_global_devices(name)


class PreemptionVote:
    """``vote(mine)``: return whether any process was asked to stop by the previous call.

    Every process gets the same answer, for the cost of reducing one number per device. The answer
    is one step late, so that no process waits for the running step.
    """

    def __init__(self) -> None:
        self._previous: jax.Array | None = None
        if several():
            # One flag for each device, because JAX reduces over devices and not over processes.
            devices = Mesh(np.array(jax.devices()), "all")
            self._one_per_device = NamedSharding(devices, P("all"))
            self._any = jax.jit(
                lambda flags: flags.max(), out_shardings=NamedSharding(devices, P())
            )

    def __call__(self, mine: bool) -> bool:
        if not several():
            return mine
        flags = jax.make_array_from_callback(
            (jax.device_count(),), self._one_per_device, lambda index: np.array([mine], np.int32)
        )
        # Reading the answer of this call would wait for the step that is queued before it; that of
        # the previous call is there already.
        previous = self._previous
        self._previous = self._any(flags)
        return previous is not None and bool(previous)


def fingerprint(parts: Any) -> str:
    """Return a short hash of any JSON value."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def disagreement(parts: dict[str, Any]) -> str | None:
    """Return one line that names which of ``parts`` (JSON) differ, and between which processes.

    Return None where all processes hold the same.
    """
    if not several():
        return None
    # Eight bytes as two uint32, since JAX would cut a uint64 to 32 bits.
    mine = np.frombuffer(bytes.fromhex(fingerprint(parts)), np.uint32)
    everyone = multihost_utils.process_allgather(mine)
    me = jax.process_index()
    others = [number for number, theirs in enumerate(everyone) if (theirs != mine).any()]
    # All processes see the same table, so all return here or none does: what follows is collective.
    if not (everyone != everyone[0]).any():
        return None
    # The parts themselves are exchanged only after a difference.
    first = run_on_first(lambda: parts)
    # Through JSON, as those of process 0 came.
    parts = json.loads(json.dumps(parts))
    keys = [key for key in {**first, **parts} if first.get(key) != parts.get(key)]
    different = [f"{key}={parts.get(key)!r} here, {first.get(key)!r} in process 0" for key in keys]
    more = f" and {len(different) - 4} more" if len(different) > 4 else ""
    # At most 8: one wrong process disagrees with all others.
    which = ", ".join(map(str, others[:8]))
    if len(others) > 8:
        which += f" and {len(others) - 8} more"
    # Process 0 itself, or two processes that agree with each other against a third.
    difference = (
        f"{'; '.join(different[:4])}{more}"
        if different
        else "it holds the same as process 0, and they do not"
    )
    return f"process {me} of {jax.process_count()} disagrees with {which}: {difference}"


def check_same_settings(config: Config, workdir: str) -> None:
    """Check before any work that all processes were started with the same settings.

    Raise ValueError in every process otherwise.
    """
    settings: dict[str, Any] = {"jax": jax.__version__, "workdir": os.path.abspath(workdir)}
    # With other compiler flags the processes would run different programs.
    settings |= {name: os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    # Key by key, so that the message names the setting and not two hashes.
    for section, value in json.loads(to_json(config)).items():
        settings |= (
            {f"{section}.{key}": one for key, one in value.items()}
            if isinstance(value, dict)
            else {section: value}
        )
    line = disagreement(settings)
    if line:
        raise ValueError(f"{line}; start all processes with the same flags")


def check_same_run(
    config: Config, data: dict[str, str], programs: list[str], state: TrainState, done: int
) -> None:
    """Check that all processes agree on config, step, data and compiled program.

    Raise Disagreement in every process otherwise.
    """
    line = disagreement(
        {
            "config": fingerprint(to_json(config)),
            "step": [done, int(state.step)],
            "data": [int(state.samples), *data.values()],
            "program": programs,
        }
    )
    if line:
        raise errors.Disagreement(f"after step {done} {line}; resolve this, then start all again")
