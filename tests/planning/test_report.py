"""Check the report of a measurement, and the suggestions for one that does not fit."""

import dataclasses
import types
from pathlib import Path

import pytest

from mtnlg_jax.config import load_config
from mtnlg_jax.hardware import CHIPS, size_of
from mtnlg_jax.planning import aot, suggest
from mtnlg_jax.planning.aot import Measurement
from mtnlg_jax.planning.decode_bound import bound_of
from mtnlg_jax.planning.hlo import Tensor
from mtnlg_jax.planning.hlo_cost import Collective, Kernel
from mtnlg_jax.planning.report import render
from mtnlg_jax.planning.topology import GIB, parse

ROOT = Path(__file__).resolve().parents[2]
POD = [
    "mesh.pipe=1",
    "mesh.data=128",
    "mesh.zero=3",
    "train.rampup_batch_size=none",
    "train.recompute=full",
]


def config(*changes):
    return load_config(str(ROOT / "configs/mtnlg_530b.py"), changes)


def measurement(**changes):
    """Return a measurement with real shapes and invented numbers."""
    state = "state.params['blocks']['attention']['w_q_DNH'].value"
    tensors = [
        Tensor(3 * GIB // 2, "f32[105,160]", "argument", 3, state),
        Tensor(2**20, "bf16[8]", "loop", 12, "jit(step)/shard_map/while/body/jvp()/mul"),
    ]
    collectives = [
        Collective("all-gather", ("data",), 128, 2, 18900.0, 2.5 * GIB),
        Collective("all-reduce", ("data", "tensor"), 1024, 0, 1.0, 64.0),
        Collective("all-to-all", ("data",), 16, 1, 2.0, 3e6),
    ]
    found = Measurement(
        "v5p:8x8x16",
        1024,
        {"pipe": 1, "data": 128, "context": 1, "tensor": 8},
        "train",
        15,
        "libtpu 1.2",
        96 * GIB,
        "",
        None,
        int(6.5 * GIB),
        6 * GIB,
        [[state, GIB // 8]],
        16 * GIB,
        38 * 2**20,
        24 * GIB,
        1.5e16,
        collectives,
        4,
        tensors,
        0.05,
        1.04,
        32.96,
        int(1.5 * GIB),
        [Kernel("attention_forward", 2, 3150.0), Kernel("attention_backward", 2, 1575.0)],
        ["--xla_a=true", "--xla_b=1"],
        "",
        30.04,
    )
    return dataclasses.replace(found, **changes)


GOLDEN = """\
mtnlg_530b: train step on v5p:8x8x16, 1,024 devices, libtpu 1.2
layout       pipe 1 x data 128 x context 1 x tensor 8, zero 3, recompute full, 15 micro-batches, \
1 row a data shard
flags        --xla_a=true --xla_b=1
verdict      FITS: peak 24.00 GiB of 96.00 GiB a device, 72.00 GiB (75%) to spare
memory       arguments 6.50 GiB, temporaries 16.00 GiB, code 38.00 MiB; peak 24.00 GiB a device
padding      512.00 MiB of the arguments (8.3%), tiles that dims do not fill; the most in \
params.blocks.attention.w_q_DNH 128.00 MiB
largest      size of one, how many in the program, held as, shape, the first one's origin
               1.50 GiB  x3   argument   f32[105,160]  params.blocks.attention.w_q_DNH
               1.00 MiB  x12  loop       bf16[8]  while/jvp()/mul
products     1.5e+16 FLOPs a device and step; 4 loops know their trips only at run time: counted \
for the full batch and \
causal attention
kernels      attention_forward 3,150 times, attention_backward 1,575 times a device and step
collectives  kind               axes           loops     times        sent  a device and step
             all-gather         data               2    18,900    2.50 GiB
             all-reduce         data+tensor        0         1        64 B
             all-to-all         data:16            1         2    2.86 MiB
compiler's   estimate 0.0500 s, which counts the body of each loop once: not a step time
took         1.0 s to trace, 33.0 s to compile (30.0 s of processor time), 1.50 GiB of this \
machine's memory"""


def test_the_report_of_a_measurement():
    assert render(config(*POD), measurement()) == GOLDEN


def test_a_step_of_decoding_has_a_bound():
    chip = CHIPS["v5p"]
    m = measurement(
        step="decode",
        topology="v5p:2x4x4",
        devices=32,
        mesh={"data": 4, "tensor": 8},
        arguments_exact=int(chip.memory_speed / 1000),  # 1 ms a token, 8 tokens a call
        flops=chip.flops / 1000,
        collectives=[Collective("all-reduce", ("tensor",), 8, 1, 1.0, chip.fast * 2e-3)],
        weights="int8",
    )
    bound = bound_of(config(*POD), m)
    assert (bound.read, bound.products, bound.sent) == pytest.approx((8e-3, 1e-3, 2e-3))
    assert bound.tokens == 4 * 8
    assert bound.tokens_per_second == pytest.approx(32 / 10e-3 / 32)
    text = render(config(*POD), m)
    assert "8 tokens, 1 row a data shard, weights int8\n" in text
    assert "at best      10.00 ms a call: reads 8.00, products 1.00, sends 2.00; at most" in text
    assert bound_of(config(*POD), measurement()) is None  # a train step has a prediction
    # All weights are read once for a whole prompt.
    prefill = bound_of(config(*POD), dataclasses.replace(m, step="prefill"))
    assert prefill.read == pytest.approx(1e-3) and prefill.tokens == 4 * 2048
    # Groups beyond a node use its slow network.
    cards = dataclasses.replace(m, topology="A100:4x8")
    wide = dataclasses.replace(m.collectives[0], group=32)
    slow = bound_of(config(*POD), dataclasses.replace(cards, collectives=[wide]))
    assert slow.sent > 10 * bound_of(config(*POD), cards).sent


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        (
            {"peak": 100 * GIB},
            "DOES NOT FIT: 100.00 GiB a device (peak) of 96.00 GiB, 4.00 GiB too much",
        ),
        (
            {"failure": "out of memory", "needed": 97 * GIB},
            "DOES NOT FIT: 97.00 GiB a device (at least, by the compiler's "
            "first estimate) of 96.00 GiB, 1.00 GiB too much",
        ),
        (
            {"failure": "the compiler ended with SIGABRT: Check failed"},
            "UNKNOWN: the compiler ended with SIGABRT: Check failed",
        ),
        (
            {"limit": None},
            "compiles, peak 24.00 GiB a device; the memory of a device is not known "
            "(give --memory=GIB)",
        ),
        (
            {"topology": "H100:1x8", "peak": 80 * GIB},
            "FITS: peak 80.00 GiB of 96.00 GiB a device, 16.00 GiB (17%) to "
            "spare; set XLA_PYTHON_CLIENT_MEM_FRACTION=0.85",
        ),
    ],
)
def test_verdicts(changes, verdict):
    assert f"verdict      {verdict}\n" in render(config(*POD), measurement(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"flags": []}, "none"),
        ({"flags": [], "flags_left_out": "refused"}, "none; refused"),
        (
            {"flags": ["--xla_a=1"], "flags_left_out": "some are refused"},
            "--xla_a=1; some are refused",
        ),
    ],
)
def test_the_report_lists_the_compiler_flags(changes, said):
    assert f"\nflags        {said}\n" in render(config(*POD), measurement(**changes))
    failed = measurement(**changes, failure="out of memory", needed=97 * GIB)
    assert f"\nflags        {said}\n" in render(config(*POD), failed)


