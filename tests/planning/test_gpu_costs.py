"""Rooflines of a GPU, worked out by hand."""

import pytest

from mtnlg_jax.hardware import CHIPS
from mtnlg_jax.planning.gpu_costs import (
    FLOAT32_SHARE,
    KERNEL_SHARE,
    LATENCY,
    LAUNCH,
    LINK_SHARE,
    MEMORY_SHARE,
    PRODUCT_SHARE,
    GpuCosts,
)
from mtnlg_jax.planning.hlo import Program
from mtnlg_jax.planning.timeline import Timeline, Transfer

CHIP = CHIPS["H100"]
MESH = {"data": 16}


DIMS = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"


def step_of(*lines: str, given: str = "bf16") -> Timeline:
    text = f"""HloModule m, is_scheduled=true

%product (a: {given}[64,64], b: {given}[64,64]) -> {given}[64,64] {{
  %a = {given}[64,64]{{1,0}} parameter(0)
  %b = {given}[64,64]{{1,0}} parameter(1)
  ROOT %d = {given}[64,64]{{1,0}} dot(%a, %b), {DIMS}
}}

ENTRY %main (x: {given}[64,64]) -> {given}[64,64] {{
  %x = {given}[64,64]{{1,0}} parameter(0)
"""
    return Timeline(Program(text + "\n".join(lines) + "\n}\n"), MESH, GpuCosts(CHIP, 8))


PRODUCT = "  %f = GIVEN[64,64]{1,0} fusion(%x, %x), kind=kCustom, calls=%product"


@pytest.mark.parametrize(
    "given, share, size", [("bf16", PRODUCT_SHARE, 2), ("f32", FLOAT32_SHARE, 4)]
)
def test_fusion_takes_the_longer_of_its_products_and_its_bytes(given, share, size):
    seconds = step_of(PRODUCT.replace("GIVEN", given), given=given).step.seconds
    products = 2 * 64**3 / (share * CHIP.flops)
    moved = 3 * 64 * 64 * size / (MEMORY_SHARE * CHIP.memory_speed)
    assert seconds == pytest.approx(LAUNCH + max(products, moved))


SLICED = """HloModule m, is_scheduled=true

%slice (stack: bf16[24,64,64], at: s32[]) -> bf16[1,64,64] {
  %stack = bf16[24,64,64]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = bf16[1,64,64]{2,1,0} dynamic-slice(%stack, %at, %zero, %zero), \
    dynamic_slice_sizes={1,64,64}
}

%update (stack: bf16[24,64,64], part: bf16[1,64,64], at: s32[]) -> bf16[24,64,64] {
  %stack = bf16[24,64,64]{2,1,0} parameter(0)
  %part = bf16[1,64,64]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %u = bf16[24,64,64]{2,1,0} dynamic-update-slice(%stack, %part, %at, %zero, %zero)
}

ENTRY %main (x: bf16[24,64,64], at: s32[]) -> bf16[24,64,64] {
  %x = bf16[24,64,64]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %read = ((bf16[24,64,64]{2,1,0}, s32[]), bf16[1,64,64]{2,1,0}, u32[]) fusion-start(%x, %at), \
kind=kLoop, calls=%slice
  %part = bf16[1,64,64]{2,1,0} fusion-done(%read)
  %write = ((bf16[24,64,64]{2,1,0}, bf16[1,64,64]{2,1,0}, s32[]), bf16[24,64,64]{2,1,0}, u32[]) \
fusion-start(%x, %part, %at), kind=kLoop, calls=%update
  ROOT %y = bf16[24,64,64]{2,1,0} fusion-done(%write)
}
"""


def test_asynchronous_slices_move_the_slice_alone():
    # The shape of a start has the operands, too: the whole stack.
    moved = 2 * 2 * 64 * 64 * 2  # read and written, once out of the stack and once into it
    step = Timeline(Program(SLICED), MESH, GpuCosts(CHIP, 8)).step
    speed = MEMORY_SHARE * CHIP.memory_speed
    assert step.seconds == pytest.approx(2 * LAUNCH + moved / speed, rel=1e-4)


