"""What every script of launch/ does around its work: bad input is one line on standard error and exit code 2."""

import functools
import sys
from collections.abc import Callable

from absl import app, flags


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags and exits with what ``main`` returns. ValueError and OSError are bad input (exit code 2);
    other exceptions that end a run as planned name their code as ``exit_code``."""
    app.run(functools.partial(_run, main), flags_parser=_parse)


def _run(main: Callable, argv: list[str]) -> int | None:
    try:
        if len(argv) > 1:
            raise ValueError(f"unknown argument {argv[1]!r}; flags are written --name=value")
        return main()
    except Exception as error:
        line, code = explain(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        return code


def explain(error: Exception) -> tuple[str | None, int]:
    """(one line for a person, exit code); no line for what nobody planned: that wants its stack."""
    if isinstance(error, ValueError | OSError):
        return f"error: {error}", 2
    if hasattr(error, "exit_code"):
        return str(error), error.exit_code
    return None, 1


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


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"error: {' '.join(str(error).split())}; see --help", file=sys.stderr)
        sys.exit(2)
