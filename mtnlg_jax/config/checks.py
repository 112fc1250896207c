"""Checks of single values. Each message names the value, the limit and a way out."""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable

from mtnlg_jax.config.coerce import hints_of

# (is the rule broken by the settings ``c``?, message with fields such as {c.mesh.pipe}).
Rules = tuple[tuple[Callable[[typing.Any], object], str], ...]


def divisors(number: int) -> list[int]:
    """Return the divisors of ``number`` from 1 to ``number``."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def near_divisors(number: int, size: int) -> str:
    """Return the two divisors of ``number`` nearest to ``size``, for a message: "4 or 8"."""
    near = sorted(sorted(divisors(number), key=lambda d: abs(d - size))[:2])
    return " or ".join(map(str, near))


def must_divide(what: str, number: int, axis: str, size: int) -> None:
    if number % size:
        raise ValueError(
            f"{what}={number} is not divisible by {axis}={size}; "
            f"try {axis}={near_divisors(number, size)}"
        )


def within(
    what: str,
    value: float,
    low: float,
    high: float,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):
        raise ValueError(f"{what}={value} is outside {interval(low, high, low_open, high_open)}")


def interval(low: float, high: float, low_open: bool = False, high_open: bool = False) -> str:
    """Return an interval in mathematical notation: (0, 1] includes its upper end only."""
    left = "(" if low_open else "["
    right = ")" if high_open else "]"
    return f"{left}{low}, {high}{right}"


def one_of(what: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {what}={value!r}; choose one of {', '.join(map(str, allowed))}")


def check_fields(config, prefix: str = "") -> None:
    """Raise ValueError if a field, also of a section, is outside the `Range` or the choices of its
    annotation. ``prefix`` comes before the names in messages."""
    kind: typing.Any = type(config)
    hints = hints_of(kind, limits=True)
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


def check_rules(rules: Rules, settings) -> None:
    """Raise ValueError with the message of the first of ``rules`` that ``settings`` break."""
    for breaks, message in rules:
        if breaks(settings):
            raise ValueError(message.format(c=settings))


def refuse_changed(settings, keys: Iterable[str], why: str, prefix: str = "") -> None:
    """Raise ValueError if a setting among ``keys`` is not its default.

    ``why`` tells the user why it cannot act and what to set instead.
    """
    for key in keys:
        value = getattr(settings, key)
        if value != getattr(type(settings), key):
            raise ValueError(f"{prefix}{key}={value} {why}, or leave {key} out")
