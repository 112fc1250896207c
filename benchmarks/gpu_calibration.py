"""Hold predicted steps on GPUs against published ones: our own program, others' figures.

    python benchmarks/gpu_calibration.py                              all points
    python benchmarks/gpu_calibration.py --points=maxtext-7b,mpt-7b
    python benchmarks/gpu_calibration.py --again=FOLDER               kept programs, not compiled
    python benchmarks/gpu_calibration.py --table                      the table of the docs

Each point compiles this package's train step for the described GPUs, with the sizes, the batch and
the layout of the published step or the nearest that this package has, and writes
predicted / published speed into benchmarks/results/gpu_calibration.json as it comes. The published
programs cannot be compiled here. So a ratio holds the error of the predictor and the difference of
the programs. No constant is fitted.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mtnlg_jax.config import Config, load_config
from mtnlg_jax.planning import topology

RESULT = Path(__file__).parent / "results" / "gpu_calibration.json"
BASE = "configs/ladder.py:1.7b"  # every size of it is set
SECONDS = 3000  # limit of one compilation

_MEGATRON = "Narayanan 2021, arXiv 2104.04473, table 1; micro-batch of Megatron-LM, sc21 scripts"
_MAXTEXT = "JAX-Toolbox, rosetta/projects/maxtext/README.md of 24.04"
_RECIPES = "NVIDIA dgxc-benchmarking"
_MPT = "MosaicML llm-foundry, scripts/train/benchmarking/README.md, H100 80GB BF16"
_TITAN = "PyTorch torchtitan, docs/performance.md of 2024, 64 A100"


@dataclass(frozen=True)
class Point:
    """A published step. One of ``seconds``, ``tokens`` and ``tflops`` is stated.

    ``differs`` names what our step has otherwise, beside the program itself.
    """

    described: str
    settings: dict[str, object]
    source: str
    seconds: float = 0.0
    tokens: float = 0.0  # a second and GPU
    # TFLOP/s of a GPU by the formula of Narayanan 2021, which counts the recomputed forward pass.
    tflops: float = 0.0
    differs: str = ""


def _model(
    layers: int, width: int, heads: int, vocabulary: int, length: int, **rest: object
) -> dict[str, object]:
    return {
        "model.num_layers": layers,
        "model.hidden_size": width,
        "model.num_attention_heads": heads,
        "model.vocab_size": vocabulary,
        "model.max_position_embeddings": length,
        **{f"model.{name}": value for name, value in rest.items()},
    }


def _llama(*sizes: int, **rest: object) -> dict[str, object]:
    """Llama's block; ``rest`` has the width of the MLP and the key/value heads."""
    return _model(
        *sizes,
        add_bias=False,
        position_embedding_type="rotary",
        normalization="rmsnorm",
        activation="swiglu",
        tie_embeddings=False,
        **rest,
    )


def _nemotron(layers: int, width: int, heads: int) -> dict[str, object]:
    return _model(
        layers,
        width,
        heads,
        256_000,
        4096,
        num_query_groups=8,
        add_bias=False,
        position_embedding_type="rotary",
        rotary_percent=0.5,
        activation="squared_relu",
        tie_embeddings=False,
    )


LLAMA2_7B = _llama(32, 4096, 32, 32_000, 4096, ffn_hidden_size=11008)
LLAMA2_70B = _llama(80, 8192, 64, 32_000, 4096, ffn_hidden_size=28672, num_query_groups=8)
LLAMA3_8B = _llama(32, 4096, 32, 128_256, 8192, ffn_hidden_size=14336, num_query_groups=8)
LLAMA3_70B = _llama(80, 8192, 64, 128_256, 8192, ffn_hidden_size=28672, num_query_groups=8)
GPT3_175B = _model(96, 12288, 96, 51_200, 2048)
NEMOTRON_15B = _nemotron(32, 6144, 48)
NEMOTRON_340B = _nemotron(96, 18432, 96)
MPT_7B = _model(32, 4096, 32, 50_368, 2048)
MPT_13B = _model(40, 5120, 40, 50_368, 2048)
MPT_30B = _model(48, 7168, 56, 50_368, 2048)
MPT_70B = _model(80, 8192, 64, 50_368, 2048)


def _layout(
    model: dict[str, object], batch: int, micro: int, recompute: str, **mesh: int
) -> dict[str, object]:
    """Return all settings. ``data`` takes the GPUs that the other axes leave."""
    return {
        **model,
        **{f"mesh.{axis}": size for axis, size in ({"pipe": 1, "data": -1} | mesh).items()},
        "train.global_batch_size": batch,
        "train.micro_batch_size": micro,
        "train.recompute": recompute,
        "train.reduce_dtype": "bfloat16",
    }


