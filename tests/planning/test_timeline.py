"""Hand-made schedules, whose seconds can be added up by hand."""

import json

import pytest

from mtnlg_jax.hardware import CHIPS
from mtnlg_jax.planning import hlo_cost, torus, tpu_costs
from mtnlg_jax.planning.cycles import cycles_of
from mtnlg_jax.planning.hlo import Program
from mtnlg_jax.planning.source_lines import SourceLines
from mtnlg_jax.planning.timeline import Timeline, Transfer
from mtnlg_jax.planning.trace import events_of, write_trace

MESH = {"data": 2, "tensor": 2}


class OneSecond:
    """A cycle takes a second; a transfer takes a second for 4 bytes of its operands."""

    def compute(self, program, computation, instruction, flops):
        return float(cycles_of(instruction.attributes) or 0)

    def transfer(self, transfer):
        return transfer.given / 4

    def lane(self, transfer):
        return f"links of {transfer.axes}" if transfer.axes else transfer.kind


def work(name: str, seconds: int, operands: str = "%x", more: str = "") -> str:
    return (
        f"  %{name} = f32[8]{{0}} fusion({operands}), kind=kLoop, calls=%inner{more}, "
        f'backend_config={{"estimated_cycles":"{seconds}"}}'
    )


INNER = """
%inner (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%a)
}
"""
DATA = "replica_groups={{0,2},{1,3}}"
TENSOR = "replica_groups={{0,1},{2,3}}"


def program(*lines: str, before: str = "") -> Program:
    head = "HloModule m, is_scheduled=true\n" + INNER + before
    entry = "ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n"
    return Program(head + "\n" + entry + "\n".join(lines) + "\n}\n")


def simulate(*lines: str, before: str = "", trips=lambda depth: 1) -> Timeline:
    return Timeline(program(*lines, before=before), MESH, OneSecond(), trips)


GATHER = (
    "  %g = (f32[8]{0}, f32[16]{0}) all-gather-start(%x), dimensions={0}, " + DATA,
    "  %d = f32[16]{0} all-gather-done(%g)",
)


def test_started_collective_hides_behind_computing():
    # 32 bytes take 8 seconds, of which 5 pass during a.
    step = simulate(GATHER[0], work("a", 5), GATHER[1], work("b", 2)).step
    assert step.seconds == 5 + 3 + 2
    assert step.classes == {"outside loops": 7, "wait all-gather data": 3}


def test_started_collective_that_is_ready_costs_nothing():
    step = simulate(GATHER[0], work("a", 9), GATHER[1]).step
    assert step.seconds == 9
    assert not step.waits


def test_synchronous_collective_stops_computing():
    step = simulate(
        work("a", 5), f"  %s = f32[8]{{0}} all-reduce(%x), {TENSOR}, to_apply=%inner"
    ).step
    assert step.seconds == 5 + 8
    assert step.classes["all-reduce tensor"] == 8


def test_synchronous_collective_shares_busy_links():
    # The gather needs 8 seconds, the sum 8: side by side both end after 16.
    total = f"  %s = f32[8]{{0}} all-reduce(%x), {DATA}, to_apply=%inner"
    step = simulate(GATHER[0], total, GATHER[1]).step
    assert step.classes == {"all-reduce data": 16}
    # After 6 seconds of computing the gather lacks 2, which take 4 beside the sum.
    step = simulate(GATHER[0], work("a", 6), total, work("b", 1), GATHER[1]).step
    assert step.classes == {"outside loops": 7, "all-reduce data": 10}
    # A short sum ends first, and delays the gather by as much as it takes.
    short = f"  %y = f32[2]{{0}} slice(%x), slice={{[0:2]}}\n{total.replace('%x', '%y')}"
    step = simulate(GATHER[0], short, GATHER[1]).step
    assert step.classes == {"all-reduce data": 4, "wait all-gather data": 6}


def test_collectives_over_other_axes_use_other_links():
    other = (
        "  %h = (f32[8]{0}, f32[16]{0}) all-gather-start(%x), dimensions={0}, " + TENSOR,
        "  %e = f32[16]{0} all-gather-done(%h)",
    )
    apart = simulate(GATHER[0], other[0], GATHER[1], other[1]).step
    same = simulate(GATHER[0], other[0].replace(TENSOR, DATA), GATHER[1], other[1]).step
    assert apart.seconds == 8
    assert same.seconds == 16


