"""Annotations that give a field's type together with the values that it may have."""

import math
from typing import Annotated, NamedTuple

# Metadata of a field that holds paths of files or folders: `load.map_paths` looks for it.
PATH = {"path": True}


class Range(NamedTuple):
    """The values that a field may have, from ``low`` to ``high``. An open end is excluded."""

    low: float
    high: float = 2**31
    low_open: bool = False
    high_open: bool = False


Count = Annotated[int, Range(1)]
OptionalCount = Annotated[int | None, Range(1)]
CountFrom0 = Annotated[int, Range(0)]
OptionalCountFrom0 = Annotated[int | None, Range(0)]
AxisSize = Annotated[int, Range(1, 2**20)]
Share = Annotated[float, Range(0, 1)]
ShareBelow1 = Annotated[float, Range(0, 1, high_open=True)]
ShareAbove0 = Annotated[float, Range(0, 1, low_open=True)]
Positive = Annotated[float, Range(0, math.inf, low_open=True, high_open=True)]
OptionalPositive = Annotated[float | None, Range(0, math.inf, low_open=True, high_open=True)]
NotNegative = Annotated[float, Range(0, math.inf, high_open=True)]
Finite = Annotated[float, Range(-math.inf, math.inf, low_open=True, high_open=True)]