def _megatron(
    shape: tuple[int, int, int],
    batch: int,
    micro: int,
    described: str,
    tflops: float,
    tensor: int,
    pipe: int = 1,
    virtual: int = 1,
) -> Point:
    """A row of the ladder. A circular pipeline computes each stage again, as ``full`` would."""
    model = _model(*shape, 51_200, 2048)
    recompute = "elementwise" if pipe > 1 else "full"
    mesh = {"pipe": pipe, "virtual_pipe": virtual, "tensor": tensor, "zero": 0}
    return Point(
        described,
        _layout(model, batch, micro, recompute, **mesh),
        _MEGATRON,
        tflops=tflops,
        differs="attention in blocks; the published one held all scores",
    )


_AGAIN = "our pipeline computes the forward pass of its stages again"

POINTS = {
    "megatron-1.7b": _megatron((24, 2304, 24), 512, 16, "A100:4x8", 137, 1),
    "megatron-7.5b": _megatron((36, 4096, 32), 512, 16, "A100:16x8", 142, 4),
    "megatron-18b": _megatron((40, 6144, 48), 1024, 8, "A100:32x8", 135, 8),
    "megatron-39b": _megatron((48, 8192, 64), 1536, 4, "A100:64x8", 138, 8, 2),
    "megatron-76b": _megatron((60, 10240, 80), 1792, 2, "A100:128x8", 140, 8, 4, 3),
    "titan-8b": Point(
        "A100:8x8",
        _layout(LLAMA3_8B, 64, 1, "mlp", zero=3) | {"train.reduce_dtype": "float32"},
        _TITAN,
        tokens=2973,
        differs="theirs recomputes every second product, ours the first of the MLP",
    ),
    "titan-70b": Point(
        "A100:8x8",
        _layout(LLAMA3_70B, 64, 1, "full", zero=3) | {"train.reduce_dtype": "float32"},
        _TITAN,
        tokens=331,
    ),
    "maxtext-7b": Point(
        "H100:1x8",
        _layout(LLAMA2_7B, 16, 2, "elementwise", zero=3),
        _MAXTEXT,
        seconds=0.721,
    ),
    "maxtext-70b": Point(
        "H100:8x8",
        _layout(LLAMA2_70B, 128, 2, "mlp", zero=3),
        f"{_RECIPES}, maxtext/README_70b.md of 25.01 (Llama 2)",
        seconds=6.999,
        differs="theirs keeps queries, keys and values alone",
    ),
    "maxtext-70b-256": Point(
        "H100:32x8",
        _layout(LLAMA2_70B, 512, 2, "mlp", zero=3),
        f"{_RECIPES}, maxtext/README_70b.md of 25.01 (Llama 2)",
        seconds=7.153,
        differs="theirs keeps queries, keys and values alone",
    ),
    "maxtext-llama3-70b": Point(
        "H100:16x8",
        _layout(LLAMA3_70B, 256, 2, "projections", zero=3),
        f"{_RECIPES}, maxtext/README_70b.md of 25.02 (Llama 3)",
        seconds=15.563,
        differs="ours computes queries, keys and values again; with them kept it does not fit",
    ),
    "nemo-llama3-8b": Point(
        "H100:1x8",
        _layout(LLAMA3_8B, 128, 1, "elementwise", context=2, zero=1),
        f"{_RECIPES}, llama3.1/README_8b.md, NeMo 24.09",
        seconds=12.91,
        differs="ours computes norms and activations again, and does not fit even so",
    ),
    "nemo-llama3-8b-128": Point(
        "H100:16x8",
        _layout(LLAMA3_8B, 2048, 1, "elementwise", context=2, zero=1),
        f"{_RECIPES}, llama3.1/README_8b.md, NeMo 24.09",
        seconds=13.10,
        differs="ours computes norms and activations again",
    ),
    "nemo-nemotron-15b": Point(
        "H100:2x8",
        _layout(NEMOTRON_15B, 64, 2, "elementwise", tensor=2, zero=1),
        f"{_RECIPES}, nemotron/README.md, H100",
        seconds=2.746,
        differs="ours computes norms and activations again, and does not fit even so",
    ),
    "nemo-llama3-70b": Point(
        "H100:8x8",
        _layout(LLAMA3_70B, 128, 1, "none", pipe=4, virtual_pipe=5, context=2, tensor=4, zero=1),
        f"{_RECIPES}, llama3.1/README_70b.md, NeMo 24.12",
        seconds=14.61,
        differs=_AGAIN,
    ),
    "nemo-gpt3-175b": Point(
        "H100:16x8",
        _layout(GPT3_175B, 256, 1, "none", pipe=8, virtual_pipe=12, tensor=4, zero=1),
        f"{_RECIPES}, nemo_megatron/README_175b.md",
        seconds=8.309,
        differs=f"{_AGAIN}; no dropout",
    ),
    "nemo-gpt3-175b-1024": Point(
        "H100:128x8",
        _layout(GPT3_175B, 2048, 1, "none", pipe=8, virtual_pipe=12, tensor=4, zero=1),
        f"{_RECIPES}, nemo_megatron/README_175b.md",
        seconds=8.453,
        differs=f"{_AGAIN}; no dropout",
    ),
    "nemo-nemotron-340b": Point(
        "H100:32x8",
        _layout(NEMOTRON_340B, 64, 1, "none", pipe=8, virtual_pipe=12, tensor=8, zero=1),
        f"{_RECIPES}, nemotron/README.md, H100",
        seconds=4.606,
        differs=_AGAIN,
    ),
    "mpt-7b": Point("H100:1x8", _layout(MPT_7B, 48, 6, "none", zero=3), _MPT, tokens=10643),
    "mpt-13b": Point("H100:8x8", _layout(MPT_13B, 128, 2, "none", zero=3), _MPT, tokens=4800),
    "mpt-30b": Point("H100:4x8", _layout(MPT_30B, 1344, 14, "full", zero=3), _MPT, tokens=2308),
    "mpt-70b": Point("H100:8x8", _layout(MPT_70B, 2048, 8, "full", zero=3), _MPT, tokens=1039),
}


