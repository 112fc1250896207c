"""Keep the compiled train steps of a config in one file, for launch/pretrain.py --executable."""

import jax
from jax.sharding import Mesh

from mtnlg_jax.config import Config
from mtnlg_jax.hardware import size_of
from mtnlg_jax.planning import steps
from mtnlg_jax.train import executable_file
from mtnlg_jax.train.executables import program_name, serialized
from mtnlg_jax.train.processes import fingerprint
from mtnlg_jax.train.program_key import key_of, program_options


def save(
    path: str,
    config: Config,
    mesh: Mesh,
    lowered: jax.stages.Lowered,
    compiled: jax.stages.Compiled,
) -> str:
    """Write the train steps of ``config`` over ``mesh`` to ``path``, and return what it has.

    ``lowered`` and ``compiled`` are the step of `steps.is_causal`. A config with stages of both
    objectives has two, of which the other one is compiled here. Steps with a teacher are left out:
    their shape is that of another run. Raises ValueError where the backend cannot serialize them.
    """
    key = key_of(config, mesh)
    stages = config.train.stages
    main = steps.is_causal(config)
    both = main and any(stage.masked > 0 for stage in stages)
    programs = []
    for causal in (main, not main) if both else (main,):
        if causal != main:
            lowered = steps.lower_train(config, mesh, causal)
            compiled = lowered.compile()
        options = program_options(config, causal)
        text = fingerprint(lowered.as_text())
        programs.append(serialized(program_name(causal), key | options, text, compiled))
    executable_file.write(path, programs)
    listed = ", ".join(f"{each.name} step {size_of(len(each.content))}" for each in programs)
    left_out = any(stage.distill for stage in stages)
    return f"{path}: {listed}" + ("; steps with a teacher are left out" if left_out else "")
