"""Hold predicted steps against published ones: MaxText's own program, its authors' figures.

    python benchmarks/calibration.py --maxtext=PYTHON                 all points
    python benchmarks/calibration.py --maxtext=PYTHON --points=v5p-64b,v5e-32b

PYTHON is the interpreter of an environment with maxtext (0.2.5 or newer). Each point compiles
MaxText's train step for the described slice with its scripts' arguments and flags, simulates the
program (mtnlg_jax/planning/timeline.py), and writes predicted / published into
benchmarks/results/calibration.json as it comes. A point that does not compile is written with the
compiler's words. "seen" marks the points that were known while the rules were made; the others are
blind. No constant is fitted.

Published figures count model FLOPs as 6 N and attention in full, as here (PaLM's count).
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mtnlg_jax.hardware import CHIPS
from mtnlg_jax.planning import hlo_cost, prediction, topology, tpu_costs
from mtnlg_jax.planning.hlo import Instruction, Program, dims_of
from mtnlg_jax.planning.source_lines import SourceLines
from mtnlg_jax.planning.span import largest_first
from mtnlg_jax.planning.timeline import Timeline

RESULT = Path(__file__).parent / "results" / "calibration.json"
CHILD = Path(__file__).parent / "maxtext_step.py"
SECONDS = 2400  # limit of one compilation

_ASYNC = (
    "--xla_enable_async_collective_permute=true --xla_enable_async_all_gather=true "
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true "
    "--xla_tpu_data_parallel_opt_different_sized_ops=true"
)
# The scripts ask for fused gathers, which today's compiler refuses on v5p; only 32b.sh takes that
# back itself.
_V5P = (
    f"{_ASYNC} --xla_tpu_megacore_fusion_allow_ags=false "
    "--xla_tpu_enable_ag_backward_pipelining=true --xla_tpu_enable_async_collective_fusion=true "
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true "
    "--xla_tpu_overlap_compute_collective_tc=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=false"
)
# Only the script of 32B has these.
_SPARSECORE = (
    "--xla_sc_disable_megacore_partitioning=true --xla_tpu_use_tc_device_shape_on_sc=true "
    "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true"
)
V5P_SPARSECORE = f"{_V5P} {_SPARSECORE}"
V5E = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true "
    "--xla_tpu_data_parallel_opt_different_sized_ops=true "
    "--xla_tpu_enable_async_collective_fusion=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true "
    "--xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true"
)
_COMMON = (
    "compile_topology_num_slices=1 steps=15 enable_checkpointing=false "
    "use_iota_embed=true reuse_example_batch=1 dataset_type=synthetic attention=flash "
    "run_name=calibration base_output_directory=unused"
)
V6E = (
    "--xla_tpu_scoped_vmem_limit_kib=98304 "
    "--xla_tpu_use_minor_sharding_for_major_trivial_input=true "
    "--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1 "
    "--xla_tpu_assign_all_reduce_scatter_layout=true "
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true "
    "--xla_tpu_data_parallel_opt_different_sized_ops=true "
    "--xla_tpu_enable_async_collective_fusion=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=false "
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true "
    "--xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true "
    "--xla_tpu_enable_all_experimental_scheduler_features=true "
    "--xla_tpu_enable_scheduler_memory_pressure_tracking=true "
    "--xla_tpu_host_transfer_overlap_limit=24 "
    "--xla_tpu_aggressive_opt_barrier_removal=ENABLED "
    "--xla_lhs_prioritize_async_depth_over_stall=ENABLED "
    "--xla_tpu_enable_ag_backward_pipelining=true "
    "--xla_should_allow_loop_variant_parameter_in_chain=ENABLED "
    "--xla_should_add_loop_invariant_op_in_chain=ENABLED "
    "--xla_max_concurrent_host_send_recv=100 "
    "--xla_tpu_scheduler_percent_shared_memory_limit=100 --xla_latency_hiding_scheduler_rerun=2"
)
_BLOCKS = " ".join(
    f"sa_block_{part}=2048"
    for part in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
)
# Of the stored configuration of that name; the batch behind the published figure is not stated.
_LLAMA_70B = (
    "model_name=llama3.1-70b per_device_batch_size=4 remat_policy=custom "
    "decoder_layer_input=offload query_proj=offload key_proj=offload value_proj=offload "
    f"{_BLOCKS} sa_use_fused_bwd_kernel=true"
)
_README_V5P = "MaxText, configs/v5p/README.md"
_README_V5E = "MaxText, configs/v5e/README.md"


@dataclass(frozen=True)
class Point:
    """A published step. ``tflops``: model TFLOP/s of a chip; ``tokens``: tokens/s of a chip."""

    slice: str  # MaxText's name: chips x cores
    described: str
    arguments: str
    flags: str
    source: str
    tflops: float = 0.0
    tokens: float = 0.0
    seen: bool = False
    length: int = 2048  # tokens of a sequence


def _v5p(
    size: int,
    slices: str,
    described: str,
    batch: int,
    tensor: int,
    tflops: float,
    sparsecore: bool = False,
    seen: bool = False,
) -> Point:
    arguments = (
        f"per_device_batch_size={batch} remat_policy=minimal global_parameter_scale={size} "
        f"ici_fsdp_parallelism=-1 ici_tensor_parallelism={tensor}"
    )
    flags = V5P_SPARSECORE if sparsecore else _V5P
    return Point(slices, described, arguments, flags, _README_V5P, tflops, seen=seen)


def _v5e(
    size: int, batch: int, tflops: float, rest: str = "remat_policy=full", seen: bool = False
) -> Point:
    arguments = f"per_device_batch_size={batch} {rest} global_parameter_scale={size}"
    return Point("v5e-256", "v5e:16x16", arguments, V5E, _README_V5E, tflops, seen=seen)


POINTS = {
    "v5p-32b": _v5p(32, "v5p-128", "v5p:4x4x4", 6, 4, 328, sparsecore=True, seen=True),
    "v5e-16b": _v5e(16, 6, 120, seen=True),
    "v5p-64b": _v5p(64, "v5p-128", "v5p:4x4x4", 3, 4, 323),
    "v5p-64b-sparsecore": _v5p(64, "v5p-128", "v5p:4x4x4", 3, 4, 323, sparsecore=True),
    "v5p-128b": _v5p(128, "v5p-256", "v5p:4x4x8", 1, 8, 315),
    "v5p-128b-sparsecore": _v5p(128, "v5p-256", "v5p:4x4x8", 1, 8, 315, sparsecore=True),
    "v5p-128b-512": _v5p(128, "v5p-512", "v5p:4x8x8", 1, 8, 316),
    "v5p-256b": _v5p(256, "v5p-1024", "v5p:8x8x8", 1, 8, 308),
    "v5p-70b": Point(
        "v5p-1024",
        "v5p:8x8x8",
        "per_device_batch_size=4 model_name=llama2-70b remat_policy=save_dot_except_mlpwi",
        _V5P,
        "MaxText, docs/reference/models/tiering.md; arguments of configs/tpu/v5p/llama2_70b.sh",
        tokens=692,
        length=4096,
    ),
    "v5e-32b": _v5e(32, 4, 132),
    "v5e-64b": _v5e(64, 1, 118),
    "v5e-128b": _v5e(
        128,
        1,
        110,
        "remat_policy=qkv_proj_offloaded ici_fsdp_parallelism=16 ici_tensor_parallelism=16 "
        "fused_qkv=True fused_mlp=True",
    ),
    "v6e-70b": Point(
        "v6e-256",
        "v6e:16x16",
        _LLAMA_70B,
        V6E,
        "MaxText, docs/reference/models/tiering.md",
        tokens=960,
        length=8192,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--maxtext", required=True, help="Python of an environment with maxtext")
    parser.add_argument("--points", default=",".join(POINTS), help="names, with commas")
    parser.add_argument("--keep", help="folder for the programs; default: none is kept")
    parser.add_argument("--output", default=str(RESULT), help=f"default {RESULT}")
    flags = parser.parse_args()
    names = flags.points.split(",")
    unknown = [name for name in names if name not in POINTS]
    if unknown:
        parser.error(f"--points={unknown[0]} is not a point; choose from {', '.join(POINTS)}")
    output = Path(flags.output)
    result = json.loads(output.read_text()) if output.exists() else {"points": {}}
    for name in names:
        found = measure(name, POINTS[name], flags.maxtext, flags.keep)
        print(name, json.dumps(found), flush=True)
        result["points"][name] = found
        result |= {
            "command": "python benchmarks/calibration.py --maxtext=PYTHON",
            "rules": tpu_costs.RULES,
            "libtpu": topology_version(),
            "maxtext": version_in(flags.maxtext),
        }
        output.write_text(json.dumps(result, indent=1) + "\n")


def topology_version() -> str:
    path = [os.fspath(topology.APART)]
    found = next(iter(importlib.metadata.distributions(name="libtpu", path=path)), None)
    return found.version if found else importlib.metadata.version("libtpu")


def version_in(python: str) -> str:
    ask = "import importlib.metadata as m; print(m.version('maxtext'))"
    return subprocess.run([python, "-c", ask], capture_output=True, text=True).stdout.strip()


def measure(name: str, point: Point, python: str, keep: str | None) -> dict:
    """Compile and simulate a point."""
    found = {
        "date": datetime.date.today().isoformat(),
        "topology": point.described,
        "arguments": point.arguments,
        "flags": point.flags,
        "published": f"{point.tflops or point.tokens} {'TFLOP' if point.tflops else 'tokens'}/s",
        "source": point.source,
        "seen": point.seen,
    }
    described = topology.parse(point.described)
    environment = topology.environment(described)
    environment["LIBTPU_INIT_ARGS"] = point.flags
    environment["PYTHONPATH"] = os.fspath(topology.APART)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(keep, name) if keep else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        fresh = not (folder / "step.json").exists()
        if fresh:
            argv = [python, os.fspath(CHILD), os.fspath(folder)]
            argv += [f"compile_topology={point.slice}", f"max_target_length={point.length}"]
            argv += [*_COMMON.split(), *point.arguments.split()]
            try:
                done = subprocess.run(
                    argv,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    env=environment,
                    timeout=SECONDS,
                )
            except subprocess.TimeoutExpired:
                return found | {"failure": f"more than {SECONDS} s to compile"}
            if not (folder / "step.json").exists():
                return found | {"failure": _reason(done.stderr)}
            found["seconds_to_compile"] = round(time.perf_counter() - start, 1)
        said = json.loads((folder / "step.json").read_text())
        text = (folder / "step.hlo").read_text()
    return found | simulate(described, said, text, point)


def _reason(said: str) -> str:
    """Return the line of a failed compilation that says why."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = ("Ran out of memory", "RESOURCE_EXHAUSTED", "Used ", "Error:")
    found = next((line for mark in telling for line in lines if mark in line), None)
    return (found or "".join(lines[-1:]))[:300]


