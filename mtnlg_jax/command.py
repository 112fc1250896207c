"""The frame around every script of launch/: flags that name files, one line for bad input, exit codes, output that
may break away."""

import contextlib
import difflib
import errno
import functools
import os
import re
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator

from absl import app, flags

# Exit codes, of launch/pretrain.py above all. launch/cluster/ and README.md repeat them; tests/launch compares.
BAD_INPUT = 2
DIVERGED = 3
STUCK = 4
DISAGREEMENT = 5
PROCESS_LOST = 6
PASSING = 74  # EX_IOERR of sysexits.h: reading or writing failed for a reason that may pass
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the state was saved, try again
INTERRUPTED = 130  # 128 + SIGINT, as a shell says it
FINAL = (BAD_INPUT, DIVERGED, DISAGREEMENT)  # another start would end in the same way

LAUNCHER_PIPE = "MTNLG_LAUNCHER_PIPE"  # file descriptor of a pipe whose other end only the launcher holds
LAUNCHER_GRACE = 300  # seconds to save in, once the launcher is gone

flags.disclaim_key_flags()  # the flags that define_path makes belong to the script that calls it


def run(main: Callable[[], int | None], log: bool = False) -> None:
    """Parses the flags and exits with what ``main`` returns. ValueError and OSError are bad input (exit code 2), or
    PASSING where `is_passing`; other exceptions that end a run as planned name their code as ``exit_code``. Standard
    output that a full disk cut short is PASSING, too, unless it is only a ``log``."""
    end_with_launcher()
    with lasting_output():
        app.run(functools.partial(_run, main, log), flags_parser=_parse)


def _run(main: Callable, log: bool, argv: list[str]) -> int | None:
    try:
        if len(argv) > 1:
            raise ValueError(f"unknown argument {argv[1]!r}; flags are written --name=value")
        code = main()
        sys.stdout.flush()
        if not log and not code and sys.stdout.lost:
            raise PassingError(f"standard output could not be written whole: {sys.stdout.lost}")
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        line, code = explain(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        return code


def explain(error: Exception) -> tuple[str | None, int]:
    """(one line for a person, exit code); no line for what nobody planned: that wants its stack."""
    if hasattr(error, "exit_code"):
        return str(error), error.exit_code
    if is_passing(error):
        return f"error: {error}", PASSING
    if isinstance(error, ValueError | OSError):
        return f"error: {error}", BAD_INPUT
    return None, 1


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"error: {' '.join(str(error).split())}; see --help", file=sys.stderr)
        sys.exit(BAD_INPUT)


# --- input and output that fails for a while ------------------------------------------------------------------

_PASSING_NAMES = """
    EAGAIN EBUSY EINTR EIO ENOSPC EDQUOT ESTALE ETIMEDOUT EPIPE ENOLCK ENOMEM EMFILE ENFILE ENOLINK EPROTO ECOMM
    ECONNABORTED ECONNREFUSED ECONNRESET ENETDOWN ENETRESET ENETUNREACH EHOSTDOWN EHOSTUNREACH ENOTCONN ESHUTDOWN
    EREMOTEIO ENOBUFS""".split()
_PASSING_NUMBERS = frozenset(getattr(errno, name) for name in _PASSING_NAMES if hasattr(errno, name))
_PASSING_STATUS = (408, 425, 429)  # of HTTP, beside all of 500 and above
# TensorStore raises ValueError for what a file system or an object store answered.
_PASSING_WORDS = re.compile(r"(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED): ")


class PassingError(OSError):
    """Reading or writing failed for a reason that may pass."""


def is_passing(error: BaseException | None) -> bool:
    """Whether ``error``, or what it was raised from, is input or output that may work at another try: a full disk, a
    stale file handle, a time-out, a broken connection, an object store's 5xx. A file that is missing, of another kind
    or not ours to touch is none of these."""
    while error is not None:
        if isinstance(error, PassingError) or _is_passing(error):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _is_passing(error: BaseException) -> bool:
    status = next((value for name in ("status", "status_code", "code")
                   if isinstance(value := getattr(error, name, None), int)), 0)
    if isinstance(error, SystemExit):
        return False
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


def try_again(function: Callable, pauses: tuple[float, ...], on_failure: Callable[[Exception, float], None]):
    """What ``function`` returns. Where it fails for a reason that may pass, it is called again after each of
    ``pauses`` (seconds), each of which is first reported to ``on_failure``. The last failure is raised, and one that
    will not pass at once."""
    for pause in pauses:
        try:
            return function()
        except Exception as error:
            if not is_passing(error):
                raise
            on_failure(error, pause)
        time.sleep(pause)
    return function()


