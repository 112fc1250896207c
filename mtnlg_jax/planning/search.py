"""Search the layouts that a config allows on a number of chips, ranked by the time of a step
(cost.py)."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

from mtnlg_jax.config import Config, divisors, validate, validate_batch
from mtnlg_jax.planning.cost import Job
from mtnlg_jax.planning.estimate import Estimate
from mtnlg_jax.planning.layout import POLICIES, Layout

Mesh = tuple[int, int, int, int]  # pipe, data, context, tensor
Schedule = tuple[str, int, int | None]  # schedule, virtual_pipe, flush


def with_layout(config: Config, layout: Layout) -> Config:
    """Return ``config`` with the settings of ``layout``."""
    values = layout._asdict()
    train = {key: values.pop(key) for key in ("micro_batch_size", "recompute")}
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **values),
        train=dataclasses.replace(config.train, **train),
    )


def flags_of(config: Config, layout: Layout) -> list[str]:
    """Return the --set flags that give ``config`` the ``layout``."""
    wanted = with_layout(config, layout)
    flags = []
    trained = ("micro_batch_size", "recompute")
    of_mesh = tuple(key for key in Layout._fields if key not in trained)
    for section, keys in (("mesh", of_mesh), ("train", trained)):
        for key in keys:
            value = getattr(getattr(wanted, section), key)
            if value != getattr(getattr(config, section), key):
                flags.append(f"--set={section}.{key}={value}")
    return flags


def _allowed(check: Callable, *args) -> bool:
    """Return whether ``check(*args)`` raises no ValueError."""
    try:
        check(*args)
    except ValueError:
        return False
    return True


class _Validity:
    """The values that config.validate accepts, with one cached call for each combination of them.

    `split` checks settings of the mesh, `batch` (parts of the rows, micro_batch_size), and
    `policies` are the allowed values of train.recompute, most memory first. Each is checked with
    neutral values of the others.
    """

    def __init__(self, config: Config):
        train = dataclasses.replace(config.train, micro_batch_size=1)
        mesh = dataclasses.replace(config.mesh, data=1, schedule="1f1b", virtual_pipe=1, flush=None)
        self.config = config
        self.plain = dataclasses.replace(config, mesh=mesh, train=train)
        self.split = functools.cache(self._split)
        self.batch = functools.cache(self._batch)
        self.policies = [
            name
            for name in POLICIES
            if _allowed(validate, self._plain_with("train", recompute=name))
        ]

    def _plain_with(self, section: str, **values) -> Config:
        part = dataclasses.replace(getattr(self.plain, section), **values)
        return dataclasses.replace(self.plain, **{section: part})

    def _split(self, **values) -> bool:
        return _allowed(validate, self._plain_with("mesh", **values))

    def _batch(self, rows: int, micro: int) -> bool:
        train = dataclasses.replace(self.config.train, micro_batch_size=micro)
        return _allowed(validate_batch, dataclasses.replace(self.config, train=train), rows)


def _layout(
    mesh: Mesh, zero: int, how: Schedule, micro: int, policy: str, expert: int = 1
) -> Layout:
    return Layout(*mesh, zero, *how, micro, policy, expert)


def _schedules(
    job: Job, valid: _Validity, pipe: int, micro_batches: int
) -> Iterator[list[Schedule]]:
    """Yield lists of schedules, each list from fast and large to slow and small."""
    if pipe == 1:
        yield [_unpiped(job)]
        return
    yield [("1f1b", 1, None)]
    smaller = [pipe << k for k in range(20) if pipe << k < micro_batches] or [pipe]
    flushes = [None, *reversed(smaller)]
    for rounds in divisors(job.config.model.num_layers // pipe):
        yield [
            ("circular", rounds, flush)
            for flush in flushes
            if valid.split(pipe=pipe, schedule="circular", virtual_pipe=rounds, flush=flush)
        ]


def _unpiped(job: Job) -> Schedule:
    return job.config.mesh.schedule, 1, None  # the schedule has no effect, so it stays as it is


def _lean(job: Job, valid: _Validity, pipe: int) -> list[Schedule]:
    """Return the schedules that may need the least memory."""
    if pipe == 1:
        return [_unpiped(job)]
    flushes = [
        flush for flush in (None, pipe) if valid.split(pipe=pipe, schedule="circular", flush=flush)
    ]
    return [("1f1b", 1, None), *(("circular", 1, flush) for flush in flushes)]


def _meshes(job: Job, valid: _Validity, devices: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (pipe, expert, context, tensor) of each allowed mesh."""
    model = job.config.model
    for pipe in divisors(model.num_layers):
        for tensor in divisors(model.num_attention_heads):
            for context in divisors(job.sequence):
                for expert in divisors(model.moe.num_moe_experts or 1):
                    if pipe * tensor * context * expert > devices:
                        break
                    if valid.split(pipe=pipe, tensor=tensor, context=context, expert=expert):
                        yield pipe, expert, context, tensor


