"""Ask a compiler in processes of its own. It may die over a question; the rest is asked again."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtnlg_jax.planning import topology as described
from mtnlg_jax.planning.cycles import PROFILE


def ask_each[Answer](
    module: str,
    topology: described.Topology,
    calls: Sequence[Any],
    read: Callable[[Any], Answer],
    died: Callable[[int, subprocess.CompletedProcess], Answer],
    profile: bool = False,
    variables: Mapping[str, str] | None = None,
) -> list[Answer]:
    """Return the answer to each of ``calls``, which are JSON, by ``python -m module``.

    The process reads {"topology", "calls", "answer"} and appends a line of JSON for each call to
    the file "answer".

    Args:
      read: makes an answer of the JSON of a line.
      died: the answer to the call of this number, over which the process died.
      profile: let the TPU compiler estimate the cycles of kernels.
      variables: of the environment, beside those that the compiler needs.
    """
    found: list[Answer] = []
    while len(found) < len(calls):
        with tempfile.TemporaryDirectory() as folder:
            answer = os.path.join(folder, "answer.jsonl")
            environment = described.environment(topology) | dict(variables or {})
            if profile:
                given = environment.get("LIBTPU_INIT_ARGS", "")
                environment["LIBTPU_INIT_ARGS"] = f"{given} {PROFILE}{folder}".strip()
            request = {
                "topology": str(topology),
                "calls": calls[len(found) :],
                "answer": answer,
            }
            done = subprocess.run(
                [sys.executable, "-m", module],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                errors="replace",
                env=environment,
            )
            lines = []
            if os.path.exists(answer):
                with open(answer, encoding="utf-8") as file:
                    lines = file.readlines()
            # A process that died may have left a part of a line.
            found += [read(json.loads(line)) for line in lines if line.endswith("\n")]
            if len(found) < len(calls):
                if done.returncode == 0:
                    raise RuntimeError(f"{module} answered fewer calls than it was asked")
                found.append(died(len(found), done))
    return found
