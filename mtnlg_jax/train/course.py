"""That all processes are on one course: at the start, and every now and then."""

import json
import os

import jax

from mtnlg_jax.config import Config, to_json
from mtnlg_jax.train import processes
from mtnlg_jax.train.program import Program


def refuse_other_settings(config: Config, workdir: str) -> None:
    """Before any work: ValueError in every process unless all were started alike."""
    settings = {"jax": jax.__version__, "workdir": os.path.abspath(workdir)}
    settings |= {name: os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}  # another program each
    for section, value in json.loads(to_json(config)).items():
        settings |= {f"{section}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {
            section: value}
    line = processes.disagreement(settings)
    if line:
        raise ValueError(f"{line}; start all processes with the same flags")


def refuse_other_course(config: Config, data: dict[str, str], steps: dict[object, Program], state, done: int) -> None:
    """Disagreement in every process unless all are at the same step of the same run."""
    line = processes.disagreement({
        "config": processes.fingerprint(to_json(config)), "step": [done, int(state["step"])],
        "data": [int(state["samples"]), *data.values()],
        "program": [steps[masked].fingerprint for masked in sorted(steps)]})
    if line:
        raise processes.Disagreement(f"after step {done} {line}; see to that, then start all again")