def published_seconds(point: Point) -> float:
    """Return the published seconds of a step."""
    settings = point.settings
    chips = topology.parse(point.described).chips
    batch = settings["train.global_batch_size"]
    length = settings["model.max_position_embeddings"]
    if point.seconds:
        return point.seconds
    if point.tokens:
        return batch * length / chips / point.tokens
    layers = settings["model.num_layers"]
    width = settings["model.hidden_size"]
    vocabulary = settings["model.vocab_size"]
    rest = 1 + length / (6 * width) + vocabulary / (16 * layers * width)
    return 96 * batch * length * layers * width**2 * rest / (chips * point.tflops * 1e12)


def command_of(point: Point) -> list[str]:
    """Return the arguments of launch/compile_ahead.py."""
    settings = [f"--set={setting}" for setting in settings_of(point)]
    return [f"--config={BASE}", f"--topology={point.described}", *settings]


def settings_of(point: Point) -> list[str]:
    return [f"{name}={value}" for name, value in point.settings.items()]


def config_of(point: Point) -> Config:
    return load_config(BASE, settings_of(point))


def sizes_of(point: Point) -> dict[str, int]:
    """Return the sizes of the mesh axes, in the order of mtnlg_jax/parallel/mesh.py."""
    mesh = config_of(point).mesh
    data = topology.parse(point.described).chips // (mesh.pipe * mesh.context * mesh.tensor)
    sizes = {"pipe": mesh.pipe, "data": data, "expert": mesh.expert}
    return sizes | {"context": mesh.context, "tensor": mesh.tensor}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", default=",".join(POINTS), help="names, with commas")
    parser.add_argument("--output", default=str(RESULT), help=f"default {RESULT}")
    parser.add_argument("--keep", help="folder for the programs; default: none is kept")
    parser.add_argument("--again", help="predict the programs of --keep=FOLDER by today's rules")
    parser.add_argument("--table", action="store_true", help="print what the output has")
    flags = parser.parse_args()
    output = Path(flags.output)
    result = json.loads(output.read_text()) if output.exists() else {"points": {}}
    if flags.table:
        print(table(result["points"]))
        return
    names = flags.points.split(",")
    unknown = [name for name in names if name not in POINTS]
    if unknown:
        sys.exit(f"--points={unknown[0]} is not a point; choose from {', '.join(POINTS)}")
    try:
        if flags.again:
            check_kept(names, result["points"], output, flags.again)
        else:
            topology.check_installed(topology.parse(POINTS[names[0]].described))
    except ValueError as error:
        sys.exit(str(error))
    for name in names:
        if flags.again:
            found = result["points"][name] | about(POINTS[name])
            found.pop("failure", None)
            found |= again(POINTS[name], Path(flags.again, f"{name}.hlo"))
        else:
            kept = [f"--hlo={flags.keep}/{name}.hlo"] if flags.keep else []
            found = measure(POINTS[name], kept)
        print(name, json.dumps(found), flush=True)
        result["points"][name] = found
        result |= {
            "command": "python benchmarks/gpu_calibration.py",
            "jax": importlib.metadata.version("jax"),
        }
        output.write_text(json.dumps(result, indent=1) + "\n")


