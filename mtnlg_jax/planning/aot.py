"""Compile one step for a described topology and measure the compiled program.

The compiler runs in a separate process, since it may abort and libtpu needs an environment that
nothing else should see. This module is both ends: ``measure`` starts
``python -m mtnlg_jax.planning.aot``."""

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

from mtnlg_jax import xla_flags
from mtnlg_jax.config import Config, from_json, to_json
from mtnlg_jax.planning import hlo, hlo_cost, prediction
from mtnlg_jax.planning import topology as described
from mtnlg_jax.planning.text import last_words
from mtnlg_jax.planning.trace import write_trace

SUSPECTS = 8


@dataclasses.dataclass
class Measurement:
    """Bytes are of one device."""

    topology: str
    devices: int
    mesh: dict[str, int]
    step: str
    micro_batches: int  # 0: the step has none
    compiler: str
    limit: int | None  # main memory that a program may use; None: not known
    failure: str = ""  # why there is no program, in the compiler's words
    needed: int | None = None  # memory needed according to the compiler, if that is why
    arguments: int = 0
    arguments_exact: int = 0  # without padding
    padded: list = dataclasses.field(default_factory=list)  # [[name, bytes lost]], largest first
    temporaries: int = 0
    code: int = 0
    peak: int = 0
    flops: float = 0.0
    collectives: list = dataclasses.field(default_factory=list)  # hlo_cost.Collective
    guessed_loops: int = 0
    suspects: list = dataclasses.field(default_factory=list)  # hlo.Tensor
    compiler_seconds: float | None = None  # the compiler's own estimate of a step
    lower_seconds: float = 0.0
    compile_seconds: float = 0.0
    resident: int = 0  # peak resident memory of the compiling process
    kernels: list = dataclasses.field(default_factory=list)  # hlo_cost.Kernel
    flags: list = dataclasses.field(default_factory=list)  # all flags of the compiler
    flags_left_out: str = ""  # why some of a run's flags are not among them
    # Processor time of compiling, child processes included; other load does not change it.
    processor_seconds: float = 0.0
    # Of decoding, as in `unstack`.
    weights: str | None = None
    cache: str | None = None
    places: list = dataclasses.field(default_factory=list)  # of the devices in a slice, in order
    not_predicted: str = "a step that does not compile has no schedule"  # why, if that was asked
    predicted: prediction.Prediction | None = None  # of a train step, if it was asked for
    saved: str = ""  # the file of the executables and what it has; "" if none was asked for
    host: int = 0  # of the host's memory, for train.offload

    @property
    def fits(self) -> bool | None:
        """Whether the step fits; None if that is not known."""
        if self.failure:
            return False if self.needed is not None else None
        return None if self.limit is None else self.peak <= self.limit

    @property
    def most(self) -> int:
        """Bytes needed, as far as known."""
        return self.needed or self.peak


def measure(
    config: Config,
    topology: described.Topology,
    step: str = "train",
    target_config: str | None = None,
    memory: int | None = None,
    text: str | None = None,
    flags: bool = True,
    weights: str | None = None,
    cache: str | None = None,
    predict: bool = False,
    trace: str | None = None,
    save: str | None = None,
) -> Measurement:
    """Compile ``step`` in a separate process.

    Args:
      memory: bytes of a device, instead of the chip's.
      text: file to write the compiled program to.
      flags: add the compiler flags that launch/pretrain.py sets for these chips to those of the
        environment. Decoding has none.
      weights, cache: "int8" to hold weights, or the cache of the step "decode", in int8.
      predict: simulate the compiled train step (`prediction`).
      trace: file to write the simulated step to, for Perfetto.
      save: file to keep the compiled train step in, for launch/pretrain.py --executable.

    Raises ValueError if config, mesh or topology is wrong. A compiler that gives up or dies is not
    an error: the measurement reports it."""
    described.check_installed(topology)
    if config.model.vocab_size is None:
        raise ValueError(
            "model.vocab_size is the tokenizer's, which compiling does not read; add "
            "--set=model.vocab_size=51200, or the tokenizer's size"
        )
    if target_config is not None and topology.platform != "cuda":
        raise ValueError(
            f"--target_config={target_config} describes a GPU, and {topology} has none; "
            "leave it out"
        )
    if target_config is not None and not os.path.isfile(target_config):
        raise FileNotFoundError(
            f"--target_config={target_config} is not a file; give a dumped GpuTargetConfigProto "
            "in text form, or leave it out"
        )
    if predict:
        prediction.check(topology, step)
    environment = described.environment(topology)
    choice = xla_flags.Choice()
    if flags and step == "train":
        choice = xla_flags.choose(
            kind_of(topology), config.mesh, topology.slices, config.train.recompute
        )
    variable = xla_flags.VARIABLE.get(xla_flags.platform_of(kind_of(topology)), "XLA_FLAGS")
    environment[variable] = " ".join([*environment.get(variable, "").split(), *choice.flags])
    with tempfile.TemporaryDirectory() as folder:
        answer = os.path.join(folder, "answer.json")
        request = {
            "config": to_json(config),
            "topology": str(topology),
            "step": step,
            "target_config": target_config,
            "memory": memory,
            "text": text and os.path.abspath(text),
            "predict": predict,
            "trace": trace and os.path.abspath(trace),
            "save": save and os.path.abspath(save),
            "weights": weights,
            "cache": cache,
            "answer": answer,
            "flags": environment[variable].split(),
            "flags_left_out": choice.left_out,
        }
        done = subprocess.run(
            [sys.executable, "-m", "mtnlg_jax.planning.aot"],
            input=json.dumps(request),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
        )
        if os.path.exists(answer):
            with open(answer, encoding="utf-8") as file:
                said = json.load(file)
            if "error" in said:
                raise ValueError(said["error"])
            if not done.returncode or not said["failure"].startswith("unfinished"):
                return from_dict(said)
            lost = from_dict(said)
            lost.failure = last_words(done)
            return lost
    raise ValueError(f"compiling for {topology} did not begin: {last_words(done)}")


