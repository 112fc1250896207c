"""Take compiled train steps from a file or a folder, and keep them there.

A step that was kept runs without tracing, lowering and compiling. It is taken only if the key that
decided it (`program_key`) is that of this run.
"""

import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils, serialize_executable
from jax.sharding import Mesh

from mtnlg_jax.config import Config
from mtnlg_jax.storage import is_remote
from mtnlg_jax.train import executable_file, processes
from mtnlg_jax.train.executable_file import Program
from mtnlg_jax.train.processes import fingerprint
from mtnlg_jax.train.program_key import differences, key_of, program_options

# Names of the key that are only known when the steps are made, that a run with differential
# privacy computes, or that a run which was lengthened keeps.
_LATE = ("program.", "optimizer.dp_", "optimizer.warmup_samples")
_NAMED = 6  # differences in a message

WAY_OUT = (
    "compile it again with launch/compile_ahead.py --save=FILE, leave --executable out, or give "
    "--executable_folder=FOLDER, which compiles what it lacks"
)


def program_name(causal: bool, kind: int = -1) -> str:
    """Return the name of a step; ``kind`` is the number of a stage with a teacher, or -1."""
    objective = "causal" if causal else "masked"
    return objective if kind < 0 else f"{objective} of stage {kind}"


def serialized(
    name: str, key: dict[str, Any], print_of_text: str, compiled: jax.stages.Compiled
) -> Program:
    """Return the program ``compiled`` of the train step ``name``.

    It must not come from JAX's compilation cache: what XLA:CPU reads there it cannot write again
    whole (jaxlib 0.12.0.1; the copy ends with "Function ... not found"). Raises ValueError where
    the backend cannot serialize it.
    """
    try:
        content, _, tree = serialize_executable.serialize(compiled)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(f"the {name} step cannot be serialized: {_line(error)}") from None
    # The first output is the state, as the first argument is. The trees are not pickled.
    _, *others = tree.unflatten([0] * tree.num_leaves)
    outputs = json.loads(json.dumps(others))
    if outputs != others:
        raise ValueError(f"the {name} step has results that JSON cannot hold: {others}")
    return Program(name, key, print_of_text, outputs, content)


def loaded(program: Program, args: tuple, devices: list) -> jax.stages.Compiled:
    """Return ``program``, ready to be called with ``args`` on ``devices``.

    This runs code of the file. Raises ValueError where the backend refuses it.
    """
    in_tree = jax.tree.structure((args, {}))
    out_tree = jax.tree.structure((args[0], *program.outputs))
    try:
        return serialize_executable.deserialize_and_load(
            program.content,
            in_tree,
            out_tree,
            backend=devices[0].client,
            execution_devices=devices,
        )
    except Exception as error:  # of pickle, of JAX and of XLA
        raise ValueError(f"it cannot be loaded on these devices: {_line(error)}") from None


class KeptStep:
    """One step of a run: `load` returns the kept program, `keep` keeps one that was compiled."""

    def __init__(self, owner: "Executables", name: str, key: dict[str, Any], mesh: Mesh) -> None:
        self._owner = owner
        self._name = name
        self._key = key
        self._devices = list(mesh.devices.flat)
        self.keeps = bool(owner.folder)
        self._good = False  # whether this process has loaded what it found
        self._found: Program | None = None

    def load(self, args: tuple) -> tuple[jax.stages.Compiled, str] | None:
        """Return (the program for ``args``, the fingerprint of its text), or None.

        Every process calls this, and with a folder all of them get a program or none does. Raises
        ValueError where a given file has the step for another run.
        """
        start = time.perf_counter()
        program = self._owner.find(self._name, self._key)
        self._found = program
        compiled = None
        if program is not None:
            try:
                compiled = loaded(program, args, self._devices)
            except ValueError as error:
                if not self.keeps:
                    raise ValueError(f"{self._owner.file}: {error}; {WAY_OUT}") from None
                path = self._owner.path_of(self._key)
                logging.warning("%s is compiled again: %s", path, error)
        self._good = compiled is not None
        if self.keeps and processes.several():
            # Where one process must compile, the others have to wait for it anyway.
            flag = np.int32(compiled is not None)
            if not multihost_utils.process_allgather(flag).all():
                compiled = None
        if program is None or compiled is None:
            return None
        place = self._owner.file or self._owner.path_of(self._key)
        seconds = time.perf_counter() - start
        self._owner.announce(f"{self._name} step: loaded from {place} in {seconds:.1f} s")
        return compiled, program.fingerprint

    def keep(self, compiled: jax.stages.Compiled, print_of_text: str, seconds: float) -> None:
        """Write the program, which took ``seconds`` to make, into the folder, if there is one.

        Every process calls this. One that cannot be written is a warning.
        """
        text = f"{self._name} step: compiled in {seconds:.1f} s"
        if not self.keeps:
            self._owner.announce(f"{text}, {self._owner.file} lacks it")
            return
        path = self._owner.path_of(self._key)

        def write() -> None:
            try:
                executable_file.write(
                    path, [serialized(self._name, self._key, print_of_text, compiled)]
                )
            except (ValueError, OSError) as error:
                logging.warning("the %s step is not kept: %s", self._name, error)

        # On a shared disk one process writes; a folder of each host gets a copy from its own.
        if processes.is_first():
            write()
        processes.barrier("executable written")
        if not processes.is_first() and not self._good and not self._is_new(path):
            write()
        self._owner.announce(f"{text}, kept in {path}")

    def _is_new(self, path: str) -> bool:
        """Return whether the file at ``path`` is whole, and not one that did not load."""
        try:
            return executable_file.read(path).get(self._name) not in (None, self._found)
        except (ValueError, OSError):
            return False