def test_sparsecore_takes_operands_with_the_first_update():
    before = f"""
%called (p: f32[8]) -> f32[16] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %ag = f32[16]{{0}} all-gather(%p), dimensions={{0}}, {DATA}
}}
"""
    asynchronous = 'async_execution_thread="sparsecore"'
    step = simulate(
        f"  %s = ((), (), s32[1]) call-start(), {asynchronous}, to_apply=%called",
        work("a", 3),
        "  %u = ((f32[8]{0}), f32[16]{0}) call-update(%s, %x)",
        work("b", 6),
        "  %v = ((f32[8]{0}), f32[16]{0}) call-update(%u)",
        "  %d = f32[16]{0} call-done(%v)",
        before=before,
    ).step
    # From the update on: 8 seconds, of which 6 are hidden.
    assert step.seconds == 3 + 6 + 2
    assert step.waits["d"].label == "wait all-gather data"


def test_collective_fused_into_products():
    before = f"""
%begin (p: f32[8]) -> f32[16] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %ag = f32[16]{{0}} all-gather(%p), dimensions={{0}}, {DATA}
}}
"""
    step = simulate(
        "  %async-collective-start.1 = f32[16]{0} fusion(%x), kind=kCustom, calls=%begin",
        work("a", 5),
        "  %async-collective-done.1 = f32[16]{0} fusion(%async-collective-start.1), "
        "kind=kCustom, calls=%inner",
        before=before,
    ).step
    assert step.seconds == 5 + 3


def test_copy_runs_beside_computing():
    step = simulate(
        "  %s = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%x)",
        work("a", 6),
        "  %d = f32[8]{0} copy-done(%s)",
    ).step
    assert step.seconds == 8
    assert step.classes["wait copy"] == 2


def test_copy_to_the_host_has_a_lane_of_its_own():
    step = simulate(
        "  %s = (f32[8]{0:S(5)}, f32[8]{0}, u32[]) copy-start(%x)",
        "  %t = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%x)",
        "  %d = f32[8]{0} copy-done(%t)",
        "  %e = f32[8]{0:S(5)} copy-done(%s)",
    ).step
    assert step.seconds == 8
    assert {event.lane for event in step.events} == {"compute", "copy", "host copy"}


def test_copy_of_a_slice_moves_the_slice():
    big = "  %big = f32[100,8]{1,0} broadcast(%x), dimensions={1}\n  %i = s32[] constant(0)\n"
    read = simulate(
        big + "  %s = ((f32[100,8]{1,0:S(5)}, s32[]), f32[1,8]{1,0}, u32[]) "
        "dynamic-slice-start(%big, %i, %i), dynamic_slice_sizes={1,8}",
        "  %d = f32[1,8]{1,0} dynamic-slice-done(%s)",
    ).step
    write = simulate(
        big + "  %s = ((f32[100,8]{1,0:S(5)}, f32[8]{0}, s32[]), f32[100,8]{1,0:S(5)}, u32[]) "
        "dynamic-update-slice-start(%big, %x, %i, %i)",
        "  %d = f32[100,8]{1,0:S(5)} dynamic-update-slice-done(%s)",
    ).step
    assert read.classes == write.classes == {"wait host copy": 8}


def test_reduce_scatter_written_as_a_fusion():
    before = f"""
%scattered (p: f32[8]) -> f32[4] {{
  %p = f32[8]{{0}} parameter(0)
  %ar = f32[8]{{0}} all-reduce(%p), {DATA}, to_apply=%inner
  ROOT %ds = f32[4]{{0}} slice(%ar), slice={{[0:4]}}
}}
"""
    step = simulate(
        "  %all-reduce-scatter.1 = f32[4]{0} fusion(%x), kind=kCustom, calls=%scattered",
        before=before,
    ).step
    assert step.classes == {"reduce-scatter data": 8}


def loop(trips: int, inside: str, name: str = "body", step: int = 1) -> tuple[str, str]:
    """Return (computations, line) of a loop whose counter goes by ``step``."""
    state = "(s32[], f32[8]{0})"
    return (
        f"""
%{name} (t: {state}) -> {state} {{
  %t = {state} parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8]{{0}} get-tuple-element(%t), index=1
{inside}
  %by = s32[] constant({step})
  %next = s32[] add(%i, %by)
  ROOT %r = {state} tuple(%next, %x)
}}

%{name}_until (t: {state}) -> pred[] {{
  %t = {state} parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %end = s32[] constant({trips * step})
  ROOT %c = pred[] compare(%i, %end), direction=LT
}}
""",
        f"  %{name}_zero = s32[] constant(0)\n"
        f"  %{name}_init = {state} tuple(%{name}_zero, %x)\n"
        f"  %{name}_loop = {state} while(%{name}_init), condition=%{name}_until, body=%{name}",
    )


