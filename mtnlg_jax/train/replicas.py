"""Silent corruption: compute the same rows on two data replicas and compare the bits.

A device that computes wrongly now and then, without an error, spoils a run unseen (Hochschild et
al. 2021, "Cores that don't count"; Dixit et al. 2021, arXiv 2102.11245). Replicas along ``data``
run one program, so from the same rows they compute the same bits. Every train.verify_every steps
each computes the loss of its rows, the output of the last layer, and the gradient by the
embedding's output, which has passed all layers forth and back and stays on its rows: nothing is
summed over ``data``. Then the rows move to the next replica, which computes them again with the
same compiled program. Sums of bit patterns are compared, which are exact. Of two results that
differ a third one tells which is odd. Weights that replicas hold in full are compared as well.
"""

# Shapes: B rows, S query positions, D width

import functools
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import Config
from mtnlg_jax.errors import Corrupted
from mtnlg_jax.model.params import split_params
from mtnlg_jax.parallel.collectives import axis_index, vary
from mtnlg_jax.parallel.mesh import AXES, axes_in, dims_of, spec_of, specs_of
from mtnlg_jax.parallel.pipeline import circular, to_rounds
from mtnlg_jax.train import lora, processes, quantized_base
from mtnlg_jax.train.course import Course
from mtnlg_jax.train.gradients import batch_specs, chunk_of, over_mesh
from mtnlg_jax.train.micro_batches import MicroBatches
from mtnlg_jax.train.schedule import is_due, is_masked
from mtnlg_jax.train.state import TrainState
from mtnlg_jax.train.weights import make_weights

KIND = "replicas"  # of its records in metrics.jsonl
COMPARED = ("loss", "output", "gradient", "weights")
_WEIGHTS = COMPARED.index("weights")
_HOST_BYTES = 64  # of a name, which travels as an array


def check_mesh(config: Config, mesh: Mesh) -> None:
    """Raise ValueError where train.verify_every has no replicas to compare."""
    every = config.train.verify_every
    if every and mesh.shape["data"] < 2:
        # Replicas along expert hold different experts.
        raise ValueError(
            f"train.verify_every={every} compares replicas along mesh.data, which is "
            f"{mesh.shape['data']} here; give mesh.data=2 or more, or train.verify_every=0"
        )


def make_sums(config: Config, mesh: Mesh, causal: bool) -> Callable:
    """Return (params, batch, step) -> checksums of COMPARED of every device, uint32, of shape
    (pipe, data, expert, context, tensor, len(COMPARED), 2).

    ``params`` are those of the state; of the batch as many micro-batches are used as there are
    stages. ``step`` decides dropout.
    """
    weights = make_weights(config)
    zero = config.mesh.zero
    tensor = mesh.shape["tensor"]
    rounds = config.mesh.virtual_pipe
    pipelined = mesh.shape["pipe"] > 1

    def is_held_whole(path) -> bool:
        # With ZeRO-3 and a quantized base, shards are gathered where they are used.
        apart = weights.scattered or quantized_base.used(config)
        spec = spec_of(dims_of(path), zero)
        return not (apart and any("data" in axes_in(entry) for entry in spec))

    def sums(params, batch, key):
        params, batch = vary((params, batch))
        if pipelined:
            natural = split_params(params)
            params = natural._replace(blocks=to_rounds(natural.blocks, rounds))
        params = weights.at_start(params)
        rest, blocks = params if pipelined else split_params(params)
        # Any number that is the same everywhere: a sum over data would depend on the order of rows.
        total = float(batch["weights"][0].size)
        key = jax.random.wrap_key_data(key)
        micro_batches = MicroBatches(config, causal, batch, total, key)
        # In a pipeline each stage embeds a micro-batch of its own.
        mine = jnp.minimum(axis_index("pipe"), len(micro_batches) - 1)
        x_BSD = vary(micro_batches.embed(rest, mine[None]))

        def layers(x_BSD):
            if not pipelined:
                return vary(micro_batches.layers(rest, blocks, 0, mine, x_BSD[0])[None])

            def stage(round, number, x):
                return micro_batches.layers(rest, *chunk_of(blocks, round), number, x)

            return circular(stage, x_BSD, rounds)

        y_BSD, back = jax.vjp(layers, x_BSD)
        loss, d_y_BSD = jax.value_and_grad(lambda y: micro_batches.loss(rest, mine, y[0]))(y_BSD)
        (d_x_BSD,) = back(d_y_BSD)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        whole = [leaf for path, leaf in leaves if is_held_whole(path)]
        found = jnp.stack([_sum_of(each) for each in ([loss], [y_BSD], [d_x_BSD], whole)])
        return vary(found.reshape(*(1 for _ in AXES), *found.shape))

    in_specs = (specs_of(lora.abstract_computed(config), zero, tensor), batch_specs(config.model))
    mapped = over_mesh(sums, mesh, (*in_specs, P()), P(*AXES))

    def run(params, batch, step):
        key = jax.random.key_data(jax.random.fold_in(jax.random.key(config.train.seed), step))
        return mapped(lora.computed(params, config), batch, key)

    # Every process reads all of it.
    return jax.jit(run, out_shardings=NamedSharding(mesh, P()))