def kind_of(topology: described.Topology) -> str:
    """Return the kind of its chips by the names of mtnlg_jax.xla_flags."""
    return {"cuda": "gpu", "cpu": "cpu"}.get(topology.platform, topology.kind)


def from_dict(said: dict) -> Measurement:
    """Return the measurement that `to_text` wrote, from its JSON."""
    found = Measurement(**said)
    found.collectives = [
        hlo_cost.Collective(**row | {"axes": tuple(row["axes"])}) for row in found.collectives
    ]
    found.kernels = [hlo_cost.Kernel(**row) for row in found.kernels]
    found.suspects = [hlo.Tensor(**row) for row in found.suspects]
    if said["predicted"]:
        found.predicted = prediction.Prediction(**said["predicted"])
    return found


def to_text(measurement: Measurement) -> str:
    said = dataclasses.asdict(measurement)
    del said["places"]  # three numbers for each of thousands of devices
    return json.dumps(said, indent=1)


# --- the other end ---


def _answer() -> None:
    request = json.load(sys.stdin)

    def say(said: dict):
        beside = request["answer"] + ".new"
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(said, file)
        os.replace(beside, request["answer"])

    try:
        for state in _compile(
            from_json(request["config"]),
            described.parse(request["topology"]),
            request["step"],
            request["target_config"],
            request["memory"],
            request["text"],
            request["weights"],
            request["cache"],
            request["predict"],
            request["trace"],
            request["save"],
        ):
            state.flags = request["flags"]
            state.flags_left_out = request["flags_left_out"]
            say(dataclasses.asdict(state))
    except (ValueError, OSError) as error:
        say({"error": str(error)})


