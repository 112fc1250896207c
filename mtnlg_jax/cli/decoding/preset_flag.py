"""--preset: a named way to choose tokens."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.decode.presets import PRESETS, with_preset

if TYPE_CHECKING:
    from mtnlg_jax.config import DecodeConfig

with command.flag_group("Repetition and diversity"):
    PRESET = flags.DEFINE_enum(
        "preset",
        None,
        list(PRESETS),
        "a named way to choose tokens, in place of the settings of the run or the task; other "
        "flags and --set override its settings; best, of generate.py, writes 8 texts (--n) and "
        "keeps the one that ranks first",
    )


def apply_preset(decode: "DecodeConfig") -> "DecodeConfig":
    """Return ``decode`` with the settings of --preset, if it is given."""
    return decode if PRESET.value is None else with_preset(decode, PRESET.value)


def must_act(given: Iterable[str]) -> set[str]:
    """Return the settings that are refused where they cannot act: those ``given``, and of --preset
    the one that is its method, without which another one would write the text."""
    if PRESET.value is None:
        return set(given)
    return {*given} | {"penalty_alpha", "mirostat_tau"} & PRESETS[PRESET.value].decode.keys()


def preset_scorers() -> Mapping[str, float]:
    """Return the weights by which --preset chooses among its texts; none if it does not."""
    return {} if PRESET.value is None else PRESETS[PRESET.value].scorers
