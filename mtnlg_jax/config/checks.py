"""Checks of one value, each with a message that names the value, the limit and the way out."""

import dataclasses
import math
import typing

from mtnlg_jax.config.coerce import hints_of


def divisors(number: int) -> list[int]:
    """From 1 up to ``number`` itself."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def near_divisors(number: int, size: int) -> str:
    """The two divisors of ``number`` nearest to ``size``, for a message: "4 or 8"."""
    near = sorted(sorted(divisors(number), key=lambda d: abs(d - size))[:2])
    return " or ".join(map(str, near))


def must_divide(what: str, number: int, axis: str, size: int) -> None:
    if number % size:
        raise ValueError(
            f"{what}={number} does not divide by {axis}={size}; try {axis}={near_divisors(number, size)}"
        )


def within(
    what: str, value: float, low: float, high: float, low_open=False, high_open=False
) -> None:
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):
        raise ValueError(f"{what}={value} lies outside {interval(low, high, low_open, high_open)}")


def interval(low: float, high: float, low_open: bool = False, high_open: bool = False) -> str:
    """As mathematics writes it: (0, 1] has its upper end and not its lower one."""
    left = "(" if low_open else "["
    right = ")" if high_open else "]"
    return f"{left}{low}, {high}{right}"


def one_of(what: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(
            f"{what}={value!r} is not known; choose one of {', '.join(map(str, allowed))}"
        )


def check_fields(config, prefix: str = "") -> None:
    """Raises ValueError on a field that lies outside the `Range` or the choices that its annotation
    names; the fields of sections too. ``prefix`` stands before names in messages."""
    hints = hints_of(type(config), limits=True)
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        hint = hints[each.name]
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{prefix}{each.name}.")
        elif typing.get_origin(hint) is typing.Literal:
            one_of(prefix + each.name, value, typing.get_args(hint))
        elif typing.get_origin(hint) is typing.Annotated and isinstance(value, int | float):
            for limits in hint.__metadata__:
                within(prefix + each.name, value, *limits)
