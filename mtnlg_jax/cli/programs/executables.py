"""Flags that give a run steps that were compiled before."""

from typing import TYPE_CHECKING

from mtnlg_jax import command

if TYPE_CHECKING:
    from mtnlg_jax.train.executables import Executables

with command.flag_group("Compiled steps"):
    EXECUTABLE = command.define_path(
        "executable",
        None,
        "a file of compile_ahead.py --save: the first step starts without compiling; a file for "
        "another run is refused. Loading it runs its code: take it from people you trust",
    )
    EXECUTABLE_FOLDER = command.define_path(
        "executable_folder", None, "a folder that keeps compiled steps for the next start"
    )


def asked() -> "Executables | None":
    """Return the executables that the flags name, if any."""
    if not (EXECUTABLE.value or EXECUTABLE_FOLDER.value):
        return None
    from mtnlg_jax.train.executables import Executables

    return Executables(EXECUTABLE.value, EXECUTABLE_FOLDER.value)
