"""Exit codes of a run, the exceptions that carry one, and transient failures.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | unexpected exception; standard error has the traceback |
| 2 | bad input |
| 3 | the loss or the gradient stayed non-finite |
| 4 | a step or another phase took too long |
| 5 | the processes of a run disagree, or its replicas |
| 6 | another process of the run ended |
| 74 | reading or writing failed for a reason that may pass |
| 75 | stopped by a signal, state saved |
| 130 | Ctrl-C |
"""

import errno
import re

BAD_INPUT = 2
DIVERGED = 3
STUCK = 4
DISAGREEMENT = 5
PROCESS_LOST = 6
PASSING = 74  # EX_IOERR of sysexits.h: reading or writing failed for a reason that may pass
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the state was saved, try again
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
FINAL = (BAD_INPUT, DIVERGED, DISAGREEMENT)  # another start would end in the same way


class Disagreement(Exception):
    """The processes differ in config, step, data or program."""

    exit_code = DISAGREEMENT


class Corrupted(Exception):
    """Data replicas computed different bits from the same rows."""

    exit_code = DISAGREEMENT


class Preempted(Exception):
    """A signal stopped the run (`lifetime.signals`); the same command resumes it."""

    exit_code = PREEMPTED


class Diverged(Exception):
    """Too many non-finite steps in a row, or returns to the same parameters for spikes."""

    exit_code = DIVERGED


def explain(error: Exception) -> tuple[str | None, int]:
    """Return (one readable line, exit code).

    The line is None for unexpected errors, which should show a traceback.
    """
    if hasattr(error, "exit_code"):
        return str(error), error.exit_code
    if is_passing(error):
        return f"error: {error}", PASSING
    if isinstance(error, ValueError | OSError):
        return f"error: {error}", BAD_INPUT
    return None, 1


# --- transient failures of input and output

_PASSING_NAMES = """
    EAGAIN EBUSY EINTR EIO ENOSPC EDQUOT ESTALE ETIMEDOUT EPIPE ENOLCK ENOMEM EMFILE ENFILE ENOLINK
    EPROTO ECOMM ECONNABORTED ECONNREFUSED ECONNRESET ENETDOWN ENETRESET ENETUNREACH EHOSTDOWN
    EHOSTUNREACH ENOTCONN ESHUTDOWN EREMOTEIO ENOBUFS""".split()
_PASSING_NUMBERS = frozenset(
    getattr(errno, name) for name in _PASSING_NAMES if hasattr(errno, name)
)
_PASSING_STATUS = (408, 425, 429)  # HTTP; 500 to 599 count as well
# TensorStore raises ValueError for errors of a file system or an object store.
_PASSING_WORDS = re.compile(r"(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED): ")


class PassingError(OSError):
    """Reading or writing failed for a reason that may pass."""


def is_passing(error: BaseException | None) -> bool:
    """Return whether ``error``, or one it was raised from, is a transient failure of I/O.

    That is a full disk, a stale file handle, a timeout, a broken connection or an object store's
    5xx. A file that is missing, of the wrong kind or protected is not.
    """
    while error is not None:
        if isinstance(error, PassingError) or _is_passing(error):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _is_passing(error: BaseException) -> bool:
    if isinstance(error, SystemExit):
        return False
    values = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    status = next((value for value in values if isinstance(value, int)), 0)
    if status in _PASSING_STATUS or 500 <= status < 600:
        return True
    if isinstance(error, OSError):
        lost = isinstance(error, TimeoutError | ConnectionError)
        return error.errno in _PASSING_NUMBERS or (error.errno is None and lost)
    if not isinstance(error, ValueError):
        return False
    text = str(error)
    if code := re.search(r"os_error_code='(\d+)'", text):
        return int(code[1]) in _PASSING_NUMBERS
    if code := re.search(r"http_response_code='(\d+)'", text):
        return int(code[1]) in _PASSING_STATUS or int(code[1]) >= 500
    return bool(_PASSING_WORDS.match(text))
