"""Read compiled programs: known counts in small CPU programs, and texts of other compilers."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mtnlg_jax.planning.hlo import Program, arguments_of, bytes_of, largest, padded_bytes
from mtnlg_jax.planning.hlo_cost import Kernel, cost_of, groups_of
from mtnlg_jax.planning.topology import check_installed, environment, parse
from mtnlg_jax.planning.trips import trips_of

MESH = {"a": 2, "b": 4}


def compiled(function, *shapes, in_specs, out_specs):
    """Return the text of ``function`` as one manual region over MESH."""
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 2)
    region = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, in_specs, strict=True)
    ]
    return jax.jit(region).lower(*arguments).compile().as_text()


def rows(text, dynamic=lambda depth: 1):
    cost = cost_of(Program(text), MESH, dynamic)
    return {(c.kind, c.axes, c.depth): (c.count, c.bytes) for c in cost.collectives}


def test_collectives_have_their_axes_and_bytes_sent():
    def region(x):  # float32 (8, 128), 4096 bytes a device
        gathered = lax.all_gather(x, "b", tiled=True)
        part = lax.psum_scatter(gathered * 2, "b", tiled=True)
        total = lax.psum(part, "a")
        moved = lax.ppermute(total, "b", [(i, (i + 1) % 4) for i in range(4)])
        return lax.psum(lax.all_to_all(moved, "b", 0, 0, tiled=True), ("a", "b"))

    found = rows(compiled(region, (64, 128), in_specs=(P(("a", "b")),), out_specs=P(None)))
    assert found == {
        ("all-gather", ("b",), 0): (1, 3 * 4096),
        ("reduce-scatter", ("b",), 0): (1, 3 * 4096),
        ("all-reduce", ("a",), 0): (1, 4096),  # 2 x half of it
        ("all-reduce", ("a", "b"), 0): (1, 2 * 4096 * 7 / 8),
        ("all-to-all", ("b",), 0): (1, 3 / 4 * 4096),
        ("collective-permute", ("b",), 0): (1, 4096),
    }


def test_loops_multiply_their_contents():
    def region(w, x):
        def inner(_, y):
            return lax.psum(jnp.sin(y @ w), "b")

        def outer(y, _):
            return lax.ppermute(lax.fori_loop(0, 3, inner, y), "a", [(0, 1), (1, 0)]), None

        return lax.scan(outer, x, None, length=5)[0]

    text = compiled(region, (16, 16), (8, 16), in_specs=(P(), P()), out_specs=P())
    assert rows(text) == {
        ("all-reduce", ("b",), 2): (15, 15 * 2 * 8 * 16 * 4 * 3 / 4),
        ("collective-permute", ("a",), 1): (5, 5 * 8 * 16 * 4),
    }
    assert cost_of(Program(text), MESH).flops == 15 * 2 * 8 * 16 * 16


def test_a_loop_with_a_traced_end_needs_a_trip_count():
    def function(w, x, count):
        return lax.fori_loop(0, count, lambda _, y: jnp.sin(y @ w), x)

    text = (
        jax.jit(function)
        .lower(np.ones((16, 16), np.float32), np.ones((8, 16), np.float32), np.int32(3))
        .compile()
        .as_text()
    )
    asked = []
    cost = cost_of(Program(text), MESH, lambda depth: asked.append(depth) or 7)
    assert asked == [0] and cost.guessed_loops == 1
    assert cost.flops == 7 * 2 * 8 * 16 * 16


def test_the_costlier_branch_of_a_condition_counts():
    def function(which, w, x):
        return lax.cond(which, lambda: x @ w @ w, lambda: x @ w)

    text = (
        jax.jit(function)
        .lower(np.bool_(True), np.ones((16, 16), np.float32), np.ones((8, 16), np.float32))
        .compile()
        .as_text()
    )
    assert cost_of(Program(text), MESH).flops == 2 * 2 * 8 * 16 * 16


@pytest.mark.parametrize(
    ("written", "axes", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, x", ("b",), 4),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("a",), 2),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("b",), 2),  # half of it
        ("replica_groups={}, x", ("a", "b"), 8),
        ("replica_groups=[2,4]<=[8], x", ("b",), 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", ("a",), 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", ("b",), 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'b','a'}, x", ("a", "b"), 8),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}, x", ("a", "b"), 8),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}, x", ("b",), 4),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}, x", ("a",), 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, x", ("b",), 2),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", ("b",), 4),
        ("source_target_pairs={{0,4},{4,0}}", ("a",), 2),
    ],
)
def test_replica_groups_in_every_notation(written, axes, size):
    assert groups_of(f" channel_id=1, {written}", MESH) == (axes, size)


# Text in the style of the TPU compiler: products as convolutions, a partial sum as a fusion,
# asynchronous collectives, trips only in the loop's condition, comments in tuples.
TPU = """HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%all-reduce-scatter.1 (p: f32[8,512]) -> f32[8,128] {
  %p = f32[8,512]{1,0:T(8,128)} parameter(0)
  %whole = f32[8,512]{1,0:T(8,128)} all-reduce(%p), channel_id=2, replica_groups=[2,4]<=[8], \
to_apply=%add
  ROOT %part = f32[8,128]{1,0:T(8,128)} slice(%whole), slice={[0:8], [0:128]}
}