def search(job: Job, devices: int) -> list[Estimate]:
    """Return the fastest layout of each mesh on which the run fits, fastest mesh first.

    Meshes have at most ``devices`` devices. If the counts do not divide (105 layers on 1,024
    chips), a mesh may leave up to half of the devices idle.
    """
    valid = _Validity(job.config)
    found = []
    for pipe, expert, context, tensor in _meshes(job, valid, devices):
        if job.batch % expert:
            continue
        fit = devices // (pipe * expert * context * tensor)
        possible = divisors(job.batch // expert)
        datas = [data for data in possible if fit / 2 < data <= fit]
        for data in datas or [max(data for data in possible if data <= fit)]:
            found.append(fastest_on(job, (pipe, data, context, tensor), valid, expert))
    return sorted(filter(None, found), key=lambda estimate: (estimate.step_seconds, estimate.bytes))


def fastest_on(
    job: Job, mesh: Mesh, valid: _Validity | None = None, expert: int = 1
) -> Estimate | None:
    """Return the fastest layout of one mesh; None if no layout is allowed and fits."""
    valid = valid or _Validity(job.config)
    pipe, _, context, tensor = mesh
    if not valid.split(pipe=pipe, tensor=tensor, context=context, expert=expert):
        return None
    # Policies are equally fast if a stage is one layer: then the config keeps its own.
    own = job.config.train.recompute
    return min(
        _fitting(job, valid, mesh, expert),
        default=None,
        key=lambda found: (found.step_seconds, found.layout.recompute != own, found.bytes),
    )


def _fitting(job: Job, valid: _Validity, mesh: Mesh, expert: int) -> Iterator[Estimate]:
    """Yield estimates of layouts of ``mesh`` that fit.

    Layouts that are certainly slower than another one that fits are left out.
    """
    pipe, data, _, tensor = mesh
    rows = data * expert
    for zero in (0, 1, 3) if rows > 1 else (1,):
        # `state` raises ValueError if a dim is not divisible by its axis.
        if not _allowed(job.state, pipe, data, tensor, expert, zero > 0):
            continue
        for micro in divisors(job.batch // rows):
            if not valid.batch(rows, micro):
                continue
            leanest_policy = valid.policies[-1]
            lean = [
                _layout(mesh, zero, how, micro, leanest_policy, expert)
                for how in _lean(job, valid, pipe)
            ]
            if not any(map(job.fits, lean)):
                break  # a larger micro-batch fits even less
            for schedules in _schedules(job, valid, pipe, job.batch // (rows * micro)):
                for policy in valid.policies:
                    # From fast and large to slow and small, so the first one that fits is enough.
                    layouts = (_layout(mesh, zero, how, micro, policy, expert) for how in schedules)
                    fitting = next(filter(job.fits, layouts), None)
                    if fitting:
                        yield job.estimate(fitting)


def lean_layouts(job: Job, devices: int) -> Iterator[Layout]:
    """Yield the layouts on up to ``devices`` devices that may need the least memory per device."""
    valid = _Validity(job.config)
    return (
        _layout((pipe, data, context, tensor), zero, how, 1, valid.policies[-1], expert)
        for pipe, expert, context, tensor in _meshes(job, valid, devices)
        for data in divisors(job.batch)
        if pipe * expert * context * tensor * data <= devices and valid.batch(data * expert, 1)
        for zero in ((1, 3) if data * expert > 1 else (1,))
        if _allowed(job.state, pipe, data, tensor, expert)
        for how in _lean(job, valid, pipe)
    )


def leanest(job: Job, devices: int) -> Estimate:
    """Return the layout on up to ``devices`` devices that needs the least memory per device."""
    return job.estimate(min(lean_layouts(job, devices), key=job.bytes))


def smallest_devices(job: Job, limit: int = 2**17) -> int | None:
    """Return the smallest number of devices on which the run fits; None if ``limit`` is not enough.

    The least memory per device never grows with the number of devices, so bisection finds it.
    """
    low = 1
    high = 1
    while leanest(job, high).bytes > job.room:
        low = high + 1
        high = 2 * high
        if high > limit:
            return None
    while low < high:
        middle = (low + high) // 2
        if leanest(job, middle).bytes <= job.room:
            high = middle
        else:
            low = middle + 1
    return low


def measured_efficiency(job: Job, layout: Layout, step_seconds: float) -> float:
    """Return the efficiency with which ``job`` predicts ``step_seconds`` for a step of ``layout``.

    It is the share of the chip's peak FLOP/s that matrix products reach, in [1e-6, 1]. Raises
    ValueError if no efficiency in this range fits the time.
    """
    probe = copy.copy(job)

    def predicted(efficiency: float) -> float:
        probe.efficiency = efficiency
        return probe.estimate(layout).step_seconds

    low = 1e-6
    high = 1.0
    if not predicted(high) <= step_seconds <= predicted(low):
        raise ValueError(
            f"{step_seconds:.4g} s a step is outside what this chip can do, "
            f"{predicted(high):.4g} s and more; is it the chip that the run used?"
        )
    for _ in range(50):
        middle = math.sqrt(low * high)  # bisection on a logarithmic scale
        if predicted(middle) > step_seconds:
            low = middle
        else:
            high = middle
    return high