def test_a_missing_estimate_is_reported_as_none():
    assert "estimate of the step's time: none" in render(
        config(*POD), measurement(compiler_seconds=None)
    )


def test_a_pipeline_names_its_schedule():
    page = render(
        config("mesh.schedule=1f1b"),
        measurement(mesh={"pipe": 35, "data": 8, "context": 1, "tensor": 8}),
    )
    assert "tensor 8, zero 0, 1f1b, recompute elementwise, 15 micro-batches" in page


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (-3 * GIB, "-3.00 GiB")]
)
def test_sizes_use_the_largest_fitting_unit(size, text):
    assert size_of(size) == text


def test_the_memory_of_the_host_is_told_where_a_step_takes_some():
    text = render(config(*POD), measurement(host=7 * GIB))
    assert "\nhost         7.00 GiB of the host's memory for each device\n" in text
    assert "\nhost " not in render(config(*POD), measurement())


@pytest.mark.parametrize(("platform", "peak"), [("tpu", 11), ("cuda", 20)])
def test_the_peak_of_a_tpu_is_that_of_its_own_memory(platform, peak):
    # As libtpu 0.0.50 reports a step with arguments and temporaries on the host.
    sizes = types.SimpleNamespace(
        argument_size_in_bytes=3,
        temp_size_in_bytes=9,
        generated_code_size_in_bytes=1,
        output_size_in_bytes=3,
        alias_size_in_bytes=3,
        peak_memory_in_bytes=20,
        total_allocation_bytes=12,
        host_argument_size_in_bytes=7,
        host_output_size_in_bytes=7,
        host_alias_size_in_bytes=7,
        host_temp_size_in_bytes=2,
    )
    found = measurement()
    aot._take_memory(found, sizes, platform)
    assert (found.host, found.peak) == (9, peak)


# --- suggestions


def flags(changes):
    return [" ".join(change.flags) for change in changes]