@pytest.mark.parametrize("step", [1, 2])
def test_loops_count_as_often_as_they_run(step):
    inner, inner_line = loop(3, work("a", 2), "inside", step)
    outer, outer_line = loop(5, "\n".join([work("b", 1), inner_line]), "outside")
    timeline = simulate(outer_line, work("c", 4), before=inner + outer)
    assert timeline.step.seconds == 5 * (1 + 3 * 2) + 4
    assert timeline.step.classes == {"element-wise": 35, "outside loops": 4}
    assert not timeline.guessed_loops


def test_waits_of_a_loop_are_counted():
    inside, line = loop(4, "\n".join([GATHER[0], work("a", 6), GATHER[1]]))
    wait = simulate(line, before=inside).step.waits["d"]
    assert (wait.count, wait.seconds, wait.bytes) == (4, 8, 4 * 32)


def test_trips_that_are_known_only_at_run_time_are_asked_for():
    inside, line = loop(4, work("a", 2))
    inside = inside.replace("constant(4)", "parameter(1)")
    timeline = simulate(line, before=inside, trips=lambda depth: 7 if depth == 0 else 100)
    assert timeline.step.seconds == 14
    assert timeline.guessed_loops == {"body_loop"}


def test_costlier_branch_counts():
    before = ""
    for name, seconds in (("short", 2), ("long", 6)):
        before += f"\n%{name} (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n"
        before += work(f"of_{name}", seconds).replace("  %of", "  ROOT %of") + "\n}\n"
    line = (
        "  %p = s32[] constant(0)\n"
        "  %c = f32[8]{0} conditional(%p, %x, %x), branch_computations={%short, %long}"
    )
    assert simulate(line, before=before).step.seconds == 6


PRODUCT = """
%product (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  ROOT %dot = f32[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, META
}
"""


@pytest.mark.parametrize(
    "origin, scope, label",
    [
        ("jit(step)/while/body/dot", "jit(step)/while/body/dot", "products"),
        ("jit(step)/rematted_computation/dot", "jit(step)/add", "products again"),
        ("jit(step)/dot", "jit(step)/optimizer/dot", "optimizer"),
    ],
)
def test_flops_of_each_class_are_the_counted_ones(origin, scope, label):
    before = PRODUCT.replace("META", f'metadata={{op_name="{origin}"}}')
    line = (
        "  %m = f32[8,8]{1,0} broadcast(%x), dimensions={0}\n"
        "  %f = f32[8,8]{1,0} fusion(%m, %m), kind=kOutput, calls=%product, "
        f'metadata={{op_name="{scope}"}}, backend_config={{"estimated_cycles":"3"}}'
    )
    timeline = simulate(line, before=before)
    assert {k: v for k, v in timeline.step.flops.items() if v} == {label: 2 * 8**3}
    assert timeline.step.classes == {label: 3}
    assert sum(timeline.step.flops.values()) == hlo_cost.cost_of(timeline.program, MESH).flops


# --- seconds on a TPU

LINK = 10.0  # bytes/s


def ring_of(size: int, wrapped: bool) -> torus.Torus:
    return torus.Torus(tuple((n,) for n in range(size)), (size,), (wrapped,), LINK, 1.0)


def transfer(kind: str, group: int, given: int, attributes: str = "", axes: str = "data"):
    return Transfer(kind, axes, group, given, attributes)


def test_ring_uses_both_directions():
    # Each of 4 devices receives 3/4 of 400 bytes, over two links of 10 bytes/s.
    gather = transfer("all-gather", 4, 100)
    assert ring_of(4, True).seconds(gather) == pytest.approx(300 / 20)
    assert ring_of(4, False).seconds(gather) == pytest.approx(300 / 10)


def test_sum_moves_twice_what_a_reduce_scatter_moves():
    scatter = ring_of(4, True).seconds(transfer("reduce-scatter", 4, 400))
    assert scatter == pytest.approx(300 / 20)
    assert ring_of(4, True).seconds(transfer("all-reduce", 4, 400)) == 2 * scatter


def plane() -> torus.Torus:
    coords = tuple((x, y) for x in range(4) for y in range(4))
    return torus.Torus(coords, (4, 4), (True, True), LINK, 1.0)


@pytest.mark.parametrize(
    "said, rings",
    [
        ("", 2),
        ('"emitter":"2DAllGatherOnMajorDim"', 2),
        ('"emitter":"1DAllGatherNonMajorDimImbalanced"', 1),
        ('"emitter":"RotatedPincerShortEmitter", StrategyRing{colors:1 cores:16}', 1),
        ('"phase_rings" "phase_rings"', 1),
        ('"phase_rings" "phase_rings" "phase_rings" "phase_rings"', 2),
    ],
)
def test_rings_through_a_plane_are_those_that_the_compiler_chose(said, rings):
    seconds = plane().seconds(transfer("reduce-scatter", 16, 1600, said))
    assert seconds == pytest.approx(1500 / (rings * 2 * LINK))


