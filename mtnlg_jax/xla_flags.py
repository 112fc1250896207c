"""Compiler flags that matter: they let communication run beside computation. On a CPU there are
none.

An unknown flag ends the process inside XLA, and each release drops some; a TPU compiler also knows
flags that it then refuses on some chips. So all is tried in a process of its own before it is set:
GPU flags are parsed, TPU flags are compiled, with the collectives that the run has. What the
environment already says of a flag stays as it is.
"""

import dataclasses
import glob
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata, util

import jax
from absl import logging

from mtnlg_jax import compat
from mtnlg_jax.config import MeshConfig

_TOOLBOX = "JAX-Toolbox, GPU_performance.md, July 2026"
_JAX_GPU = "jax, gpu_performance_tips, 2026"
_MAXTEXT = "MaxText, xla_flags_library.py, August 2026"
_MAXTEXT_V5P = "MaxText, configs/tpu/v5p/32b.sh, 2026"
_RECIPES = "MaxText and tpu-recipes, benchmarks of v5p and v6e, 2026"

VARIABLE = {"gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}

# Left out where a layer that is split over tensor is recomputed whole: compiled for H100 (jaxlib
# 0.12.0.1), the pipeliner then repeats attention's forward pass a third time, 9 % more FLOPs in the
# ladder's 3.6B row.
PIPELINED_GATHER = "--xla_gpu_enable_pipelined_all_gather=true"
# flag -> where it is recommended
GPU = {
    "--xla_gpu_enable_latency_hiding_scheduler=true": _TOOLBOX,
    PIPELINED_GATHER: _TOOLBOX,
    "--xla_gpu_enable_pipelined_all_reduce=true": _TOOLBOX,
    "--xla_gpu_enable_pipelined_reduce_scatter=true": _TOOLBOX,
    "--xla_gpu_enable_dynamic_slice_fusion=true": "tried on jaxlib 0.11.2 and 0.12.0.1, November 2026",
}
# Added where mesh.pipe > 1.
GPU_PIPELINE = {
    "--xla_gpu_experimental_pipeline_parallelism_opt_level=PIPELINE_PARALLELISM_OPT_LEVEL_ENABLE": _JAX_GPU,
    "--xla_disable_hlo_passes=collective-permute-motion": _JAX_GPU,
    "--xla_gpu_enable_command_buffer=": _JAX_GPU,
}
ENVIRONMENT = {
    "gpu": {
        "NCCL_NVLS_ENABLE": "1",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
    },  # both: JAX-Toolbox, July 2026
}


@dataclasses.dataclass(frozen=True)
class Group:
    """TPU flags that are set together or not at all. ``what`` they do stands in messages;
    ``flags``: flag -> where it is recommended."""

    what: str
    flags: dict[str, str]


_ASYNCHRONOUS = Group(
    "asynchronous gathers and permutes, sums between slices beside products",
    {
        "--xla_enable_async_all_gather=true": _MAXTEXT,
        "--xla_enable_async_collective_permute=true": _MAXTEXT_V5P,
        "--xla_tpu_enable_data_parallel_all_reduce_opt=true": _MAXTEXT,
        "--xla_tpu_data_parallel_opt_different_sized_ops=true": _MAXTEXT,
    },
)
# The steps of a gather between the tiles of a product. All other chips' compilers refuse it, from
# the first program
# with a gather on: "incorrect results, hang, SDC".
_FUSION = Group(
    "gathers fused into products",
    {
        "--xla_tpu_enable_async_collective_fusion=true": _MAXTEXT,
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true": _MAXTEXT,
        "--xla_tpu_enable_async_collective_fusion_multiple_steps=true": _MAXTEXT,
        "--xla_tpu_overlap_compute_collective_tc=true": _MAXTEXT,
    },
)
# The collective runs on the chip's SparseCores, while its other cores go on.
_OFFLOAD = Group(
    "collectives on SparseCore",
    {
        "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true": _MAXTEXT_V5P,
        "--xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true": _RECIPES,
        "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true": _MAXTEXT,
        "--xla_tpu_use_tc_device_shape_on_sc=true": _MAXTEXT_V5P,
        "--xla_sc_disable_megacore_partitioning=true": _MAXTEXT_V5P,
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=false": _MAXTEXT_V5P,
        "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=false": _RECIPES,
        "--xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter=false": _RECIPES,
    },
)
# Chip kind -> groups, each one more than those before it. Compiled for every kind, timed on none. A
# tpu7x's compiler offloads collectives by itself. Left out, though small steps compile with them:
# gathers and scatters over two and three dims of the torus on SparseCore
# (..._offload_2d_all_gather, 3d_all_gather, nd_reduce_scatter), with which 530B has not been
# compiled, and a larger xla_tpu_scoped_vmem_limit_kib, whose gain nobody has measured here.
TPU = {
    "v4": (_ASYNCHRONOUS,),
    "v5e": (_ASYNCHRONOUS, _FUSION),
    "v5p": (_ASYNCHRONOUS, _OFFLOAD),
    "v6e": (_ASYNCHRONOUS, _OFFLOAD),
    "tpu7x": (_ASYNCHRONOUS,),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """``flags`` to add to the environment variable of a platform, and a line on what of ours was
    ``left_out``."""

    flags: tuple[str, ...] = ()
    left_out: str = ""


def set_flags(mesh: MeshConfig, recompute: str = "elementwise") -> list[str]:
    """Sets what is known to be good on this machine's chips for a run over ``mesh`` with
    train.recompute=``recompute``, before the first use of a device; returns the flags that it
    set."""
    kind = kind_here()
    platform = platform_of(kind)
    if platform not in VARIABLE:
        return []
    for name, value in ENVIRONMENT.get(platform, {}).items():
        os.environ.setdefault(name, value)
    choice = choose(kind, mesh, int(os.environ.get("MEGASCALE_NUM_SLICES") or 1), recompute)
    if choice.left_out:
        logging.warning("%s", choice.left_out)
    given = os.environ.get(VARIABLE[platform], "")
    os.environ[VARIABLE[platform]] = " ".join([*given.split(), *choice.flags])
    return list(choice.flags)


def choose(kind: str, mesh: MeshConfig, slices: int = 1, recompute: str = "elementwise") -> Choice:
    """The flags that a run over ``mesh`` sets on chips of ``kind`` ("gpu", one of TPU, "tpu" for
    one that is not told, "cpu"), beside those in the environment: the same for a run and for a
    described chip. ``slices``: of TPUs."""
    platform = platform_of(kind)
    if platform not in VARIABLE:
        return Choice()
    taken = {_name(flag) for flag in os.environ.get(VARIABLE[platform], "").split()}

    def free(flags: Iterable[str]) -> list[str]:
        return [flag for flag in flags if _name(flag) not in taken]

    if platform == "gpu":
        wanted = free([*GPU, *(GPU_PIPELINE if mesh.pipe > 1 else ())])
        if recompute == "full" and mesh.tensor > 1:
            wanted = [flag for flag in wanted if flag != PIPELINED_GATHER]
        unknown = unknown_flags(wanted)
        return Choice(
            tuple(flag for flag in wanted if flag not in unknown),
            f"this compiler does not know {' '.join(unknown)}: left out" if unknown else "",
        )
    if kind not in TPU:
        return Choice(
            (),
            "this TPU is of no known kind, so none of the compiler's flags are set; "
            f"set TPU_ACCELERATOR_TYPE, as v5p-8, to one of {', '.join(TPU)}",
        )
    groups = TPU[kind]
    why = ""
    while groups:
        flags = free(flag for group in groups for flag in group.flags)
        refused = refusal(kind, mesh, slices, flags)
        if not refused:
            break
        why = why or refused
        groups = groups[:-1]
    else:
        flags = []
    dropped = "; ".join(group.what for group in TPU[kind][len(groups) :])
    return Choice(
        tuple(flags),
        dropped and f"the compiler for {kind} refuses flags, left out: {dropped} ({why[:200]})",
    )


def _name(flag: str) -> str:
    return flag.partition("=")[0]


def collectives_of(mesh: MeshConfig) -> list[tuple[str, str]]:
    """(kind, mesh axis) of what a step over ``mesh`` may send, as planning.hlo_cost names the
    kinds."""
    found = []
    if mesh.data != 1:
        found += [
            (kind, "data")
            for kind in ("all-reduce", *(("all-gather", "reduce-scatter") if mesh.zero else ()))
        ]
    if mesh.tensor > 1:
        found += [(kind, "tensor") for kind in ("all-gather", "reduce-scatter", "all-reduce")]
    if mesh.pipe > 1:
        found.append(("collective-permute", "pipe"))
    if mesh.context > 1:
        kinds = {
            "ulysses": ["all-to-all"],
            "gather": ["all-gather"],
            "ring": ["collective-permute"],
        }
        found += [
            (kind, "context") for kind in kinds.get(mesh.context_mode, ["all-to-all", "all-gather"])
        ]
    return found


# --- what is here
# ---------------------------------------------------------------------------------------------------


def kind_here() -> str:
    """The kind of chip that JAX will choose, without its choosing it yet: "cpu", "gpu", one of TPU,
    or "tpu" where the machine does not tell which."""
    platform = platform_here()
    if platform != "tpu":
        return platform
    found = compat.tpu_here()
    return found if found in TPU else kind_of(os.environ.get("TPU_ACCELERATOR_TYPE", "")) or "tpu"


def kind_of(accelerator: str) -> str | None:
    """ "v5litepod-16", "tpu-v6e-slice" or "tpu7x-128" as a key of TPU; None for what names none."""
    text = accelerator.lower().replace("-", "").replace("v5lite", "v5e")
    return next((kind for kind in TPU if kind in text), None)


def platform_of(kind: str) -> str:
    """gpu, tpu or cpu."""
    return "tpu" if kind in TPU else kind


def platform_here() -> str:
    """gpu, tpu or cpu: what JAX will choose, without its choosing it yet."""
    asked = (jax.config.jax_platforms or "").split(",")[0]
    if asked:
        return {"cuda": "gpu"}.get(asked, asked)
    if os.path.exists("/dev/nvidiactl") and any(
        util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)
    ):
        return "gpu"
    if util.find_spec("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")):
        return "tpu"
    return "cpu"


