"""Compiler flags that matter: they let communication run beside computation. On a CPU there are none.

An unknown flag ends the process inside XLA, and each release drops some: so every flag is tried in a process of its own
before it is set. What the environment already says of a flag stays as it is.
"""

import glob
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata, util

import jax
from absl import logging

from mtnlg_jax import compat

_TOOLBOX = "JAX-Toolbox, GPU_performance.md, July 2026"
_JAX_GPU = "jax, gpu_performance_tips, 2026"
_MAXTEXT = "MaxText, xla_flags_library.py, August 2026"

VARIABLE = {"gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}

# platform -> flag -> where it is recommended
FLAGS = {
    "gpu": {
        "--xla_gpu_enable_latency_hiding_scheduler=true": _TOOLBOX,
        "--xla_gpu_enable_pipelined_all_gather=true": _TOOLBOX,
        "--xla_gpu_enable_pipelined_all_reduce=true": _TOOLBOX,
        "--xla_gpu_enable_pipelined_reduce_scatter=true": _TOOLBOX,
        "--xla_gpu_enable_dynamic_slice_fusion=true": "tried on jaxlib 0.11.2 and 0.12.0.1, November 2026",
    },
    "tpu": {
        "--xla_tpu_enable_async_collective_fusion=true": _MAXTEXT,
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true": _MAXTEXT,
        "--xla_tpu_enable_async_collective_fusion_multiple_steps=true": _MAXTEXT,
        "--xla_tpu_overlap_compute_collective_tc=true": _MAXTEXT,
        "--xla_enable_async_all_gather=true": _MAXTEXT,
        "--xla_enable_async_collective_permute=true": _MAXTEXT,
        "--xla_tpu_scoped_vmem_limit_kib=98304": _MAXTEXT,
        "--xla_tpu_enable_data_parallel_all_reduce_opt=true": _MAXTEXT,
        "--xla_tpu_data_parallel_opt_different_sized_ops=true": _MAXTEXT,
    },
}
# Added where mesh.pipe > 1.
PIPELINE_FLAGS = {
    "gpu": {
        "--xla_gpu_experimental_pipeline_parallelism_opt_level=PIPELINE_PARALLELISM_OPT_LEVEL_ENABLE": _JAX_GPU,
        "--xla_disable_hlo_passes=collective-permute-motion": _JAX_GPU,
        "--xla_gpu_enable_command_buffer=": _JAX_GPU,
    },
}
ENVIRONMENT = {
    "gpu": {"NCCL_NVLS_ENABLE": "1", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"},  # both: JAX-Toolbox, July 2026
}


def set_flags(pipelined: bool) -> list[str]:
    """Sets what is known to be good on this machine's platform, before the first use of a device; returns the flags
    that it set. ``pipelined``: with those for pipelines over several devices."""
    platform = platform_here()
    if platform not in VARIABLE:
        return []
    for name, value in ENVIRONMENT.get(platform, {}).items():
        os.environ.setdefault(name, value)
    wanted = [*FLAGS[platform], *(PIPELINE_FLAGS.get(platform, ()) if pipelined else ())]
    given = os.environ.get(VARIABLE[platform], "")
    taken = {flag.partition("=")[0] for flag in given.split()}
    wanted = [flag for flag in wanted if flag.partition("=")[0] not in taken]
    unknown = unknown_flags(platform, wanted)
    if unknown:
        logging.warning("this compiler does not know %s: left out", " ".join(unknown))
    known = [flag for flag in wanted if flag not in unknown]
    os.environ[VARIABLE[platform]] = " ".join([*given.split(), *known])
    return known


def platform_here() -> str:
    """gpu, tpu or cpu: what JAX will choose, without its choosing it yet."""
    asked = (jax.config.jax_platforms or "").split(",")[0]
    if asked:
        return {"cuda": "gpu"}.get(asked, asked)
    if os.path.exists("/dev/nvidiactl") and any(util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        return "gpu"
    if util.find_spec("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")):
        return "tpu"
    return "cpu"


def unknown_flags(platform: str, flags: Iterable[str]) -> list[str]:
    """Those of ``flags`` that this machine's compiler for ``platform`` refuses; remembered for its version."""
    flags = list(flags)
    package = {"gpu": "jaxlib", "tpu": "libtpu"}[platform]
    key = f"{package} {metadata.version(package)} {' '.join(flags)}"
    path = os.path.join(compat.cache_folder(), f"flags-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json")
    try:
        with open(path) as file:
            return json.load(file)["unknown"]
    except (OSError, ValueError):
        unknown = _try(platform, flags)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        beside = f"{path}.{os.getpid()}"
        with open(beside, "w") as file:
            json.dump({"asked": key, "unknown": unknown}, file)
        os.replace(beside, path)
    except OSError:
        pass  # a home that cannot be written to: asked again next time
    return unknown


# The parser of XLA's GPU flags is in every jaxlib, so that no card is needed, or taken; libtpu describes a slice
# without taking a chip.
_PROGRAM = {
    "gpu": "import jax; jax.devices()",
    "tpu": "from jax.experimental.topologies import get_topology_desc as d; d(platform='tpu', topology_name='v5e:2x2')",
}


def _try(platform: str, flags: list[str]) -> list[str]:
    unknown: list[str] = []
    while len(unknown) < len(flags):
        left = [flag for flag in flags if flag not in unknown]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": "",
                                    "LIBTPU_INIT_ARGS": ""} | {VARIABLE[platform]: " ".join(left)}
        done = subprocess.run([sys.executable, "-c", _PROGRAM[platform]], env=environment, capture_output=True,
                              text=True, timeout=120)
        if done.returncode == 0:
            return unknown
        lines = [line for line in done.stderr.splitlines() if "nknown flag" in line or "nknown command line" in line]
        named = {name for line in lines for name in re.findall(r"xla_\w+", line.lower())}
        found = [flag for flag in left if flag[2:].partition("=")[0] in named]
        if not found:  # it fails for another reason: better no flag than a run that ends
            return flags
        unknown += found
    return unknown