def test_totals_equal_those_of_the_planner():
    parts = suggest.estimate(config(*POD), 1024, "train")
    state = parts["masters"] + parts["moments"]
    assert state == pytest.approx(
        12 * config().model.parameter_count() / 1024, rel=1e-2
    )  # biases are whole
    assert (
        suggest.estimate(config(), 2240, "decode")["weights"]
        == 2 * config().model.parameter_count() / 8
    )


def test_smaller_micro_batches_come_first():
    changes = suggest.suggest(
        config(*POD, "train.micro_batch_size=15"),
        parse("v5p:8x8x16"),
        1024,
        100 * GIB,
        96 * GIB,
        "train",
    )
    assert changes and not flags(changes)[0].startswith("--set=train.micro")  # 15 cannot be halved
    changes = suggest.suggest(
        config(*POD, "train.global_batch_size=2048", "train.micro_batch_size=16"),
        parse("v5p:8x8x16"),
        1024,
        100 * GIB,
        96 * GIB,
        "train",
    )
    assert flags(changes)[0] == "--set=train.micro_batch_size=8"
    assert all(change.predicted <= suggest.MARGIN * 96 * GIB for change in changes)


def test_1f1b_is_suggested_for_a_pipeline_that_holds_too_much():
    circular = config(
        "mesh.zero=1",
        "mesh.schedule=circular",
        "mesh.virtual_pipe=3",
        "train.rampup_batch_size=none",
    )
    changes = suggest.suggest(circular, parse("H100:280x8"), 2240, 110 * GIB, 80 * GIB, "train")
    assert flags(changes)[0] == "--set=mesh.schedule=1f1b --set=mesh.virtual_pipe=1"


def test_sharding_replicated_master_weights_is_suggested():
    changes = suggest.suggest(
        config("mesh.schedule=1f1b"), parse("H100:280x8"), 2240, 110 * GIB, 80 * GIB, "train"
    )
    assert flags(changes)[0] == "--set=mesh.zero=1"


def test_suggestions_are_valid_configs():
    for change in suggest.suggest(
        config(*POD), parse("v5e:16x16*4"), 1024, 40 * GIB, 16 * GIB, "train"
    ):
        assert "pipe=2 " not in " ".join(change.flags)  # 105 layers do not divide
        assert change.predicted <= suggest.MARGIN * 16 * GIB


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ("v5e:16x16", "v5e:16x16*4"),
        ("v6e:8x16", "v6e:16x16*2"),
        ("v5p:8x8x16", "v5p:16x16x16"),
        ("H100:2x8", "H100:8x8"),
    ],
)
def test_a_topology_grows_to_existing_shapes(small, large):
    assert str(suggest._grown(parse(small), 4)) == large


def test_suggestions_are_measured_in_order(monkeypatch):
    tried = []

    def measured(config, topology, step, target_config=None, memory=None, flags=True):
        tried.append((config.train.micro_batch_size, str(topology), flags))
        return measurement(peak=(97 if len(tried) == 1 else 50) * GIB)

    monkeypatch.setattr(suggest, "measure", measured)
    big = config(*POD, "train.global_batch_size=2048", "train.micro_batch_size=16")
    said = list(
        suggest.way_out(big, parse("v5p:8x8x16"), measurement(peak=120 * GIB), None, None, 2, False)
    )
    assert tried == [(8, "v5p:8x8x16", False), (4, "v5p:8x8x16", False)]
    assert said[0].startswith("by sums      layers ")
    assert said[1].startswith(
        "tried        --set=train.micro_batch_size=8: 97.00 GiB a device, still too much ("
    )
    assert said[2] == (
        "way out      --set=train.micro_batch_size=4: compiled, FITS with a peak of 50.00 GiB of "
        "96.00 GiB a device"
    )


def test_a_failed_compilation_is_repeated_for_a_chip_with_more_memory(monkeypatch):
    monkeypatch.setattr(
        suggest, "measure", lambda config, topology, *_, flags: measurement(topology=str(topology))
    )
    failed = measurement(topology="v5e:16x16*4", failure="HbmOom", needed=70 * GIB, limit=16 * GIB)
    said = list(suggest.way_out(config(*POD), parse("v5e:16x16*4"), failed, None, None, 0))
    assert (
        said[0]
        == "to blame     on v5p:8x16x8, where it compiles, the step's peak is 24.00 GiB a device"
    )
    assert "f32[105,160]  params.blocks.attention.w_q_DNH" in said[2]


@pytest.mark.parametrize(
    ("devices", "dims"), [(4, (2, 2, 1)), (256, (8, 8, 4)), (1024, (8, 16, 8)), (2240, None)]
)
def test_the_substitute_topology_has_as_many_devices(devices, dims):
    roomy = suggest._roomy(devices)
    assert roomy.chips == devices and not (roomy.dims[0] % 2 or roomy.dims[1] % 2)
    assert dims in (None, roomy.dims)
    assert suggest._roomy(6) is None