def test_group_of_every_second_chip_shares_its_links():
    groups = "replica_groups={{0,2},{1,3}}"
    assert ring_of(4, True).seconds(transfer("all-gather", 2, 100, groups)) == pytest.approx(
        100 / (2 * LINK / 2)
    )


def test_part_of_a_ring_is_not_closed():
    groups = "replica_groups={{0,1},{2,3}}"
    assert ring_of(4, True).seconds(transfer("all-gather", 2, 100, groups)) == pytest.approx(
        100 / LINK
    )


def test_permute_uses_one_link():
    pairs = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
    assert ring_of(4, True).seconds(transfer("collective-permute", 4, 100, pairs)) == 10


@pytest.mark.parametrize("size", [4, 16])
def test_all_to_all_passes_a_quarter_of_the_ring(size):
    # Each device sends size pieces of 1/size over size/4 hops in the mean, half of them each way.
    every = transfer("all-to-all", size, 1600)
    assert ring_of(size, True).seconds(every) == pytest.approx(1600 * size / 4 / (2 * LINK))


def test_permute_between_far_devices_takes_its_hops():
    pairs = "source_target_pairs={{0,2},{1,3},{2,0},{3,1}}"
    assert ring_of(4, True).seconds(transfer("collective-permute", 4, 100, pairs)) == 20


def test_collective_of_one_device_is_none():
    line = GATHER[0].replace(DATA, "replica_groups={{0},{1},{2},{3}}")
    assert simulate(line, work("a", 5), GATHER[1]).step.seconds == 5


def test_permutes_in_two_directions_run_at_once():
    chip = CHIPS["v5p"]
    costs = tpu_costs.TpuCosts(chip, ring_of(4, True))
    there = transfer("collective-permute", 4, 1, "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}")
    back = transfer("collective-permute", 4, 1, "source_target_pairs={{0,3},{1,0},{2,1},{3,2}}")
    gather = transfer("all-gather", 4, 1)
    assert len({costs.lane(each) for each in (there, back, gather)}) == 3
    assert costs.lane(there) == "links of data, 0 to 1"


def test_small_collective_takes_its_hops():
    assert ring_of(4, True).seconds(transfer("all-reduce", 4, 0)) == 2 * torus.HOP


def test_traffic_between_slices():
    each = transfer("all-reduce", 2, 100, axes="slices")
    assert ring_of(4, True).seconds(each) == 100


def test_slice_of_an_argument_is_not_the_argument():
    before = """
%sliced (a: f32[100,8], i: s32[]) -> f32[1,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %d = f32[1,8]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,8}
}
"""
    made = program(
        "  %big = f32[100,8]{1,0} broadcast(%x), dimensions={1}",
        "  %i = s32[] constant(0)",
        "  %s = f32[1,8]{1,0} fusion(%big, %i), kind=kLoop, calls=%sliced",
        "  %v = f32[100,8]{1,0:S(1)} fusion(%big), kind=kLoop, calls=%inner",
        before=before,
    )
    entry = made.index(made.entry)
    assert tpu_costs.traffic(made, made.entry, entry["s"]) == 32 + 32 + 4
    assert tpu_costs.traffic(made, made.entry, entry["v"]) == 3200  # S(1) is on the chip


# --- source lines and traces

TABLES = """HloModule m

FileNames
1 "/somewhere/mtnlg_jax/model/mlp.py"
2 "/somewhere/mtnlg_jax/parallel/collectives.py"
3 "/usr/lib/python3/site-packages/jax/_src/api.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=42 end_line=42 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

"""


def test_source_line_is_the_callers_of_a_wrapper():
    sources = SourceLines(TABLES)
    assert sources.of("metadata={stack_frame_id=3}") == "mtnlg_jax/model/mlp.py:42"
    assert sources.of("metadata={}") == ""
    assert SourceLines("").of("metadata={stack_frame_id=3}") == ""


def test_trace_shows_a_loop_once_and_its_turns(tmp_path):
    inside, line = loop(4, "\n".join([GATHER[0], work("a", 6), GATHER[1]]))
    timeline = simulate(line, work("b", 1), before=inside)
    write_trace(timeline, str(tmp_path / "t.json"))
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert events == events_of(timeline)
    pieces = {event["name"]: event for event in events if event["ph"] == "X"}
    assert pieces["4 turns of body_loop"]["dur"] == 4 * 8 * 1e6
    assert pieces["a"]["pid"] == pieces["g"]["pid"] != pieces["b"]["pid"]
    assert pieces["a"]["tid"] != pieces["g"]["tid"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["one step", "one turn of body_loop, body"]