def measure(point: Point, more: list[str]) -> dict:
    """Compile and predict a point, with ``more`` flags of compile_ahead.py."""
    found = about(point) | {"date": datetime.date.today().isoformat()}
    command = shown_command(point)
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said.json")
        try:
            done = subprocess.run(
                [sys.executable, *command, *more, f"--json={said}"],
                cwd=Path(__file__).parent.parent,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return found | {"failure": f"more than {SECONDS} s to compile"}
        if not said.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return found | {"failure": "".join(lines[-1:])[:300]}
        measured = json.loads(said.read_text())
    predicted = measured["predicted"]
    found |= {
        "compiler": measured["compiler"],
        "peak_bytes": measured["peak"],
        "limit_bytes": measured["limit"],
        "processor_seconds_to_compile": round(measured["processor_seconds"], 1),
    }
    if predicted is None:
        return found | {"failure": (measured["failure"] or measured["not_predicted"])[:300]}
    return found | summary(predicted, published_seconds(point))


def shown_command(point: Point) -> list[str]:
    return ["launch/compile_ahead.py", *command_of(point), "--time", "--prove=0"]


def about(point: Point) -> dict:
    """Return what is kept of a point itself."""
    stated = (
        (point.seconds, "s"),
        (point.tokens, "tokens/s a GPU"),
        (point.tflops, "TFLOP/s a GPU, recomputed ones counted"),
    )
    return {
        "command": " ".join(["python", *shown_command(point)]),
        "source": point.source,
        "published": next(f"{value} {unit}" for value, unit in stated if value),
        "published_seconds": round(published_seconds(point), 4),
        "differs": point.differs,
    }


def check_kept(names: list[str], points: dict[str, dict], output: Path, folder: str) -> None:
    """Raise ValueError if ``output`` or ``folder`` lacks a point as it is compiled today."""
    for name in names:
        program = Path(folder, f"{name}.hlo")
        # The program tells neither its settings nor its peak.
        command = about(POINTS[name])["command"]
        if points.get(name, {}).get("command") != command or not program.exists():
            raise ValueError(
                f"--again needs {name} with today's settings in {output}, and {program}; compile "
                f"it first, with --points={name} --keep={folder}"
            )


def again(point: Point, program: Path) -> dict:
    """Predict a kept program."""
    from jax.sharding import AbstractMesh

    from mtnlg_jax import compat
    from mtnlg_jax.planning import prediction, steps

    described = topology.parse(point.described)
    # Blocks of attention without a kernel depend on the device.
    compat.compile_for(described.platform, described.kind)
    config = config_of(point)
    sizes = sizes_of(point)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    trips = steps.dynamic_trips(config, mesh, "train")
    timeline, costs = prediction.simulate(program.read_text(), described, [], sizes, trips)
    predicted = prediction.predict(config, timeline, costs, described.chips)
    return summary(dataclasses.asdict(predicted), published_seconds(point))


def summary(predicted: dict, seconds: float) -> dict:
    """Return what is kept of a prediction; ``seconds`` are the published ones."""
    mfu = predicted["mfu"]
    ratio = seconds / predicted["seconds"]
    return {
        "predicted_seconds": round(predicted["seconds"], 4),
        "predicted_mfu": round(mfu, 4),
        "predicted_hfu": round(predicted["hfu"], 4),
        "published_mfu": round(mfu / ratio, 4),
        "ratio": round(ratio, 3),
        "shares": {
            label: round(part / predicted["seconds"], 3)
            for label, part in predicted["classes"].items()
            if part > 0.002 * predicted["seconds"]
        },
        "assumed_kernels": predicted["assumed_kernels"],
        "unknown": predicted["unknown"],
    }


def table(points: dict[str, dict]) -> str:
    """Return the points as rows of Markdown, in the order of POINTS."""
    lines = []
    for name, point in POINTS.items():
        found = points.get(name)
        if found is None:
            continue
        start = f"| {name} | {point.described} | {layout_of(point)} "
        if "failure" in found:
            lines.append(f"{start}| {found['published_seconds']:.2f} s | {found['failure']} | | |")
            continue
        too_large = found["peak_bytes"] > found["limit_bytes"]
        rest = [
            f"{label} {100 * share:.0f} %"
            for label, share in found["shares"].items()
            if not label.startswith("products")
        ]
        lines.append(
            f"{start}| {found['published_seconds']:.2f} s, {100 * found['published_mfu']:.1f} % "
            f"| {found['predicted_seconds']:.2f} s, {100 * found['predicted_mfu']:.1f} % "
            f"| {found['ratio']:.2f} | {', '.join(rest[:2])}{'; does not fit' * too_large} |"
        )
    return "\n".join(lines)


def layout_of(point: Point) -> str:
    config = config_of(point)
    sizes = sizes_of(point)
    axes = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
    virtual = config.mesh.virtual_pipe
    chunks = f", {virtual} chunks" if virtual > 1 else ""
    train = config.train
    return (
        f"{axes}{chunks}, ZeRO {config.mesh.zero}, micro-batch {train.micro_batch_size}, "
        f"{train.recompute}"
    )


if __name__ == "__main__":
    main()
