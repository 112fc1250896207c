"""Compare the Hopper kernels in interpretable form, with the race detector, with the reference."""

import pytest

FLOAT16 = 3e-3  # eleven bits of mantissa, rounded twice, relative to the largest value
BFLOAT16 = 3e-2


# A case takes seconds: one has every feature, and the other the path without ALiBi.
@pytest.mark.parametrize("case", [pytest.param("softcap", marks=pytest.mark.slow), "alibi and all"])
def test_output_lse_and_gradients_equal_the_reference(kernels, longhand, case):
    longhand.compare(*kernels.everything("pallas_gpu", case, "float16", (64, 64)), FLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "causal",
        "interior blocks",
        "head width 160",
        "one query",
        "both ways",
        "head width 96",
        "eight heads share",
        "window",
        "window both ways",
        "lengths",
        "documents",
        "offset",
        "before the keys",
        "mixed documents",
        "all",
        "all both ways",
        "alibi",
        "alibi both ways",
        "alibi head width 160",
    ],
)
def test_the_other_cases_equal_the_reference(kernels, longhand, case):
    longhand.compare(*kernels.everything("pallas_gpu", case, "float16", (64, 64)), FLOAT16)


@pytest.mark.slow
def test_bfloat16_stays_near_the_reference(kernels, longhand):
    longhand.compare(*kernels.everything("pallas_gpu", "causal", "bfloat16", (64, 64)), BFLOAT16)