# --- trying
# ---------------------------------------------------------------------------------------------------------

SECONDS = 600  # for one try


def unknown_flags(flags: Sequence[str]) -> list[str]:
    """Those of the GPU compiler's ``flags`` that it does not know; remembered for its version."""
    return _remembered(
        f"jaxlib {metadata.version('jaxlib')} {' '.join(flags)}", lambda: _unknown(list(flags))
    )


def refusal(kind: str, mesh: MeshConfig, slices: int, flags: Sequence[str]) -> str:
    """Why the compiler for ``kind`` refuses ``flags`` beside those in the environment, in its
    words, or "": it has compiled a small step with the collectives of ``mesh``. Remembered for its
        version."""
    request = {"kind": kind, "slices": min(slices, 2), "collectives": collectives_of(mesh)}
    all_flags = " ".join([*os.environ.get("LIBTPU_INIT_ARGS", "").split(), *flags])
    return _remembered(
        f"{_libtpu()} {json.dumps(request)} {all_flags}", lambda: _refusal(request, all_flags)
    )


def _libtpu() -> str:
    """Which TPU compiler the process of a try will find; launch/test.sh puts one apart."""
    path = [*sys.path, os.path.join(sys.prefix, "ahead")]
    found = next(iter(metadata.distributions(name="libtpu", path=path)), None)
    return (
        f"libtpu {found.version if found else 'unknown'} {os.environ.get('TPU_LIBRARY_PATH', '')}"
    )


