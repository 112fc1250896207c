"""Every layout that a config admits on a number of chips, ranked by the time of its step
(cost.py)."""

import copy
import dataclasses
import functools
import math
from collections.abc import Iterator

from mtnlg_jax.config import Config, divisors, validate, validate_batch
from mtnlg_jax.planning.cost import POLICIES, Estimate, Job, Layout


def with_layout(config: Config, layout: Layout) -> Config:
    values = layout._asdict()
    train = {key: values.pop(key) for key in ("micro_batch_size", "recompute")}
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **values),
        train=dataclasses.replace(config.train, **train),
    )


def flags_of(config: Config, layout: Layout) -> list[str]:
    """The --set flags that turn ``config`` into ``layout``."""
    wanted = with_layout(config, layout)
    flags = []
    for section, keys in (("mesh", Layout._fields[:8]), ("train", Layout._fields[8:])):
        for key in keys:
            value = getattr(getattr(wanted, section), key)
            if value != getattr(getattr(config, section), key):
                flags.append(f"--set={section}.{key}={value}")
    return flags


def _allowed(check, *args) -> bool:
    try:
        check(*args)
    except ValueError:
        return False
    return True


class _Laws:
    """What config.validate accepts, asked once for each group of values that it looks at
    together."""

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

    def _batch(self, data: int, micro: int) -> bool:
        train = dataclasses.replace(self.config.train, micro_batch_size=micro)
        return _allowed(validate_batch, dataclasses.replace(self.config, train=train), data)


def _schedules(job: Job, laws: _Laws, pipe: int, micro_batches: int) -> Iterator[list[tuple]]:
    """Runs of (schedule, virtual_pipe, flush), each run from fast and large to slow and small."""
    if pipe == 1:
        yield [_unpiped(job)]
        return
    yield [("1f1b", 1, None)]
    flushes = [
        None,
        *reversed([pipe << k for k in range(20) if pipe << k < micro_batches] or [pipe]),
    ]
    for rounds in divisors(job.config.model.num_layers // pipe):
        yield [
            ("circular", rounds, flush)
            for flush in flushes
            if laws.split(pipe=pipe, schedule="circular", virtual_pipe=rounds, flush=flush)
        ]


def _unpiped(job: Job) -> tuple[str, int, None]:
    return job.config.mesh.schedule, 1, None  # without a pipeline it says nothing: so it stays


def _lean(job: Job, laws: _Laws, pipe: int) -> list[tuple]:
    """The (schedule, virtual_pipe, flush) of which one needs the least memory."""
    if pipe == 1:
        return [_unpiped(job)]
    flushes = [
        flush for flush in (None, pipe) if laws.split(pipe=pipe, schedule="circular", flush=flush)
    ]
    return [("1f1b", 1, None), *(("circular", 1, flush) for flush in flushes)]


def _meshes(job: Job, laws: _Laws, devices: int) -> Iterator[tuple[int, int, int]]:
    model = job.config.model
    for pipe in divisors(model.num_layers):
        for tensor in divisors(model.num_attention_heads):
            for context in divisors(job.sequence):
                if pipe * tensor * context <= devices and laws.split(
                    pipe=pipe, tensor=tensor, context=context
                ):
                    yield pipe, context, tensor


def search(job: Job, devices: int) -> list[Estimate]:
    """The fastest layout of each mesh of up to ``devices`` devices in which the run fits, fastest
    mesh first.

    Where a count does not factor (105 layers on 1,024 chips) a mesh may leave devices out, up to
    half of them."""
    laws = _Laws(job.config)
    found = []
    for pipe, context, tensor in _meshes(job, laws, devices):
        fit = devices // (pipe * context * tensor)
        datas = [data for data in divisors(job.batch) if fit / 2 < data <= fit]
        for data in datas or [max(data for data in divisors(job.batch) if data <= fit)]:
            found.append(_fastest(job, laws, (pipe, data, context, tensor)))
    return sorted(filter(None, found), key=lambda estimate: (estimate.step_seconds, estimate.bytes))


def fastest_on(job: Job, mesh: tuple[int, int, int, int]) -> Estimate | None:
    """The fastest layout of one mesh, (pipe, data, context, tensor); None where nothing fits or is
    allowed."""
    laws = _Laws(job.config)
    pipe, _, context, tensor = mesh
    return (
        _fastest(job, laws, mesh) if laws.split(pipe=pipe, context=context, tensor=tensor) else None
    )


def _fastest(job: Job, laws: _Laws, mesh: tuple[int, int, int, int]) -> Estimate | None:
    own = job.config.train.recompute  # where a stage is one layer all policies are one
    return min(
        _fitting(job, laws, mesh),
        default=None,
        key=lambda found: (found.step_seconds, found.layout.recompute != own, found.bytes),
    )


def _fitting(job: Job, laws: _Laws, mesh: tuple[int, int, int, int]) -> Iterator[Estimate]:
    """Estimates of layouts of ``mesh`` that fit: all but those which another one that fits beats
    for certain."""
    pipe, data, _, _ = mesh
    for zero in (0, 1, 3) if data > 1 else (1,):
        if not _allowed(job.state, pipe, data if zero else 1, mesh[3]):
            continue
        for micro in divisors(job.batch // data):
            if not laws.batch(data, micro):
                continue
            if not any(
                job.fits(Layout(*mesh, zero, *how, micro, laws.policies[-1]))
                for how in _lean(job, laws, pipe)
            ):
                break  # a larger micro-batch fits even less
            for run in _schedules(job, laws, pipe, job.batch // (data * micro)):
                for policy in laws.policies:
                    layouts = (Layout(*mesh, zero, *how, micro, policy) for how in run)
                    fitting = next(filter(job.fits, layouts), None)
                    if fitting:
                        yield job.estimate(fitting)


def leanest(job: Job, devices: int) -> Estimate:
    """Of the layouts on up to ``devices`` devices the one that needs the least memory a device."""
    laws = _Laws(job.config)
    candidates = (
        Layout(pipe, data, context, tensor, zero, *how, 1, laws.policies[-1])
        for pipe, context, tensor in _meshes(job, laws, devices)
        for data in divisors(job.batch)
        if pipe * context * tensor * data <= devices and laws.batch(data, 1)
        for zero in ((1, 3) if data > 1 else (1,))
        if _allowed(job.state, pipe, data, tensor)
        for how in _lean(job, laws, pipe)
    )
    return job.estimate(min(candidates, key=lambda layout: sum(job.memory(layout).values())))


def smallest_devices(job: Job, limit: int = 2**17) -> int | None:
    """The smallest number of devices, up to ``limit``, in which the run fits; None where none is
    enough."""
    low = 1
    high = 1
    while leanest(job, high).bytes > job.room:
        low = high + 1
        high = 2 * high
        if high > limit:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if leanest(job, middle).bytes <= job.room else (middle + 1, high)
    return low


def measured_efficiency(job: Job, layout: Layout, step_seconds: float) -> float:
    """The efficiency with which ``job`` predicts that a step of ``layout`` takes ``step_seconds``.
    Raises ValueError where not even products at the chip's peak would be so fast."""

    probe = copy.copy(job)

    def predicted(efficiency: float) -> float:
        probe.efficiency = efficiency
        return probe.estimate(layout).step_seconds

    low = 1e-6
    high = 1.0
    if not predicted(high) <= step_seconds <= predicted(low):
        raise ValueError(
            f"{step_seconds:.4g} s a step lies outside what this chip can do, {predicted(high):.4g} s and "
            f"more; is it the chip that the run used?"
        )
    for _ in range(50):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if predicted(middle) > step_seconds else (low, middle)
    return high
