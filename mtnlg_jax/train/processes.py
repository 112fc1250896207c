"""Several processes, one run: how they meet, agree and part. Alone, all of it is free.

Crash-only: a process that fails leaves at once, without JAX's farewell, for which the others would
never come. They notice in their next collective (gloo), by the heartbeat (JAX aborts them, exit
code 134) or by their watchdogs; whoever started the processes starts them all again, and they go on
from the last checkpoint.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtnlg_jax import compat, errors
from mtnlg_jax.config import Config, to_json

LAST_WORDS = 3  # seconds that process 0 outlives a failure: JAX aborts the others when it goes


def start(
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    heartbeat_seconds: int,
    local_devices: int | None = None,
    distributed: str = "auto",
    timeout: int = 300,
) -> None:
    """Joins the other processes of the run, before the first use of a device: those that
    ``coordinator`` ("HOST:PORT", where process 0 runs), ``processes`` and ``process_id`` name;
    else, unless ``distributed`` is "off", those that SLURM, Open MPI, a TPU pod or GKE tells of;
    else none. "on" insists on others.

    Waits ``timeout`` seconds for process 0, and for all of them to come; then this process ends
    (exit code 2). ``local_devices`` simulates devices on the CPU. Raises ValueError on what does
    not fit.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process_id": process_id}
    if local_devices is not None:
        if local_devices < 1:
            raise ValueError(f"--local_devices={local_devices} must be at least 1")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", local_devices)
    if any(value is not None for value in given.values()):
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} missing: --coordinator=HOST:PORT, --processes and --process_id "
                "go together; leave out all three on SLURM, TPU pods and GKE's TPUs"
            )
        _check_address(coordinator)
        if processes < 1 or not 0 <= process_id < processes:
            raise ValueError(
                f"--process_id={process_id} of --processes={processes} does not exist; the first is 0"
            )
        arguments = {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process_id,
            "cluster_detection_method": "deactivate",
        }
    elif distributed == "on" or (distributed == "auto" and compat.cluster_processes() > 1):
        if not compat.cluster_processes():
            raise ValueError(
                "--distributed=on, but no SLURM, Open MPI, TPU pod or GKE is found here; start under one, "
                "or give --coordinator=HOST:PORT, --processes and --process_id"
            )
        arguments = {}
    else:
        return
    with _deadline(timeout, coordinator, process_id):
        try:
            # JAX aborts without a word for a person when its own time is over: ours is over before.
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=timeout + 60,
                heartbeat_timeout_seconds=heartbeat_seconds,
            )
        except RuntimeError as error:
            raise ValueError(
                f"process {process_id} could not listen or connect at {coordinator}: "
                f"{str(error).splitlines()[0]}; choose another port in --coordinator"
            ) from None


def _check_address(coordinator: str) -> None:
    if (
        not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):[0-9]+", coordinator)
        or int(coordinator.split(":")[-1]) > 65535
    ):
        raise ValueError(f"--coordinator={coordinator!r} is not HOST:PORT, as 10.0.0.1:1234")


@contextlib.contextmanager
def _deadline(seconds: float, coordinator: str | None, process_id: int | None):
    came = threading.Event()

    def wait():
        if came.wait(seconds):
            return
        answers = process_id == 0 or coordinator is None or _listens(coordinator)
        what = (
            "not every process came to process 0"
            if answers
            else f"no process 0 answers at {coordinator}"
        )
        print(
            f"error: {what} within {seconds} s; see that all are started, with one --coordinator that each of them "
            "can reach, or raise --coordinator_timeout",
            file=sys.stderr,
        )
        leave(2)

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        came.set()


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 1).close()
    except OSError:
        return False
    return True


def several() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes what one process writes: logs, curves, descriptions."""
    return jax.process_index() == 0


def leave(code: int) -> None:
    """Ends this process now: no clean-up waits for another."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def leaving_at_once():
    """Where there are others, ends the process on an exception: they are not in it, so nobody may
    wait for them. What all have agreed on (it has an ``exit_code``) passes; alone, everything
    does."""
    try:
        yield
    except Exception as error:
        if not several() or hasattr(error, "exit_code"):
            raise
        number = f"process {jax.process_index()} of {jax.process_count()}"
        if _is_of_a_lost_process(error):
            print(
                f"{number}: another process ended, so this one does; start all of them again to go on from the "
                f"last checkpoint ({str(error).splitlines()[0]})",
                file=sys.stderr,
            )
            code = errors.PROCESS_LOST
        else:
            line, code = errors.explain(error)
            print(
                f"{number}: {line}" if line else "".join(traceback.format_exception(error)),
                file=sys.stderr,
            )
        sys.stderr.flush()
        if is_first():
            time.sleep(LAST_WORDS)
        leave(code)


