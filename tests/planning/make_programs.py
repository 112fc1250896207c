"""Make tests/planning/programs again: train steps compiled for TPUs, which the tests simulate.

    python tests/planning/make_programs.py

Parts of the text that the simulation does not read are left out, such as the code of kernels.
"""

import gzip
import json
import re
import tempfile
from pathlib import Path

from mtnlg_jax.config import load_config
from mtnlg_jax.planning import aot, topology

FOLDER = Path(__file__).parent / "programs"
STEPS = {
    "v5e": ("v5e:4x4", ["mesh.data=16"]),
    "v5p": ("v5p:2x2x4", ["mesh.data=8", "mesh.tensor=2"]),
    "v6e": ("v6e:4x4", ["mesh.data=8", "mesh.tensor=2"]),
}
SETTINGS = [
    "mesh.pipe=1",
    "mesh.zero=3",
    "model.num_layers=2",
    "train.global_batch_size=64",
    "train.micro_batch_size=2",
    "train.recompute=full",
]
_UNREAD = re.compile(
    r'"(?:body|flag_configs|scoped_memory_configs|used_scoped_memory_configs|window_config'
    r'|indices_config|aliasing_operands|barrier_config|retry_config)":'
    r'(?:"[^"]*"|\[[^\[\]]*\]|\{[^{}]*\}),?'
)


def main() -> None:
    for name, (described, mesh) in STEPS.items():
        config = load_config("configs/ladder.py:1.7b", [*SETTINGS, *mesh])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "step.hlo")
            found = aot.measure(
                config, topology.parse(described), text=str(path), predict=True, flags=True
            )
            text = path.read_text()
        short = _UNREAD.sub("", text)
        (FOLDER / f"{name}.hlo.gz").write_bytes(gzip.compress(short.encode(), 9, mtime=0))
        said = {
            "topology": found.topology,
            "compiler": found.compiler,
            "mesh": found.mesh,
            "micro_batches": found.micro_batches,
            "coords": found.places,
        }
        (FOLDER / f"{name}.json").write_text(json.dumps(said) + "\n")
        print(name, len(text), (FOLDER / f"{name}.hlo.gz").stat().st_size, found.predicted)


if __name__ == "__main__":
    main()
