"""The near tier of a run: what is copied, when, where to, and what is kept."""

import contextlib
import functools
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mtnlg_jax import command
from mtnlg_jax.hardware import size_of
from mtnlg_jax.train import checkpoint_arrays, processes
from mtnlg_jax.train.checkpoint_folder import Refuse, check_record
from mtnlg_jax.train.near import agree, boxes, wire
from mtnlg_jax.train.near.boxes import Box, Shard
from mtnlg_jax.train.near.files import OWN, PEER, Copy, NearFiles, shard_from
from mtnlg_jax.train.near.whole import Candidate, Inventory, Source

COPIES = 2  # the newest whole one, and the one that is being written
PATIENCE = 60  # seconds that a peer's copy may come before this process has begun its own


class NearTier:
    """Copies of the state below ``folder`` of each host, every ``every`` steps.

    Every process makes it and calls the same methods in the same order. ``run`` names the run.
    Raise ValueError in every process where a host has no room for one copy.
    """

    def __init__(self, folder: str, every: int, run: str, mesh: Mesh, abstract: Any) -> None:
        me = jax.process_index()
        self.every = every
        self.folder = folder
        host = agree.host()
        # A simulated host does not see the folders of the others.
        below = [host] if os.environ.get(command.HOST) else []
        self.files = NearFiles(os.path.join(os.path.abspath(folder), *below, run))
        self.warnings: list[str] = []
        flat = checkpoint_arrays.flatten(abstract)
        self._held = boxes.holders(flat)
        self._hosts: list[str] = agree.gather(host)
        self._peers = agree.peers_of(mesh, self._hosts)
        self.shards = boxes.shards_of(flat, self._held, lambda them: me in them)
        alone = self._alone(flat, me) if self._peers else []
        self._alone_shards = set(alone)
        self._kept_for = {peer: process for process, peer in self._peers.items()}.get(me)
        theirs = self._alone(flat, self._kept_for) if self._kept_for is not None else []
        self._own_bytes = sum(shard.bytes for shard in self.shards)
        self._peer_bytes = sum(shard.bytes for shard in theirs)
        self._groups = self._checked_groups()
        # One thread, so that copies, marks and removals happen in order.
        self._background = ThreadPoolExecutor(1, "near tier")
        self._buffer = np.empty(self._own_bytes, np.uint8)
        # Pages are made when they are first written, which takes 40 times as long as a copy.
        self._writing: Future = self._background.submit(self._buffer.fill, 0)
        self._marks: list[Future] = []
        # In the names of this start's copies.
        self.start: str = processes.run_on_first(lambda: secrets.token_hex(4))
        self._secret = processes.run_on_first(lambda: secrets.token_hex(16))
        self._whole: list[Copy] = []  # those that every process has finished, the newest last
        self._latest: Copy | None = None  # the newest that was begun, whole or not
        self._ready: Copy | None = None  # the one for which old ones have made room
        # The newest, of whose parameters no loss is known; a start makes another of the same step.
        self._unproven: list[Copy] = []
        self._good = True  # whether this process has written the latest
        self._skipped = False
        self._full = False
        self._begun = threading.Condition()
        self._inventory: Inventory | None = None
        self._server: wire.Server | None = None
        self._addresses: list[list[tuple[str, int]]] = []
        if processes.several():
            self._server = wire.Server(self._secret, self._take, self._give)
            self._addresses = agree.gather(self._server.addresses)

    def _alone(self, flat: dict[str, Any], process: int) -> list[Shard]:
        """Return the shards that ``process`` sends to its peer."""
        return boxes.shards_of(
            flat, self._held, lambda them: agree.holds_alone(process, them, self._hosts)
        )

    def _checked_groups(self) -> list[str]:
        """Return for each process a name of its folder, the same where processes have one folder.

        Raise ValueError where a folder has no room for one copy.
        """
        need = self._own_bytes + self._peer_bytes
        free = 0
        group = ""
        why = ""
        try:
            above = os.path.dirname(self.files.folder)
            os.makedirs(above, exist_ok=True)
            group = agree.folder(above)
            # Nobody else reads the parameters of a run.
            os.makedirs(self.files.folder, 0o700, exist_ok=True)
            # What an earlier start left makes room.
            free = shutil.disk_usage(self.files.folder).free + self.files.used()
        except OSError as error:
            why = error.strerror or str(error)
        told = agree.gather([need, free, why, group])
        groups = [each[3] for each in told]
        # Behind the exchange, and by one process: another one may have just made the folder.
        if groups.index(group) == jax.process_index():
            with contextlib.suppress(OSError):
                os.rmdir(self.files.folder)
        for process, (_, free, why, group) in enumerate(told):
            where = f"train.near_folder={self.folder} on {self._hosts[process]}"
            if why:
                raise ValueError(
                    f"{where} cannot be written to ({why}); name a folder of each host, or set "
                    "train.near_every=0"
                )
            # Processes of a host share its disk.
            need = sum(told[each][0] for each, name in enumerate(groups) if name == group)
            if free < need:
                raise ValueError(
                    f"{where} has {free:,} bytes free, and one copy of this run takes {need:,} "
                    "there; free some, name another folder, or set train.near_every=0"
                )
            if free < COPIES * need and processes.is_first():
                logging.warning(
                    "%s has room for one copy (%s), not for %d: copies will fail",
                    where,
                    size_of(need),
                    COPIES,
                )
        return groups

    def lines(self) -> list[str]:
        """Return what the start of the run says of the tier."""
        each = size_of(self._own_bytes)
        kept = f"{each} a copy"
        if self._peer_bytes:
            kept += f" and {size_of(self._peer_bytes)} for its peer"
        told = (
            f"  near    every {self.every:,} steps in {self.files.folder}: a process writes "
            f"{kept}, keeps {COPIES} copies, and holds {each} of host memory"
        )
        if not self._peers:
            reason = "data is within each process" if processes.several() else "one process"
            told += f"; no peer has a second copy ({reason})"
        together = [a for a, b in self._peers.items() if self._hosts[a] == self._hosts[b]]
        if together and len(together) == len(self._peers):
            told += "; peers are on the same host"
        elif together:
            told += f"; {len(together)} of {len(self._peers)} peers are on the same host"
        if self._latest is not None:
            told += f"; the run goes on from the copy of step {self._latest.step:,}"
        return [told]

    # --- saving

    def is_due(self, done: int) -> bool:
        """Return whether a copy is due after step ``done``."""
        return done % self.every == 0

    @property
    def goes_on_from_earlier(self) -> bool:
        """Return whether the newest copy is of an earlier start."""
        return self._latest is not None and self._latest.start != self.start

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Copy ``state`` (a `TrainState`) to the host, and return; the rest is in the background.

        Do nothing but warn where a process is still busy with the copy before.
        """
        if not self._settle():
            if not self._skipped and processes.is_first():
                logging.warning(
                    "the near copy of step %d is left out, since the last one is still being "
                    "written; raise train.near_every",
                    step,
                )
            self._skipped = True
            return
        flat = checkpoint_arrays.flatten(state)
        copy = Copy(int(step), self.start)
        self._copy_to_host(flat)
        about = {"meta": meta, "arrays": checkpoint_arrays.shapes(flat)}
        self._whole = self._whole[-1:]  # it stays until this one is whole and proven
        self._latest = copy
        same = [each for each in self._unproven if each.step == copy.step]
        self._unproven = [*same, copy]
        self._good = True
        self._writing = self._background.submit(self._write, copy, about)

    def _settle(self) -> bool:
        """Return whether every process is done with the latest copy. Then it is whole, or gone."""
        busy = not self._writing.done()
        if not busy:
            self.wait()  # raises what went wrong
        mine = np.array([busy, self._good], np.int32)
        everyone = multihost_utils.process_allgather(mine).reshape(-1, 2)
        if everyone[:, 0].any():
            return False
        if self._latest is not None and everyone[:, 1].all() and self._latest not in self._whole:
            self._whole.append(self._latest)
        return True

    def _copy_to_host(self, flat: dict[str, jax.Array]) -> None:
        parts: dict[tuple[str, Box], jax.Array] = {}
        for name, array in flat.items():
            for part in array.addressable_shards:
                parts.setdefault((name, boxes.box_of(part.index, array.shape)), part.data)
        for data in parts.values():
            # All at once; each is then waited for.
            data.copy_to_host_async()
        for shard, view in self._views():
            # Copied: the next step reuses the memory of these arrays.
            np.copyto(view, boxes.bytes_of(parts[shard.name, shard.box]))

    def _views(self) -> Iterator[tuple[Shard, np.ndarray]]:
        start = 0
        for shard in self.shards:
            yield shard, self._buffer[start : start + shard.bytes]
            start += shard.bytes

    def _write(self, copy: Copy, about: dict) -> None:
        """Make room, write the buffer, and send the peer its part. Runs in the background."""
        me = jax.process_index()
        for old in self.files.copies():
            if old not in (*self._whole, copy):
                self._remove(old)
        with self._begun:
            self._ready = copy
            self._begun.notify_all()
        try:
            parts = (memoryview(view) for _, view in self._views())
            self.files.write(copy, me, OWN, self.shards, parts, about)
            self._full = False
        except OSError as error:
            self._good = False
            if not self._full:
                wire.warn_of(
                    error,
                    f"process {me}: the near copy of step {copy.step} could not be written to "
                    f"{self.files.folder}; the run goes on with its checkpoints",
                )
            self._full = True
        if me in self._peers and self._alone_shards:
            self._send(copy, about)

    def _send(self, copy: Copy, about: dict) -> None:
        me = jax.process_index()
        chosen = [pair for pair in self._views() if pair[0] in self._alone_shards]
        header = {
            "step": copy.step,
            "start": copy.start,
            "process": me,
            "shards": [[shard.name, shard.box, shard.bytes] for shard, _ in chosen],
            "about": about,
        }
        parts = [memoryview(view) for _, view in chosen]
        peer = self._peers[me]
        try:
            answer = wire.send_copy(self._addresses[peer], self._secret, header, parts)
            error = OSError(answer["error"]) if answer.get("error") else None
        except (OSError, ValueError) as failure:
            error = OSError(str(failure))
        if error is not None:
            wire.warn_of(
                error, f"process {me}: process {peer} has no second copy of step {copy.step}"
            )

    def _take(self, request: dict, parts: Iterator[bytes]) -> dict:
        """Write what the process sends whose second copies are kept here."""
        copy = Copy(request["step"], request["start"])
        if request["process"] != self._kept_for or copy.start != self.start:
            return {"error": "it keeps the copies of another process"}
        # Its removal of old copies makes room, so that comes first.
        with self._begun:
            self._begun.wait_for(lambda: self._ready == copy, PATIENCE)
        shards = [shard_from(*each) for each in request["shards"]]
        try:
            self.files.write(copy, request["process"], PEER, shards, parts, request["about"])
        except OSError as error:
            # The sender waits until all is taken.
            for _ in parts:
                pass
            return {"error": f"{self.files.folder}: {error.strerror or error}"}
        return {}

    def _remove(self, copy: Copy) -> None:
        """Remove what this process has written of ``copy``."""
        if copy.start != self.start:
            # Of another start, perhaps with other processes: the first one of a host removes it.
            if self._is_first_here():
                shutil.rmtree(self.files.path(copy.name), ignore_errors=True)
            return
        names = [f"{jax.process_index()}.{OWN}"]
        if self._kept_for is not None:
            names.append(f"{self._kept_for}.{PEER}")
        self.files.remove_of(copy, names)

    def _is_first_here(self) -> bool:
        """Return whether no earlier process has the same folder."""
        me = jax.process_index()
        return self._groups.index(self._groups[me]) == me

    def prove(self) -> None:
        """Record that a loss of the newest copy's parameters was finite. Return at once."""
        me = jax.process_index()
        for copy in self._unproven:
            self._marks.append(self._background.submit(self.files.mark_finite, copy, me))
        self._unproven = []

    def wait(self) -> None:
        """Return once this process has written its part of the newest copy."""
        self._writing.result()
        while self._marks:
            self._marks.pop(0).result()

    def give_up(self) -> int | None:
        """Remove the newest copy if no loss of its parameters was finite; return the newest step
        left, the same in every process."""
        self.wait()
        self._settle()
        for copy in self._unproven:
            self._remove(copy)
        self._whole = [copy for copy in self._whole if copy not in self._unproven]
        self._latest = None
        self._unproven = []
        return self._whole[-1].step if self._whole else None

    def distrust(self, after: int) -> int | None:
        """Remove the copies of steps above ``after``; return the newest step left, the same in
        every process."""
        self.wait()
        self._settle()
        for copy in [*self._whole, *([self._latest] if self._latest else [])]:
            if copy.step > after:
                self._remove(copy)
        self._whole = [copy for copy in self._whole if copy.step <= after]
        self._latest = None
        self._unproven = []
        return self._whole[-1].step if self._whole else None

    # --- restoring

    def candidates(self) -> list[Candidate]:
        """Return the copies of which all shards exist, the newest first."""
        self.wait()
        agree.gather(None)  # also what peers send is written then
        self._inventory = Inventory(self.files, self._groups)
        return self._inventory.candidates

    def newest(
        self,
        candidates: list[Candidate],
        least: int,
        identity: dict,
        arrays: dict[str, str],
        refuse: Refuse,
    ) -> Candidate | None:
        """Return the newest whole one of ``candidates``, of step ``least`` or later, after the
        checks of a checkpoint (`checkpoint_folder.check_record`), whose errors it raises.

        Those that turn out damaged are removed from ``candidates``.
        """
        while candidates and candidates[0].copy.step >= least:
            found = self._inventory.checked(candidates.pop(0)) if self._inventory else None
            if found is not None:
                record = found.about | {"step": found.copy.step}
                path = epath.Path(self.files.folder)
                processes.run_on_first(
                    functools.partial(check_record, path, record, identity, arrays, refuse)
                )
                return found
        return None

    def read(self, candidate: Candidate, flat: dict[str, Any]) -> dict[str, jax.Array]:
        """Return the arrays of ``candidate`` that are among ``flat`` (abstract, by name)."""
        inventory = self._inventory
        if inventory is None:
            raise RuntimeError("`candidates` comes first")
        made = {}
        for name, leaf in flat.items():
            dtype = np.dtype(leaf.dtype).name

            def fetch(source: Source, parts: list, dtype: str = dtype) -> bytes:
                addresses = self._addresses[self._groups.index(source[0])]
                request = {"file": source[1], "parts": parts, "dtype": dtype}
                return wire.fetch(addresses, self._secret, request)[1]

            made[name] = inventory.assemble(candidate, name, leaf, fetch)
        # Nobody removes a file that another process still reads.
        agree.gather(None)
        return made

    def _give(self, request: dict) -> tuple[dict, list]:
        if self._inventory is None:
            raise ValueError("nothing is being restored")
        return self._inventory.give(request)

    def go_on_from(self, candidate: Candidate | None) -> None:
        """Remove all other copies: what comes after them will be computed again."""
        if self._inventory is not None:
            for warning in self._inventory.warnings:
                logging.warning("%s", warning)
            self.warnings += self._inventory.warnings
        self._inventory = None
        kept = candidate.copy if candidate else None
        if self._is_first_here():
            self.files.keep_only(kept)
        agree.gather(None)
        self._whole = [kept] if kept else []
        self._latest = kept
        self._good = True
        self._unproven = [kept] if candidate and kept and not candidate.finite else []

    def drop(self, newest: int) -> None:
        """Remove all copies if none is newer than step ``newest``, which is saved elsewhere."""
        self.wait()
        steps = [copy.step for copy in self._whole] + [self._latest.step if self._latest else -1]
        if max(steps) <= newest:
            agree.gather(None)  # also what peers send is written then
            self.go_on_from(None)

    def close(self) -> None:
        """Stop; the copies stay."""
        self._background.shutdown()
        if self._server is not None:
            self._server.close()
