"""Read --set=decode.KEY=VALUE: any setting of DecodeConfig from the command line."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from mtnlg_jax.cli.decoding.devices import of_mesh


def read_assignments(entries: Iterable[str]) -> dict[str, Any]:
    """Return {key: value} of entries "decode.KEY=VALUE" or "KEY=VALUE"; later entries win.

    Entries of the mesh are left out: `devices` reads them.

    Raise ValueError if a key is not a setting of DecodeConfig, or if a value has another type than
    the setting or is out of its range.
    """
    return dict(_read_assignment(entry) for entry in entries if not of_mesh(entry))


def _read_assignment(entry: str) -> tuple[str, Any]:
    from mtnlg_jax.config import Config, DecodeConfig, override
    from mtnlg_jax.config.checks import check_fields

    path, equals, text = entry.partition("=")
    section, _, key = path.strip().rpartition(".")
    keys = [field.name for field in dataclasses.fields(DecodeConfig)]
    of_decode = section in ("", "decode")
    if not of_decode or key not in keys:
        close = difflib.get_close_matches(key, keys, 1) if of_decode else []
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"--set={entry}: unknown setting {path.strip()!r}; {hint}write --set=decode.KEY=VALUE "
            f"with one of the keys {', '.join(keys)}"
        )
    default = getattr(DecodeConfig, key)
    if not equals:
        raise ValueError(
            f"--set={entry} has no value; write --set=decode.{key}=VALUE, such as the default, "
            f"{default!r}"
        )
    try:
        decode = override(Config(), f"decode.{key}={text}").decode
        check_fields(decode, "decode.")
    except ValueError as error:
        raise ValueError(
            f"--set: {error}; write a value such as the default, {default!r}"
        ) from None
    return key, getattr(decode, key)


def merge(
    by_flag: Mapping[str, Any], by_set: Mapping[str, Any], flag_of: Mapping[str, str]
) -> dict[str, Any]:
    """Return the settings of the flags together with those of --set.

    ``flag_of`` holds the flags that are not named like their setting. Raise ValueError if a flag
    and --set give a setting different values.
    """
    for key, value in by_set.items():
        if key in by_flag and by_flag[key] != value:
            raise ValueError(
                f"--{flag_of.get(key, key)} gives {by_flag[key]!r} and --set=decode.{key} gives "
                f"{value!r} for the same setting; leave one of the two out"
            )
    return {**by_flag, **by_set}
