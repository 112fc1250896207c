"""Which copies of a near tier are whole, over the files of all hosts, and arrays made from them on
the mesh of this run."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mtnlg_jax.train.near import boxes
from mtnlg_jax.train.near.agree import gather
from mtnlg_jax.train.near.boxes import Box
from mtnlg_jax.train.near.files import Copy, File, NearFiles, name_of, shard_from

Source = tuple[str, str]  # group of the processes that read a file, name of the file
# Return the bytes of parts of a file of another group.
Fetch = Callable[[Source, list[tuple[str, Box, Box]]], bytes]


@dataclasses.dataclass
class Candidate:
    """A copy of which every shard is in some file."""

    copy: Copy
    about: dict
    finite: bool
    # (array, ranges) -> files that hold it
    sources: dict[tuple[str, Box], list[Source]]

    def without(self, damaged: set[Source]) -> "Candidate | None":
        """Return the copy without the files ``damaged``; None where a shard is missing then."""
        left = {
            shard: [source for source in sources if source not in damaged]
            for shard, sources in self.sources.items()
        }
        left = {shard: sources for shard, sources in left.items() if sources}
        sizes = {name: math.prod(shape_of(text)) for name, text in self.about["arrays"].items()}
        whole = boxes.covers(left, sizes)
        return dataclasses.replace(self, sources=left) if whole else None


def shape_of(text: str) -> tuple[int, ...]:
    """Return the shape in "float32[2, 64]"."""
    return tuple(json.loads(re.sub(r"^\w+", "", text)))


class Inventory:
    """The near copies that all processes of this run can reach together. Every process makes it,
    and calls the same methods."""

    def __init__(self, files: NearFiles, groups: list[str]) -> None:
        me = jax.process_index()
        self.files = files
        self.group = groups[me]
        self.groups = groups
        self.warnings: list[str] = []
        # Processes of one group read the same files: each checks a part of them.
        self._together = [number for number, each in enumerate(groups) if each == self.group]
        self.here: dict[str, File] = {}
        mine = self._listed() if me == self._together[0] else []
        self.candidates = self._joined(gather(mine))

    def _listed(self) -> list[dict]:
        """Return what this host has, as JSON."""
        found = []
        for copy in self.files.copies():
            files, warnings = self.files.files(copy)
            self.warnings += warnings
            if files:
                found.append(
                    {
                        "copy": dataclasses.astuple(copy),
                        "about": files[0].about,
                        "finite": self.files.is_finite(copy),
                        "files": [
                            [file.process, file.kind, [dataclasses.astuple(x) for x in file.shards]]
                            for file in files
                        ],
                    }
                )
        return found

    def _joined(self, everywhere: list[list[dict]]) -> list[Candidate]:
        found: dict[Copy, Candidate] = {}
        for process, listed in enumerate(everywhere):
            for each in listed:
                copy = Copy(*each["copy"])
                known = found.setdefault(copy, Candidate(copy, each["about"], False, {}))
                # Every process marks its own file, and all of them follow the same loss.
                known.finite = known.finite or each["finite"]
                for owner, kind, shards in each["files"]:
                    source = (self.groups[process], name_of(copy, owner, kind))
                    for shard in shards:
                        part = shard_from(*shard)
                        known.sources.setdefault((part.name, part.box), []).append(source)
        whole = filter(None, (candidate.without(set()) for candidate in found.values()))
        return sorted(whole, key=lambda candidate: (-candidate.copy.step, candidate.copy.start))

    def checked(self, candidate: Candidate) -> Candidate | None:
        """Return ``candidate`` without damaged files; None where it is not whole then."""
        listed, _ = self.files.files(candidate.copy)
        self.here = {file.name: file for file in listed}
        rank = self._together.index(jax.process_index())
        expected = {
            name
            for sources in candidate.sources.values()
            for group, name in sources
            if group == self.group
        }
        damaged = sorted(expected - self.here.keys())
        self.warnings += [
            f"the near copy of step {candidate.copy.step}: {self.files.path(name)} is missing"
            for name in damaged
        ]
        for file in listed[rank :: len(self._together)]:
            if damage := self.files.damage(file):
                damaged.append(file.name)
                self.warnings.append(f"the near copy of step {file.copy.step}: {damage}")
        everyone = gather(damaged)
        gone = {
            (self.groups[process], name) for process, names in enumerate(everyone) for name in names
        }
        return candidate.without(gone)

    def assemble(self, candidate: Candidate, name: str, leaf: Any, fetch: Fetch) -> jax.Array:
        """Return array ``name`` with the shape, type and sharding of ``leaf``.

        Rows of padding that the copy lacks are 0; those that this mesh does not need are left out.
        """
        dtype = np.dtype(leaf.dtype)
        saved = [(box, where) for (each, box), where in candidate.sources.items() if each == name]
        made: dict[Box, np.ndarray] = {}
        wanted: dict[Source, list[tuple[str, Box, Box]]] = {}
        targets: dict[Source, list[np.ndarray]] = {}
        indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
        for box in {boxes.box_of(index, leaf.shape) for index in indices}:
            made[box] = np.zeros([stop - start for start, stop in box], dtype)
            for outer, where in saved:
                part = boxes.common(box, outer)
                if part is None:
                    continue
                target = made[box][boxes.within(part, box)]
                here = [source for source in where if source[0] == self.group]
                if here:
                    file = self.here[here[0][1]]
                    target[...] = self.files.read(file, name, outer, part, dtype)
                else:
                    wanted.setdefault(where[0], []).append((name, outer, part))
                    targets.setdefault(where[0], []).append(target)
        for source, parts in wanted.items():
            data = np.frombuffer(fetch(source, parts), np.uint8)
            start = 0
            for target in targets[source]:
                piece = data[start : start + target.nbytes]
                target[...] = piece.view(dtype).reshape(target.shape)
                start += target.nbytes
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: made[boxes.box_of(index, leaf.shape)]
        )

    def give(self, request: dict) -> tuple[dict, list]:
        """Answer the `Fetch` of another process."""
        file = self.here[request["file"]]
        parts = []
        for name, outer, box in request["parts"]:
            dtype = np.dtype(request["dtype"])
            whole = shard_from(name, outer, 0).box
            found = self.files.read(file, name, whole, shard_from(name, box, 0).box, dtype)
            parts.append(memoryview(found.reshape(-1).view(np.uint8)))
        return {"bytes": sum(map(len, parts))}, parts
