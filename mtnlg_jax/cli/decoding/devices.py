"""The devices of a command that decodes: one, a mesh (--set=mesh.KEY=VALUE), several processes.

All processes run the same command. Process 0 reads standard input and prints; the others only
compute.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.processes import several_processes

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from mtnlg_jax.config import MeshConfig

with command.flag_group("Several processes"):
    _HEARTBEAT = flags.DEFINE_integer(
        "heartbeat_seconds",
        100,
        "end when another process has given no sign of life for so long",
        lower_bound=1,
    )

flags.adopt_module_key_flags(several_processes)

# Keys of MeshConfig that place a model. The others are for training.
KEYS = ("data", "context", "tensor", "pipe", "expert")
_mesh: "Mesh | None" = None


def of_mesh(entry: str) -> bool:
    """Return whether an entry of --set is about the mesh."""
    return entry.strip().startswith("mesh.")


def check_of_mesh(entries: Sequence[str]) -> None:
    """Raise ValueError for the first entry of --set that is not about the mesh."""
    for entry in entries:
        if not of_mesh(entry):
            raise ValueError(f"--set={entry} is not of the mesh; write --set=mesh.KEY=VALUE")


def mesh() -> "Mesh | None":
    """Return the mesh to load models onto; None for one device."""
    return _mesh


def mesh_config(entries: Sequence[str]) -> "MeshConfig":
    """Return the mesh of entries "mesh.KEY=VALUE".

    Raise ValueError on another key, or a value out of its range.
    """
    from mtnlg_jax.config import Config, override
    from mtnlg_jax.config.checks import check_fields

    config = Config()
    for entry in entries:
        key = entry.partition("=")[0].strip().removeprefix("mesh.")
        if key not in KEYS:
            raise ValueError(
                f"--set={entry}: mesh.{key} does not place a model that decodes; write "
                f"--set=mesh.KEY=VALUE with one of the keys {', '.join(KEYS)}"
            )
        try:
            config = override(config, entry)
            check_fields(config.mesh, "mesh.")
        except ValueError as error:
            raise ValueError(f"--set: {error}") from None
    return config.mesh


@contextlib.contextmanager
def started(entries: Sequence[str], check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Join the other processes and make the mesh of ``entries``, those of --set; then run the body.

    ``check`` looks at files that process 0 will write. A failure of one process ends all.
    """
    global _mesh
    from mtnlg_jax import compat

    _mesh = None
    config = mesh_config([entry for entry in entries if of_mesh(entry)])
    automatic = several_processes.DISTRIBUTED.value == "auto" and compat.cluster_processes() > 1
    on_mesh = any(map(of_mesh, entries))
    if not (on_mesh or automatic or several_processes.asked()):
        check()
        yield
        return
    # Imported where they are needed: generation on one device starts without them.
    from mtnlg_jax.parallel.mesh import make_mesh
    from mtnlg_jax.train import processes

    compat.quiet()  # or JAX tells of every connection that it makes
    several_processes.start(_HEARTBEAT.value)
    with processes.exit_on_failure("start all of them again"):
        if on_mesh or processes.several():
            _mesh = make_mesh(config)
        on_first(check)
        with contextlib.ExitStack() as stack:
            if not processes.is_first():
                if "output" in flags.FLAGS:
                    flags.FLAGS["output"].value = None
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield


def on_first(read: Callable[[], Any]) -> Any:
    """Return what ``read`` returns in process 0 (JSON), in every process; such as standard input.

    With one process, call it.
    """
    # Without a mesh there is one process, and nothing to import.
    if _mesh is None:
        return read()
    from mtnlg_jax.train import processes

    return processes.run_on_first(read)


def note(text: str) -> None:
    """Print a line for the user to standard error, once for all processes."""
    if on_first_process():
        print(text, file=sys.stderr)


def on_first_process() -> bool:
    """Return whether this process speaks to the user."""
    if _mesh is None:
        return True
    from mtnlg_jax.train import processes

    return processes.is_first()