def _remembered(key: str, find: Callable):
    """What ``find`` gave for ``key`` before, or gives: (answer, whether that is certain, and so
    worth keeping)."""
    path = os.path.join(
        compat.cache_folder(), f"flags-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    )
    try:
        with open(path) as file:
            return json.load(file)["answer"]
    except (OSError, ValueError, KeyError):
        answer, certain = find()
    if certain:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            beside = f"{path}.{os.getpid()}"
            with open(beside, "w") as file:
                json.dump({"asked": key, "answer": answer}, file)
            os.replace(beside, path)
        except OSError:
            pass  # a home that cannot be written to: asked again next time
    return answer


def _refusal(request: dict, flags: str) -> tuple[str, bool]:
    # The process takes no chip: it describes some, so libtpu need not be alone on this machine.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MEGASCALE_")
    }
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "LIBTPU_INIT_ARGS": flags,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mtnlg_jax.planning.probe"],
            input=json.dumps(request),
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"not tried: the compiler took more than {SECONDS} s", False
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])["refused"], True
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [
        f"exit code {done.returncode}"
    ]
    unknown = [line for line in lines if _UNKNOWN.search(line)]
    return (unknown[-1], True) if unknown else (f"not tried: {lines[-1]}", False)


_UNKNOWN = re.compile("nknown flag|nknown command line")
# The parser of XLA's GPU flags is in every jaxlib, so that no card is needed, or taken.
_PARSES = "import jax; jax.devices()"


def _unknown(flags: list[str]) -> tuple[list[str], bool]:
    unknown: list[str] = []
    while len(unknown) < len(flags):
        left = [flag for flag in flags if flag not in unknown]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(left)}
        try:
            done = subprocess.run(
                [sys.executable, "-c", _PARSES],
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return flags, False
        if done.returncode == 0:
            break
        lines = [line for line in done.stderr.splitlines() if _UNKNOWN.search(line)]
        named = {name for line in lines for name in re.findall(r"xla_\w+", line.lower())}
        found = [flag for flag in left if _name(flag)[2:] in named]
        if not found:  # it fails for another reason: better no flag than a run that ends
            return flags, False
        unknown += found
    return unknown, True