%started (p.1: bf16[8,128]) -> bf16[32,128] {
  %p.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p.1), replica_groups=[2,4]<=[8], \
dimensions={0}
}

%condition (s: (s32[], f32[8,512], s32[])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[8,512]{1,0:T(8,128)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %n = s32[]{:T(128)} get-tuple-element(%s), index=2
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (s.1: (s32[], f32[8,512], s32[])) -> (s32[], f32[8,512], s32[]) {
  %s.1 = (s32[]{:T(128)}, f32[8,512]{1,0:T(8,128)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %x.1 = f32[8,512]{1,0:T(8,128)} get-tuple-element(%s.1), index=1
  %n.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i.1, %one)
  %fused = f32[8,128]{1,0:T(8,128)S(1)} fusion(%x.1), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[]{:T(128)}, f32[8,512]{1,0:T(8,128)}, /*index=2*/s32[]{:T(128)}) tuple(%next, \
%x.1, %n.1)
}

ENTRY %main (a: f32[8,512], b: bf16[8,128], q: f32[16,128,160], k: f32[16,128,160]) -> \
f32[16,128,128] {
  %a = f32[8,512]{1,0:T(8,128)} parameter(0), metadata={op_name="state['w']"}
  %b = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="b (of \\"two\\")"}
  %q = f32[16,128,160]{2,1,0:T(8,128)} parameter(2)
  %k = f32[16,128,160]{2,1,0:T(8,128)} parameter(3)
  %zero = s32[]{:T(128)} constant(0)
  %five = s32[]{:T(128)} constant(5)
  %copied = s32[]{:T(128)} copy(%five)
  %start = (s32[]{:T(128)}, f32[8,512]{1,0:T(8,128)}, /*index=2*/s32[]{:T(128)}) tuple(%zero, %a, \
/*index=2*/%copied)
  %loop = (s32[]{:T(128)}, f32[8,512]{1,0:T(8,128)}, s32[]{:T(128)}) while(%start), \
condition=%condition, body=%body
  %s.2 = ((bf16[8,128]), bf16[32,128], u32[]) async-start(%b), calls=%started
  %u = ((bf16[8,128]), bf16[32,128], u32[]) async-update(%s.2), calls=%started
  %d = bf16[32,128]{1,0:T(8,128)(2,1)} async-done(%u), calls=%started
  %token = token[] after-all()
  %leaves = (bf16[8,128], u32[], token[]) send(%b, %token), channel_id=5, is_host_transfer=true, \
frontend_attributes=\
{_xla_megascale_target="{1,2}x{0:511}",_xla_megascale_transfer_type="ALL_GATHER"}
  ROOT %c = f32[16,128,128]{2,1,0:T(8,128)} convolution(%q, %k), window={size=16 stride=15 \
lhs_dilate=16}, \
dim_labels=0bf_0oi->0bf
}
"""


def test_text_of_the_tpu_compiler():
    cost = cost_of(Program(TPU), MESH)
    assert [(c.kind, c.axes, c.depth, c.count, c.bytes) for c in cost.collectives] == [
        ("all-gather", ("b",), 0, 1, 3 * 8 * 128 * 2),
        ("all-gather", ("slices",), 0, 1, 8 * 128 * 2),
        ("reduce-scatter", ("b",), 1, 5, 5 * 8 * 512 * 4 * 3 / 4),
    ]
    # A product of a batch of 16: one position of a window of 16 is used.
    assert cost.flops == 2 * 16 * 128 * 128 * 160
    assert cost.guessed_loops == 0


def test_products_of_library_calls():
    text = """HloModule jit_f
ENTRY %main (a: bf16[8,16], b: bf16[16,32]) -> bf16[8,32] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  ROOT %c = (bf16[8,32]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}
"""
    assert cost_of(Program(text), MESH).flops == 2 * 8 * 32 * 16


@pytest.mark.parametrize(
    ("shape", "exact", "padded"),
    [
        (
            "f32[105,160,16,160]{3,2,1,0:T(8,128)}",
            4 * 105 * 160 * 16 * 160,
            4 * 105 * 160 * 16 * 256,
        ),
        (
            "f32[105,160,16,160]{0,3,2,1:T(8,128)}",
            4 * 105 * 160 * 16 * 160,
            4 * 128 * 160 * 16 * 160,
        ),
        ("bf16[10,100]{1,0:T(8,128)(2,1)S(1)}", 2000, 2 * 16 * 128),
        ("f32[160]{0:T(256)}", 640, 1024),
        ("s32[]{:T(128)}", 4, 4),
        ("(f32[3]{0}, pred[5]{0})", 17, 17),
        ("f8e4m3fn[4]{0}", 4, 4),
        ("s4[3]{0}", 2, 2),
    ],
)
def test_shape_bytes_with_and_without_padding(shape, exact, padded):
    assert (bytes_of(shape), padded_bytes(shape)) == (exact, padded)


def test_arguments_and_the_largest_tensors():
    program = Program(TPU)
    assert arguments_of(program)[0] == ("state['w']", "f32[8,512]{1,0:T(8,128)}")
    first, *others = largest(program, 20)
    assert (first.bytes, first.shape, first.held, first.count) == (
        16 * 128 * 256 * 4,
        "f32[16,128,160]",
        "argument",
        2,
    )
    assert "f32[8,128]" not in {t.shape for t in others}  # S(1) is another memory space
    assert ("f32[16,128,128]", "temporary") in {(t.shape, t.held) for t in others}


def test_invalid_programs_raise_an_error():
    with pytest.raises(ValueError, match="not HLO text"):
        Program("nothing\n")


KERNELS = """HloModule jit_step

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[8]{0} get-tuple-element(%arg), index=1
  %forward.3 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", METADATA
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %forward.3)
}

