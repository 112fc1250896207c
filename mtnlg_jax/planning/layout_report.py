"""Report the fastest layouts of a config on a number of chips."""

import dataclasses

from mtnlg_jax.config import Config, validate
from mtnlg_jax.hardware import CHIPS
from mtnlg_jax.parallel.mesh import AXES, described
from mtnlg_jax.planning.calibration import read_calibration
from mtnlg_jax.planning.cost import MEMORY_SHARE, Job, known_share
from mtnlg_jax.planning.estimate import Estimate
from mtnlg_jax.planning.layout import Layout, layout_of
from mtnlg_jax.planning.search import flags_of, leanest, search, smallest_devices
from mtnlg_jax.planning.text import amount, columns, duration
from mtnlg_jax.train.schedule import samples_before

CHINCHILLA = 20  # tokens a parameter (Hoffmann 2022)
_HEADER = (
    *(
        "",
        "pipe",
        "data",
        "expert",
        "context",
        "tensor",
        "zero",
        "schedule",
        "flush",
        "micro",
        "recompute",
    ),
    *("step", "tokens/s", "MFU", "HFU", "bubble", "GiB of {}", "binds"),
)
_NOTE = (
    "MFU by PaLM's count, 6 N + 12 L H Q T a token: attention in full, nothing recomputed; HFU "
    "counts what is recomputed. Bound by memory: recomputing because memory is short"
)


def job_of(config: Config, name: str, calibration: str | None = None) -> tuple[Job, str]:
    """Return ``config`` on chips ``name``, and where its efficiency comes from. A vocabulary from
    elsewhere is padded for any mesh.tensor, which divides the heads."""
    efficiency = None
    origin = "MT-NLG's on A100s; your own with --calibrate"
    if known_share(config, CHIPS[name]):
        origin = "by the compiler's schedules of this package; --prove=N for a layout's own"
    if calibration:
        efficiency, origin = read_calibration(calibration, name)
    if config.model.vocabulary % config.model.vocab_size_divisible_by:
        model = config.model.padded(config.model.num_attention_heads)
        config = dataclasses.replace(config, model=model)
    return Job(config, CHIPS[name], efficiency), origin


def layout_report(
    job: Job, origin: str, name: str, number: int, found: list[Estimate], most: int = 5
) -> str:
    """Return the ``most`` fastest layouts of a job (`job_of`) on ``number`` chips, and its own.

    ``found``: by `search`. Raises ValueError if nothing fits, with the number of chips that would
    be enough.
    """
    config = job.config
    efficiency = job.efficiency
    devices = number * CHIPS[name].devices
    if not found:
        raise ValueError(_missing(job, name, number))
    marked = [(str(i), estimate) for i, estimate in enumerate(found[:most], 1)]
    own = _own_layout(config, devices)
    if own and own not in (estimate.layout for _, estimate in marked):
        marked.append(("own", job.estimate(own)))
    header = tuple(cell.format(f"{CHIPS[name].memory / 2**30:.1f}") for cell in _HEADER)
    cells = [header, *(_cells(mark, estimate) for mark, estimate in marked)]
    if not config.model.moe.num_moe_experts:
        number_of = _HEADER.index("expert")
        cells = [row[:number_of] + row[number_of + 1 :] for row in cells]
    table = columns(cells, left=0)
    lines = [
        _head(config, name, number),
        f"products at {efficiency:.1%} of peak ({origin}); up to {MEMORY_SHARE:.0%} of memory is "
        "used\n",
        table,
        *(_breakdown(job, devices, mark, estimate) for mark, estimate in marked),
        "",
        *_lengths(config, found[0]),
        *_ramp(job, devices, found[0]),
        _NOTE,
    ]
    return "\n".join(lines)


def _head(config: Config, name: str, number: int) -> str:
    chip = CHIPS[name]
    devices = f" = {number * chip.devices:,} devices, each" if chip.devices > 1 else ", each"
    return (
        f"{config.name}: {amount(config.model.parameter_count())} parameters, "
        f"{config.train.global_batch_size:,} sequences of {config.sequence_length:,} tokens a "
        "step\n"
        f"{number:,} {name}{devices} {chip.flops / 1e12:.0f} TFLOP/s bf16, "
        f"{chip.memory / 2**30:.1f} GiB at {chip.memory_speed / 1e12:.2f} TB/s, "
        f"{chip.fast / 1e9:.0f} GB/s among {chip.domain:,}, {chip.slow / 1e9:g} GB/s beyond\n"
        f"({chip.source}, {chip.date})"
    )