def _sum_of(leaves: list[jax.Array]) -> jax.Array:
    """Return two sums modulo 2^32 of the bits of ``leaves``, uint32 (2,): plain and by position."""
    found = jnp.zeros(2, jnp.uint32)
    for leaf in leaves:
        # The sum of integers has no rounding, whatever its order.
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32).reshape(-1)
        place = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        both = jnp.stack([bits.sum(dtype=jnp.uint32), (bits * place).sum(dtype=jnp.uint32)])
        found = found * jnp.uint32(1_000_003) + both
    return found


@functools.partial(jax.jit, static_argnums=(1, 2))
def _moved(batch: dict[str, jax.Array], rows: int, count: int) -> dict[str, jax.Array]:
    """Return the first ``count`` micro-batches with B moved on by ``rows``, every token of weight
    1: a replica whose rows are unused would compare zeros."""
    moved = {name: jnp.roll(x[:count], rows, axis=1) for name, x in batch.items()}
    return moved | {"weights": jnp.ones_like(moved["weights"])}


def sums_after(
    sums: Callable, state: TrainState, batch: dict[str, jax.Array], mesh: Mesh, turn: int
) -> np.ndarray:
    """Return the checksums of `make_sums` on the host, with the rows moved on by ``turn``
    replicas."""
    rows = batch["tokens"].shape[1] // mesh.shape["data"]
    moved = _moved(batch, turn * rows, mesh.shape["pipe"])
    # The layout of the step's own batch: every turn runs one compiled program.
    moved = {name: jax.device_put(x, batch[name].sharding) for name, x in moved.items()}
    return np.asarray(jax.device_get(sums(state.params, moved, state.step)))


def odd_ones(passes: list[np.ndarray]) -> tuple[list[int], bool, list[str]]:
    """Return (replicas that may be wrong, whether they surely are, what differs).

    ``passes[s]`` are the checksums of `make_sums` after the rows moved on by s replicas: two
    passes tell whether all is well, three which replica is odd.
    """
    by_replica = [np.moveaxis(each, 1, 0) for each in passes]
    count = len(by_replica[0])
    rows_alone = [name for name in COMPARED if name != "weights"]

    def result(rows: int, turn: int, names=tuple(range(_WEIGHTS))) -> bytes:
        return by_replica[turn][(rows + turn) % count][..., names, :].tobytes()

    differing = [rows for rows in range(count) if result(rows, 0) != result(rows, 1)]
    what = [
        name
        for number, name in enumerate(rows_alone)
        if any(result(rows, 0, (number,)) != result(rows, 1, (number,)) for rows in differing)
    ]
    odd: set[int] = set()
    doubtful: set[int] = set()
    for rows in differing:
        first = result(rows, 0)
        second = result(rows, 1)
        third = result(rows, 2) if len(passes) > 2 else b""
        if third == second:
            odd.add(rows)
        elif third == first and count > 2:
            odd.add((rows + 1) % count)
        elif count == 2 and third and third != first:
            odd.add(rows)  # it computed these rows twice, with two results
        else:
            doubtful |= {rows, (rows + 1) % count}
    held = [by_replica[0][replica][..., _WEIGHTS, :].tobytes() for replica in range(count)]
    (usual, votes), *others = Counter(held).most_common()
    if others:
        what.append("weights")
        if votes > others[0][1]:
            odd |= {replica for replica, each in enumerate(held) if each != usual}
        else:
            doubtful |= set(range(count))
    return sorted(odd or doubtful), bool(odd), what