def simulate(described: topology.Topology, said: dict, text: str, point: Point) -> dict:
    chip = CHIPS[described.kind]
    torus = prediction.torus_between(described, said["coords"], chip)
    costs = SplashCosts(chip, torus)
    timeline = Timeline(Program(text), said["mesh"], costs, sources=SourceLines(text))
    step = timeline.step
    flops = model_flops(said["model"]) / described.chips
    tflops = flops / step.seconds / 1e12
    tokens = said["model"]["global_batch_size_to_train_on"] * point.length / described.chips
    published = tokens / point.tokens if point.tokens else flops / point.tflops / 1e12
    return {
        "peak_bytes": said["peak"],
        "predicted_seconds": round(step.seconds, 4),
        "published_seconds": round(published, 4),
        "predicted_tflops": round(tflops, 1),
        "predicted_mfu": round(tflops * 1e12 / chip.flops, 4),
        "ratio": round(published / step.seconds, 3),
        "shares": {
            label: round(seconds / step.seconds, 3)
            for label, seconds in largest_first(step.classes).items()
            if seconds > 0.001 * step.seconds
        },
        "guessed_loops": len(timeline.guessed_loops),
        "unknown": sorted(costs.unknown),
    }


def model_flops(model: dict) -> float:
    """Return the FLOPs of a step of the whole batch, 6 N + 12 L H Q T a token."""
    width = model["emb_dim"]
    heads = model["head_dim"] * (2 * model["num_query_heads"] + 2 * model["num_kv_heads"])
    matrices = len(model["mlp_activations"]) + 1
    layer = width * heads + matrices * width * model["mlp_dim"]
    weights = model["num_decoder_layers"] * layer + model["vocab_size"] * width
    length = model["max_target_length"]
    attention = model["num_decoder_layers"] * model["num_query_heads"] * model["head_dim"] * length
    tokens = model["global_batch_size_to_train_on"] * length
    return tokens * (6 * weights + 12 * attention)


