"""Compile kernels with the real compilers, without chips: memory fits, and their estimates are
read."""

import dataclasses
import shutil

import pytest

from mtnlg_jax.model.kernels import blocks
from mtnlg_jax.planning.kernel_profile import (
    Call,
    Compiled,
    assembled_of,
    compile_calls,
    kernels_of,
)
from mtnlg_jax.planning.topology import check_installed, parse

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
MASKS = ("segment_ids", "kv_lengths", "q_offset", "window")
LONG = 131072


def compiled(topology: str, calls) -> list[Compiled]:
    """Compile, or skip if the compiler is not installed."""
    described = parse(topology)
    try:
        check_installed(described)
    except ValueError as error:
        pytest.skip(str(error))
    results = compile_calls(described, calls)
    assert [result.call for result in results] == list(calls)
    return results


def rows_of(device: str) -> list[Call]:
    """Return the calls of the block table's rows for ``device``, one for each shape."""
    found = {}
    for entry in blocks.table():
        if entry.device == device and entry.impl == "pallas_tpu":
            call = Call(
                "decode" if entry.kind == "decode" else "both",
                dtype=entry.dtype,
                keys=entry.length,
                queries=1 if entry.kind == "decode" else entry.length,
                head_width=entry.head_width,
                heads=2,
                kv_heads=1,
                causal=entry.causal,
            )
            found[call] = None
    return list(found)


@pytest.mark.slow
@pytest.mark.parametrize("device", TPUS)
def test_tpu_kernels_compile_for_every_width_to_128k(device):
    calls = [
        Call(queries=length, keys=length, head_width=width, heads=2, kv_heads=1, masks=masks)
        for width, length, masks in (
            (64, 32768, ()),
            (96, 2048, MASKS),
            (128, LONG, ("segment_ids",)),
            (160, 32768, ("segment_ids",)),
            (128, 8192, ("alibi_slopes",)),
            (192, 8192, ()),
            (256, 32768, ()),
        )
    ]
    calls += [
        Call("decode", keys=32768, rows=8),
        Call("decode", dtype="int8", keys=LONG, rows=4, head_width=160),
        Call("decode", keys=32768, rows=8, masks=("window", "alibi_slopes")),
    ]
    for result in compiled(TPUS[device], calls):
        assert not result.failure, result
        # A forward kernel, and one or two of the backward pass.
        assert (
            len(result.kernels) == 1
            if result.call.step == "decode"
            else 2 <= len(result.kernels) <= 3
        )


@pytest.mark.slow
@pytest.mark.parametrize("device", ["v5p", "v6e"])  # the table has no rows for v5e
def test_every_row_of_the_table_compiles(device):
    calls = rows_of(device)
    assert calls
    failures = [result for result in compiled(TPUS[device], calls) if result.failure]
    assert not failures


@pytest.mark.slow
def test_the_estimate_of_the_compiler_is_read():
    calls = [
        Call("forward", queries=1024, keys=1024, heads=heads, kv_heads=heads) for heads in (2, 4)
    ]
    described = parse(TPUS["v5p"])
    compiled(TPUS["v5p"], [])
    one, two = compile_calls(described, calls, estimate=True)
    assert 1.5 < two.kernels[0][1] / one.kernels[0][1] < 2.5  # two cores with one head or two each


def test_hopper_kernels_assemble_without_spills():
    """Needs the CUDA plugin and an assembler. Tests the fast forms at the head width of MT-NLG."""
    if shutil.which("ptxas") is None:
        pytest.skip("no ptxas: it comes with CUDA")
    calls = [
        Call(head_width=width, masks=masks)
        for width, masks in ((64, ()), (128, ()), (160, ("segment_ids",)))
    ]
    calls += [Call("decode", keys=4096, rows=4)]
    for result in compiled("H100:1x1", calls):
        assert not result.failure, result
        assert (
            len(result.assembled)
            == len(result.kernels)
            == (1 if result.call.step == "decode" else 3)
        )
        # Grouped heads and segment ids may spill the few loop bounds that they need, once a tile.
        assert all(
            spills <= (128 if result.call.masks else 0) for _, _, spills in result.assembled
        ), result.assembled


def test_the_output_of_the_assembler_is_read():
    said = """ptxas info    : Compiling entry function 'flash_dq_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for flash_dq_mosaic_gpu_kernel
    0 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers"""
    assert assembled_of(said) == [["flash_dq", 168, 24]] and assembled_of("nothing") == []


def test_kernels_are_found_if_metadata_has_several_lines():
    text = """
  %splash.1 = bf16[8,64]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", \
frontend_attributes={x={
"xprof": "1"
}}, backend_config={"estimated_cycles":"120"}
  %add.2 = f32[8]{0} add(%b, %c), backend_config={"estimated_cycles":"7"}
  %lookup.4 = bf16[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", \
backend_config={"estimated_cycles":"9223372036854775807"}
  %odd.5 = bf16[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", \
backend_config={"estimated_cycles":"-1"}
  ROOT %attention.12 = (bf16[8]{0}, f32[8]{0}) custom-call(%d), \
custom_call_target="mosaic_gpu_v2", metadata={}
"""
    # 2^63 - 1 means that the compiler has no estimate, and must not be added.
    assert kernels_of(text) == [
        ["splash", 120],
        ["lookup", None],
        ["odd", None],
        ["attention", None],
    ]


def test_a_call_survives_json():
    call = Call(masks=("window",), blocks=(128, 256))
    from mtnlg_jax.planning import kernel_profile

    assert kernel_profile._call(dataclasses.asdict(call)) == call