class ReplicaCheck:
    """Compare the replicas of a run after a step; see `__call__`."""

    def __init__(self, course: Course, mesh: Mesh) -> None:
        self._course = course
        self._mesh = mesh
        config = course.config
        self._sums = functools.cache(functools.partial(make_sums, config, mesh))
        self._hosts = _hosts() if config.train.verify_every else []

    def __call__(self, state: TrainState, batch: dict[str, jax.Array]) -> None:
        """Compare where it is due after the step that made ``state`` from ``batch``: every
        train.verify_every steps, and before each regular checkpoint.

        Raise Corrupted, in every process, where replicas computed different bits.
        """
        course = self._course
        train = course.config.train
        done = course.done + 1
        due = is_due(train, train.verify_every, done) or is_due(train, train.save_every, done)
        if not train.verify_every or not due:
            return
        course.report()  # the previous step
        course.watchdog.enter("comparison of replicas")
        start = time.perf_counter()
        sums = self._sums(not is_masked(train, course.done))
        run = functools.partial(sums_after, sums, state, batch, self._mesh)
        passes = [run(0), run(1)]
        odd, sure, what = odd_ones(passes)
        if odd:
            odd, sure, what = odd_ones([*passes, run(2)])
        record: dict[str, Any] = {"kind": KIND, "step": done, "count": self._mesh.shape["data"]}
        record |= {"odd": odd, "differing": what}
        course.log.write(record | {"seconds": round(time.perf_counter() - start, 3)})
        course.reporter.meter.restart()  # its time does not count as a step's
        if odd:
            raise Corrupted(self._message(done, odd, sure, what))

    def _message(self, done: int, odd: list[int], sure: bool, what: list[str]) -> str:
        course = self._course
        checked = processes.run_on_first(lambda: self._last_clean(done))
        left = course.checkpoints.distrust(checked)
        count = self._mesh.shape["data"]
        names = " and ".join(map(str, odd))
        places = "; ".join(self._place(replica) for replica in odd)
        if sure and len(odd) == 1:
            found = (
                f"replica {names} of {count} along mesh.data computed other bits than the others"
            )
        elif sure:
            found = (
                f"replicas {names} of {count} along mesh.data computed other bits than the others"
            )
        else:
            found = (
                f"replicas {names} of {count} along mesh.data computed different bits, and it is "
                "not certain which of them is wrong"
            )
        if left is None:
            resume = "no checkpoint is from before that, and the run begins anew"
        else:
            resume = f"the run resumes from checkpoint {left}"
        clean = f"all was well after step {checked}" if checked else "no step before was compared"
        return (
            f"after step {done} {found} from the same rows ({', '.join(what)}): {places}. This is "
            "silent corruption: keep that machine out and start again. The last comparison: "
            f"{clean}, so {resume}; later checkpoints are renamed to checkpoints/N.suspect"
        )

    def _last_clean(self, done: int) -> int:
        """Return the last step after which replicas agreed, also of earlier starts; 0 for none."""
        records = self._course.log.records
        clean = [each["step"] for each in records if each["kind"] == KIND and not each["odd"]]
        return max((step for step in clean if step < done), default=0)

    def _place(self, replica: int) -> str:
        """Return the devices of a replica by process and host."""
        by_process: dict[int, list[int]] = {}
        for device in self._mesh.devices[:, replica].flat:
            by_process.setdefault(device.process_index, []).append(device.id)
        return f"replica {replica}: " + ", ".join(
            f"devices {', '.join(map(str, sorted(ids)))} of process {process} on host "
            f"{self._hosts[process]}"
            for process, ids in sorted(by_process.items())
        )


def _hosts() -> list[str]:
    """Return the name of each process's machine."""
    name = socket.gethostname()
    if not processes.several():
        return [name]
    # Text cannot be gathered, bytes can.
    mine = np.frombuffer(name.encode()[:_HOST_BYTES].ljust(_HOST_BYTES), np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(mine), np.uint8)
    return [row.tobytes().decode(errors="replace").strip() for row in everyone]
