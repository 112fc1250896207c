"""Compile MaxText's train step for a described slice, and keep its program.

    LIBTPU_INIT_ARGS="FLAGS" PYTHON benchmarks/maxtext_step.py FOLDER compile_topology=v5p-128 ...

PYTHON is that of an environment with maxtext (0.2.5 or newer) and libtpu, without this project.
FOLDER receives step.hlo, the compiled program, and step.json: mesh, places of the devices on the
torus, sizes of the model, and memory. benchmarks/calibration.py calls this.
"""

import json
import os
import sys
import time

import maxtext
from maxtext.trainers.pre_train import train_compile

SIZES = (
    "emb_dim",
    "num_decoder_layers",
    "mlp_dim",
    "num_query_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "mlp_activations",
    "logits_via_embedding",
    "max_target_length",
    "global_batch_size_to_train_on",
    "gradient_accumulation_steps",
)


def main() -> None:
    folder = sys.argv[1]
    arguments = sys.argv[2:]
    base = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
    compile_step = train_compile.jit_and_compile

    def kept(function, inputs, named, mesh, *rest):
        start = time.perf_counter()
        compiled = compile_step(function, inputs, named, mesh, *rest)
        seconds = time.perf_counter() - start
        config = next(each for each in rest if hasattr(each, "emb_dim"))
        with open(os.path.join(folder, "step.hlo"), "w", encoding="utf-8") as file:
            file.write(compiled.as_text())
        found = {
            "mesh": dict(mesh.shape),
            "coords": [list(device.coords) for device in mesh.devices.flat],
            "peak": compiled.memory_analysis().peak_memory_in_bytes,
            "compile_seconds": round(seconds, 1),
            "model": {name: getattr(config, name) for name in SIZES},
        }
        with open(os.path.join(folder, "step.json"), "w", encoding="utf-8") as file:
            json.dump(found, file, default=list)
        return compiled

    train_compile.jit_and_compile = kept
    train_compile.main(["train_compile", base, *arguments])


if __name__ == "__main__":
    main()
