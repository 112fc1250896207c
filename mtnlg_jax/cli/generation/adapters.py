"""--adapter for all prompts, and the adapters of single rows of --prompts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mtnlg_jax.cli.decoding import held_flags, shared_flags
from mtnlg_jax.cli.generation import options

if TYPE_CHECKING:
    from mtnlg_jax.decode.cache import Decoder
    from mtnlg_jax.train.adapter_file import Adapter


def merge(rows: Sequence[dict]) -> None:
    """Merge --adapter into the model when it is read, unless ``rows`` name theirs."""
    from mtnlg_jax.interop import registry

    if not any("adapter" in row for row in rows):
        registry.adapt(
            options.WORKDIR.value, shared_flags.ADAPTER.value, held_flags.CHECKPOINT.value
        )


def load(rows: Sequence[dict], stages: int) -> "dict[str, Adapter]":
    """Return the adapters of rows that name theirs, by name; {} if no row does.

    ``stages``: of the mesh. Raise what `adapter_file.load_adapter` and `check_stackable` raise,
    before the model is loaded.
    """
    names = dict.fromkeys(name for row in rows if (name := name_of(row)) is not None)
    if not names or not any("adapter" in row for row in rows):
        return {}
    from mtnlg_jax.decode.adapters import check_stackable
    from mtnlg_jax.interop.adapter_runs import read_adapters

    found = read_adapters(options.WORKDIR.value, list(names), held_flags.CHECKPOINT.value)
    check_stackable(found.values(), stages)
    return found


def name_of(row: Mapping[str, Any]) -> str | None:
    """Return the name of a row's adapter: --adapter if the row has no such key; None for none."""
    return row.get("adapter", shared_flags.ADAPTER.value)


def names_of(decoder: "Decoder", rows: Sequence[dict]) -> list[str | None] | None:
    """Return the name of each row's adapter; None if the decoder has none for single rows."""
    return list(map(name_of, rows)) if decoder.adapters else None
