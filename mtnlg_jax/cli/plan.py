"""How a run lies on a mesh, and which mesh to choose, by arithmetic; nothing is allocated.

    python launch/plan.py --config=configs/mtnlg_530b.py                     every tensor: what a
        device has of it
    python launch/plan.py --config=configs/mtnlg_530b.py --chips=H100:1024   the fastest layouts on
        these chips
    python launch/plan.py --calibrate=RUN --chips=H100:8                     how fast RUN went

The last writes RUN/calibration.json, which the second takes as --calibration=FILE.
"""

import dataclasses
from pathlib import Path

from absl import flags

from mtnlg_jax import command

_MTNLG = (
    Path(__file__).resolve().parents[2] / "configs" / "mtnlg_530b.py"
)  # not there where a wheel is installed
_CONFIG = command.define_path(
    "config", str(_MTNLG) if _MTNLG.is_file() else None, "a file of configs/"
)
_SET = flags.DEFINE_multi_string(
    "set", [], "a value of the config, as mesh.tensor=4; repeat for more"
)
_DEVICES = flags.DEFINE_integer(
    "devices",
    None,
    "devices of the table, where mesh.data=-1 takes what is left; default: one replica",
    lower_bound=1,
)
_CHIPS = flags.DEFINE_string(
    "chips", None, "kind and number, as H100:1024 or v5p:1024: rank the layouts on them"
)
_TOP = flags.DEFINE_integer("top", 5, "how many layouts to print", lower_bound=1)
_CALIBRATION = command.define_path(
    "calibration", None, "a calibration.json: its efficiency instead of MT-NLG's"
)
_CALIBRATE = command.define_path(
    "calibrate", None, "a run's folder: measure its efficiency on --chips"
)

# for configs whose tokenizer decides: GPT-2's 50,257, padded to a multiple of 128 x tensor 8
VOCABULARY = 51200
CHINCHILLA = 20  # tokens a parameter (Hoffmann 2022)


def main() -> None:
    from mtnlg_jax.config import load_config
    from mtnlg_jax.hardware import parse_chips

    if _CALIBRATE.value:
        if not _CHIPS.value:
            raise ValueError(
                "--calibrate needs --chips: the kind and number of chips that the run used, as H100:8"
            )
        from mtnlg_jax.planning.calibration import calibrate

        print(calibrate(_CALIBRATE.value, *parse_chips(_CHIPS.value)))
        return
    if _CONFIG.value is None:
        raise ValueError("--config is missing; name the file of a run, as --config=my_run.py")
    chips = parse_chips(_CHIPS.value) if _CHIPS.value else None
    config = load_config(_CONFIG.value, _SET.value)
    if config.model.vocab_size is None:
        print(
            f"model.vocab_size is the tokenizer's; planned with {VOCABULARY:,}, --set=model.vocab_size=... for "
            "another"
        )
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, vocab_size=VOCABULARY)
        )
    if chips:
        print_layouts(config, *chips)
    else:
        print_table(config)


# --- the table
# ------------------------------------------------------------------------------------------------


def print_table(config) -> None:
    from mtnlg_jax.config import validate
    from mtnlg_jax.model.transformer import abstract_model
    from mtnlg_jax.parallel.mesh import mesh_shape, plan_table
    from mtnlg_jax.planning.cost import Job
    from mtnlg_jax.planning.layout import layout_of

    mesh = config.mesh
    replica = mesh.pipe * mesh.context * mesh.tensor
    sizes = mesh_shape(mesh, _DEVICES.value or replica * max(mesh.data, 1))
    config = dataclasses.replace(config, mesh=dataclasses.replace(mesh, data=sizes["data"]))
    validate(config)
    rows = plan_table(abstract_model(config.model)[1], sizes, mesh.zero)
    memory = Job(config, None).memory(
        layout_of(config)
    )  # before the first line: it may not fit together

    print(
        f"{config.name}: {config.model.parameter_count():,} parameters on "
        + " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        + f" = {replica * sizes['data']:,} devices, zero {mesh.zero}\n"
    )
    cells = [
        (
            row.path,
            row.dims,
            " ".join(map(str, row.shape)),
            " ".join(axis or "-" for axis in row.spec),
            f"{row.bytes:,}",
        )
        for row in rows
    ]
    print_columns(
        [
            ("tensor", "dims", "shape", "split over", "bytes a device"),
            *cells,
            ("all, float32", "", "", "", f"{sum(row.bytes for row in rows):,}"),
        ],
        left=4,
    )
    print(
        "\nGiB a device in a step: "
        + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
        + f"; together {sum(memory.values()) / 2**30:.1f}\n"
        f"masters, moments and gradients are float32, weights {config.train.compute_dtype}; recompute "
        f"{config.train.recompute}, micro-batches of {layout_of(config).micro_batch_size}"
    )


