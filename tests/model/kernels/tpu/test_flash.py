"""Compare the TPU kernels, interpreted with the race detector, with the reference."""

import pytest

from mtnlg_jax.model.kernels.tpu import flash

FLOAT32 = 2e-5  # sums of some hundreds of numbers of size one
BFLOAT16 = 3e-2  # eight bits of mantissa, rounded twice, relative to the largest value


# Slow: the features of "all" and "all both ways", one at a time.
@pytest.mark.parametrize(
    "case",
    [
        "head width 160",
        "lengths",
        "all",
        "all both ways",
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in (
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
            )
        ),
    ],
)
def test_output_lse_and_gradients_equal_the_reference(kernels, longhand, case):
    longhand.compare(*kernels.everything("pallas_tpu", case), FLOAT32)


@pytest.mark.parametrize("case", ["causal"])
def test_bfloat16_stays_near_the_reference(kernels, longhand, case):
    longhand.compare(*kernels.everything("pallas_tpu", case, "bfloat16"), BFLOAT16)


@pytest.mark.parametrize("case", ["interior blocks", pytest.param("all", marks=pytest.mark.slow)])
def test_dq_in_a_separate_kernel_is_the_same(kernels, longhand, monkeypatch, case):
    monkeypatch.setattr(flash, "DQ_LIMIT", 0)  # as for sequences whose dq does not fit VMEM
    longhand.compare(*kernels.everything("pallas_tpu", case), FLOAT32)
