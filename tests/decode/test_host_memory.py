"""The memory of a host while a model is loaded onto a mesh: its devices' parts, and little more."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mtnlg_jax.interop.families import FAMILIES, model_of
from mtnlg_jax.interop.huggingface import convert
from mtnlg_jax.interop.interchange import Interchange
from mtnlg_jax.interop.shards import write_shards

ROOT = Path(__file__).resolve().parents[2]
SHARD = 20e6
# Copies of a tensor on its way (read, turned to our layout, cut for the devices), and what the
# allocator keeps: 60 to 130 MB were measured.
SLACK = 150e6

# Prints the growth of the peak while the second model is loaded, the bytes of its parts here, and
# those of the whole model.
LOAD = """
import json, resource, sys
from mtnlg_jax.train import processes
address, count, me, devices, small, large = sys.argv[1:]
if int(count) > 1:
    processes.start(address, int(count), int(me), 100, int(devices))
else:
    processes.start(None, None, None, 100, int(devices))
import jax
from mtnlg_jax.config import MeshConfig
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.interop import registry
from mtnlg_jax.parallel.mesh import make_mesh
registry.register()
mesh = make_mesh(MeshConfig(tensor=jax.device_count()))
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_decoder(small, mesh=mesh)  # imports and compiles everything
before = peak()
params = load_decoder(large, mesh=mesh)[1].params
own = sum(
    shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards
)
print(json.dumps([peak() - before, own, sum(leaf.nbytes for leaf in jax.tree.leaves(params))]))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Return the folders of a model of one layer and of one of 600 MB."""
    import tokenizers

    root = tmp_path_factory.mktemp("models")

    def make(name: str, layers: int) -> Path:
        folder = root / name
        folder.mkdir()
        config = json.loads((ROOT / "tests/interop/families/llama3/config.json").read_text())
        config |= {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": layers,
            "head_dim": 128,
            "vocab_size": 1024,
        }
        (folder / "config.json").write_text(json.dumps(config))
        letters = {letter: index for index, letter in enumerate("_\n .,abcdefghijklmnopqrstuvwxyz")}
        fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="_"))
        fast.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        fast.save(os.fspath(folder / "tokenizer.json"))
        table = Interchange(model_of(config), FAMILIES["llama"]).table
        sizes = {key: 4 * int(np.prod(entry.shape)) for key, entry in table.items()}
        write_shards(
            folder, sizes, lambda key: np.full(table[key].shape, 0.5, np.float32), SHARD / 1e9
        )
        return folder

    made = (make("small", 1), make("large", 40))
    assert len(list(made[1].glob("*.safetensors"))) > 20
    yield made
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def checkpoint(shards):
    """Return the folders of runs with the same models."""
    runs = tuple(folder.with_name(f"{folder.name} run") for folder in shards)
    for folder, run in zip(shards, runs, strict=True):
        convert(os.fspath(folder), os.fspath(run))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("form", ["shards", "checkpoint"])
@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (2, 1)])
def test_a_host_holds_its_parts_and_one_piece(request, form, processes, devices):
    models = request.getfixturevalue(form)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.fspath(ROOT), "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", LOAD, f"localhost:{port}", str(processes), str(me)),
                *(str(devices), *map(str, models)),
            ],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for me in range(processes)
    ]
    said = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0] * processes, said
    for out, _ in said:
        grown, own, whole = json.loads(out.splitlines()[-1])
        if processes > 1:
            # A host that held all of the model would be found.
            assert own + SHARD + SLACK < whole
        assert grown < own + SHARD + SLACK, (grown / 1e6, own / 1e6)
