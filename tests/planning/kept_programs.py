"""Train steps compiled for TPUs, whose programs are kept in tests/planning/programs.

    python tests/planning/kept_programs.py        makes them again

Parts of a text that the simulation does not read are left out, such as the code of kernels. The
seconds of each are kept beside it, without cycles of kernels that are compiled alone.
"""

import gzip
import json
import re
import tempfile
from pathlib import Path

from mtnlg_jax.config import load_config
from mtnlg_jax.planning import aot, prediction, topology
from mtnlg_jax.planning.hlo import Program
from mtnlg_jax.planning.source_lines import SourceLines
from mtnlg_jax.planning.timeline import Timeline
from mtnlg_jax.planning.tpu_costs import TpuCosts

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
    r'"(?:body|flag_configs|scoped_memory_configs|used_scoped_memory_configs|indices_config'
    r"|aliasing_operands|barrier_config|retry_config|kernel_window_bounds|output_window_bounds"
    r"|input_window_bounds|iteration_bounds|scratchpad_allocation_size|cost_model_type"
    r"|ml_estimated_microseconds|is_mask|pad_output_on_minor_dim|pad_input_on_minor_dim"
    r'|estimated_vmem_bytes|estimated_bundle_count|estimated_scoped_vmem_bytes|buffering_level)":'
    r'(?:"[^"]*"|\[[^\[\]]*\]|\{[^{}]*\}|\w+),?'
)


def simulated(name: str) -> tuple[Timeline, TpuCosts, dict]:
    """Simulate a kept program; the last result is what stands beside it."""
    said = json.loads((FOLDER / f"{name}.json").read_text())
    text = gzip.decompress((FOLDER / f"{name}.hlo.gz").read_bytes()).decode()
    described = topology.parse(said["topology"])
    chip = prediction.chip_of(described)
    costs = TpuCosts(chip, prediction.torus_between(described, said["places"], chip))
    return (
        Timeline(Program(text), said["mesh"], costs, trips_of(said), SourceLines(text)),
        costs,
        said,
    )


def trips_of(said: dict):
    """Return the trips of loops that know theirs at run time."""
    return lambda depth: said["micro_batches"] if depth == 0 else 1


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
            "places": found.places,
        }
        beside = FOLDER / f"{name}.json"
        beside.write_text(json.dumps(said) + "\n")
        said["seconds"] = simulated(name)[0].step.seconds
        beside.write_text(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