RESHAPED = """HloModule m, is_scheduled=true

%part (stack: bf16[24,64,64], rows: bf16[64,64]) -> bf16[1,64,64] {
  %stack = bf16[24,64,64]{2,1,0} parameter(0)
  %rows = bf16[64,64]{1,0} parameter(1)
  %flat = bf16[1536,64]{1,0} bitcast(%stack)
  %first = bf16[64,64]{1,0} slice(%flat), slice={[0:64], [0:64]}
  %sum = bf16[64,64]{1,0} add(%first, %rows)
  ROOT %s = bf16[1,64,64]{2,1,0} bitcast(%sum)
}

%into (stack: bf16[24,64,64], part: bf16[1,64,64], at: s32[]) -> bf16[1536,64] {
  %stack = bf16[24,64,64]{2,1,0} parameter(0)
  %flat = bf16[1536,64]{1,0} bitcast(%stack)
  %part = bf16[1,64,64]{2,1,0} parameter(1)
  %rows = bf16[64,64]{1,0} bitcast(%part)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %u = bf16[1536,64]{1,0} dynamic-update-slice(%flat, %rows, %at, %zero)
}

ENTRY %main (x: bf16[24,64,64], y: bf16[64,64], at: s32[]) -> bf16[1536,64] {
  %x = bf16[24,64,64]{2,1,0} parameter(0)
  %y = bf16[64,64]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %read = bf16[1,64,64]{2,1,0} fusion(%x, %y), kind=kLoop, calls=%part
  ROOT %write = bf16[1536,64]{1,0} fusion(%x, %read, %at), kind=kLoop, calls=%into
}
"""


def test_slices_of_reshaped_arrays_move_the_slice_alone():
    moved = (3 + 2) * 64 * 64 * 2  # two read and one written; one read and one written in place
    step = Timeline(Program(RESHAPED), MESH, GpuCosts(CHIP, 8)).step
    speed = MEMORY_SHARE * CHIP.memory_speed
    assert step.seconds == pytest.approx(2 * LAUNCH + moved / speed, rel=1e-4)


UPDATED = """HloModule m, is_scheduled=true

%added (sums: f32[24,64], stack: f32[24,64], part: f32[1,64]) -> f32[24,64] {
  %sums = f32[24,64]{1,0} parameter(0)
  %stack = f32[24,64]{1,0} parameter(1)
  %part = f32[1,64]{1,0} parameter(2)
  %at = s32[] constant(23)
  %zero = s32[] constant(0)
  %u = f32[24,64]{1,0} dynamic-update-slice(%stack, %part, %at, %zero)
  ROOT %a = f32[24,64]{1,0} add(%sums, %u)
}

%padded (part: f32[1,64]) -> f32[24,64] {
  %part = f32[1,64]{1,0} parameter(0)
  %at = s32[] constant(23)
  %zero = s32[] constant(0)
  %none = f32[] constant(0)
  %zeros = f32[24,64]{1,0} broadcast(%none), dimensions={}
  ROOT %u = f32[24,64]{1,0} dynamic-update-slice(%zeros, %part, %at, %zero)
}

%converted (stack: f32[24,64]) -> bf16[1,64] {
  %stack = f32[24,64]{1,0} parameter(0)
  %short = bf16[24,64]{1,0} convert(%stack)
  ROOT %s = bf16[1,64]{1,0} slice(%short), slice={[23:24], [0:64]}
}

%cast (stack: f32[24,64]) -> bf16[24,64] {
  %stack = f32[24,64]{1,0} parameter(0)
  ROOT %short = bf16[24,64]{1,0} convert(%stack)
}

ENTRY %main (x: f32[24,64], y: f32[24,64], part: f32[1,64]) -> f32[24,64] {
  %x = f32[24,64]{1,0} parameter(0)
  %y = f32[24,64]{1,0} parameter(1)
  %part = f32[1,64]{1,0} parameter(2)
  %sum = f32[24,64]{1,0} fusion(%x, %y, %part), kind=kLoop, calls=%added
  %last = bf16[1,64]{1,0} fusion(%x), kind=kLoop, calls=%converted
  %short = bf16[24,64]{1,0} fusion(%x), kind=kLoop, calls=%cast
  ROOT %pad = f32[24,64]{1,0} fusion(%part), kind=kLoop, calls=%padded
}
"""


