"""Set XLA's compiler flags that overlap communication with computation. There are none for CPUs.

An unknown flag ends the process inside XLA, and each release drops some. A TPU compiler also knows
flags that it then refuses on some chips. So all flags are first tried in another process: GPU flags
are parsed, TPU flags compile a small program with the collectives of the run. Flags that the
environment already sets stay as they are.
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
_MAXTEXT_V6E = "MaxText, configs/tpu/v6e, 2026"
_RECIPES = "MaxText and tpu-recipes, benchmarks of v5p and v6e, 2026"

VARIABLE = {"gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}

# Left out where a layer that is split over tensor is recomputed as a whole: compiled for H100
# (jaxlib 0.12.0.1), the pipeliner then runs attention's forward pass a third time, 9 % more FLOPs
# in the 3.6B config of the ladder.
PIPELINED_GATHER = "--xla_gpu_enable_pipelined_all_gather=true"
# flag -> source of the recommendation
GPU = {
    "--xla_gpu_enable_latency_hiding_scheduler=true": _TOOLBOX,
    PIPELINED_GATHER: _TOOLBOX,
    "--xla_gpu_enable_pipelined_all_reduce=true": _TOOLBOX,
    "--xla_gpu_enable_pipelined_reduce_scatter=true": _TOOLBOX,
    "--xla_gpu_enable_dynamic_slice_fusion=true": (
        "tried on jaxlib 0.11.2 and 0.12.0.1, November 2026"
    ),
}
# Added where mesh.pipe > 1.
GPU_PIPELINE = {
    "--xla_gpu_experimental_pipeline_parallelism_opt_level="
    "PIPELINE_PARALLELISM_OPT_LEVEL_ENABLE": _JAX_GPU,
    "--xla_disable_hlo_passes=collective-permute-motion": _JAX_GPU,
    "--xla_gpu_enable_command_buffer=": _JAX_GPU,
}
# Environment variables by platform; source: JAX-Toolbox, July 2026.
ENVIRONMENT = {"gpu": {"NCCL_NVLS_ENABLE": "1", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}}


@dataclasses.dataclass(frozen=True)
class Group:
    """TPU flags that are set together or not at all.

    ``what`` they do appears in messages; ``flags``: flag -> source of the recommendation;
    ``unsplit``: only for meshes over data alone.
    """

    what: str
    flags: dict[str, str]
    unsplit: bool = False


_ASYNCHRONOUS = Group(
    "asynchronous gathers and permutes, sums between slices beside products",
    {
        "--xla_enable_async_all_gather=true": _MAXTEXT,
        "--xla_enable_async_collective_permute=true": _MAXTEXT_V5P,
        "--xla_tpu_enable_data_parallel_all_reduce_opt=true": _MAXTEXT,
        "--xla_tpu_data_parallel_opt_different_sized_ops=true": _MAXTEXT,
    },
)
# Interleaves the steps of a gather with the tiles of a product. The compilers of all other chips
# refuse it in the first program with a gather: "incorrect results, hang, SDC".
_FUSION = Group(
    "gathers fused into products",
    {
        "--xla_tpu_enable_async_collective_fusion=true": _MAXTEXT,
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true": _MAXTEXT,
        "--xla_tpu_enable_async_collective_fusion_multiple_steps=true": _MAXTEXT,
        "--xla_tpu_overlap_compute_collective_tc=true": _MAXTEXT,
    },
)
# Runs collectives on the chip's SparseCores while its other cores compute.
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
# Gathers over two and three dims of the torus. Beside collectives over tensor they wait for each
# other: by prediction they shorten a step of 32B over data alone by 7 % and lengthen one of 530B
# over data and tensor by 3 % (docs/predicted_step.md).
_PLANES = Group(
    "gathers over planes on SparseCore",
    {
        "--xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=true": _RECIPES,
        "--xla_tpu_enable_sparse_core_collective_offload_3d_all_gather=true": _RECIPES,
    },
    unsplit=True,
)
# The default leaves products of v6e with windows that read operands too often.
_VMEM = Group("larger windows of products", {"--xla_tpu_scoped_vmem_limit_kib=98304": _MAXTEXT_V6E})
# Chip kind -> groups; where the compiler refuses them all, the last ones are left out first.
# Compiled for every kind, timed on none. The tpu7x compiler offloads collectives by itself. Not
# used: a larger xla_tpu_scoped_vmem_limit_kib on v5p, where no published step has it.
TPU = {
    "v4": (_ASYNCHRONOUS,),
    "v5e": (_ASYNCHRONOUS, _FUSION),
    "v5p": (_ASYNCHRONOUS, _OFFLOAD, _PLANES),
    "v6e": (_ASYNCHRONOUS, _OFFLOAD, _VMEM),
    "tpu7x": (_ASYNCHRONOUS,),
}


def groups_of(kind: str, mesh: MeshConfig) -> tuple[Group, ...]:
    """Return the groups for a run over ``mesh`` on chips of ``kind``, a key of TPU."""
    split = mesh.tensor > 1 or mesh.context > 1 or mesh.expert > 1 or mesh.pipe > 1
    return tuple(group for group in TPU[kind] if not (group.unsplit and split))


@dataclasses.dataclass(frozen=True)
class Choice:
    """``flags`` to add to a platform's environment variable, and a line about those
    ``left_out``."""

    flags: tuple[str, ...] = ()
    left_out: str = ""


def set_flags(mesh: MeshConfig, recompute: str = "elementwise") -> list[str]:
    """Set and return the recommended flags for a run over ``mesh`` on this machine's chips.

    Call this before the first use of a device. ``recompute``: train.recompute of the run.
    """
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
    """Return the flags that a run over ``mesh`` adds to the environment on chips of ``kind``.

    ``kind`` is "gpu", "cpu", a key of TPU, or "tpu" for an unknown one; ``slices``: TPU slices. The
    answer is the same for a run and for a chip that is only described.
    """
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
            "the kind of this TPU is not known, so no compiler flags are set; "
            f"set TPU_ACCELERATOR_TYPE, as v5p-8, to one of {', '.join(TPU)}",
        )
    wanted_groups = groups_of(kind, mesh)
    groups = wanted_groups
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
    dropped = "; ".join(group.what for group in wanted_groups[len(groups) :])
    return Choice(
        tuple(flags),
        dropped and f"the compiler for {kind} refuses flags, left out: {dropped} ({why[:200]})",
    )


def _name(flag: str) -> str:
    return flag.partition("=")[0]


def collectives_of(mesh: MeshConfig) -> list[tuple[str, str]]:
    """Return (kind, mesh axis) of each collective that a step over ``mesh`` may use.

    The kinds are named as in planning.hlo_cost.
    """
    found = []
    if mesh.data != 1:
        found.append(("all-reduce", "data"))
        if mesh.zero:
            found += [("all-gather", "data"), ("reduce-scatter", "data")]
    if mesh.expert > 1:
        found += [(kind, "expert") for kind in ("all-gather", "reduce-scatter", "all-reduce")]
    if mesh.tensor > 1:
        found += [(kind, "tensor") for kind in ("all-gather", "reduce-scatter", "all-reduce")]
        if mesh.tp_comm_overlap:
            found.append(("collective-permute", "tensor"))
    if mesh.pipe > 1:
        found.append(("collective-permute", "pipe"))
    if mesh.context > 1:
        kinds = {
            "ulysses": ["all-to-all"],
            "gather": ["all-gather"],
            "ring": ["collective-permute"],
        }
        used = kinds.get(mesh.context_mode, ["all-to-all", "all-gather"])
        found += [(kind, "context") for kind in used]
    return found


# --- this machine


def kind_here() -> str:
    """Return the kind of chip that JAX will choose, without making JAX choose it yet.

    It is "cpu", "gpu", a key of TPU, or "tpu" where the machine does not report which.
    """
    platform = platform_here()
    if platform != "tpu":
        return platform
    found = compat.tpu_here()
    return found if found in TPU else kind_of(os.environ.get("TPU_ACCELERATOR_TYPE", "")) or "tpu"


def kind_of(accelerator: str) -> str | None:
    """Return the key of TPU for "v5litepod-16", "tpu-v6e-slice" or "tpu7x-128"; None if unknown."""
    text = accelerator.lower().replace("-", "").replace("v5lite", "v5e")
    return next((kind for kind in TPU if kind in text), None)


def platform_of(kind: str) -> str:
    """Return the platform of ``kind``: gpu, tpu or cpu."""
    return "tpu" if kind in TPU else kind


def platform_here() -> str:
    """Return the platform that JAX will choose (gpu, tpu or cpu), without making it choose yet."""
    requested = (jax.config.jax_platforms or "").split(",")[0]
    if requested:
        return {"cuda": "gpu"}.get(requested, requested)
    has_plugin = any(util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    if os.path.exists("/dev/nvidiactl") and has_plugin:
        return "gpu"
    if util.find_spec("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")):
        return "tpu"
    return "cpu"


# --- trying flags in another process

SECONDS = 600  # limit of one try


def unknown_flags(flags: Sequence[str]) -> list[str]:
    """Return those of ``flags`` that the GPU compiler does not know; cached for its version."""
    return _remembered(
        f"jaxlib {metadata.version('jaxlib')} {' '.join(flags)}", lambda: _unknown(list(flags))
    )


def refusal(kind: str, mesh: MeshConfig, slices: int, flags: Sequence[str]) -> str:
    """Return why the compiler for ``kind`` refuses ``flags`` and those in the environment.

    Return its own message, or "" if it compiled a small step with the collectives of ``mesh``. The
    answer is cached for its version.
    """
    request = {"kind": kind, "slices": min(slices, 2), "collectives": collectives_of(mesh)}
    all_flags = " ".join([*os.environ.get("LIBTPU_INIT_ARGS", "").split(), *flags])
    return _remembered(
        f"{_libtpu()} {json.dumps(request)} {all_flags}", lambda: _refusal(request, all_flags)
    )


def _libtpu() -> str:
    """Name the TPU compiler that another process will find; launch/test.sh installs one apart."""
    path = [*sys.path, os.path.join(sys.prefix, "ahead")]
    found = next(iter(metadata.distributions(name="libtpu", path=path)), None)
    version = found.version if found else "unknown"
    return f"libtpu {version} {os.environ.get('TPU_LIBRARY_PATH', '')}"


def _remembered[Answer](key: str, find: Callable[[], tuple[Answer, bool]]) -> Answer:
    """Return the cached answer for ``key``, or that of ``find``.

    ``find`` returns (answer, whether it is certain); only certain answers are cached.
    """
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = os.path.join(compat.cache_folder(), f"flags-{digest}.json")
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
            pass  # the home folder is read-only: the next run tries again
    return answer


def _refusal(request: dict, flags: str) -> tuple[str, bool]:
    # The process acquires no chip, it only describes some: another one may hold the chips.
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
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    lines = lines or [f"exit code {done.returncode}"]
    unknown = [line for line in lines if _UNKNOWN.search(line)]
    return (unknown[-1], True) if unknown else (f"not tried: {lines[-1]}", False)


_UNKNOWN = re.compile("nknown flag|nknown command line")
# Every jaxlib contains the parser of XLA's GPU flags, so no card is needed or acquired.
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
        if not found:  # another failure: running without flags is better than not running
            return flags, False
        unknown += found
    return unknown, True
