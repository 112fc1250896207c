"""What moves between platforms and JAX releases, in one place."""

import contextlib
import inspect
import os

import jax
from absl import logging

_DESCRIBED: list[str] = []


def compile_for(platform: str, device_kind: str = "") -> None:
    """Says that this process makes programs for ``platform`` ("tpu", "cuda", "cpu"), of which it
    has no device."""
    _DESCRIBED[:] = [platform, device_kind]


def described() -> bool:
    """True where programs are made for devices that are not here."""
    return bool(_DESCRIBED)


def platform() -> str:
    """What programs are made for: "cpu", "tpu" or "gpu"."""
    name = _DESCRIBED[0] if _DESCRIBED else jax.default_backend()
    return {"cuda": "gpu"}.get(name, name)


def device_kind() -> str:
    """Its devices in JAX's words: "cpu", "TPU v5 lite", "NVIDIA H100 80GB HBM3"."""
    return _DESCRIBED[1] if _DESCRIBED else jax.devices()[0].device_kind


def cuda_version() -> int | None:
    """12080 for CUDA 12.8.0; None where this process has none."""
    from jax._src.lib import cuda_versions

    return (
        None if cuda_versions is None or described() else cuda_versions.cuda_runtime_get_version()
    )


# What stands for a kernel's hardware while ``interpreted`` is on.
_INTERPRETED: list[bool] = []


@contextlib.contextmanager
def interpreted(detect_races: bool = False):
    """Runs the kernels of any platform here, on the CPU, slowly: for tests. ``detect_races`` also
    watches every read and write, and raises RuntimeError where the kernel does not force their
    order."""
    _INTERPRETED.append(detect_races)
    try:
        yield
    finally:
        _INTERPRETED.pop()


def interpret_params(impl: str):
    """What the kernels of ``impl`` take as ``interpret``: False and None mean the hardware."""
    if not _INTERPRETED:
        return None if impl == "pallas_gpu" else False
    if impl == "pallas_gpu":
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams as Params
    else:
        from jax.experimental.pallas.tpu import InterpretParams as Params
    # JAX 0.11 has no on_race: there a race is recorded and not raised.
    known = {"detect_races": _INTERPRETED[-1], "on_race": "raise"}
    known = {
        name: value for name, value in known.items() if name in inspect.signature(Params).parameters
    }
    return Params(**known)


def interpreting() -> bool:
    return bool(_INTERPRETED)


def tpu_here() -> str | None:
    """The kind of this machine's TPU chips, "v5p" or the like, by what its bus tells; None where it
    tells of none. No chip is taken, and nothing of JAX is fixed."""
    from jax._src import hardware_utils  # JAX starts libtpu by it; there is no public way

    version = hardware_utils.num_available_tpu_chips_and_device_id()[1]
    return None if version is None else version.name


def configure_cache(least_seconds: float | None = None) -> None:
    """Keeps compiled programs between runs, so that a resumed run starts in seconds. An
    accelerator's compile is worth minutes; $JAX_COMPILATION_CACHE_DIR moves the cache, an empty
    value turns it off. ``least_seconds``: programs that take less to compile are not kept; None: as
        JAX has it, 1."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        folder = os.path.join(cache_folder(), "xla")
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        if least_seconds is not None:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)


def cache_folder() -> str:
    """Where what can be made again is kept between runs."""
    return os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mtnlg_jax"
    )


def quiet() -> None:
    """Libraries' chatter at INFO is for their developers; warnings stay."""
    logging.set_verbosity(logging.WARNING)


def serialize_cpu_collectives() -> None:
    """Several programs in flight on more CPU devices than cores can wait for each other for ever
    inside their collectives; one program at a time cannot."""
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def cluster_processes() -> int:
    """How many processes JAX would start with by itself under SLURM, Open MPI, on a TPU pod or on
    GKE; 0 where it finds none of them."""
    from jax._src.clusters import (
        ClusterEnv,
    )  # the public way, jax.distributed.initialize(), raises where there is none

    found = (
        env
        for env in ClusterEnv._cluster_types
        if not env.opt_in_only_method and env.is_env_present()
    )
    env = next(found, None)
    return env.get_process_count() if env else 0


def varying_axes(*trees) -> frozenset[str]:
    """The mesh axes that any array of ``trees`` differs over, inside a shard_map."""
    return frozenset().union(
        *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(trees))
    )


def result_like(shape, dtype, *inputs) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result made from ``inputs``: inside a shard_map it varies over the
    mesh axes that any of them varies over."""
    axes = varying_axes(*inputs)
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(
        shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=axes)
    )
