"""Read the cycles that the TPU compiler estimates for an instruction."""

import re

# libtpu estimates the cycles of each kernel only if it may write them to a folder.
PROFILE = "--xla_jf_dump_static_llo_profile_to="

UNKNOWN = 2**62  # the compiler writes 2^63 - 1 cycles where it has no estimate

_ESTIMATE = re.compile(r'"estimated_cycles":"?(-?\d+)')


def is_estimated(attributes: str) -> bool:
    """Return whether the compiler wrote a number of cycles, if only the one that means unknown."""
    return _ESTIMATE.search(attributes) is not None


def cycles_of(attributes: str) -> int | None:
    """Return the estimated cycles in the attributes of an instruction; None if unknown."""
    found = _ESTIMATE.search(attributes)
    if found is None:
        return None
    cycles = int(found[1])
    return cycles if 0 <= cycles < UNKNOWN else None
