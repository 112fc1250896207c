"""What moves between platforms and JAX releases, in one place."""

import os

import jax
from absl import logging

_DESCRIBED: list[str] = []


def compile_for(platform: str) -> None:
    """Says that this process makes programs for ``platform`` ("tpu", "cuda", "cpu"), of which it has no device."""
    _DESCRIBED[:] = [platform]


def platform() -> str:
    """What programs are made for: "cpu", "tpu", "gpu" or "cuda"."""
    return _DESCRIBED[0] if _DESCRIBED else jax.default_backend()


def configure_cache() -> None:
    """Keeps compiled programs between runs, so that a resumed run starts in seconds. An accelerator's compile
    is worth minutes; $JAX_COMPILATION_CACHE_DIR moves the cache, an empty value turns it off."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        folder = os.path.join(cache_folder(), "xla")
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)


def cache_folder() -> str:
    """Where what can be made again is kept between runs."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mtnlg_jax")


def quiet() -> None:
    """Libraries' chatter at INFO is for their developers; warnings stay."""
    logging.set_verbosity(logging.WARNING)


def serialize_cpu_collectives() -> None:
    """Several programs in flight on more CPU devices than cores can wait for each other for ever inside their
    collectives; one program at a time cannot."""
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def cluster_processes() -> int:
    """How many processes JAX would start with by itself under SLURM, Open MPI, on a TPU pod or on GKE; 0 where it
    finds none of them."""
    from jax._src.clusters import ClusterEnv  # the public way, jax.distributed.initialize(), raises where there is none

    found = (env for env in ClusterEnv._cluster_types if not env.opt_in_only_method and env.is_env_present())
    env = next(found, None)
    return env.get_process_count() if env else 0
