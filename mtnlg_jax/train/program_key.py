"""What decides the compiled program of a train step, by name.

All of it is known without tracing or lowering the step: settings, mesh, devices, compiler flags,
versions, and a hash of the code. So a start that has a saved program need not look at the model.
"""

import dataclasses
import functools
import hashlib
import json
import os
import platform
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import mtnlg_jax
from mtnlg_jax import compat
from mtnlg_jax.config import Config
from mtnlg_jax.train import changes, spike_rule
from mtnlg_jax.train.processes import fingerprint
from mtnlg_jax.train.schedule import samples_before

# Settings that decide no program. All others decide it, as far as is known here: a
# setting that is missing below costs a compilation, and one too many would train wrongly. A test
# compares the lowered programs. The stages decide by `program_options`.
FREE = changes.HOST | {
    "model.init_method_std",
    "data.path",
    "data.blend",
    "data.tokenizer",
    "data.heldout",
    "data.masking.word_share",
    "data.masking.mask_share",
    "data.masking.random_share",
    "optimizer.dp_secret",
    "train.init",
    "train.stages",
    "train.eval_batches",
    "train.spike_leave_out",
}
FREE_SECTIONS = ("decode",)

# Folders of the package from which a step is made; a test compares them with what it imports.
CODE = ("config", "data", "model", "parallel", "train")

