"""Check the search: its layouts are valid and fit, and no better one is missed."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest

from mtnlg_jax.config import (
    Config,
    ModelConfig,
    MoEConfig,
    TrainConfig,
    load_config,
    override,
    validate,
)
from mtnlg_jax.hardware import CHIPS
from mtnlg_jax.planning.cost import EFFICIENCY, Job
from mtnlg_jax.planning.layout import POLICIES, Layout
from mtnlg_jax.planning.search import (
    fastest_on,
    flags_of,
    leanest,
    measured_efficiency,
    search,
    smallest_devices,
    with_layout,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
A100 = CHIPS["A100-80"]
SMALL = Config(
    model=ModelConfig(
        num_layers=6,
        hidden_size=384,
        num_attention_heads=4,
        vocab_size=1024,
        max_position_embeddings=256,
    ),
    train=TrainConfig(global_batch_size=12),
)


def configured(name, *changes):
    return load_config(f"{CONFIGS}/{name}", changes)


def _every_layout(job, devices):
    """Return every layout that validate, the sizes of tensors and the search admit, by brute
    force."""
    config = job.config
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    for mesh in itertools.product((1, 2, 3, 6), sizes, sizes, (1, 2, 4)):
        schedules = [
            ("1f1b", 1, None),
            *(
                ("circular", rounds, flush)
                for rounds in (1, 2, 3, 6)
                for flush in (None, mesh[0], 2 * mesh[0], 4 * mesh[0])
            ),
        ]
        if math.prod(mesh) != devices:
            continue
        for zero, micro, how in itertools.product(
            (0, 1, 3), (1, 2, 3, 4, 6, 12), schedules if mesh[0] > 1 else [("circular", 1, None)]
        ):
            layout = Layout(*mesh, zero, *how, micro, "full")
            try:
                validate(with_layout(config, layout))
                job.memory(layout)
            except ValueError:
                continue
            yield from (layout._replace(recompute=policy) for policy in POLICIES)


def test_the_search_splits_experts_where_that_is_the_way_to_fit():
    moe = dataclasses.replace(SMALL.model, moe=MoEConfig(4, 2))
    job = Job(dataclasses.replace(SMALL, model=moe), A100)
    found = search(job, 4)
    assert {estimate.layout.expert for estimate in found} == {1, 2, 4}
    split = next(estimate.layout for estimate in found if estimate.layout.expert == 4)
    assert split.devices == 4 and "--set=mesh.expert=4" in flags_of(job.config, split)
    for estimate in found:
        validate(with_layout(job.config, estimate.layout))


def test_the_search_finds_the_fastest_layouts():
    job = Job(SMALL, A100)
    devices = 6
    every = list(_every_layout(job, devices))
    sizes = sorted(sum(job.memory(layout).values()) for layout in every)
    for share in (1.0, 0.5, 0.2):  # of the layouts fit in memory
        job.room = sizes[int(share * (len(sizes) - 1))]
        best = {}
        for estimate in (job.estimate(layout) for layout in every if job.fits(layout)):
            mesh = estimate.layout.mesh
            seconds = estimate.step_seconds
            best[mesh] = min(seconds, best.get(mesh, seconds))
        found = {
            estimate.layout.mesh: estimate.step_seconds
            for estimate in search(job, devices)
            if estimate.layout.devices == devices
        }
        assert len(best) > 4 and found == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(
    ("chips", "devices"), [pytest.param("H100", 1024, marks=pytest.mark.slow), ("v5p", 1024)]
)
def test_layouts_found_are_valid_fit_and_are_sorted(chips, devices):
    config = configured("mtnlg_530b.py")
    job = Job(config, CHIPS[chips])
    found = search(job, devices)
    assert len(found) > 10
    seconds = [estimate.step_seconds for estimate in found]
    assert seconds == sorted(seconds) and len({estimate.layout.mesh for estimate in found}) == len(
        found
    )
    for estimate in found:
        assert estimate.bytes <= 0.9 * CHIPS[chips].memory and estimate.layout.devices <= devices
        validate(with_layout(config, estimate.layout))
        assert job.estimate(estimate.layout) == estimate


def test_the_flags_reproduce_the_layout():
    config = configured("mtnlg_530b.py")
    for estimate in search(Job(config, CHIPS["H100"]), 1024)[:5]:
        flags = [flag.removeprefix("--set=") for flag in flags_of(config, estimate.layout)]
        assert override(config, *flags) == with_layout(config, estimate.layout)
        assert flags and all(override(config, flag) != config for flag in flags)


def test_the_mesh_of_the_paper_is_among_the_first():
    found = search(Job(configured("mtnlg_530b.py", "train.rampup_batch_size=None"), A100), 2240)
    assert (35, 8, 1, 8) in [estimate.layout.mesh for estimate in found[:3]]


@pytest.mark.parametrize(
    "name",
    ["1.7b", "3.6b", "7.5b", "18.4b", "39.1b", "76.1b", "145.6b", "310.1b", "529.6b", "1008b"],
)
def test_each_mesh_of_the_ladder_fits_its_gpus(name):
    config = configured(f"ladder.py:{name}")
    mesh = config.mesh
    assert fastest_on(Job(config, A100), (mesh.pipe, mesh.data, mesh.context, mesh.tensor))


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        pytest.param("1008b", 3072, marks=pytest.mark.slow),
        pytest.param("529.6b", 2520, marks=pytest.mark.slow),
    ],
)
def test_the_largest_meshes_of_the_ladder_are_within_two_percent(name, devices):
    config = configured(f"ladder.py:{name}")
    mesh = config.mesh
    job = Job(config, A100)
    own = fastest_on(job, (mesh.pipe, mesh.data, mesh.context, mesh.tensor))
    assert own.step_seconds <= 1.02 * search(job, devices)[0].step_seconds


@pytest.mark.slow
def test_the_smallest_number_of_chips_is_found():
    job = Job(configured("mtnlg_530b.py"), CHIPS["v5e"])
    enough = smallest_devices(job)
    assert search(job, enough) and not search(job, enough - 1)
    assert leanest(job, enough).bytes <= job.room < leanest(job, enough - 1).bytes


def test_a_job_that_never_fits_has_no_number_of_chips():
    job = Job(configured("mtnlg_530b.py"), dataclasses.replace(A100, memory=1e6))
    assert smallest_devices(job, limit=64) is None


def test_a_job_that_does_not_fit_has_no_layout():
    assert search(Job(configured("mtnlg_530b.py"), CHIPS["v5e"]), 256) == []


def test_an_invalid_mesh_has_no_layout():
    assert (
        fastest_on(Job(SMALL, A100), (4, 1, 1, 1)) is None
        and fastest_on(Job(SMALL, A100), (1, 1, 1, 3)) is None
    )


def test_efficiency_is_recovered_from_a_measured_time():
    config = configured("mtnlg_530b.py")
    layout = Layout(35, 8, 1, 8, 1, "1f1b", 1, None, 1, "none")
    for efficiency in (0.2, EFFICIENCY, 0.9):
        seconds = Job(config, A100, efficiency).estimate(layout).step_seconds
        assert measured_efficiency(Job(config, A100), layout, seconds) == pytest.approx(
            efficiency, rel=1e-6
        )
    with pytest.raises(
        ValueError,
        match="^1 s a step is outside what this chip can do, 3.* s and more; is it the",
    ):
        measured_efficiency(Job(config, A100), layout, 1.0)
