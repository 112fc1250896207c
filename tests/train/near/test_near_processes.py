"""The near tier of two processes, as if on two hosts: second copies, a lost host, other meshes."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from near_states import check_equal, state_of

from mtnlg_jax import command
from mtnlg_jax.config import Config, MeshConfig, ModelConfig
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train.near.opening import restore_near
from mtnlg_jax.train.near.tier import NearTier
from mtnlg_jax.train.state import abstract_state

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PATIENCE = 120

PROCESS = """
    import logging, os, shutil, sys
    from pathlib import Path
    from near_states import check_equal, state_of
    from mtnlg_jax.config import Config, MeshConfig, ModelConfig
    from mtnlg_jax.parallel.mesh import make_mesh
    from mtnlg_jax.train import processes
    from mtnlg_jax.train.near import wire
    from mtnlg_jax.train.near.agree import gather
    from mtnlg_jax.train.near.opening import restore_near
    from mtnlg_jax.train.near.tier import NearTier
    from mtnlg_jax.train.state import abstract_state

    me, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    processes.start(f"localhost:{port}", 2, me, 10, local_devices=4)

    def opened(data, tensor):
        model = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=4, vocab_size=64,
                            max_position_embeddings=8)
        config = Config(model=model, mesh=MeshConfig(data=data, tensor=tensor))
        mesh = make_mesh(config.mesh)
        abstract = abstract_state(config, mesh)
        return NearTier(folder, 2, "run", mesh, abstract), abstract

    def restored(near, abstract):
        candidates = near.candidates()
        arrays = candidates[0].about["arrays"] if candidates else {}
        found = near.newest(candidates, 0, {"t": {}}, arrays, lambda *_: None)
        return found.copy.step, restore_near(near, found, abstract)[0]

    near, abstract = opened(8, 1)
    assert "for its peer" in near.lines()[0]
    for step in (2, 4):
        near.wait()
        gather(None)  # a copy is left out where a process is still busy
        near.save(step, state_of(step, abstract), {"identity": {"t": {}}})
        near.prove()
    near.wait()
    gather(None)
    # Somebody who does not know the secret of this start gets and leaves nothing.
    try:
        wire.fetch(near._addresses[1 - me], "guess", {"file": "x", "parts": [], "dtype": "int8"})
        raise SystemExit("a stranger was answered")
    except (OSError, ValueError):
        pass
    near.close()

    # Host 1 is lost with all that it had: its shards come from host 0, on another mesh.
    if me == 1:
        shutil.rmtree(near.files.folder)
    gather(None)
    near, abstract = opened(4, 2)
    step, state = restored(near, abstract)
    assert step == 4, step
    check_equal(state, state_of(4, abstract))

    # A file on host 0 is cut short: the newest copy is not whole any more, and host 1 has nothing.
    near.wait()
    gather(None)
    near.save(6, state_of(6, abstract), {"identity": {"t": {}}})
    near.wait()
    gather(None)
    if me == 1:
        shutil.rmtree(near.files.folder)
    else:
        [path] = Path(folder).rglob("6-*/0.own.data")
        os.truncate(path, 100)
    gather(None)
    step, state = restored(near, abstract)
    assert step == 4, step
    assert [("6-" in line, "instead of" in line) for line in near.warnings] == [(True, True)] * (
        1 - me
    ), near.warnings
    check_equal(state, state_of(4, abstract))
    gather(None)
    near.close()
    print("done", flush=True)
"""


# Two processes of a host are the replicas of a stage.
STAGES = """
    import shutil, sys
    from near_states import check_equal, state_of
    from mtnlg_jax.config import Config, MeshConfig, ModelConfig
    from mtnlg_jax.parallel.mesh import make_mesh
    from mtnlg_jax.train import processes
    from mtnlg_jax.train.near.agree import gather
    from mtnlg_jax.train.near.opening import restore_near
    from mtnlg_jax.train.near.tier import NearTier
    from mtnlg_jax.train.state import abstract_state

    me, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    processes.start(f"localhost:{port}", 4, me, 10, local_devices=1)
    model = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=4, vocab_size=64,
                        max_position_embeddings=8)
    config = Config(model=model, mesh=MeshConfig(pipe=2, data=2))
    mesh = make_mesh(config.mesh)
    abstract = abstract_state(config, mesh)
    for lost in (False, True):
        near = NearTier(folder, 2, "run", mesh, abstract)
        assert near._peers == {0: 2, 1: 3, 2: 0, 3: 1}
        assert "for its peer" in near.lines()[0] and "the same host" not in near.lines()[0]
        if not lost:
            near.wait()
            gather(None)
            near.save(2, state_of(2, abstract), {"identity": {"t": {}}})
            near.wait()
            gather(None)
            near.close()
            if me == 3:
                shutil.rmtree(near.files.folder)
            gather(None)
    candidates = near.candidates()
    arrays = candidates[0].about["arrays"]
    found = near.newest(candidates, 0, {"t": {}}, arrays, lambda *_: None)
    check_equal(restore_near(near, found, abstract)[0], state_of(2, abstract))
    near.close()
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the near folder that two processes with four devices each have left: of the copy of
    step 4 only what host 0 has."""
    folder = tmp_path_factory.mktemp("near")
    run_on_hosts(PROCESS, [0, 1], folder)
    return folder


def run_on_hosts(program: str, hosts: list[int], folder: Path) -> None:
    """Run ``program`` in a process for each of ``hosts``, to its end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), str(me), str(port), folder],
            env=os.environ
            | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{HERE.parent}"}
            | {command.HOST: str(host)}
            | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for me, host in enumerate(hosts)
    ]
    try:
        for process in started:
            output, _ = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0 and "done" in output, output
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
def test_a_lost_host_of_whole_replicas_is_restored_from_the_other_stage_s_host(tmp_path):
    run_on_hosts(STAGES, [0, 0, 1, 1], tmp_path)


@pytest.mark.slow
def test_one_process_restores_what_a_host_has_left_of_two(folder, monkeypatch):
    """`folder` also checks what the two processes do."""
    monkeypatch.setenv(command.HOST, "0")
    model = ModelConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=8,
    )
    config = Config(model=model, mesh=MeshConfig(data=2, tensor=2))
    mesh = make_mesh(config.mesh, jax.devices()[:4])
    abstract = abstract_state(config, mesh)
    near = NearTier(str(folder), 2, "run", mesh, abstract)
    candidates = near.candidates()
    arrays = candidates[0].about["arrays"]
    found = near.newest(candidates, 0, {"t": {}}, arrays, lambda *_: None)
    state, lacking = restore_near(near, found, abstract)
    assert found.copy.step == 4 and not lacking
    check_equal(state, state_of(4, abstract))
    # Its next copy takes the place of all files of the other start.
    for step in (6, 8):
        near.wait()
        near.save(step, state, {})
        near.wait()
    names = {path.name for path in folder.rglob("*.data")}
    near.close()
    assert names == {"0.own.data"}
    assert np.all([path.stat().st_size for path in folder.rglob("*.data")])
