"""How the processes of a run exchange values, on which hosts they are, and who keeps a second copy
of whose shards."""

import json
import os
import platform
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mtnlg_jax.command import HOST

LEAST_BYTES = 4096  # of a message; a power of two, so that few programs are compiled


def gather(value: Any) -> list[Any]:
    """Return ``value`` (JSON) of each process, in the order of processes, in every process."""
    text = json.dumps(value).encode()
    if jax.process_count() == 1:
        return [json.loads(text)]
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    # The same shape everywhere, and the same shape again at most calls.
    width = LEAST_BYTES
    while width < sizes.max():
        width *= 2
    rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(width), np.uint8))
    return [
        json.loads(np.asarray(row[:size], np.uint8).tobytes())
        for row, size in zip(rows, sizes, strict=True)
    ]


def host() -> str:
    """Return the name of this host; a simulated one has that of its number as well."""
    number = os.environ.get(HOST)
    return platform.node() + (f"#{number}" if number else "")


def folder(path: str) -> str:
    """Return a name of the folder ``path``, the same in every process of this machine that opens
    this folder; containers of one name may have folders of their own at one path."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            machine = file.read().strip()
    except OSError:  # not Linux
        machine = platform.node()
    found = os.stat(path)
    return f"{machine}:{found.st_dev}:{found.st_ino}"


def peers_of(mesh: Mesh, hosts: list[str]) -> dict[int, int]:
    """Return {process: the one that keeps a second copy of what it alone holds}.

    ``hosts`` is the host of each process. Peers are in the next data replica, where that is on
    another host; else they are another number of processes further on, such that the most are on
    other hosts. No two processes have the same peer. Return {} where data does not span processes:
    then no process has a peer.
    """
    # Shapes of the axes in the order of `parallel.mesh.AXES`.
    axis = mesh.axis_names.index("data")
    numbers = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    found: list[dict[int, int]] = []
    for shift in range(1, numbers.shape[axis]):
        moved = np.roll(numbers, -shift, axis)
        peers: dict[int, int] = {}
        for process, peer in zip(numbers.flat, moved.flat, strict=True):
            # A process whose devices are in several replicas has one peer: that of the first
            # device whose neighbor is elsewhere.
            if process != peer:
                peers.setdefault(int(process), int(peer))
        if len(peers) == len(hosts) == len(set(peers.values())):
            found.append(peers)
    if not found:
        return {}
    count = len(hosts)
    # A peer keeps bytes, so it may as well be of another stage: a replica may be within a host.
    found += [
        {process: (process + shift) % count for process in range(count)}
        for shift in range(1, count)
    ]
    # The first of equals: the nearest replica.
    return max(found, key=lambda peers: sum(hosts[a] != hosts[b] for a, b in peers.items()))


def holds_alone(process: int, processes: set[int], hosts: list[str]) -> bool:
    """Return whether ``process`` sends a shard that ``processes`` hold to its peer.

    It does where no other host holds it, and ``process`` is the first of those that do.
    """
    if min(processes) != process:
        return False
    several = len(set(hosts)) > 1
    places = {hosts[each] for each in processes} if several else processes
    return len(places) == 1
