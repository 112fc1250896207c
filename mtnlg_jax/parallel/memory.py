"""The memory that devices have free, to know before anything is loaded whether it fits."""

import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mtnlg_jax.hardware import CHIPS

_UNIT = 1 << 20  # bytes in which processes tell each other sizes
_MOST = 2**32 - 1  # no device tells its size


class Room(NamedTuple):
    """What one device may still take."""

    bytes: int
    shared: int  # devices that take it from the same memory: those of a host, or 1
    of_host: bool = False  # whether it is the host's memory


def room(mesh: Mesh | None) -> Room | None:
    """Return what each device of ``mesh`` (None: the first one) may still take.

    It is that of the device that has the least. None where no device tells. All processes of a
    mesh must call this together.
    """
    here = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    if here[0].platform == "cpu":
        return _among_processes(host_free(), len(here), mesh)
    found = [each for each in map(_device_free, here) if each is not None]
    free = _units(min(found, default=None))
    if mesh is not None and mesh.is_multi_process:
        # All decide alike: if one refused alone, the others would wait for it.
        free = int(multihost_utils.process_allgather(np.uint32(free)).min())
    return None if free == _MOST else Room(free * _UNIT, 1)


def _device_free(device: jax.Device) -> int | None:
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    sizes = [int(chip.memory) for chip in CHIPS.values() if device.device_kind in chip.kinds]
    return sizes[0] if sizes else None


def _units(free: int | None) -> int:
    """Return ``free`` bytes as processes tell them each other; ``_MOST`` for None."""
    return _MOST if free is None else min(max(0, free) // _UNIT, _MOST)


def _among_processes(free: int | None, devices: int, mesh: Mesh | None) -> Room | None:
    """Divide the free memory of hosts by the devices of all processes that they run."""
    if mesh is None or not mesh.is_multi_process:
        return None if free is None else Room(free // devices, devices, True)
    # Containers have names of their own, and memory of their own.
    host = zlib.crc32(socket.gethostname().encode())
    mine = np.array([host, _units(free), devices], np.uint32)
    everyone = np.asarray(multihost_utils.process_allgather(mine)).astype(np.int64)
    rooms = []
    for name in np.unique(everyone[:, 0]):
        of_host = everyone[everyone[:, 0] == name]
        if of_host[:, 1].min() == _MOST:
            continue
        count = int(of_host[:, 2].sum())
        rooms.append(Room(int(of_host[:, 1].min()) * _UNIT // count, count, True))
    return min(rooms, default=None)


def host_free(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may still take of its host's memory.

    It is what the system calls available, or less where a control group (a container, a SLURM job)
    allows less. None on systems without /proc.
    """
    found = [*_groups_free(root)]
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    return max(0, min(found)) if found else None


def _groups_free(root: Path) -> Iterator[int]:
    """Yield what each control group above this process has left, of either version."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = root / "sys/fs/cgroup"
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path is often that of the host, and its own group is the top.
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            left = _group_free(top.joinpath(*parts[:depth]), *names)
            if left is not None:
                yield left


def _group_free(folder: Path, limit: str, used: str, cached: str) -> int | None:
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return None
        taken = int((folder / used).read_text())
        statistics = dict(
            line.split() for line in (folder / "memory.stat").read_text().splitlines()
        )
        # Pages of files are counted and given back before anything is refused.
        return int(most) - taken + int(statistics.get(cached, 0))
    except (OSError, ValueError):
        return None