# Updates that are not in place write the whole array; a slice is read before it is converted.
@pytest.mark.parametrize(
    ("name", "rows"),
    [("sum", 24 + 24 + 1 + 24), ("pad", 1 + 24), ("last", 1 + 0.5), ("short", 24 + 12)],
)
def test_updates_elsewhere_and_converted_slices(name, rows):
    program = Program(UPDATED)
    fusion = program.index("main")[name]
    seconds = GpuCosts(CHIP, 8).compute(program, "main", fusion, 0)
    moved = rows * 64 * 4
    assert seconds - LAUNCH == pytest.approx(moved / (MEMORY_SHARE * CHIP.memory_speed), rel=1e-3)


KERNEL = """HloModule m, is_scheduled=true

%sliced (stack: bf16[24,64,64], at: s32[]) -> bf16[64,64] {
  %stack = bf16[24,64,64]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %s = bf16[1,64,64]{2,1,0} dynamic-slice(%stack, %at, %zero, %zero), \
dynamic_slice_sizes={1,64,64}
  %q = bf16[64,64]{1,0} bitcast(%s)
  ROOT %k = bf16[64,64]{1,0} custom-call(%q), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(f)/attention_dq:2000000000000flops/mosaic"}
}

ENTRY %main (x: bf16[24,64,64], at: s32[]) -> bf16[64,64] {
  %x = bf16[24,64,64]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %f = bf16[64,64]{1,0} fusion(%x, %at), kind=kCustom, calls=%sliced
}
"""


def test_kernel_that_slices_are_fused_to_counts_as_a_kernel():
    costs = GpuCosts(CHIP, 8)
    step = Timeline(Program(KERNEL), MESH, costs).step
    assert step.classes == {
        "attention kernels": pytest.approx(LAUNCH + 2e12 / (KERNEL_SHARE * CHIP.flops))
    }
    assert list(costs.assumed) == ["attention_dq"]


def group(first: int, stride: int, size: int) -> str:
    return "replica_groups={{" + ",".join(str(first + stride * n) for n in range(size)) + "}}"


@pytest.mark.parametrize(
    "groups, size, speed, lane",
    [
        (group(0, 1, 8), 8, CHIP.fast, "NVLink data"),
        (group(0, 8, 2), 2, CHIP.slow, "network data"),
        (group(0, 4, 4), 4, 2 * CHIP.slow, "network data"),  # two of a node share its cards
        (group(0, 1, 16), 16, 8 * CHIP.slow, "network data"),
    ],
)
def test_rings_leave_a_node_over_the_cards_of_their_members(groups, size, speed, lane):
    costs = GpuCosts(CHIP, 8)
    gather = Transfer("all-gather", "data", size, 1000, groups)
    moved = 1000 * size * (size - 1) / size
    assert costs.transfer(gather) == pytest.approx(LATENCY + moved / (LINK_SHARE * speed))
    assert costs.lane(gather) == lane


def test_synchronous_start_stops_computing():
    lines = (
        "  %g = (bf16[64,64]{1,0}, bf16[1024,64]{1,0}) all-gather-start(%x), dimensions={0}, "
        f'{group(0, 1, 16)}, backend_config={{"collective_backend_config":{{"is_sync":SYNC}}}}',
        PRODUCT.replace("GIVEN", "bf16"),
        "  %d = bf16[1024,64]{1,0} all-gather-done(%g)",
    )
    apart = step_of(*(line.replace("SYNC", "true") for line in lines)).step
    beside = step_of(*(line.replace("SYNC", "false") for line in lines)).step
    gather = apart.classes["all-gather data"]
    product = apart.classes["products"]
    assert apart.seconds == pytest.approx(gather + product)
    assert beside.seconds == pytest.approx(max(gather, product))
