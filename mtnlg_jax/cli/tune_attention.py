"""Time attention on this machine and record the fastest settings.

Every kernel and shape, into the table of the package; some of them, into a file:

    python launch/tune_attention.py
    python launch/tune_attention.py --lengths=512,2048 --widths=128 --dtypes=bfloat16 \\
        --impls=pallas_gpu,cudnn --table=blocks.json

Try the block sizes of every kernel that runs here, and every implementation, on random data, and
write the best into the table that attention() reads. An entry for the same device, implementation,
pass and shape is replaced; all others stay. The table is written after each shape, so an
interrupted sweep keeps its results.

Exit codes: 0 done, 2 bad input.
"""

from pathlib import Path

from absl import flags

from mtnlg_jax import command

with command.flag_group("What to time"):
    _IMPLS = flags.DEFINE_list("impls", None, "implementations; default: all that run here")
    _DTYPES = flags.DEFINE_list("dtypes", None, "types; default: float32 on CPU, else bfloat16")
with command.flag_group("The shapes"):
    _LENGTHS = flags.DEFINE_list(
        "lengths", None, "of queries and keys; default: 128 to 2048 on CPU, else 512 to 16384"
    )
    _WIDTHS = flags.DEFINE_list("widths", ["64", "128", "160"], "head widths")
    _HEADS = flags.DEFINE_integer("heads", None, "query heads; default: 4 on CPU, else 16", 1)
    _TOKENS = flags.DEFINE_integer(
        "tokens", None, "rows x length; default: 1024 on CPU, else 16384", 1
    )
    _CAUSAL = flags.DEFINE_enum("causal", "both", ["both", "yes", "no"], "masking")
with command.flag_group("The result"):
    _TABLE = command.define_path(
        "table", None, "file to write; default: blocks.json of the package"
    )


def main() -> None:
    lengths = _numbers("lengths", _LENGTHS.value)
    widths = _numbers("widths", _WIDTHS.value) or []

    from mtnlg_jax import compat
    from mtnlg_jax.model.kernels import blocks, select, tune
    from mtnlg_jax.model.kernels.table_file import read_rows, render, with_row
    from mtnlg_jax.storage import write_file

    compat.quiet()
    cpu = compat.platform() == "cpu"
    dtypes = _DTYPES.value or (["float32"] if cpu else ["bfloat16"])
    for dtype in dtypes:
        if dtype not in select.FLOATS:
            raise ValueError(
                f"--dtypes: unknown type {dtype!r}; choose from {', '.join(select.FLOATS)}"
            )
    here = [
        name for name in select.SUPPORT if any(name in tune.impls_here(dtype) for dtype in dtypes)
    ]
    for name in _IMPLS.value or []:
        if name not in here:
            raise ValueError(
                f"--impls: {name!r} does not run on {select.device()} in {', '.join(dtypes)}; "
                f"choose from {', '.join(here)}"
            )
    path = Path(_TABLE.value or str(blocks.TABLE))
    rows = read_rows(path)
    sweep = tune.sweep(
        _IMPLS.value or here,
        lengths or ([128, 256, 512, 1024, 2048] if cpu else [512, 1024, 2048, 4096, 8192, 16384]),
        widths,
        dtypes,
        heads=_HEADS.value or (4 if cpu else 16),
        tokens=_TOKENS.value or (1024 if cpu else 16384),
        causal={"both": (True, False), "yes": (True,), "no": (False,)}[_CAUSAL.value],
    )
    for row in sweep:
        rows = with_row(rows, row)
        write_file(path.parent, path.name, render(rows).encode())
        sizes = ", ".join(
            f"{name} {row[name]}" for name in ("q", "kv", "compute", "stages") if name in row
        )
        print(
            f"{row['impl']:<14} {row['dtype']} H={row['head_width']} T={row['length']} "
            f"{'causal' if row['causal'] else 'both ways'} {row['pass']:<8} "
            f"{row['ms']:.4g} ms  {sizes}",
            flush=True,
        )


def _numbers(name: str, values: list[str] | None) -> list[int] | None:
    if values is None:
        return None
    if not all(value.strip().isdigit() and int(value) > 0 for value in values):
        raise ValueError(
            f"--{name}={','.join(values)} must be integers above 0, separated by commas"
        )
    return list(map(int, values))


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main, log=True)
