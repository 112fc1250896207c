"""Generate docs/configuration.md: every key with its type, default, range and meaning, read from
`schema`.

    python -m mtnlg_jax.config.page > docs/configuration.md
"""

import dataclasses
import inspect
import math
import re
import typing

from mtnlg_jax.config import model, schema
from mtnlg_jax.config.checks import interval
from mtnlg_jax.config.coerce import hints_of, kind_name

SECTIONS = {
    "model": model.ModelConfig,
    "model.rope_scaling": model.RopeScaling,
    "model.layer_pattern": model.LayerSpec,
    "model.multipliers": model.Multipliers,
    "model.moe": model.MoEConfig,
    "model.prefix": model.PrefixConfig,
    "mesh": schema.MeshConfig,
    "data": schema.DataConfig,
    "data.masking": schema.MaskingConfig,
    "optimizer": schema.OptimizerConfig,
    "train": schema.TrainConfig,
    "train.stages": schema.StageConfig,
    "decode": schema.DecodeConfig,
}

HEAD = """# Configuration

A run is one frozen dataclass, `Config`, with six sections. A file of `configs/` returns it from
`get_config()`. The command line changes single values:

```bash
python launch/pretrain.py --config=configs/small.py --set=data.path=OUT --set=train.steps=2000 \\
    --workdir=RUN
python launch/plan.py --config=configs/ladder.py:7.5b --chips=H100:128
```

Text after a colon is the argument of `get_config`. Unknown keys, wrong types, values outside their
range and combinations that do not fit are refused before any work starts. The error is one line
that names the values and a way out.

This page is generated: `python -m mtnlg_jax.config.page > docs/configuration.md`.
"""


def render() -> str:
    """Return the whole page."""
    return HEAD + "".join(_section(name, kind) for name, kind in SECTIONS.items())


def _section(name: str, kind: type) -> str:
    lines = [f"\n## {name}\n", " ".join((inspect.getdoc(kind) or "").split()) + "\n"]
    lines += ["| key | type | default | range | meaning |", "| --- | --- | --- | --- | --- |"]
    hints = hints_of(kind, limits=True)
    comments = _comments(kind)
    for each in dataclasses.fields(kind):
        hint = hints[each.name]
        if dataclasses.is_dataclass(hint):
            continue
        cells = [f"`{each.name}`", _type_name(hint), _default(each), _allowed(hint)]
        cells.append(comments[each.name])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(each: dataclasses.Field) -> str:
    value = each.default
    if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        return f"one {type(value[0]).__name__}"
    return f"`{value}`" if value not in ("", ()) else "none"


def _type_name(hint) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "choice"
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    name = (
        kind_name(hint)
        .replace("mtnlg_jax.config.schema.", "")
        .replace("mtnlg_jax.config.model.", "")
    )
    return name.replace(" | None", " or none")


def _allowed(hint) -> str:
    """Return the choices or the range of a field as text; "" where any value of its type may be."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Annotated:
        return ", ".join(_limits(*limit) for limit in hint.__metadata__)
    return ""


def _limits(low: float, high: float, low_open: bool, high_open: bool) -> str:
    if high >= 2**20 and math.isfinite(low):
        return f"above {low}" if low_open else f"at least {low}"
    return interval(low, high, low_open, high_open)


def _comments(kind: type) -> dict[str, str]:
    """Return {field: the comment above it}."""
    found = {}
    above: list[str] = []
    for line in inspect.getsource(kind).splitlines():
        if line.startswith("    # "):
            above.append(line.strip("# "))
            continue
        if match := re.match(r"    (\w+): ", line):
            found[match[1]] = " ".join(above)
        above = []
    return found


if __name__ == "__main__":
    print(render(), end="")