# Settings of JAX that decide a program, as far as is known; a version may lack some.
_SETTINGS_OF_JAX = (
    "jax_enable_x64",
    "jax_explicit_x64_dtypes",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_threefry_gpu_kernel_lowering",
    "jax_random_seed_offset",
    "jax_numpy_dtype_promotion",
    "jax_high_dynamic_range_gumbel",
    "jax_softmax_custom_jvp",
    "jax_accurate_erf_inv",
    "jax_allow_f16_reductions",
    "jax_use_hlo_logistic_lowering",
    "jax_ragged_dot_use_ragged_dot_instruction",
    "jax_use_direct_linearize",
    "jax_use_simplified_jaxpr_constants",
    "jax_embedded_constants_max_bytes",
    "jax_auto_pcast",
    "jax_remove_size_one_mesh_axis_from_type",
    "jax_remat_barrier_no_cotangents",
    "jax_remat3",
    "jax_scan3",
    "jax_custom_jvp3",
    "jax_custom_vjp3",
    "jax_error_checking_behavior_nan",
    "jax_error_checking_behavior_divide",
    "jax_error_checking_behavior_oob",
    "jax_disable_most_optimizations",
    "jax_optimization_level",
    "jax_memory_fitting_level",
    "jax_compiler_enable_remat_pass",
    "jax_use_shardy_partitioner",
    "jax_enable_pgle",
    "jax_mosaic_allow_hlo",
    "jax_pallas_enable_debug_checks",
    "jax_pallas_poison_buffers",
    "jax_pallas_auto_assign_collective_ids",
    "jax_xla_profile_version",
    "jax_pjrt_client_create_options",
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_COMPILERS = {
    "tpu": ("libtpu",),
    "gpu": ("jax-cuda12-pjrt", "jax-cuda12-plugin", "jax-cuda13-pjrt", "jax-cuda13-plugin"),
}
# Simulated devices are counted as the others are, whichever way they were asked for.
_NOT_OF_THE_COMPILER = "--xla_force_host_platform_device_count"


def key_of(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Return what decides the programs of a run of ``config`` (resolved) over ``mesh``, as JSON
    values by name."""
    return {
        **_settings(config, mesh),
        **_devices(mesh),
        **_flags(),
        **_versions(),
        "code": _hash_of_code(),
    }


def program_options(
    config: Config,
    causal: bool,
    total_samples: int | None = None,
    sparse: bool = False,
    distillation: Any = None,
) -> dict[str, Any]:
    """Return what tells the programs of a run apart: the options of `step.make_train_step`."""
    train = config.train
    if total_samples is None:
        total_samples = samples_before(train, train.steps)
    found = {
        "objective": "causal" if causal else "masked",
        "samples at the end": total_samples,
        "answers alone": sparse,
        # The teacher's parameters are an argument, its shape is not.
        "teacher": distillation and fingerprint(dataclasses.asdict(distillation)),
        # The histories of its rule follow stages and sources, which are free otherwise.
        "histories of spikes": spike_rule.histories(config),
    }
    return {f"program.{name}": value for name, value in found.items()}


def differences(kept: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Return a text for each name of which ``kept`` and ``here`` have other values."""
    names = [name for name in {**kept, **here} if kept.get(name) != here.get(name)]
    return [f"{name} {_text(kept.get(name))} there, {_text(here.get(name))} here" for name in names]


def _text(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)


def _settings(config: Config, mesh: Mesh) -> dict[str, Any]:
    values = {
        name: value
        for name, value in changes.normalized(config).items()
        if name not in FREE and name.split(".")[0] not in FREE_SECTIONS
    }
    # mesh.data=-1 is what the devices leave.
    return values | {f"mesh.{axis}": size for axis, size in mesh.shape.items()}


def _devices(mesh: Mesh) -> dict[str, Any]:
    devices = list(mesh.devices.flat)
    # Where each device of the mesh is: a program has routes for this order alone.
    order = [
        [device.id, *(getattr(device, name, None) for name in ("coords", "slice_index"))]
        for device in devices
    ]
    found = {
        "kind": compat.device_kind(),
        "count": len(devices),
        "processes": len({device.process_index for device in devices}),
        "order": fingerprint(order),
    }
    if compat.platform() == "cpu":
        found |= {"processor": _processor()}
    return {f"devices.{name}": value for name, value in found.items()}


@functools.cache
def _processor() -> str:
    """Return the name of this machine's processor with a hash of its instruction sets: a program
    for others may end in an illegal instruction."""
    name = platform.processor() or platform.machine()
    instructions = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                instructions = value
        # The first processor is enough: they are alike.
    return f"{name} ({platform.machine()}, {fingerprint(sorted(instructions.split()))})"


def _flags() -> dict[str, Any]:
    words = _flags_of_xla()
    found: dict[str, Any] = {}
    if compat.platform() == "tpu":
        words += os.environ.get("LIBTPU_INIT_ARGS", "").split()
        if library := os.environ.get("TPU_LIBRARY_PATH"):
            # It has no version that could be read without loading it.
            size = os.path.getsize(library) if os.path.isfile(library) else None
            found["TPU_LIBRARY_PATH"] = [library, size]
    for flag in words:
        name, _, value = flag.partition("=")
        if name != _NOT_OF_THE_COMPILER:
            found[f"flag {name}"] = value
    of_jax = {name: getattr(jax.config, name, None) for name in _SETTINGS_OF_JAX}
    # As JSON gives them back.
    return found | {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in of_jax.items()
        if value is not None
    }


def _flags_of_xla() -> list[str]:
    """Return the flags of XLA, which reads a file where the value does not begin with a dash."""
    value = os.environ.get("XLA_FLAGS", "")
    if value.strip() and not value.lstrip().startswith("-"):
        path = Path(value)
        # A file that is not there ends the process in XLA.
        value = path.read_text() if path.is_file() else value
    return value.split()


def _versions() -> dict[str, str]:
    found = {"mtnlg_jax": mtnlg_jax.__version__}
    for name in (*_PACKAGES, *_COMPILERS.get(compat.platform(), ())):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass  # CUDA 12 or 13
    return {f"version of {name}": version for name, version in found.items()}


@functools.cache
def _hash_of_code() -> str:
    """Return a hash of the package's files from which a step is made."""
    # Four milliseconds for two hundred files.
    root = Path(str(resources.files("mtnlg_jax")))
    files = [*root.glob("*.py")]
    for folder in CODE:
        files += [path for path in (root / folder).rglob("*") if path.is_file()]
    digest = hashlib.sha256()
    for path in sorted(files):
        name = path.relative_to(root).as_posix()
        if "__pycache__" not in name:
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