def print_columns(lines: list[tuple[str, ...]], left: int) -> None:
    """Aligned columns, the first ``left`` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


# --- layouts
# --------------------------------------------------------------------------------------------------

HEADER = (
    "",
    "pipe",
    "data",
    "context",
    "tensor",
    "zero",
    "schedule",
    "flush",
    "micro",
    "recompute",
    "step",
    "tokens/s",
    "MFU",
    "HFU",
    "bubble",
    "GiB of {}",
    "binds",
)


def print_layouts(config, name: str, number: int) -> None:
    from mtnlg_jax.hardware import CHIPS
    from mtnlg_jax.planning.cost import EFFICIENCY, MEMORY_SHARE, Job
    from mtnlg_jax.planning.search import flags_of, search

    chip = CHIPS[name]
    devices = number * chip.devices
    efficiency = EFFICIENCY
    origin = "MT-NLG's on A100s; your own with --calibrate"
    if _CALIBRATION.value:
        from mtnlg_jax.planning.calibration import read_calibration

        efficiency, origin = read_calibration(_CALIBRATION.value, name)
    job = Job(config, chip, efficiency)
    found = search(job, devices)
    if not found:
        raise ValueError(what_is_missing(job, name, number))

    print(
        f"{config.name}: {_amount(config.model.parameter_count())} parameters, {config.train.global_batch_size:,} "
        f"sequences of {config.sequence_length:,} tokens a step\n"
        f"{number:,} {name}"
        + (f" = {devices:,} devices, each" if chip.devices > 1 else ", each")
        + f" {chip.flops / 1e12:.0f} TFLOP/s bf16, {chip.memory / 2**30:.1f} GiB at {chip.memory_speed / 1e12:.2f} "
        f"TB/s, {chip.fast / 1e9:.0f} GB/s among {chip.domain:,}, {chip.slow / 1e9:g} GB/s beyond\n"
        f"({chip.source}, {chip.date})\n"
        f"products at {efficiency:.1%} of peak ({origin}); up to {MEMORY_SHARE:.0%} of memory is used\n"
    )
    marked = [(str(i), estimate) for i, estimate in enumerate(found[: _TOP.value], 1)]
    own = own_layout(config, devices)
    if own and own not in (estimate.layout for _, estimate in marked):
        marked.append(("own", job.estimate(own)))
    header = tuple(cell.format(f"{chip.memory / 2**30:.1f}") for cell in HEADER)
    print_columns([header, *(_cells(mark, estimate) for mark, estimate in marked)], left=0)
    for mark, estimate in marked:
        seconds = estimate.step_seconds
        idle = devices - estimate.layout.devices
        over = estimate.bytes - job.room
        chosen = (
            "the config as it is" if mark == "own" else " ".join(flags_of(config, estimate.layout))
        )
        print(
            f"\n{mark}: {chosen or 'the config as it is'}\n   "
            + ", ".join(
                f"{what} {part / seconds:.1%}"
                for what, part in estimate.seconds.items()
                if part > 0.0005 * seconds
            )
            + (
                f"; {estimate.hidden / seconds:.0%} more is traffic behind products"
                if estimate.hidden
                else ""
            )
            + (f"; {idle:,} devices idle" if idle else "")
            + (f"; DOES NOT FIT by {over / 2**30:.1f} GiB" if over > 0 else "")
        )
    print()
    print_lengths(config, found[0])
    print_what_the_ramp_costs(job, devices, found[0])
    print(
        "MFU by PaLM's count, 6 N + 12 L H Q T a token: attention in full, nothing recomputed; HFU with it. "
        "Bound by memory: by recomputing for want of it"
    )


def own_layout(config, devices: int):
    """The layout of the config as it stands; None where it takes more devices or one that is not
    allowed here."""
    from mtnlg_jax.config import validate
    from mtnlg_jax.planning.layout import layout_of

    mesh = config.mesh
    data = devices // (mesh.pipe * mesh.context * mesh.tensor) if mesh.data == -1 else mesh.data
    config = dataclasses.replace(config, mesh=dataclasses.replace(mesh, data=data))
    try:
        validate(config)
    except ValueError:
        return None
    return layout_of(config) if layout_of(config).devices <= devices else None


def _cells(mark: str, estimate) -> tuple[str, ...]:
    layout = estimate.layout
    schedule = "-" if layout.pipe == 1 else layout.schedule
    if layout.virtual_pipe > 1:
        schedule += f" x {layout.virtual_pipe}"
    return (
        mark,
        *map(str, layout.mesh),
        str(layout.zero),
        schedule,
        str(layout.flush or "-"),
        str(layout.micro_batch_size),
        layout.recompute,
        _time(estimate.step_seconds),
        f"{estimate.tokens_per_second:,.0f}",
        f"{estimate.mfu:.1%}",
        f"{estimate.hfu:.1%}",
        f"{estimate.bubble:.1%}",
        f"{estimate.bytes / 2**30:.1f}",
        estimate.binds,
    )


def _amount(number: float) -> str:
    """Three digits or more: 529.6 B, 3.38 M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.{2 if number < 10 * size else 1}f} {unit}"
    return f"{number:.0f}"


