"""The frame of every command: flags that name files, one-line errors, exit codes, lost output."""

import contextlib
import errno
import functools
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, TextIO

from absl import app, flags

from mtnlg_jax.errors import BAD_INPUT, INTERRUPTED, PROCESS_LOST, PassingError, explain

# File descriptor of a pipe whose other end only the launcher holds.
LAUNCHER_PIPE = "MTNLG_LAUNCHER_PIPE"
# Number of the simulated host of a process, where one machine stands for several.
HOST = "MTNLG_HOST"
LAUNCHER_GRACE = 300  # seconds for a save after the launcher has ended

_GROUPS: dict[str, None] = {}  # titles of `flag_group`, in the order of definition
flags.disclaim_key_flags()  # flags of define_path belong to the module that calls it


def run(main: Callable[[], int | None], log: bool = False) -> None:
    """Parse the flags, call ``main`` and exit with the code that it returns.

    ValueError and OSError are bad input (exit code 2), or PASSING where `is_passing`; other
    expected exceptions carry an ``exit_code``. Standard output that a full disk cut short also
    exits with PASSING, unless it is only a ``log``.
    """
    end_with_launcher()
    _show_help_of(sys.modules[main.__module__])
    with lasting_output():
        app.run(functools.partial(_run, main, log), flags_parser=_parse)


