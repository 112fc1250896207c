"""Tables, numbers and times as a person reads them."""

import pytest

from mtnlg_jax.planning.text import amount, columns, duration


def test_columns_are_aligned():
    lines = [("name", "note", "size"), ("a", "", "1,000"), ("long name", "x", "2")]
    assert columns(lines, left=2).splitlines() == [
        "name       note   size",
        "a                1,000",
        "long name  x         2",
    ]
    assert columns([("a", "")], left=2) == "a"


@pytest.mark.parametrize(
    ("number", "text"),
    [(529.6e9, "529.6 B"), (3.38e6, "3.38 M"), (10.6e12, "10.6 T"), (1234, "1.23 k"), (999, "999")],
)
def test_an_amount_has_three_digits(number, text):
    assert amount(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (57, "57.0 s"),
        (3.5, "3.50 s"),
        (45.3 * 86400, "45.3 days"),
        (1777 * 86400, "1,777 days"),
        (7200, "2.00 hours"),
        (0.0305, "30.5 ms"),
        (0.0001, "0.10 ms"),
    ],
)
def test_a_duration_is_in_the_largest_unit_that_fits(seconds, text):
    assert duration(seconds) == text
