"""The page docs/configuration.md: every key with its type, default, range and meaning, read from
`schema`.

python -m mtnlg_jax.config.page > docs/configuration.md
"""

import dataclasses
import inspect
import io
import math
import re
import tokenize
import typing

from mtnlg_jax.config import schema
from mtnlg_jax.config.checks import interval
from mtnlg_jax.config.coerce import hints_of, kind_name

SECTIONS = {
    "model": schema.ModelConfig,
    "mesh": schema.MeshConfig,
    "data": schema.DataConfig,
    "data.masking": schema.MaskingConfig,
    "optimizer": schema.OptimizerConfig,
    "train": schema.TrainConfig,
    "train.stages": schema.StageConfig,
    "decode": schema.DecodeConfig,
}

HEAD = """# Configuration

A run is one frozen dataclass, `Config`, with six sections. A file of `configs/` returns it from `get_config()`. The
command line changes single values:

```bash
python launch/pretrain.py --config=configs/small.py --set=data.path=OUT --set=train.steps=2000 --workdir=RUN
python launch/plan.py --config=configs/ladder.py:7.5b --chips=H100:128
```

Text behind a colon is the argument of `get_config`. Unknown keys, wrong types, values outside their range and
combinations that do not fit are refused in one line, with the values and a way out, before any work is done.

This page is generated: `python -m mtnlg_jax.config.page > docs/configuration.md`.
"""


def render() -> str:
    """The whole page."""
    return HEAD + "".join(_section(name, kind) for name, kind in SECTIONS.items())


def _section(name: str, kind: type) -> str:
    lines = [f"\n## {name}\n", " ".join(inspect.getdoc(kind).split()) + "\n"]
    lines += ["| key | type | default | range | |", "| --- | --- | --- | --- | --- |"]
    hints = hints_of(kind, limits=True)
    comments = _comments(kind)
    for each in dataclasses.fields(kind):
        if not dataclasses.is_dataclass(hints[each.name]):
            name, limits = _kind(hints[each.name])
            cells = [f"`{each.name}`", name, _default(each), limits, comments.get(each.name, "")]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(each: dataclasses.Field) -> str:
    value = each.default
    if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        return f"one {type(value[0]).__name__}"
    return f"`{value}`" if value not in ("", ()) else "none"


def _kind(hint) -> tuple[str, str]:
    """(type, range or choices) as text."""
    if typing.get_origin(hint) is typing.Literal:
        return "choice", ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    limits = ""
    if typing.get_origin(hint) is typing.Annotated:
        limits = ", ".join(_limits(*limit) for limit in hint.__metadata__)
        hint = typing.get_args(hint)[0]
    return kind_name(hint).replace("mtnlg_jax.config.schema.", "").replace(
        " | None", " or none"
    ), limits


def _limits(low: float, high: float, low_open: bool, high_open: bool) -> str:
    if high >= 2**20 and math.isfinite(low):
        return f"above {low}" if low_open else f"at least {low}"
    return interval(low, high, low_open, high_open)


def _comments(kind: type) -> dict[str, str]:
    """{field: the comment behind it, or above it}."""
    source = inspect.getsource(kind)
    behind = {}
    above = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            (above if alone else behind)[token.start[0]] = token.string.lstrip("# ")
    found = {}
    for number, line in enumerate(source.splitlines(), 1):
        if match := re.match(r"    (\w+): ", line):
            lines = []
            place = number - 1
            while place in above:
                lines.insert(0, above[place])
                place -= 1
            found[match[1]] = " ".join([*lines, *([behind[number]] if number in behind else [])])
    return found


if __name__ == "__main__":
    print(render(), end="")