def _is_of_a_lost_process(error: Exception) -> bool:
    words = (
        "gloo",
        "connection closed",
        "connection reset",
        "nccl",
        "coordination service",
        "heartbeat",
        "barrier",
    )
    return isinstance(error, jax.errors.JaxRuntimeError) and any(
        word in str(error).lower() for word in words
    )


# --- agreeing
# ---------------------------------------------------------------------------------------------


def agree(function: Callable):
    """What ``function`` returns (JSON) or raises (ValueError, OSError) in process 0, in every
    process; what may pass is raised as PassingError."""
    if jax.process_count() == 1:
        return function()
    outcome = {}
    if is_first():
        try:
            outcome = {"value": function()}
        except Exception as error:
            if not (isinstance(error, ValueError | OSError) or errors.is_passing(error)):
                raise
            kind = (
                "passing"
                if errors.is_passing(error)
                else "value"
                if isinstance(error, ValueError)
                else "system"
            )
            outcome = {"error": str(error), "kind": kind}
    text = json.dumps(outcome).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = np.frombuffer(text[:size].ljust(size), np.uint8)
    outcome = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8).tobytes())
    if "error" in outcome:
        raise {"passing": errors.PassingError, "value": ValueError, "system": OSError}[
            outcome["kind"]
        ](outcome["error"])
    return outcome["value"]


def meet(name: str) -> None:
    """Returns when every process is here."""
    if several():
        multihost_utils.sync_global_devices(name)


class Asked:
    """asked(mine): whether any process was asked to stop by the call before; the same answer in
    all, at the cost of one number a device. A step late, so that no process waits for the step that
    runs."""

    def __init__(self):
        self._before = None
        if several():
            devices = Mesh(np.array(jax.devices()), "all")
            self._each = NamedSharding(devices, P("all"))
            self._any = jax.jit(
                lambda flags: flags.max(), out_shardings=NamedSharding(devices, P())
            )

    def __call__(self, mine: bool) -> bool:
        if not several():
            return mine
        flags = jax.make_array_from_callback(
            (jax.device_count(),), self._each, lambda index: np.int32([mine])
        )
        before = self._before
        self._before = self._any(flags)
        return before is not None and bool(before)


def fingerprint(parts) -> str:
    """Of anything JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def disagreement(parts: dict) -> str | None:
    """One line that says what of ``parts`` (JSON) differs, and with whom; None where all processes
    hold the same."""
    if not several():
        return None
    mine = np.frombuffer(bytes.fromhex(fingerprint(parts)), np.uint32)
    everyone = multihost_utils.process_allgather(mine)
    me = jax.process_index()
    others = [number for number, theirs in enumerate(everyone) if (theirs != mine).any()]
    if not (everyone != everyone[0]).any():
        return None
    first = agree(lambda: parts)
    parts = json.loads(json.dumps(parts))
    keys = [key for key in {**first, **parts} if first.get(key) != parts.get(key)]
    different = [f"{key}={parts.get(key)!r} here, {first.get(key)!r} in process 0" for key in keys]
    more = f" and {len(different) - 4} more" if len(different) > 4 else ""
    which = ", ".join(map(str, others[:8])) + (
        f" and {len(others) - 8} more" if len(others) > 8 else ""
    )
    what = (
        f"{'; '.join(different[:4])}{more}"
        if different
        else "it holds what process 0 does, and they do not"
    )
    return f"process {me} of {jax.process_count()} disagrees with {which}: {what}"


def refuse_other_settings(config: Config, workdir: str) -> None:
    """Before any work: ValueError in every process unless all were started alike."""
    settings = {"jax": jax.__version__, "workdir": os.path.abspath(workdir)}
    settings |= {
        name: os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    }  # another program each
    for section, value in json.loads(to_json(config)).items():
        settings |= (
            {f"{section}.{key}": one for key, one in value.items()}
            if isinstance(value, dict)
            else {section: value}
        )
    line = disagreement(settings)
    if line:
        raise ValueError(f"{line}; start all processes with the same flags")


def refuse_other_course(
    config: Config, data: dict[str, str], programs: list[str], state, done: int
) -> None:
    """Disagreement in every process unless all are at the same step of the same run."""
    line = disagreement(
        {
            "config": fingerprint(to_json(config)),
            "step": [done, int(state.step)],
            "data": [int(state.samples), *data.values()],
            "program": programs,
        }
    )
    if line:
        raise errors.Disagreement(f"after step {done} {line}; see to that, then start all again")
