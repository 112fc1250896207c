"""Everything that differs between platforms and JAX releases."""

import contextlib
import ctypes
import inspect
import logging as standard_logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging

_NVIDIA = Path("/dev/nvidiactl")  # of the driver
# Platform and device kind of `compile_for`, or empty.
_DESCRIBED: list[str] = []


def compile_for(platform: str, device_kind: str = "") -> None:
    """Declare that this process compiles for ``platform`` ("tpu", "cuda", "cpu") without a device
    of it."""
    _DESCRIBED[:] = [platform, device_kind]


def described() -> bool:
    """Return whether programs are compiled for devices that are not present."""
    return bool(_DESCRIBED)


def platform() -> str:
    """Return the platform that programs are compiled for: "cpu", "tpu" or "gpu"."""
    name = _DESCRIBED[0] if _DESCRIBED else jax.default_backend()
    return {"cuda": "gpu"}.get(name, name)


def device_kind() -> str:
    """Return JAX's name of its devices: "cpu", "TPU v5 lite", "NVIDIA H100 80GB HBM3"."""
    return _DESCRIBED[1] if _DESCRIBED else jax.devices()[0].device_kind


def cuda_version() -> int | None:
    """Return the CUDA runtime version, 12080 for 12.8.0; None where this process has none."""
    from jax._src.lib import cuda_versions

    if cuda_versions is None or described():
        return None
    return cuda_versions.cuda_runtime_get_version()


def hold_aborts() -> None:
    """Let a thread that aborts this process wait for 6 seconds first, without a dump of stacks.

    JAX aborts from a thread of its own as soon as it knows that another process was lost. Python's
    handlers run in the main thread and could not hold it back; the C library's ``sleep``, called
    with the number of the signal, does.
    """
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


_ENDED = "mtnlg_jax/ended"


def tell_others_that_this_ends() -> None:
    """Let `others_go_on` be False in the other processes."""
    from jax._src import distributed

    client: Any = distributed.global_state.client
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(_ENDED, "", allow_overwrite=True)


def others_go_on() -> bool:
    """Return False if another process has told that it ends, or if process 0 does not answer."""
    from jax._src import distributed

    client: Any = distributed.global_state.client
    try:
        client.key_value_try_get(_ENDED)
    except jax.errors.JaxRuntimeError as error:
        return "NOT_FOUND" in str(error)
    return False


# ``detect_races`` of each `interpreted` context that is open.
_INTERPRETED: list[bool] = []


@contextlib.contextmanager
def interpreted(detect_races: bool = False) -> Iterator[None]:
    """Interpret the kernels of any platform on the CPU, slowly: for tests.

    ``detect_races`` also records every read and write, and raises RuntimeError where the kernel
    does not order them.
    """
    _INTERPRETED.append(detect_races)
    try:
        yield
    finally:
        _INTERPRETED.pop()


def interpret_params(impl: str) -> Any:
    """Return the ``interpret`` argument of the kernels of ``impl``.

    False and None mean the hardware.
    """
    if not _INTERPRETED:
        return None if impl == "pallas_gpu" else False
    params: Any
    if impl == "pallas_gpu":
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams as params
    else:
        from jax.experimental.pallas.tpu import InterpretParams as params
    # JAX 0.11 has no on_race: there a race is recorded and not raised.
    wanted = {"detect_races": _INTERPRETED[-1], "on_race": "raise"}
    known = inspect.signature(params).parameters
    return params(**{name: value for name, value in wanted.items() if name in known})


def interpreting() -> bool:
    """Return whether an `interpreted` context is open."""
    return bool(_INTERPRETED)


def tpu_here() -> str | None:
    """Return the kind of this machine's TPU chips, such as "v5p"; None without chips.

    It is read from the PCI bus: no chip is acquired, and JAX's choice of a backend stays open.
    """
    # JAX decides with this whether to start libtpu; there is no public way.
    from jax._src import hardware_utils

    version = hardware_utils.num_available_tpu_chips_and_device_id()[1]
    return None if version is None else version.name


def configure_cache(least_seconds: float | None = None) -> None:
    """Keep compiled programs between runs, so that a resumed run starts in seconds.

    $JAX_COMPILATION_CACHE_DIR moves the cache, an empty value disables it. Programs that compile in
    less than ``least_seconds`` are not kept; None leaves JAX's default, 1.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        folder = os.path.join(cache_folder(), "xla")
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        if least_seconds is not None:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Compile inside without the cache of `configure_cache`, neither reading nor writing it."""
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX looks at the setting once; this makes it look again.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def cache_folder() -> str:
    """Return the folder of files that can be regenerated."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "mtnlg_jax")


def quiet() -> None:
    """Silence third-party INFO logs; warnings are still shown.

    So are errors, except that the CUDA plugin, which compile-ahead installs without CUDA's
    libraries, cannot start on a machine without an NVIDIA card.
    """
    logging.set_verbosity(logging.WARNING)
    # A filter is added once: it is the same object each time.
    standard_logging.getLogger("jax._src.xla_bridge").addFilter(_concerns_this_machine)


def _concerns_this_machine(record: standard_logging.LogRecord) -> bool:
    told = record.getMessage()
    of_cuda = told.startswith("Jax plugin configuration error") and "cuda" in told
    return not of_cuda or _NVIDIA.exists()


def serialize_cpu_collectives() -> None:
    """Run one program at a time on several CPU devices.

    With more devices than cores, programs in flight can deadlock inside their collectives.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def cluster_processes() -> int:
    """Return the number of processes that JAX detects under SLURM, Open MPI, a TPU pod or GKE.

    Return 0 where it detects none of them.
    """
    # The public way, jax.distributed.initialize(), raises where there is no cluster.
    from jax._src.clusters import ClusterEnv

    for env in ClusterEnv._cluster_types:
        if not env.opt_in_only_method and env.is_env_present():
            return env.get_process_count()
    return 0


def varying_axes(*trees: Any) -> frozenset[str]:
    """Return the mesh axes over which any array of ``trees`` varies, inside a shard_map."""
    axes: set[str] = set()
    for leaf in jax.tree.leaves(trees):
        axes |= jax.typeof(leaf).manual_axis_type.varying
    return frozenset(axes)


def result_like(shape: tuple[int, ...], dtype: Any, *inputs: Any) -> jax.ShapeDtypeStruct:
    """Return the type of a kernel's result computed from ``inputs``.

    Inside a shard_map it varies over every mesh axis that any of them varies over.
    """
    axes = varying_axes(*inputs)
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(
        shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=axes)
    )


def addresses_for_others() -> list[str]:
    """Return names under which the other processes may reach this host, the likeliest first.

    With one process, and where the coordinator is on this machine's loopback, it is "localhost".
    """
    from jax._src import distributed

    coordinator = distributed.global_state.coordinator_address
    name, _, port = (coordinator or "localhost:1").rpartition(":")
    name = name.strip("[]")
    if name in ("localhost", "127.0.0.1", "::1"):
        return ["localhost"]
    found = []
    # The others have reached process 0 by this very name.
    if jax.process_index() == 0:
        found.append(name)
    # Nothing is sent: connecting a datagram socket only chooses the address of this side.
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((name, int(port)))
        found.append(probe.getsockname()[0])
    return list(dict.fromkeys([*found, socket.getfqdn()]))