class LastingStream:
    """Standard output or error that never fails: a log whose reader is gone, or whose disk is full, is no reason to
    stop. All else is the ``stream``'s own.

    ``lost``: why something could not be written that somebody may still wait for; None where all was."""

    def __init__(self, stream):
        self._stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, function: Callable) -> None:
        try:
            function()
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF):  # nobody reads it any more
                with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), self._stream.fileno())
            else:
                self.lost = self.lost or error
        except ValueError:  # closed
            pass


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, standard output and error never raise: a reader that ended, a closed terminal, a full disk, a character
    that their encoding lacks (it is written as an escape)."""
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:  # closed when the process began
                stream = stack.enter_context(open(os.devnull, "w"))
            if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, LastingStream(stream))
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before


def end_with_launcher() -> None:
    """Where launch/cluster/launch.py started this process: sends it SIGTERM when the launcher has ended, however that
    came, so that it saves and ends, too. It has LAUNCHER_GRACE seconds for that."""
    handle = os.environ.pop(LAUNCHER_PIPE, "")
    try:
        if not stat.S_ISFIFO(os.fstat(int(handle)).st_mode):
            return
    except (ValueError, OSError):  # not started so, or by a process that was
        return

    def watch():
        while os.read(int(handle), 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.suppress(OSError):
            print("the launcher ended, so this process does", file=sys.stderr, flush=True)
        time.sleep(LAUNCHER_GRACE)
        os._exit(PROCESS_LOST)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


# --- names of files -------------------------------------------------------------------------------------------


def define_path(name: str, default: str | None, help: str, required: bool = False) -> flags.FlagHolder:
    """A flag that names a file or a folder; see `expand`."""
    return flags.DEFINE(_PathParser(), name, default, help, required=required)


def define_paths(name: str, help: str) -> flags.FlagHolder:
    """The same for a flag that is repeated; none by default."""
    return flags.DEFINE_multi(_PathParser(), flags.ArgumentSerializer(), name, [], help)


class _PathParser(flags.ArgumentParser):
    def parse(self, argument: str) -> str:
        return expand(argument)


def expand(path: str) -> str:
    """``path`` with ~ or ~user in front replaced by that home folder, which a shell does not do behind a "=". A
    relative path means the folder in which the command was typed, and stays relative.

    Raises ValueError where there is no such user, and where this Python cannot name the file.
    """
    given = path
    if path.startswith("~"):
        path = os.path.expanduser(path)
        if path.startswith("~"):
            user = given[1:].split("/")[0]
            raise ValueError(f"{given}: there is no user {user!r} here; write the folder in full, or ./{given} if its "
                             "name begins with ~")
    try:
        whole = path if "://" in path else os.path.abspath(path)
    except FileNotFoundError:
        raise ValueError(f"{given} lies in a folder that was removed; go to another one") from None
    try:
        whole.encode()
        os.fsencode(whole)
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        way_out = ("its bytes are not UTF-8; rename it" if encoding == "utf-8" else
                   f"this Python names files in {encoding}; set PYTHONUTF8=1, or a locale such as LC_ALL=C.UTF-8")
        raise ValueError(f"{ascii(whole)} cannot be used: {way_out}") from None
    return path


def missing(path: str) -> str:
    """"PATH does not exist", with the name beside it that may have been meant, as of a Megatron prefix."""
    folder, name = os.path.split(path.rstrip("/"))
    beside = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    names = {os.path.splitext(entry)[0] if entry.endswith((".idx", ".bin")) else entry for entry in beside}
    close = difflib.get_close_matches(name, sorted(names), 1)
    hint = f"; did you mean {os.path.join(folder, close[0])}?" if close else ""
    return f"{path} does not exist{hint}"


def read_text(path: str | None, what: str, encoding: str = "utf-8") -> tuple[str, str]:
    """(a name for messages, the text) of a file, or of standard input where ``path`` is None or "-"; ``what`` it is is
    said to a person at a terminal. Raises ValueError where it is not UTF-8."""
    if path in (None, "-"):
        if sys.stdin.isatty():
            print(f"{what}, ended by Ctrl-D:", file=sys.stderr)
        name, raw = "standard input", sys.stdin.buffer.read()
    else:
        name = path
        with open(path, "rb") as file:
            raw = file.read()
    try:
        return name, raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 at byte {error.start}; convert it, as with iconv") from None