def _show_help_of(module: ModuleType) -> None:
    """Make --help print the docstring and flags of ``module``, whichever script imported it.

    Flags of a `flag_group` follow the docstring under their title.
    """
    entry = sys.modules["__main__"]
    own = flags.FLAGS.get_key_flags_for_module(module.__name__)
    grouped = {title: flags.FLAGS.get_key_flags_for_module(title) for title in _GROUPS}
    # In a process that imported several scripts, the groups of the others are left out.
    shown = [title for title, members in grouped.items() if any(flag in own for flag in members)]
    help = module.__doc__ or ""
    if shown:
        help = "\n".join([help.rstrip(), *map(flags.FLAGS.module_help, shown)])
    entry.__doc__ = help.replace("%", "%%")  # absl formats it with %
    if module is not entry:
        inside = [flag for title in shown for flag in grouped[title]]
        for flag in own:
            if flag not in inside:
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _run(main: Callable[[], int | None], log: bool, argv: list[str]) -> int | None:
    try:
        if len(argv) > 1:
            raise ValueError(f"unknown argument {argv[1]!r}; flags are written --name=value")
        code = main()
        sys.stdout.flush()
        lost = getattr(sys.stdout, "lost", None)  # of the LastingStream
        if not log and not code and lost:
            raise PassingError(f"standard output could not be written whole: {lost}")
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
    """Standard output or error that never fails, neither without a reader nor on a full disk.

    Everything else is delegated to ``stream``. ``lost`` is the first error that cost output which
    still has a reader; None where all was written.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, function: Callable) -> None:
        try:
            function()
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF):
                # The reader is gone: send all further output to /dev/null.
                with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), self._stream.fileno())
            else:
                self.lost = self.lost or error
        except ValueError:  # closed
            pass


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Make standard output and error never raise inside.

    They survive a reader that ended, a closed terminal, a full disk, and a character that their
    encoding lacks (it is written as an escape).
    """
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
    """End this process with launch/cluster/launch.py, if that started it.

    When the launcher has ended, for any reason, this process gets SIGTERM, so that it saves and
    ends as well. It has LAUNCHER_GRACE seconds for that.
    """
    handle = os.environ.pop(LAUNCHER_PIPE, "")
    try:
        if not stat.S_ISFIFO(os.fstat(int(handle)).st_mode):
            return
    except (ValueError, OSError):  # not started by the launcher, or a grandchild of it
        return

    def watch() -> None:
        while os.read(int(handle), 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.suppress(OSError):
            print("the launcher ended, so this process ends", file=sys.stderr, flush=True)
        time.sleep(LAUNCHER_GRACE)
        os._exit(PROCESS_LOST)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


# --- flags


@contextlib.contextmanager
def flag_group(title: str) -> Iterator[None]:
    """Show the flags that are defined inside under ``title`` in --help."""
    before = set(flags.FLAGS)
    yield
    _GROUPS[title] = None
    for name in set(flags.FLAGS) - before:
        flags.FLAGS.register_key_flag_for_module(title, flags.FLAGS[name])


def define_path(
    name: str, default: str | None, help: str, required: bool = False
) -> flags.FlagHolder:
    """Define a flag that names a file or a folder; see `expand`."""
    return flags.DEFINE(_PathParser(), name, default, help, required=required)


def define_paths(name: str, help: str) -> flags.FlagHolder:
    """Define the same as a repeated flag, empty by default."""
    return flags.DEFINE_multi(_PathParser(), flags.ArgumentSerializer(), name, [], help)


CHECKPOINTS = ("best", "last", "ema")


def define_checkpoint(default: str | None = "best", more: str = "") -> flags.FlagHolder:
    """Define the flag --checkpoint, which takes one of CHECKPOINTS."""
    help = "which checkpoint; ema: the newest average of the weights (train.ema_decay)"
    return flags.DEFINE_enum("checkpoint", default, CHECKPOINTS, help + more)


def check_output(flag: flags.FlagHolder) -> None:
    """Raise OSError, which names the flag, if no file can be written to its path."""
    if flag.value is not None:
        check_file(flag.value, flag.name)


def check_file(path: str, name: str) -> None:
    """Raise OSError, which names the flag --NAME, if no file can be written to ``path``."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"--{name}={path} is in a folder that does not exist; create it first"
        )
    if os.path.isdir(path):
        raise IsADirectoryError(f"--{name}={path} is a folder; name a file in it")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"--{name}={path}: the folder is not writable; choose another one")


def refuse(holders: Iterable[flags.FlagHolder], reason: str) -> None:
    """Raise ValueError, with ``reason``, for the first of the flags that is given."""
    for holder in holders:
        if holder.present:
            raise ValueError(f"--{holder.name}={holder.value} {reason}")


def names_a_file(flag: flags.Flag) -> bool:
    """Return whether a flag was defined by `define_path`."""
    return isinstance(flag.parser, _PathParser)


class _PathParser(flags.ArgumentParser):
    def parse(self, argument: str) -> str:
        return expand(argument)


def expand(path: str) -> str:
    """Return ``path`` with a leading ~ or ~user replaced, which a shell does not do after "=".

    A relative path is relative to the current folder, and stays relative. Raise ValueError where
    the user does not exist, and where this Python cannot name the file.
    """
    given = path
    if path.startswith("~"):
        path = os.path.expanduser(path)
        if path.startswith("~"):
            user = given[1:].split("/")[0]
            raise ValueError(
                f"{given}: there is no user {user!r} here; write the folder in full, or ./{given} "
                "if its name begins with ~"
            )
    try:
        whole = path if "://" in path else os.path.abspath(path)
    except FileNotFoundError:
        raise ValueError(
            f"{given} is in a folder that was removed; change to another folder"
        ) from None
    try:
        whole.encode()
        os.fsencode(whole)
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        reason = (
            "its bytes are not UTF-8; rename it"
            if encoding == "utf-8"
            else f"this Python encodes file names in {encoding}; set PYTHONUTF8=1, or a locale "
            "such as LC_ALL=C.UTF-8"
        )
        raise ValueError(f"{ascii(whole)} cannot be used: {reason}") from None
    return path


def read_text(path: str | None, what: str, encoding: str = "utf-8") -> tuple[str, str]:
    """Return (a name for messages, the text) of a file, or of standard input for None or "-".

    At a terminal, ``what`` to type is printed. Raise ValueError where the text is not UTF-8.
    """
    if path is None or path == "-":
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
            f"{name} is not UTF-8 at byte {error.start}; convert it, for example with iconv"
        ) from None