class Executables:
    """The compiled steps of a run: those of a file, which must fit, or a folder that keeps them."""

    def __init__(self, file: str | None = None, folder: str | None = None) -> None:
        """Raises ValueError if both are given, if ``file`` is not whole, or if ``folder`` is not a
        folder."""
        if file and folder:
            raise ValueError(
                f"--executable={file} and --executable_folder={folder} exclude each other: the "
                "file must fit, and the folder compiles what it lacks; leave one out"
            )
        if (
            folder
            and not is_remote(folder)
            and os.path.exists(folder)
            and not os.path.isdir(folder)
        ):
            raise ValueError(
                f"--executable_folder={folder} is a file; name a folder, or give a file of "
                "launch/compile_ahead.py --save=FILE as --executable"
            )
        self.file = file
        self.folder = folder
        self.announce: Callable[[str], None] = lambda text: None
        self._programs = executable_file.read(file) if file else {}

    def check(self, config: Config, mesh: Mesh) -> None:
        """Raise ValueError, with the differences by name, where the file is of another run.

        ``config`` is resolved.
        """
        if not self.file:
            return
        here = key_of(config, mesh)
        for program in self._programs.values():
            kept = {
                name: value for name, value in program.key.items() if not name.startswith(_LATE)
            }
            early = {name: value for name, value in here.items() if not name.startswith(_LATE)}
            self._refuse(program.name, differences(kept, early))

    def step(
        self, config: Config, mesh: Mesh, causal: bool, kind: int, options: dict[str, Any]
    ) -> KeptStep | None:
        """Return the step of `step.make_train_step` with ``options`` and its ``kind``; None if
        there is neither file nor folder.

        Raises ValueError where the file has it for another run.
        """
        if not (self.file or self.folder):
            return None
        key = key_of(config, mesh) | program_options(config, causal, **options)
        name = program_name(causal, kind)
        if self.file:
            self.find(name, key)  # before the first step, which may be minutes away
        return KeptStep(self, name, key, mesh)

    def find(self, name: str, key: dict[str, Any]) -> Program | None:
        """Return the program of this name and key, or None.

        Raises ValueError where the file has it with another key.
        """
        if self.file:
            program = self._programs.get(name)
            if program is not None:
                self._refuse(name, differences(program.key, key))
            return program
        path = self.path_of(key)
        try:
            program = executable_file.read(path).get(name)
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            logging.warning("the %s step is compiled again: %s", name, error)
            return None
        return program if program is not None and program.key == key else None

    def path_of(self, key: dict[str, Any]) -> str:
        """Return where the folder has the program of ``key``."""
        assert self.folder is not None
        return f"{self.folder.rstrip('/')}/{fingerprint(key)}.executable"

    def _refuse(self, name: str, different: list[str]) -> None:
        if not different:
            return
        more = len(different) - _NAMED
        listed = "; ".join(different[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise ValueError(
            f"{self.file}: its {name} step is another program than this run's: {listed}; {WAY_OUT}"
        )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