def _time(seconds: float) -> str:
    units = (("days", 86400), ("hours", 3600), ("s", 1), ("ms", 1e-3))
    unit, size = next((unit for unit in units if seconds >= unit[1]), units[-1])
    return f"{seconds / size:,.{0 if seconds >= 1000 * size else 1 if seconds >= 10 * size else 2}f} {unit}"


def print_lengths(config, best) -> None:
    from mtnlg_jax.train.schedule import samples_before

    optimal = CHINCHILLA * config.model.parameter_count()
    own = samples_before(config.train, config.train.steps) * config.sequence_length
    for tokens, what in (
        (optimal, f"compute-optimal, {CHINCHILLA} tokens a parameter"),
        (own, f"this config's {config.train.steps:,} steps"),
    ):
        print(
            f"{_amount(tokens)} tokens ({what}): {_time(tokens / best.tokens_per_second)} at full batch"
        )


def print_what_the_ramp_costs(job, devices: int, best) -> None:
    """A ramp's small batches must split over data and not wait for a whole flush; says so where the
    run could be much faster without."""
    from mtnlg_jax.planning.cost import Job
    from mtnlg_jax.planning.search import search

    train = job.config.train
    if train.rampup_batch_size is None:
        return
    flat = dataclasses.replace(job.config, train=dataclasses.replace(train, rampup_batch_size=None))
    faster = search(Job(flat, job.chip, job.efficiency), devices)[0]
    if faster.step_seconds < 0.98 * best.step_seconds:
        print(
            f"the batch ramp asks that data x micro divide {train.rampup_batch_size[0]} and that circular pipelines "
            f"flush; without it (--set=train.rampup_batch_size=None) a step takes {_time(faster.step_seconds)} on "
            + " x ".join(map(str, faster.layout.mesh))
        )


def what_is_missing(job, name: str, number: int) -> str:
    """One line: how much memory is missing, and how many chips would do."""
    from mtnlg_jax.planning.cost import MEMORY_SHARE
    from mtnlg_jax.planning.search import leanest, smallest_devices

    best = leanest(job, number * job.chip.devices)
    largest = sorted(best.memory, key=best.memory.get)[:-3:-1]
    enough = smallest_devices(job)
    return (
        f"{job.config.name} does not fit {number:,} {name}: the leanest layout, pipe x data x context x tensor "
        f"{' x '.join(map(str, best.layout.mesh))} with zero {best.layout.zero}, needs "
        f"{best.bytes / 2**30:.1f} GiB a device of {job.room / 2**30:.1f} ({MEMORY_SHARE:.0%} of its memory), "
        "most for "
        + " and ".join(f"{what} ({best.memory[what] / 2**30:.1f})" for what in largest)
        + (
            f"; {-(-enough // job.chip.devices):,} {name} would do"
            if enough
            else "; no number of them would do: lower train.global_batch_size or the sequence"
        )
    )


def run() -> None:
    """Parses the command line, does what it says and exits."""
    command.run(main)
