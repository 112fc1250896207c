"""Lower every kernel for every device that it supports, at common lengths and widths."""

import jax
import pytest
from jax import export

from mtnlg_jax import compat
from mtnlg_jax.model.kernels.gpu import cudnn
from mtnlg_jax.model.kernels.mask import Mask
from mtnlg_jax.planning.kernel_profile import Call, function_of

DEVICES = {
    "v5e": ("tpu", "TPU v5 lite", 1),
    "v5p": ("tpu", "TPU v5p", 1),
    "v6e": ("tpu", "TPU v6 lite", 1),
    "H100": ("gpu", "NVIDIA H100 80GB HBM3", 132),
    "A100": ("gpu", "NVIDIA A100-SXM4-80GB", 108),
}
MASKS = ("segment_ids", "kv_lengths", "q_offset", "window")


def _kernels_in(monkeypatch, device: str, call: Call) -> int:
    """Lower for a device that is not present, and return the number of kernels in the program."""
    platform, kind, cores = DEVICES[device]
    monkeypatch.setattr(compat, "_DESCRIBED", [platform, kind])
    function, arguments = function_of(call)
    abstract = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((), (), abstract_device=abstract)
    ):
        return _kernels(_exported(function, arguments, platform))


def _exported(function, arguments, platform: str) -> str:
    checks = [
        export.DisabledSafetyCheck.custom_call(name)
        for name in ("tpu_custom_call", "mosaic_gpu_v2")
    ]
    return export.export(
        jax.jit(function),
        platforms=["cuda" if platform == "gpu" else platform],
        disabled_checks=checks,
    )(*arguments).mlir_module()


def _kernels(text: str) -> int:
    return text.count("@tpu_custom_call") + text.count("@mosaic_gpu_v2")


# Slow: simpler calls, and TPUs that use the same kernels with other blocks.
@pytest.mark.parametrize(
    "device",
    ["v5e", "H100", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v5p", "v6e"))],
)
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(Call(head_width=64, kv_heads=2), id="64", marks=pytest.mark.slow),
        pytest.param(
            Call(head_width=128, causal=False), id="128 both ways", marks=pytest.mark.slow
        ),
        pytest.param(Call(head_width=160, masks=("segment_ids",)), id="160 documents"),
        pytest.param(Call(queries=1000, keys=1100, masks=MASKS), id="all masks"),
        pytest.param(
            Call(queries=131072, keys=131072, masks=("segment_ids",)),
            id="131072",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_attention_and_its_gradients_lower_to_kernels(monkeypatch, device, call):
    # On TPU the kernel of keys also computes dq, up to the length at which it fits VMEM.
    assert _kernels_in(monkeypatch, device, call) == (
        3 if device == "H100" or call.queries > 100_000 else 2
    )


@pytest.mark.parametrize("device", ["v5e", "v5p", "v6e", "H100"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_decoding_lowers_to_a_kernel(monkeypatch, device, dtype):
    assert (
        _kernels_in(monkeypatch, device, Call("decode", dtype=dtype, rows=4, keys=2000, kv_heads=2))
        == 1
    )


def test_an_a100_has_no_kernel_and_asking_for_one_raises_an_error(monkeypatch):
    assert _kernels_in(monkeypatch, "A100", Call(masks=("segment_ids",))) == 0
    with pytest.raises(
        ValueError, match="'pallas_gpu' cannot serve this call: runs on Hopper, and this is A100"
    ):
        _kernels_in(monkeypatch, "A100", Call(impl="pallas_gpu"))


@pytest.mark.parametrize("device", ["v5p", "H100"])
def test_each_device_of_a_manual_region_runs_its_part(monkeypatch, device):
    platform, kind, cores = DEVICES[device]
    monkeypatch.setattr(compat, "_DESCRIBED", [platform, kind])
    abstract = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    mesh = jax.sharding.AbstractMesh(
        (2, 2), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2, abstract_device=abstract
    )
    function, (q, k, v, d, ids, _) = function_of(Call(rows=2, masks=("segment_ids",)))
    spec = jax.P("data", None, "tensor")
    split = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(spec,) * 4 + (jax.P("data"),) * 2,
        out_specs=(spec, (spec,) * 3),
    )
    text = _exported(split, (q, k, v, d, ids, ids), platform)
    assert _kernels(text) == (3 if device == "H100" else 2)
    assert "2048x4x128" in text or "4x2048x128" in text  # four of eight heads


def test_compiled_functions_are_the_public_ones():
    function, arguments = function_of(
        Call("forward", dtype="float32", queries=64, keys=64, head_width=8)
    )
    assert jax.eval_shape(function, *arguments).shape == (1, 64, 8, 8)


def test_cudnn_is_called_forward_and_backward_with_its_window(monkeypatch):
    import jax._src.cudnn.fused_attention_stablehlo as fused_attention

    monkeypatch.setattr(fused_attention, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(fused_attention, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(fused_attention, "is_cuda_compute_capability_equal", lambda _: False)
    q = jax.ShapeDtypeStruct((2, 256, 4, 128), "bfloat16")

    def loss(q, k, v):
        return cudnn.attend(q, k, v, Mask(True, window=64), scale=0.1).astype("float32").sum()

    checks = [
        export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaSoftmax{part}")
        for part in ("", "Backward")
    ]
    text = export.export(
        jax.jit(jax.grad(loss, (0, 1, 2))), platforms=["cuda"], disabled_checks=checks
    )(q, q, q).mlir_module()
    # The 64 visible keys include the query's own.
    assert (
        text.count("@__cudnn$fmhaSoftmax") == 2
        and text.count(r"sliding_window_length\22: 64,") == 2
    )