def _own_layout(config: Config, devices: int) -> Layout | None:
    """Return the layout of the config as it is; None if it is not allowed or needs more devices."""
    mesh = config.mesh
    replica = mesh.pipe * mesh.expert * mesh.context * mesh.tensor
    data = devices // replica if mesh.data == -1 else mesh.data
    config = dataclasses.replace(config, mesh=dataclasses.replace(mesh, data=data))
    try:
        validate(config)
    except ValueError:
        return None
    layout = layout_of(config)
    return layout if layout.devices <= devices else None


def _cells(mark: str, estimate: Estimate) -> tuple[str, ...]:
    """Return the row of a layout in the table."""
    layout = estimate.layout
    schedule = "-" if layout.pipe == 1 else layout.schedule
    if layout.virtual_pipe > 1:
        schedule += f" x {layout.virtual_pipe}"
    return (
        mark,
        *map(str, layout.sizes),
        str(layout.zero),
        schedule,
        str(layout.flush or "-"),
        str(layout.micro_batch_size),
        layout.recompute,
        duration(estimate.step_seconds),
        f"{estimate.tokens_per_second:,.0f}",
        f"{estimate.mfu:.1%}",
        f"{estimate.hfu:.1%}",
        f"{estimate.bubble:.1%}",
        f"{estimate.bytes / 2**30:.1f}",
        estimate.binds,
    )


def _breakdown(job: Job, devices: int, mark: str, estimate: Estimate) -> str:
    """Return the flags of a layout, and the shares of its step."""
    seconds = estimate.step_seconds
    chosen = "" if mark == "own" else " ".join(flags_of(job.config, estimate.layout))
    shares = ", ".join(
        f"{what} {part / seconds:.1%}"
        for what, part in estimate.seconds.items()
        if part > 0.0005 * seconds
    )
    notes = [shares]
    if estimate.hidden:
        notes.append(f"{estimate.hidden / seconds:.0%} more is traffic behind products")
    if estimate.host:
        notes.append(f"{estimate.host / 2**30:.1f} GiB of its host for each device")
    idle = devices - estimate.layout.devices
    if idle:
        notes.append(f"{idle:,} devices idle")
    over = estimate.bytes - job.room
    if over > 0:
        notes.append(f"DOES NOT FIT by {over / 2**30:.1f} GiB")
    return f"\n{mark}: {chosen or 'the config as it is'}\n   {'; '.join(notes)}"


def _lengths(config: Config, best: Estimate) -> list[str]:
    """Return the duration of a compute-optimal run, and of the steps of the config."""
    optimal = CHINCHILLA * config.model.parameter_count()
    own = samples_before(config.train, config.train.steps) * config.sequence_length
    return [
        f"{amount(tokens)} tokens ({what}): {duration(tokens / best.tokens_per_second)} at full "
        "batch"
        for tokens, what in (
            (optimal, f"compute-optimal, {CHINCHILLA} tokens a parameter"),
            (own, f"this config's {config.train.steps:,} steps"),
        )
    ]


def _ramp(job: Job, devices: int, best: Estimate) -> list[str]:
    """Return a line if the run would be much faster without its batch ramp.

    The small batches of a ramp must split over data, and must not wait for a whole flush.
    """
    train = job.config.train
    if train.rampup_batch_size is None:
        return []
    flat = dataclasses.replace(job.config, train=dataclasses.replace(train, rampup_batch_size=None))
    faster = search(Job(flat, job.chip, job.efficiency), devices)[0]
    if faster.step_seconds >= 0.98 * best.step_seconds:
        return []
    return [
        f"the batch ramp requires that data x micro divide {train.rampup_batch_size[0]} and that "
        "circular pipelines flush; without it (--set=train.rampup_batch_size=None) a step takes "
        f"{duration(faster.step_seconds)} on {' x '.join(map(str, faster.layout.mesh))}"
    ]


def _missing(job: Job, name: str, number: int) -> str:
    """Return one line: how much memory is missing, and how many chips would be enough."""
    per_chip = CHIPS[name].devices
    best = leanest(job, number * per_chip)
    largest = sorted(best.memory.items(), key=lambda item: item[1])[:-3:-1]
    parts = " and ".join(f"{what} ({size / 2**30:.1f})" for what, size in largest)
    enough = smallest_devices(job)
    remedy = (
        f"{-(-enough // per_chip):,} {name} would be enough"
        if enough
        else "no number of them would be enough: lower train.global_batch_size or the sequence"
    )
    mesh = described(dict(zip(AXES, best.layout.sizes, strict=True)))
    return (
        f"{job.config.name} does not fit {number:,} {name}: the leanest layout, {mesh} with "
        f"zero {best.layout.zero}, "
        f"needs {best.bytes / 2**30:.1f} GiB a device of {job.room / 2**30:.1f} "
        f"({MEMORY_SHARE:.0%} of its memory), most for {parts}; {remedy}"
    )