class SplashCosts(tpu_costs.TpuCosts):
    """Costs of a program with splash attention, whose kernels do not tell their FLOPs.

    Its tables of blocks are known only at run time, so the compiler's estimate of a kernel leaves
    most of it out. Its FLOPs, halved for causality, count at KERNEL_SHARE of the peak.
    """

    def compute(
        self, program: Program, computation: str, instruction: Instruction, flops: float
    ) -> float:
        if instruction.opcode == "custom-call" and hlo_cost.kernel_of(instruction) and not flops:
            return _splash_flops(program, computation, instruction) / (
                tpu_costs.KERNEL_SHARE * self.chip.flops
            )
        return super().compute(program, computation, instruction, flops)


def _splash_flops(program: Program, computation: str, instruction: Instruction) -> float:
    """Return the FLOPs of a kernel over (rows, heads, positions, width), or without rows.

    Keys may have fewer heads than queries, and more positions where the context is split; a query
    sees half of them in the mean. A kernel has 2 products forward and 5 backward; two backward
    kernels share 7, as both form the scores.
    """
    # Not the results: a fused backward kernel gives one array of gradients for each block of keys.
    arrays = program.operand_arrays(computation, instruction)
    wide = [dims for dims in map(dims_of, arrays) if len(dims) >= 3]
    if not wide or "splash" not in instruction.name:
        return 0.0
    width = max(wide, key=_product)[-1]
    alike = [dims for dims in wide if dims[-1] == width]
    heads = max(_product(dims[:-2]) for dims in alike)
    lengths = [dims[-2] for dims in alike]
    pairs = min(lengths) * max(lengths)
    apart = any(
        "_dq" in each.name
        for instructions in program.computations.values()
        for each in instructions
        if each.opcode == "custom-call"
    )
    name = instruction.name
    products = 2 if "fwd" in name else 3 if "_dq" in name else 4 if apart else 5
    return products * 2 * heads * width * pairs / 2


def _product(dims: tuple[int, ...]) -> int:
    total = 1
    for size in dims:
        total *= size
    return total


if __name__ == "__main__":
    main()
