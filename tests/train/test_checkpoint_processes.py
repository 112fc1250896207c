"""Save checkpoints with several processes (gloo on localhost): one writes the record, and all agree
on which to restore."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROCESS = """
    import sys
    import jax
    import numpy as np
    number, address, folder, *sys.path[:0] = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, int(number))
    from jax.experimental import multihost_utils
    from mtnlg_jax.config import Config, MeshConfig, ModelConfig
    from mtnlg_jax.parallel.mesh import make_mesh
    from mtnlg_jax.train.checkpoint import Checkpoints
    from mtnlg_jax.train.state import abstract_state

    def abstract_on(data, tensor):
        model = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=4, vocab_size=64,
                            max_position_embeddings=8)
        config = Config(model=model, mesh=MeshConfig(data=data, tensor=tensor))
        return abstract_state(config, make_mesh(config.mesh))

    def state_of(step, abstract):
        leaves, structure = jax.tree.flatten(abstract)
        def make(index, leaf):
            values = np.random.default_rng([step, index]).normal(size=leaf.shape) * 1000
            values = values.astype(leaf.dtype)
            return jax.make_array_from_callback(
                leaf.shape, leaf.sharding, lambda part: values[part])
        return jax.tree.unflatten(structure, [make(*pair) for pair in enumerate(leaves)])

    def restored(identity):
        abstract = abstract_on(2, 2)
        step, state, _ = checkpoints.restore(abstract, identity)
        saved = state_of(step, abstract)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(saved), strict=True):
            assert a.sharding == b.sharding
            for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
                np.testing.assert_array_equal(x.data, y.data)
        return step

    identity = {"tokenizer": "t1"}
    checkpoints = Checkpoints(folder)
    assert checkpoints.restore(abstract_on(4, 1), identity) is None
    for step in (1, 2, 3):
        state = state_of(step, abstract_on(4, 1))
        checkpoints.save(step, state, {"identity": identity}, metric=step)
    assert restored(identity) == 3 and not checkpoints.warnings
    multihost_utils.sync_global_devices("restored")
    if jax.process_index() == 0:
        (checkpoints.folder / "3" / "record.json").write_text("")
    assert restored(identity) == 2
    assert len(checkpoints.warnings) == 1 and "3.damaged" in checkpoints.warnings[0]
    try:
        checkpoints.restore(abstract_on(2, 2), {"tokenizer": "t2"})
    except ValueError as error:
        assert "tokenizer: t1 -> t2" in str(error)
        print("refused", flush=True)
    checkpoints.close()
"""


@pytest.mark.slow
def test_two_processes_save_and_restore_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), str(number), address, tmp_path, root],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number in (0, 1)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=180)
            assert process.returncode == 0 and "refused" in output, output
    finally:
        for process in processes:
            process.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3.damaged", "lock"]
