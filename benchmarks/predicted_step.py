"""Predict steps of this package and of MaxText under the same compiler, for the same shape.

    python benchmarks/predicted_step.py --maxtext=PYTHON                    every row
    python benchmarks/predicted_step.py --maxtext=PYTHON --rows=ours-data64
    python benchmarks/predicted_step.py --rows=ours-data64,mtnlg-micro5     ours alone

PYTHON is that of benchmarks/calibration.py. A row is written into
benchmarks/results/predicted_step.json as it comes, with its command. Both sides have the same
model, chips and global batch. A difference within the error of benchmarks/calibration.py is a tie.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

from calibration import V5P_SPARSECORE, Point, measure, topology_version

from mtnlg_jax.planning.tpu_costs import RULES

RESULT = Path(__file__).parent / "results" / "predicted_step.json"

# 32 billion parameters, of the shape of MaxText's 32b.sh: 384 sequences of 2,048 on 64 v5p.
LLAMA_32B = (
    "--config=configs/ladder.py:7.5b --topology=v5p:4x4x4 --set=mesh.pipe=1 --set=mesh.zero=3 "
    "--set=model.num_layers=32 --set=model.hidden_size=8192 --set=model.num_attention_heads=64 "
    "--set=model.ffn_hidden_size=28672 --set=model.vocab_size=32000 --set=model.add_bias=False "
    "--set=model.position_embedding_type=rotary --set=model.normalization=rmsnorm "
    "--set=model.activation=swiglu --set=model.tie_embeddings=False "
    "--set=train.global_batch_size=384 "
)
MTNLG = (
    "--config=configs/mtnlg_530b.py --topology=v5p:8x8x16 --set=mesh.pipe=1 --set=mesh.data=128 "
    "--set=mesh.zero=3 --set=train.rampup_batch_size=none "
)


def _llama(data: int, tensor: int, micro: int, recompute: str) -> str:
    return LLAMA_32B + (
        f"--set=mesh.data={data} --set=mesh.tensor={tensor} --set=train.micro_batch_size={micro} "
        f"--set=train.recompute={recompute}"
    )


# Gathers over planes of the torus on SparseCore. pretrain.py does not set these: they help the step
# of 32B and slow that of 530B.
PLANES = (
    "--xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=true "
    "--xla_tpu_enable_sparse_core_collective_offload_3d_all_gather=true"
)
OURS = {
    "ours-data16": _llama(16, 4, 12, "elementwise"),
    "ours-data16-none": _llama(16, 4, 12, "none"),
    "ours-data32": _llama(32, 2, 6, "elementwise"),
    "ours-data64": _llama(64, 1, 3, "elementwise"),
    "ours-data64-none": _llama(64, 1, 3, "none"),
    "mtnlg-micro1": MTNLG,
    "mtnlg-micro5": MTNLG + "--set=train.micro_batch_size=5",
    "ours-data64-planes": _llama(64, 1, 3, "elementwise"),
    "mtnlg-micro5-planes": MTNLG + "--set=train.micro_batch_size=5",
}


def _maxtext(fsdp: int, tensor: int, policy: str, planes: bool = False) -> Point:
    arguments = (
        f"per_device_batch_size=6 remat_policy={policy} global_parameter_scale=32 "
        f"ici_fsdp_parallelism={fsdp} ici_tensor_parallelism={tensor}"
    )
    flags = f"{V5P_SPARSECORE} {PLANES}" if planes else V5P_SPARSECORE
    return Point("v5p-128", "v5p:4x4x4", arguments.strip(), flags, "", 328)


MAXTEXT = {
    "maxtext-fsdp16": _maxtext(16, 4, "minimal"),  # 32b.sh
    "maxtext-fsdp64": _maxtext(64, 1, "minimal"),
    "maxtext-fsdp64-full": _maxtext(64, 1, "full"),
    "maxtext-fsdp64-qkv": _maxtext(64, 1, "save_qkv_proj"),
    "maxtext-fsdp16-full": _maxtext(16, 4, "full"),
    "maxtext-fsdp16-qkv": _maxtext(16, 4, "save_qkv_proj"),
    "maxtext-fsdp16-planes": _maxtext(16, 4, "minimal", planes=True),
    "maxtext-fsdp64-planes": _maxtext(64, 1, "minimal", planes=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--maxtext", help="Python of an environment with maxtext")
    parser.add_argument("--rows", default=",".join([*OURS, *MAXTEXT]), help="names, with commas")
    parser.add_argument("--keep", help="folder for MaxText's programs; default: none is kept")
    parser.add_argument("--output", default=str(RESULT), help=f"default {RESULT}")
    flags = parser.parse_args()
    output = Path(flags.output)
    result = json.loads(output.read_text()) if output.exists() else {"rows": {}}
    for name in flags.rows.split(","):
        row = ours(name) if name in OURS else theirs(name, flags.maxtext, flags.keep)
        row["date"] = datetime.date.today().isoformat()
        print(name, json.dumps(row), flush=True)
        result["rows"][name] = row
        output.write_text(json.dumps(result, indent=1) + "\n")


def ours(name: str) -> dict:
    """Compile a step of this package and keep what compile_ahead.py predicts."""
    beside = RESULT.with_suffix(".new")
    command = ["launch/compile_ahead.py", *OURS[name].split(), "--time", "--prove=0"]
    flags = PLANES if name.endswith("-planes") else ""
    subprocess.run(
        [sys.executable, *command, f"--json={beside}"],
        env=os.environ | {"LIBTPU_INIT_ARGS": flags},
        check=False,
    )
    said = json.loads(beside.read_text())
    beside.unlink()
    shown = " ".join(["python", *command])
    found = {
        "command": f'LIBTPU_INIT_ARGS="{flags}" {shown}' if flags else shown,
        "compiler": said["compiler"],
    }
    predicted = said["predicted"]
    if predicted is None:
        return found | {"failure": said["failure"][:300]}
    seconds = predicted["seconds"]
    return found | {
        "seconds": round(seconds, 4),
        "mfu": round(predicted["mfu"], 4),
        "hfu": round(predicted["hfu"], 4),
        "peak_bytes": said["peak"],
        "shares": {
            label: round(part / seconds, 3)
            for label, part in predicted["classes"].items()
            if part > 0.005 * seconds
        },
        "rules": predicted["rules"],
    }


def theirs(name: str, python: str | None, keep: str | None) -> dict:
    if python is None:
        raise ValueError(f"row {name} needs --maxtext=PYTHON")
    found = measure(name, MAXTEXT[name], python, keep)
    kept = ("arguments", "flags", "peak_bytes", "shares", "failure")
    found |= {"compiler": f"libtpu {topology_version()}", "rules": RULES}
    kept = (*kept, "compiler", "rules")
    return {key: found[key] for key in kept if key in found} | (
        {"seconds": found["predicted_seconds"], "mfu": found["predicted_mfu"]}
        if "predicted_seconds" in found
        else {}
    )


if __name__ == "__main__":
    main()