%condition (arg: (s32[], f32[8])) -> pred[] {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]{0}) tuple(%zero, %p)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  %y = f32[8]{0} get-tuple-element(%loop), index=1
  %other.7 = f32[8]{0} custom-call(%y), custom_call_target="mosaic_gpu_v2"
  ROOT %sort = f32[8]{0} custom-call(%other.7), custom_call_target="Sharding"
}
"""


def test_kernels_have_the_flops_of_their_scope():
    text = KERNELS.replace(
        "METADATA", 'metadata={op_name="jit(step)/while/attention_forward:1000flops/pallas_call"}'
    )
    cost = cost_of(Program(text), {"data": 1})
    assert (
        cost.kernels == (Kernel("attention_forward", 1, 5), Kernel("other", 0, 1))
        and cost.flops == 5 * 1000
    )


# --- trips of loops

LOOP = """HloModule jit_loop

%wrapped_next (p: s32[], q: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  ROOT %r = s32[] add(%q, %p)
}

%wrapped_test (p.1: s32[], q.1: s32[]) -> pred[] {
  %p.1 = s32[] parameter(0)
  %q.1 = s32[] parameter(1)
  ROOT %r.1 = pred[] compare(%p.1, %q.1), direction=LT
}

%body (s: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %s = (s32[], f32[8]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %n = s32[] get-tuple-element(%s), index=2
  %step = s32[] constant(STEP)
  %again = s32[] copy(%n)
  NEXT
  ROOT %t = (s32[], f32[8]{0}, s32[]) tuple(%next, %x, %again)
}

%condition (s.1: (s32[], f32[8], s32[])) -> pred[] {
  %s.1 = (s32[], f32[8]{0}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%s.1), index=0
  %m = s32[] get-tuple-element(%s.1), index=2
  %one = s32[] constant(1)
  TEST
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %first = s32[] constant(FIRST)
  %last = s32[] constant(LAST)
  %start = (s32[], f32[8]{0}, s32[]) tuple(%first, %a, %last)
  %loop = (s32[], f32[8]{0}, s32[]) while(%start), condition=%condition, body=%bodyNOTE
  ROOT %y = f32[8]{0} get-tuple-element(%loop), index=1
}
"""
ADD = "%next = s32[] add(%i, %step)"
TWICE = "%once = s32[] add(%i, %step)\n  %next = s32[] add(%step, %once)"  # a body unrolled by two
FUSED = "%next = s32[] fusion(%step, %i), kind=kLoop, calls=%wrapped_next"
WRAPPED = "ROOT %less = pred[] fusion(%j, %m), kind=kLoop, calls=%wrapped_test"
NEARER = "%nearer = s32[] add(%j, %one)\n  ROOT %less = pred[] compare(%nearer, %m), direction=LT"
KNOWN = ', backend_config={"known_trip_count":{"n":"9"}}'


def compare(direction, sides="%j, %m"):
    return f"ROOT %less = pred[] compare({sides}), direction={direction}"


@pytest.mark.parametrize(
    ("first", "step", "last", "test", "after", "trips"),
    [
        (0, 1, 5, compare("LT"), ADD, 5),
        (0, 2, 8, compare("LT"), ADD, 4),
        (0, 2, 7, compare("LT"), ADD, 4),  # 0, 2, 4, 6
        (3, 2, 8, compare("LT"), ADD, 3),  # 3, 5, 7
        (-3, 3, 4, compare("LT"), ADD, 3),
        (0, 2, 8, compare("LE"), ADD, 5),
        (0, 2, 7, compare("LE"), ADD, 4),
        (8, -2, 0, compare("GT"), ADD, 4),
        (7, -2, 0, compare("GT"), ADD, 4),  # 7, 5, 3, 1
        (8, -2, 0, compare("GE"), ADD, 5),
        (8, 2, 0, compare("GT"), "%next = s32[] subtract(%i, %step)", 4),
        (0, 4, 12, compare("NE"), ADD, 3),
        (12, -4, 0, compare("NE"), ADD, 3),
        (5, 1, 5, compare("EQ"), ADD, 1),
        (0, 2, 8, compare("GT", "%m, %j"), ADD, 4),
        (8, -2, 0, compare("LE", "%m, %j"), ADD, 5),
        (0, 1, 8, compare("LT"), TWICE, 4),
        (0, 2, 8, compare("LT"), FUSED, 4),
        (0, 2, 8, WRAPPED, ADD, 4),
        (0, 2, 8, NEARER, FUSED, 4),  # 1, 3, 5, 7 are compared
        (9, 2, 8, compare("LT"), ADD, 0),
        (0, 0, 5, compare("LT"), ADD, None),  # never ends by its counter
        (0, -1, 5, compare("LT"), ADD, None),
        (0, 3, 5, compare("NE"), ADD, None),  # steps over its end
        (0, 1, 2**31 - 1, compare("LT"), ADD, None),  # no bound
        (0, 1, 2**63 - 1, compare("LT"), ADD, None),
        (0, 1, 5, compare("LT"), "%next = s32[] multiply(%i, %step)", None),
        (
            0,
            1,
            5,
            "%less = pred[] compare(%j, %m), direction=LT\n  ROOT %both = pred[] and(%less, %less)",
            ADD,
            None,
        ),
    ],
    ids=str,
)
def test_trip_counts_from_start_step_and_condition(first, step, last, test, after, trips):
    text = (
        LOOP.replace("FIRST", str(first))
        .replace("STEP", str(step))
        .replace("LAST", str(last))
        .replace("NOTE", "")
    )
    program = Program(text.replace("TEST", test).replace("NEXT", after))
    assert trips_of(program, "main", program.index("main")["loop"]) == trips


@pytest.mark.parametrize(("noted", "trips"), [(9, 9), (2**63 - 1, None)])
def test_a_trip_count_noted_by_the_compiler_takes_precedence(noted, trips):
    text = (
        LOOP.replace("FIRST", "0")
        .replace("STEP", "2")
        .replace("LAST", "8")
        .replace("TEST", compare("LT"))
    )
    program = Program(text.replace("NEXT", ADD).replace("NOTE", KNOWN.replace("9", str(noted))))
    assert trips_of(program, "main", program.index("main")["loop"]) == trips


def test_a_loop_that_carries_one_value():
    program = Program("""HloModule jit_loop
%body (i: s32[]) -> s32[] {
  %i = s32[] parameter(0)
  %step = s32[] constant(3)
  ROOT %next = s32[] add(%i, %step)
}

%condition (j: s32[]) -> pred[] {
  %j = s32[] parameter(0)
  %last = s32[] constant(10)
  ROOT %less = pred[] compare(%j, %last), direction=LT
}

ENTRY %main () -> s32[] {
  %zero = s32[] constant(0)
  ROOT %loop = s32[] while(%zero), condition=%condition, body=%body
}
""")
    assert trips_of(program, "main", program.index("main")["loop"]) == 4


# A product whose left side is split: the TPU compiler multiplies one part while the next is being
# received, in a loop that it unrolls by two.
_COLLECTIVE_PRODUCT = """
import json
import jax
from jax.sharding import NamedSharding, PartitionSpec as P
from mtnlg_jax.planning.topology import devices, mesh_over, parse
from mtnlg_jax.config import MeshConfig
from mtnlg_jax.planning import hlo, hlo_cost

described = parse("v5p:2x2x2")
mesh = mesh_over(MeshConfig(pipe=1, data=1, tensor=8), described, devices(described))

def array(shape, *spec):
    return jax.ShapeDtypeStruct(shape, "bfloat16", sharding=NamedSharding(mesh, P(*spec)))

def product(x, w):
    return jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P(None, "tensor")))

x = array((65536, 8192), "tensor", None)
w = array((8192, 8192), None, "tensor")
written = jax.jit(product).lower(x, w).compile()
program = hlo.Program(written.as_text())
cost = hlo_cost.cost_of(program, dict(mesh.shape))
loops = [
    hlo_cost.trips_of(program, name, each)
    for name, body in program.computations.items()
    for each in body
    if each.opcode == "while"
]
print(json.dumps([loops, cost.flops, cost.guessed_loops, sum(c.bytes for c in cost.collectives)]))
"""


def test_a_collective_product_counts_as_its_share_of_the_whole():
    described = parse("v5p:2x2x2")
    try:
        check_installed(described)
    except ValueError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-c", _COLLECTIVE_PRODUCT],
        env=environment(described),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.returncode, done.stderr
    loops, flops, guessed, sent = json.loads(done.stdout.splitlines()[-1])
    assert loops and flops == 2 * 65536 * 8192 * 8192 / 8 and not guessed
    assert sent == pytest.approx(
        65536 * 8192 * 2 * 7 / 8, rel=0.3
    )  # the parts of the other seven, or one more part