def _compile(
    config: Config,
    topology: described.Topology,
    step: str,
    target_config,
    memory,
    text,
    weights: str | None,
    cache: str | None,
    predict: bool,
    trace: str | None,
    save: str | None,
):
    """Yield what is known before the compiler starts, which may abort this process, and then the
    whole measurement."""
    import jax

    from mtnlg_jax import compat
    from mtnlg_jax.planning import kept_steps, steps
    from mtnlg_jax.train.batch import micro_batch_shape

    devices = described.devices(topology, target_config)
    compat.compile_for(topology.platform, devices[0].device_kind)
    mesh = described.mesh_over(config.mesh, topology, devices)
    sizes = dict(mesh.shape)
    limit = memory or described.memory_of(topology, devices, target_config)
    start = time.perf_counter()
    lowered = steps.lower(config, mesh, step, weights, cache)
    result = Measurement(
        str(topology),
        len(devices),
        sizes,
        step,
        micro_batch_shape(config, mesh)[0] if step == "train" else 0,
        _compiler(topology),
        limit,
        failure="unfinished",
        weights=weights,
        cache=cache,
        places=[list(getattr(device, "coords", ())) for device in mesh.devices.flat],
    )
    result.lower_seconds = time.perf_counter() - start
    yield result
    start = time.perf_counter()
    busy = _processor_seconds()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        result.failure = " ".join(str(error).split())
        result.needed = _needed(result.failure)
        result.compile_seconds = time.perf_counter() - start
        result.processor_seconds = _processor_seconds() - busy
        result.resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        yield result
        return
    result.failure = ""
    result.compile_seconds = time.perf_counter() - start
    result.processor_seconds = _processor_seconds() - busy
    result.resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    _take_memory(result, compiled.memory_analysis(), topology.platform)
    written = compiled.as_text() or ""
    if text:
        with open(text, "w", encoding="utf-8") as file:
            file.write(written)
    program = hlo.Program(written)
    arguments = hlo.arguments_of(program)
    result.arguments_exact = sum(hlo.bytes_of(shape) for _, shape in arguments)
    lost = sorted(
        ((hlo.padded_bytes(shape) - hlo.bytes_of(shape), name) for name, shape in arguments),
        reverse=True,
    )
    result.padded = [[name, size] for size, name in lost[:SUSPECTS] if size > 0]
    trips = steps.dynamic_trips(config, mesh, step)
    cost = hlo_cost.cost_of(program, sizes, trips)
    result.flops = cost.flops
    result.collectives = list(cost.collectives)
    result.guessed_loops = cost.guessed_loops
    result.kernels = list(cost.kernels)
    result.suspects = hlo.largest(program, SUSPECTS)
    said = compiled.cost_analysis()
    result.compiler_seconds = _believable(
        (said[0] if isinstance(said, list) else said or {}).get("optimal_seconds")
    )
    yield result  # what is measured stands, whatever becomes of the rest
    if save:
        result.saved = kept_steps.save(save, config, mesh, lowered, compiled)
        yield result
    if predict:
        try:
            _predict(config, topology, result, written, trips, trace)
        except (ValueError, KeyError, RuntimeError, OSError) as error:
            result.not_predicted = " ".join(f"{type(error).__name__}: {error}".split())
        yield result


def _take_memory(result: Measurement, sizes_of: Any, platform: str) -> None:
    """Put the bytes of a compiled program's ``memory_analysis`` into ``result``."""
    result.arguments = sizes_of.argument_size_in_bytes
    result.temporaries = sizes_of.temp_size_in_bytes
    result.code = sizes_of.generated_code_size_in_bytes
    result.peak = sizes_of.peak_memory_in_bytes
    result.host = (
        sizes_of.host_argument_size_in_bytes
        + sizes_of.host_output_size_in_bytes
        - sizes_of.host_alias_size_in_bytes
        + sizes_of.host_temp_size_in_bytes
    )
    if platform == "tpu" and result.host:
        # Its peak is that of both memories together. What it allocates is the device's alone.
        result.peak = sizes_of.total_allocation_bytes - result.code
    if platform == "cpu":  # its peak leaves the temporaries out
        new = sizes_of.output_size_in_bytes - sizes_of.alias_size_in_bytes
        result.peak = result.arguments + result.temporaries + new


def _predict(
    config: Config, topology: described.Topology, result: Measurement, text: str, trips, trace
) -> None:
    """Simulate the compiled program ``text``, and write its timeline to ``trace`` if not None."""
    from mtnlg_jax.planning import steps

    model = config.model
    windowed = any(model.layer(number).window for number in range(model.num_layers))
    split = result.mesh["context"] > 1 and config.mesh.context_mode != "ulysses"
    timeline, costs = prediction.simulate(
        text,
        topology,
        result.places,
        result.mesh,
        trips,
        steps.is_causal(config),
        # Other masks visit other blocks, which only the step itself knows.
        profiled=not windowed and not split,
    )
    result.predicted = prediction.predict(config, timeline, costs, result.devices)
    if trace:
        write_trace(timeline, trace)


def _processor_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _believable(seconds: float | None) -> float | None:
    """Return the compiler's estimate, or None for the values that mean "none": below zero, not
    finite, or 2^63 cycles."""
    return seconds if seconds is not None and 0 < seconds < 1e6 else None


def _needed(failure: str) -> int | None:
    """Return the bytes that an out-of-memory message reports as needed."""
    found = re.search(r"(?:required for HLO temporaries \(|Used )([\d.]+)([KMGT])", failure)
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1)) if found else None


def _compiler(topology: described.Topology) -> str:
    import importlib.metadata

    package = {"tpu": "libtpu", "cuda": "jax-cuda12-pjrt"}.get(topology.platform, "jaxlib")
    return f"{package} {importlib.metadata.version(package)}"


if __name__ == "__main__":
    _answer()
