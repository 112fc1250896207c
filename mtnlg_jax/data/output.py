"""Make an output folder whole or not at all, and never replace what it was not asked to."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mtnlg_jax import storage


def check_output(
    output: str,
    marker: str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    flag: str = "output",
    input_path: str | os.PathLike | None = None,
) -> None:
    """Check that ``output``, a folder or a URL, may be written, before any work.

    ``marker`` is the file by which an earlier output of the same kind is known: only such a folder
    is replaced (``overwrite``) or continued (``resume``). ``flag`` names the option in messages.

    Raises ValueError if a local ``output`` is inside ``input_path``, and FileExistsError if it
    exists and is not to be replaced.
    """
    if input_path is not None and not storage.is_remote(output) and os.path.isdir(input_path):
        # Both as written and with links followed: either way its text would be read.
        for form in (Path.absolute, Path.resolve):
            if form(Path(output)).is_relative_to(form(Path(input_path))):
                raise ValueError(
                    f"output {output} is inside the input {input_path} and would be read as text; "
                    "put it elsewhere"
                )
    marked = storage.exists(output, marker)
    exists = marked or _is_occupied(output, resume)
    if exists and not overwrite and not resume:
        raise FileExistsError(
            f"{output} exists; choose another {flag} or replace it with --overwrite"
        )
    if exists and not marked:
        raise FileExistsError(
            f"{output} is not a prepared data set (no {marker}) and is not replaced; "
            f"choose another {flag}"
        )


def _is_occupied(output: str, resume: bool) -> bool:
    """Whether there is anything in the folder but, with ``resume``, hidden files such as a lock.

    At a URL, files without the marker are those of a stopped run, which a run that does not resume
    writes over.
    """
    if storage.is_remote(output):
        return resume and any(not name.startswith(".") for name in storage.list_files(output, ""))
    if not os.path.isdir(output):
        return os.path.lexists(output)
    return any(not (resume and name.startswith(".")) for name in os.listdir(output))


@contextlib.contextmanager
def new_folder(output: str, overwrite: bool) -> Iterator[tuple[str, str]]:
    """Yield (a local folder for temporary files, the place to write to), and put the result in
    place at the end.

    For a local ``output`` both are a folder beside it, which has its disk space and is renamed to
    it if nothing failed. At a URL the result is written where it belongs.
    """
    remote = storage.is_remote(output)
    work = tempfile.mkdtemp() if remote else f"{output}.partial-{os.getpid()}"
    try:
        os.makedirs(work, exist_ok=remote)
        yield work, output if remote else work
        if not remote:
            _put_in_place(work, output, overwrite)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _put_in_place(work: str, output: str, overwrite: bool) -> None:
    """Rename the folder ``work`` to ``output``. An earlier one is removed after that, and restored
    if it fails."""
    before = f"{output}.before-{os.getpid()}"
    replaced = overwrite and os.path.isdir(output)
    if replaced:
        os.rename(output, before)
    try:
        os.rename(work, output)
    except OSError as error:
        if replaced:
            os.rename(before, output)
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(
                f"{output} was made by another run meanwhile; choose another"
            ) from None
        raise
    folder = os.open(os.path.dirname(os.path.abspath(output)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    if replaced:
        shutil.rmtree(before)
