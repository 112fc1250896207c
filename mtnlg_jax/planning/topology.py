"""Described accelerators: ``v5p:8x8x16``, ``v5p:8x8x8*2`` (slices), ``H100:280x8`` (hosts x cards),
``cpu:8``."""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import sys
from importlib import resources
from pathlib import Path

import numpy as np

from mtnlg_jax.config import MeshConfig
from mtnlg_jax.hardware import GIB
from mtnlg_jax.parallel.mesh import AXES, make_mesh, mesh_shape

TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
FLAT = ("v5e", "v6e")  # their torus has two dims, the others' three
GPUS = ("A100", "H100", "H200", "B200")  # each has a file in gpus/

# Where launch/test.sh puts the TPU compiler. Only processes that compile see this folder.
APART = Path(sys.prefix, "ahead")
# Processes load libtpu only to compile, never on a machine with the chip, so several may do it at
# once. It must not ask the network what machine this is, nor fill standard error.
_TPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind."""

    kind: str
    # TPU: chips of a slice along its torus. GPU: hosts x cards. CPU: devices.
    dims: tuple[int, ...]
    slices: int = 1

    @property
    def platform(self) -> str:
        return "tpu" if self.kind in TPUS else "cuda" if self.kind in GPUS else "cpu"

    @property
    def chips(self) -> int:
        return math.prod(self.dims) * self.slices

    def __str__(self):
        return f"{self.kind}:{'x'.join(map(str, self.dims))}" + (
            f"*{self.slices}" if self.slices > 1 else ""
        )


def wrapped(topology: Topology) -> tuple[bool, bool, bool]:
    """Return for each dim of a slice whether its last chip is linked to the first.

    v4, v5p and tpu7x consist of cubes of 4 x 4 x 4: all dims are linked if 4 divides each of them,
    else none. v5e and v6e: a dim of 16, the whole pod's, is linked (MaxText,
    accelerator_to_spec_map.py, 2026; Google Cloud, TPU v5p page). Twisted tori, which v4 and v5p
    also offer, are described untwisted."""
    if topology.kind in FLAT:
        first, second = (size == 16 for size in topology.dims)
        return first, second, False
    return (all(size % 4 == 0 for size in topology.dims),) * 3


_SMALL_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL_CUBES = ((1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_LARGEST = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}  # chips of a slice (Google Cloud, TPU pages)


@functools.cache
def _slices(kind: str) -> tuple[tuple[int, ...], ...]:
    """Return the dims of all slices of a kind, shortest dim first, smallest slice first.

    v5e and v6e have eight sizes. The others are cubes of 4 x 4 x 4 joined along any dim, and parts
    of one (Google Cloud, TPU v4, v5p and TPU7x pages).
    """
    if kind in FLAT:
        return _SMALL_FLAT
    sides = range(4, 65, 4)
    cubes = [
        (a, b, c)
        for a in sides
        for b in sides
        for c in sides
        if a <= b <= c and a * b * c <= _LARGEST[kind]
    ]
    return tuple(sorted([*_SMALL_CUBES, *cubes], key=lambda dims: (math.prod(dims), dims[::-1])))


def check_slice(topology: Topology) -> None:
    """Raise ValueError, which names the nearest ones, if no TPU slice has these dims."""
    if topology.platform != "tpu" or tuple(sorted(topology.dims)) in _slices(topology.kind):
        return
    wanted = math.prod(topology.dims)
    sizes = _slices(topology.kind)
    below = [dims for dims in sizes if math.prod(dims) <= wanted][-1:]
    above = [dims for dims in sizes if math.prod(dims) > wanted][:1]
    named = " and ".join(
        f"{topology.kind}:{'x'.join(map(str, _written(dims)))}" for dims in [*below, *above]
    )
    raise ValueError(f"topology {topology}: no slice has these dims; the nearest have {named}")


def _written(dims: tuple[int, ...]) -> tuple[int, ...]:
    return (2, 2, 1) if dims == (1, 2, 2) else dims  # as Google writes it


def slice_of(kind: str, chips: int) -> Topology:
    """Return the slice of ``chips`` whose longest dim is the shortest. Raises ValueError, which
    names the nearest ones, if there is none."""
    sizes = _slices(kind)
    fitting = [dims for dims in sizes if math.prod(dims) == chips]
    if fitting:
        return Topology(kind, _written(min(fitting, key=max)))
    below = [math.prod(dims) for dims in sizes if math.prod(dims) < chips][-1:]
    above = [math.prod(dims) for dims in sizes if math.prod(dims) > chips][:1]
    named = " and ".join(map(str, [*below, *above]))
    raise ValueError(f"no {kind} slice has {chips} chips; the nearest have {named}")


def parse(text: str) -> Topology:
    """Parse "v5p:8x8x8*2". Raises ValueError on another form or an unknown kind."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", text)
    kinds = {kind.lower(): kind for kind in (*TPUS, *GPUS, "cpu")}
    if not found or found[1].lower() not in kinds:
        raise ValueError(
            f"unknown topology {text!r}; write KIND:SIZE, as v5p:8x8x16, v5e:16x16, v5p:8x8x8*2 "
            "for two slices, H100:280x8 for hosts x cards, cpu:8; KIND is one of "
            f"{', '.join(kinds.values())}"
        )
    topology = Topology(
        kinds[found[1].lower()], tuple(map(int, found[2].split("x"))), int(found[3] or 1)
    )
    wanted = {"cuda": (2,), "cpu": (1,)}.get(
        topology.platform, (2,) if topology.kind in FLAT else (3,)
    )
    if len(topology.dims) not in wanted or 0 in topology.dims or topology.slices < 1:
        raise ValueError(
            f"topology {text!r}: a {topology.kind} has {wanted[0]} sizes, each at least 1, as "
            f"{topology.kind}:{'x'.join('2' * wanted[0])}"
        )
    if topology.platform == "cpu" and topology.slices > 1:
        raise ValueError(
            f"topology {text!r}: CPU devices have no slices; write cpu:{topology.chips}"
        )
    return topology


