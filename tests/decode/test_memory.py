"""Tell that a model does not fit before anything of it is read, with what would fit."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from runs import save_run

from mtnlg_jax.config import Config, DecodeConfig, MeshConfig
from mtnlg_jax.decode import cache, slots
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.decode.load import _assemble, load_decoder
from mtnlg_jax.decode.memory import Caches, Choices, Plan, caches_of, check_fits
from mtnlg_jax.parallel import memory
from mtnlg_jax.parallel.memory import Room, host_free
from mtnlg_jax.parallel.mesh import AXES, make_mesh
from mtnlg_jax.train.arrays import Held
from mtnlg_jax.train.checkpoint import load_run

GIB = 2**30
ANY = Choices()


def held_by(tree) -> int:
    """Return the bytes of the device that holds the most."""
    sizes: dict = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            sizes[shard.device] = sizes.get(shard.device, 0) + shard.data.nbytes
    return max(sizes.values())


HELD = [{}, {"dtype": "bfloat16"}, {"weights": "int8"}]


@pytest.mark.parametrize("model", ["rotary", "learned", "balanced"])
def test_weights_are_counted_as_they_are_held(request, model):
    tiny = request.getfixturevalue(model)

    def load(dtype="float32", weights=None, mesh=None):
        return held_by(_assemble(tiny.config, dtype, weights, Held(tiny.params), mesh))

    for held in HELD:
        assert Plan(tiny.config, **held).weight_bytes == load(**held), held
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    # A mesh of devices that are not here counts the same.
    sizes = AbstractMesh(tuple(mesh.shape.values()), AXES)
    expected = load(weights="int8", mesh=mesh)
    assert Plan(tiny.config, weights="int8", mesh=mesh).weight_bytes == expected
    assert Plan(tiny.config, weights="int8", mesh=sizes).weight_bytes == expected
    assert expected < load(weights="int8")


@pytest.mark.parametrize("form", [None, "int8"])
def test_caches_are_counted_as_they_are_held(windowed, form):
    decoder = windowed.decoder._replace(int8_cache=form == "int8")
    made = slots.Slots(decoder, slots=3, limit=64, length=64).cache
    caches = (Caches(3, 64),)
    found = Plan(windowed.config, cache=form, caches=caches).cache_bytes
    assert found == held_by(made)


def test_prompts_of_beams_and_guesses_keep_all_positions(windowed):
    prefix = cache.prefill(windowed.decoder, [[5, 6]] * 2, 64)
    beams = DecodeConfig(num_beams=2, max_new_tokens=4)
    guesses = DecodeConfig(prompt_lookup_num_tokens=3, max_new_tokens=4)
    for decode, drafted in [(beams, False), (guesses, False), (DecodeConfig(), True)]:
        prompts, _ = caches_of(windowed.config, 2, 60, decode, drafted)
        found = Plan(windowed.config, caches=(prompts._replace(positions=64),)).cache_bytes
        assert found == held_by(prefix.cache)
    prompts, _ = caches_of(windowed.config, 2, 60, DecodeConfig())
    assert Plan(windowed.config, caches=(prompts,)).cache_bytes < held_by(prefix.cache)


@pytest.mark.slow
def test_caches_on_a_mesh_are_counted_as_they_are_held(rotary):
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    over = unstack(rotary.config, rotary.params, mesh=mesh)
    prefix = cache.prefill(over, [[5, 6]] * 8, 32)
    plan = Plan(rotary.config, mesh=mesh, caches=(Caches(6, 32),))  # 6 rows are padded to 8
    assert plan.cache_bytes == held_by(prefix.cache)


def test_generation_holds_the_prompts_and_their_copies(learned):
    decode = DecodeConfig(num_return_sequences=3, temperature=1.0, max_new_tokens=500)
    prompts, rows = caches_of(learned.config, 2, 20, decode)
    assert (prompts.rows, rows.rows, rows.positions) == (2, 6, 64)  # the context has 64
    assert prompts.floats and not rows.floats
    decode = dataclasses.replace(decode, num_return_sequences=1, num_beams=4, max_new_tokens=9)
    assert caches_of(learned.config, 2, 20, decode) == (
        Caches(2, 32, floats=True, whole=True),
        Caches(8, 9, floats=True, whole=True),
    )


def told(plan: Plan, free: float, choices: Choices = ANY, **room) -> str:
    with pytest.raises(ValueError, match="RUN does not fit") as raised:
        check_fits(
            "RUN", [plan], Room(int(free), **({"shared": 1} | room)), choices, "or --memory=0"
        )
    return str(raised.value)


def test_a_model_that_does_not_fit_is_told_with_what_would(rotary):
    plan = Plan(rotary.config, caches=(Caches(8, 64),))
    check_fits("RUN", [plan], Room(plan.bytes, 1), Choices(), "")
    weights = plan.weight_bytes
    text = told(plan, plan.bytes - 1)
    assert f"{weights / 1024:.2f} KiB of weights" in text and "(8 rows of 64 positions)" in text
    assert "it fits with --dtype=bfloat16 (" in text and text.endswith("; or --memory=0")
    assert "--set=mesh.tensor=2 over 2 such devices" in text
    # Where weights in bfloat16 are too large, in int8 they may not be.
    least = Plan(rotary.config, weights="int8")
    text = told(Plan(rotary.config), least.bytes)
    assert "--dtype" not in text and "it fits with --weights=int8 (" in text
    # Fewer rows, with the weights as they are.
    text = told(
        plan, weights + plan.cache_bytes / 4, Choices(False, False, False, False, ("--slots", 8))
    )
    assert "it fits with --slots=2 (" in text
    # Fewer rows, once nothing else suffices; devices that share a host are no way out.
    rows = Choices(mesh=False, rows=("--slots", 8))
    smallest = Plan(rotary.config, "bfloat16", "int8", "int8", caches=(Caches(1, 64),)).bytes
    text = told(plan, smallest, rows, of_host=True)
    assert "with --dtype=bfloat16 --weights=int8 --cache=int8 --slots=1 (" in text
    assert "a machine would hold" in text
    text = told(plan, 1000, rows, of_host=True)
    assert "even --dtype=bfloat16 --weights=int8 --cache=int8 needs" in text
    assert "take hosts with more memory" in text


def test_more_devices_that_share_memory_are_no_way_out(rotary):
    mesh = make_mesh(MeshConfig(tensor=2), jax.devices()[:2])
    plan = Plan(rotary.config, mesh=mesh)
    free = int(plan.bytes * 0.7)
    text = told(plan, free, Choices(False, False, False), of_host=True, shared=2)
    # Two hosts with twice the memory of a device hold what two devices hold.
    assert "--set=mesh.tensor=4 over 4 hosts like this one" in text, text


def test_nothing_is_read_of_a_model_that_does_not_fit(learned, tokenizer, tmp_path):
    folder = save_run(tmp_path, Config(model=learned.config), learned.params, tokenizer)
    seen = []

    def refuse(config, found):
        seen.append((config.model, found and found.vocab_size))
        raise ValueError("too large")

    # Not even a checksum is computed.
    shutil.rmtree(folder / "checkpoints/3/params")
    with pytest.raises(ValueError, match="too large"):
        load_decoder(folder, before=refuse)
    with pytest.raises(ValueError, match="too large"):
        load_run(folder, before=refuse)
    assert seen == [(learned.config, tokenizer.vocab_size)] * 2
    with pytest.raises(OSError, match="is missing"):
        load_decoder(folder)


# --- what a host has free

MEMINFO = "MemTotal: 32 kB\nMemFree: 1 kB\nMemAvailable:   4194304 kB\n"


def make_host(root, files: dict[str, str]):
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder: str, limit: str, used: int, cached: int) -> dict[str, str]:
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": str(used),
        f"{folder}/memory.stat": f"anon 5\ninactive_file {cached}\n",
    }


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 4 * GIB),
        ({"proc/self/cgroup": "0::/\n"}, 4 * GIB),
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                **group("sys/fs/cgroup/job", str(GIB), 300, 100),
            },
            GIB - 200,
        ),
        (
            {"proc/self/cgroup": "0::/a\n", **group("sys/fs/cgroup/a", "max", 3, 1)},
            4 * GIB,
        ),
        # A container, whose own group is the top one.
        (
            {"proc/self/cgroup": "0::/docker/1\n", **group("sys/fs/cgroup", str(2 * GIB), 0, 0)},
            2 * GIB,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n2:memory:/slurm\n",
                "sys/fs/cgroup/memory/slurm/memory.limit_in_bytes": str(GIB),
                "sys/fs/cgroup/memory/slurm/memory.usage_in_bytes": "1000",
                "sys/fs/cgroup/memory/slurm/memory.stat": "total_inactive_file 400\n",
            },
            GIB - 600,
        ),
    ],
)
def test_a_host_has_what_the_system_and_its_groups_leave(tmp_path, files, free):
    assert host_free(make_host(tmp_path, files)) == free


def test_a_system_that_does_not_tell_is_not_guessed(tmp_path):
    assert host_free(tmp_path) is None


def test_devices_of_a_host_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "host_free", lambda: 8 * GIB)
    assert memory.room(None) == Room(8 * GIB, 1, True)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    assert memory.room(mesh) == Room(2 * GIB, 4, True)
    # Processes of the same host, as `process_allgather` returns them.
    everyone = [[7, 8192, 2], [7, 8000, 2], [9, 4096, 1]]
    monkeypatch.setattr(memory.multihost_utils, "process_allgather", lambda mine: everyone)

    class Several:
        is_multi_process = True

    assert memory._among_processes(8 * GIB, 2, Several()) == Room(2000 * 2**20, 4, True)
    everyone = [[7, 8192, 2], [9, 2**32 - 1, 1]]
    assert memory._among_processes(None, 2, Several()) == Room(4 * GIB, 2, True)


def test_an_accelerator_tells_what_it_has(monkeypatch):
    class Device:
        def __init__(self, kind, statistics):
            self.device_kind = kind
            self.memory_stats = lambda: statistics

    used = Device("NVIDIA H100", {"bytes_limit": 60 * GIB, "bytes_in_use": GIB})
    assert memory._device_free(used) == 59 * GIB
    assert memory._device_free(Device("TPU v5 lite", None)) == 16 * GIB
    assert memory._device_free(Device("unknown", {})) is None
    used.platform = "gpu"

    class Several:
        is_multi_process = True
        local_devices = (used,)

    # The other process has less, and both decide by that.
    told = []

    def process_allgather(mine):
        told.append(int(mine))
        return np.array([mine, 20 * 1024], np.uint32)

    monkeypatch.setattr(memory.multihost_utils, "process_allgather", process_allgather)
    assert memory.room(Several()) == Room(20 * GIB, 1)
    used.memory_stats = lambda: {"bytes_limit": GIB, "bytes_in_use": 2 * GIB}
    assert memory.room(Several()) == Room(0, 1)
    assert told == [59 * 1024, 0]
