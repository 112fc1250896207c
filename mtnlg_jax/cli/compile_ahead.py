"""Compile a step for accelerators that are not present, and report whether it fits.

A train step, on TPUs and on GPUs. It is compiled with the compiler flags that launch/pretrain.py
sets on these chips; the report names them. --time predicts its seconds, and --trace=FILE keeps them
as a timeline for Perfetto:

    python launch/compile_ahead.py --config=configs/mtnlg_530b.py --topology=v5p:8x8x16 \\
        --set=mesh.pipe=1 --set=mesh.data=128 --set=mesh.zero=3 \\
        --set=train.rampup_batch_size=none --time --trace=step.json
    python launch/compile_ahead.py --config=configs/ladder.py:7.5b --topology=H100:16x8

--save=FILE keeps the compiled train step for launch/pretrain.py --executable=FILE, which then
starts without compiling.

The step that reads a prompt, and the one that writes a token; layers with a window cache only that:

    python launch/compile_ahead.py --config=configs/ladder.py:7.5b --topology=v5e:2x4 \\
        --set=mesh.data=2 --step=decode --weights=int8 --cache=int8   # or --step=prefill

Topologies: v4, v5p, tpu7x (three sizes), v5e, v6e (two), each with *N for N slices; A100, H100,
H200, B200 as hosts x cards; cpu:N. All but cpu need the extra `ahead`.

Exit codes: 0 it fits, as far as memory is known; 1 it does not, or the compiler died; 2 bad input.
"""

import os

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.programs import results

with command.flag_group("What to compile"):
    _CONFIG = command.define_path(
        "config", None, "a file of configs/ or a Hugging Face folder", required=True
    )
    _SET = flags.DEFINE_multi_string("set", [], "a value of the config, such as mesh.tensor=8")
    _STEP = flags.DEFINE_enum("step", "train", ["train", "prefill", "decode"], "which step")
    _FLAGS = flags.DEFINE_enum(
        "flags",
        "on",
        ["on", "off"],
        "compile a train step with the compiler flags that launch/pretrain.py sets",
    )
    _WEIGHTS = flags.DEFINE_enum(
        "weights", None, ["int8"], "prefill, decode: type of the stored weights"
    )
    _CACHE = flags.DEFINE_enum("cache", None, ["int8"], "decode: type of the keys and values")
with command.flag_group("The chips"):
    _TOPOLOGY = flags.DEFINE_string(
        "topology", None, "such as v5p:8x8x16, v5p:8x8x8*2, H100:280x8, cpu:8", required=True
    )
    _TARGET_CONFIG = command.define_path(
        "target_config",
        None,
        "description of the GPU, dumped from a real card; default: the project's",
    )
    _MEMORY = flags.DEFINE_float(
        "memory", None, "GiB per device; default: as reported by the compiler or the card", 0.0
    )
flags.adopt_module_key_flags(results)


def main() -> int:
    from mtnlg_jax.config import load_config
    from mtnlg_jax.interop import registry
    from mtnlg_jax.planning import aot, report, suggest, topology
    from mtnlg_jax.storage import write_file

    registry.register()
    for held, fitting in ((_WEIGHTS, ("prefill", "decode")), (_CACHE, ("decode",))):
        if held.value and _STEP.value not in fitting:
            raise ValueError(
                f"--{held.name}={held.value} is for --step={' or '.join(fitting)}, not "
                f"--step={_STEP.value}; leave it out"
            )
    results.check(_STEP.value)
    described = topology.parse(_TOPOLOGY.value)
    config = load_config(_CONFIG.value, _SET.value)
    memory = None if _MEMORY.value is None else int(_MEMORY.value * topology.GIB)
    result = aot.measure(
        config,
        described,
        _STEP.value,
        _TARGET_CONFIG.value,
        memory,
        results.TEXT.value,
        _FLAGS.value == "on",
        _WEIGHTS.value,
        _CACHE.value,
        results.TIME.value,
        results.TRACE.value,
        results.SAVE.value,
    )
    print(report.render(config, result), flush=True)
    if results.TIME.value and result.predicted is None:
        print(f"predicted    nothing: {result.not_predicted}", flush=True)
    if results.JSON.value:
        write_file(*os.path.split(results.JSON.value), aot.to_text(result).encode())
    if result.fits or (result.fits is None and not result.failure):
        return 0
    for line in suggest.way_out(
        config,
        described,
        result,
        _TARGET_CONFIG.value,
        memory,
        results.PROVE.value,
        _FLAGS.value == "on",
    ):
        print(line, flush=True)
    return 1


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
