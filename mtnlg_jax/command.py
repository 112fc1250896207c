"""The frame around every script of launch/: flags that name files, one line for bad input, exit
codes, output that may break away."""

import contextlib
import errno
import functools
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator

from absl import app, flags

from mtnlg_jax.errors import BAD_INPUT, INTERRUPTED, PROCESS_LOST, PassingError, explain

LAUNCHER_PIPE = (
    "MTNLG_LAUNCHER_PIPE"  # file descriptor of a pipe whose other end only the launcher holds
)
LAUNCHER_GRACE = 300  # seconds to save in, once the launcher is gone

flags.disclaim_key_flags()  # the flags that define_path makes belong to the script that calls it


def run(main: Callable[[], int | None], log: bool = False) -> None:
    """Parses the flags and exits with what ``main`` returns. ValueError and OSError are bad input
    (exit code 2), or PASSING where `is_passing`; other exceptions that end a run as planned name
    their code as ``exit_code``. Standard output that a full disk cut short is PASSING, too, unless
    it is only a ``log``."""
    end_with_launcher()
    _show_help_of(sys.modules[main.__module__])
    with lasting_output():
        app.run(functools.partial(_run, main, log), flags_parser=_parse)


def _show_help_of(module) -> None:
    """--help prints the docstring and the flags of the main module: those of ``module`` are its,
    whether a script of launch/ or a console command imported it."""
    entry = sys.modules["__main__"]
    if module is not entry:
        entry.__doc__ = module.__doc__
        for flag in flags.FLAGS.get_key_flags_for_module(module.__name__):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


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


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"error: {' '.join(str(error).split())}; see --help", file=sys.stderr)
        sys.exit(BAD_INPUT)


class LastingStream:
    """Standard output or error that never fails: a log whose reader is gone, or whose disk is full,
    is no reason to stop. All else is the ``stream``'s own.

    ``lost``: why something could not be written that somebody may still wait for; None where all
        was."""

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
            if error.errno in (
                errno.EPIPE,
                errno.EIO,
                errno.ENXIO,
                errno.EBADF,
            ):  # nobody reads it any more
                with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), self._stream.fileno())
            else:
                self.lost = self.lost or error
        except ValueError:  # closed
            pass


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, standard output and error never raise: a reader that ended, a closed terminal, a full
    disk, a character that their encoding lacks (it is written as an escape)."""
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
    """Where launch/cluster/launch.py started this process: sends it SIGTERM when the launcher has
    ended, however that came, so that it saves and ends, too. It has LAUNCHER_GRACE seconds for
    that."""
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


# --- names of files
# -------------------------------------------------------------------------------------------


def define_path(
    name: str, default: str | None, help: str, required: bool = False
) -> flags.FlagHolder:
    """A flag that names a file or a folder; see `expand`."""
    return flags.DEFINE(_PathParser(), name, default, help, required=required)


def define_paths(name: str, help: str) -> flags.FlagHolder:
    """The same for a flag that is repeated; none by default."""
    return flags.DEFINE_multi(_PathParser(), flags.ArgumentSerializer(), name, [], help)


class _PathParser(flags.ArgumentParser):
    def parse(self, argument: str) -> str:
        return expand(argument)


def expand(path: str) -> str:
    """``path`` with ~ or ~user in front replaced by that home folder, which a shell does not do
    behind a "=". A relative path means the folder in which the command was typed, and stays
    relative.

    Raises ValueError where there is no such user, and where this Python cannot name the file.
    """
    given = path
    if path.startswith("~"):
        path = os.path.expanduser(path)
        if path.startswith("~"):
            user = given[1:].split("/")[0]
            raise ValueError(
                f"{given}: there is no user {user!r} here; write the folder in full, or ./{given} if its "
                "name begins with ~"
            )
    try:
        whole = path if "://" in path else os.path.abspath(path)
    except FileNotFoundError:
        raise ValueError(f"{given} lies in a folder that was removed; go to another one") from None
    try:
        whole.encode()
        os.fsencode(whole)
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        way_out = (
            "its bytes are not UTF-8; rename it"
            if encoding == "utf-8"
            else f"this Python names files in {encoding}; set PYTHONUTF8=1, or a locale such as LC_ALL=C.UTF-8"
        )
        raise ValueError(f"{ascii(whole)} cannot be used: {way_out}") from None
    return path


def read_text(path: str | None, what: str, encoding: str = "utf-8") -> tuple[str, str]:
    """(a name for messages, the text) of a file, or of standard input where ``path`` is None or
    "-"; ``what`` it is is said to a person at a terminal. Raises ValueError where it is not
    UTF-8."""
    if path in (None, "-"):
        if sys.stdin.isatty():
            print(f"{what}, ended by Ctrl-D:", file=sys.stderr)
        name = "standard input"
        raw = sys.stdin.buffer.read()
    else:
        name = path
        with open(path, "rb") as file:
            raw = file.read()
    try:
        return name, raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 at byte {error.start}; convert it, as with iconv"
        ) from None