def check_installed(topology: Topology) -> None:
    """Raise ValueError, with what to install, if the compiler for ``topology`` is missing."""
    module = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda12"}.get(topology.platform)
    try:
        missing = (
            module is not None
            and not APART.joinpath(module).is_dir()
            and importlib.util.find_spec(module) is None
        )
    except ModuleNotFoundError:
        missing = True
    if missing:
        raise ValueError(
            f"compiling for {topology.kind} needs {(module or '').split('.')[-1]}, which is not "
            "here; install it with: pip install -c launch/constraints.txt -e '.[ahead]'"
        )


def enter(topology: Topology) -> None:
    """Prepare this process to compile for ``topology``. Call it before any use of JAX."""
    for name, value in environment(topology).items():
        os.environ[name] = value
    if topology.platform == "tpu" and APART.is_dir() and str(APART) not in sys.path:
        sys.path.insert(0, str(APART))


def environment(topology: Topology) -> dict[str, str]:
    """Return the environment of a process that compiles for ``topology``. No other process should
    have it."""
    values = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }  # a compile is to be measured, not looked up
    if topology.platform == "tpu":
        values |= _TPU_ENVIRONMENT
        if APART.is_dir():
            values["PYTHONPATH"] = os.pathsep.join(
                filter(None, [str(APART), os.environ.get("PYTHONPATH")])
            )
    if topology.platform == "cpu":
        flag = "--xla_force_host_platform_device_count"
        others = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(flag)]
        values["XLA_FLAGS"] = " ".join([*others, f"{flag}={topology.chips}"])
    return values


def card(topology: Topology, path: str | None = None) -> str:
    """Return the text (a GpuTargetConfigProto) that describes the card to the compiler: the
    project's, or that of ``path``."""
    if path is not None:
        with open(path, encoding="utf-8") as file:
            return file.read()
    return (
        resources.files(__package__)
        .joinpath(f"gpus/{topology.kind.lower()}.txtpb")
        .read_text(encoding="utf-8")
    )


def devices(topology: Topology, target_config: str | None = None) -> list:
    """Return the described devices, or with "cpu" those of this process. Raises ValueError if the
    compiler refuses."""
    import jax
    from jax.experimental import topologies

    if topology.platform == "cpu":
        return jax.devices("cpu")
    hosts = "x".join(map(str, topology.dims))
    try:
        if topology.platform == "cuda":
            return topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                topology=f"{topology.slices}x{hosts}",
                target_config=card(topology, target_config),
            ).devices
        more: dict[str, int | str] = {}
        if topology.slices > 1:
            more["num_slices"] = topology.slices
        if topology.kind == "v4":  # otherwise its two cores would be two devices
            more["chip_config_name"] = "megacore"
        # Without ``wrap`` the compiler uses no ring along any dim.
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{topology.kind}:{hosts}", wrap=wrapped(topology), **more
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"topology {topology}: the compiler refuses it: {' '.join(str(error).split())}"
        ) from None


def abstract(device):
    """Return a context in which kernels are lowered for the described ``device``."""
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    cores = getattr(device, "num_cores", None) or getattr(device, "core_count", None) or 1
    platform = "tpu" if device.platform == "tpu" else "gpu"
    return use_abstract_mesh(
        AbstractMesh((), (), abstract_device=AbstractDevice(device.device_kind, cores, platform))
    )


def mesh_over(config: MeshConfig, topology: Topology, devices: list):
    """Return the project's mesh over described devices. Slices are along ``data``, or along
    ``pipe`` if only that is divisible. Raises ValueError if the sizes do not multiply to the
    devices."""
    from jax.experimental import mesh_utils
    from jax.sharding import AxisType, Mesh

    shape = tuple(mesh_shape(config, len(devices)).values())
    mesh = functools.partial(Mesh, axis_names=AXES, axis_types=(AxisType.Auto,) * len(AXES))
    try:
        if topology.slices == 1 or topology.platform != "tpu":
            return make_mesh(config, devices)
        outer = [1] * len(AXES)
        outer[
            AXES.index("data" if shape[AXES.index("data")] % topology.slices == 0 else "pipe")
        ] = topology.slices
        inner = [size // n for size, n in zip(shape, outer, strict=True)]
        return mesh(mesh_utils.create_hybrid_device_mesh(inner, outer, devices=devices))
    except (NotImplementedError, ValueError):  # no assignment to this torus: use any order
        return mesh(np.array(devices).reshape(shape))


def memory_of(topology: Topology, devices: list, target_config: str | None = None) -> int | None:
    """Return the bytes of main memory that a program may use on one device, from the compiler's
    error message or the card's description; None on CPU."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    if topology.platform == "cpu":
        return None
    if topology.platform == "cuda":
        found = re.search(r"device_memory_size: *(\d+)", card(topology, target_config))
        return int(found[1]) if found else None
    huge = jax.ShapeDtypeStruct((2**40,), jnp.bfloat16, sharding=SingleDeviceSharding(devices[0]))
    try:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"exceeds available HBM \(([\d.]+)([GM])\)", str(error))
        if found:
            return int(float(found[1]) * {"G": GIB, "M": 2**20}[found[2]])
    return None
