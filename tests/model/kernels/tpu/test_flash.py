"""Compare the TPU kernels, interpreted with the race detector, with the reference."""

import jax
import numpy as np
import pytest

from mtnlg_jax import compat
from mtnlg_jax.model.kernels.blocks import Blocks
from mtnlg_jax.model.kernels.mask import Mask
from mtnlg_jax.model.kernels.tpu import flash

FLOAT32 = 2e-5  # sums of some hundreds of numbers of size one
BFLOAT16 = 3e-2  # eight bits of mantissa, rounded twice, relative to the largest value


# Slow: the features of "alibi and all" and "all both ways", one at a time.
@pytest.mark.parametrize(
    "case",
    [
        "head width 160",
        "all both ways",
        "alibi and all",
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in (
                "lengths",
                "all",
                "causal",
                "interior blocks",
                "window",
                "offset",
                "before the keys",
                "both ways",
                "head width 96",
                "window both ways",
                "softcap",
                "documents",
                "mixed documents",
                "eight heads share",
                "one query",
                "alibi",
                "alibi both ways",
                "alibi head width 160",
            )
        ),
    ],
)
def test_output_lse_and_gradients_equal_the_reference(kernels, longhand, case):
    longhand.compare(*kernels.everything("pallas_tpu", case), FLOAT32)


@pytest.mark.parametrize("case", ["causal"])
def test_bfloat16_stays_near_the_reference(kernels, longhand, case):
    longhand.compare(*kernels.everything("pallas_tpu", case, "bfloat16"), BFLOAT16)


@pytest.mark.parametrize(
    "case",
    [
        "interior blocks",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("all", "alibi and all")),
    ],
)
def test_dq_in_a_separate_kernel_is_the_same(kernels, longhand, monkeypatch, case):
    monkeypatch.setattr(flash, "DQ_LIMIT", 0)  # as for sequences whose dq does not fit VMEM
    longhand.compare(*kernels.everything("pallas_tpu", case), FLOAT32)


def test_parts_of_a_block_have_the_distances_of_their_own_keys(longhand):
    """Blocks of 256 keys in parts of 128: on the diagonal a part leaves queries out."""
    arrays = longhand.inputs(0, 1, 300, 300, 2, 1, 64)
    slopes = np.float32([0.5, 0.05])
    blocks = Blocks(256, 256, 128)
    options = {"scale": 0.125, "softcap": None, "alibi_slopes": slopes}

    def compute(q, k, v, d_out, d_lse):
        run = {"interpret": compat.interpret_params("pallas_tpu"), **options}
        out, lse = flash.forward(q, k, v, Mask(True), blocks=blocks, **run)
        sizes = {"dq_blocks": blocks, "dkv_blocks": blocks}
        grads = flash.backward(q, k, v, Mask(True), out, lse, d_out, d_lse, **sizes, **run)
        return out, lse, *grads

    with compat.interpreted(detect_races=True):
        got = jax.jit(compute)(*arrays)
    longhand.compare(got, longhand.reference(*arrays, alibi_slopes=slopes), FLOAT32)
