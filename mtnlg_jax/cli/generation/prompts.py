"""Read the prompts: one from a flag or standard input, or many from a file."""

import json
from typing import Any

from mtnlg_jax import command
from mtnlg_jax.cli.generation import options, prefixes


def read_prompt() -> str:
    """Return the prompt of --prompt, --input or standard input."""
    if options.PROMPT.value is not None:
        if options.INPUT.value is not None:
            raise ValueError("--prompt and --input are both given; keep one of them")
        return options.PROMPT.value
    if options.INPUT.value is None and prefixes.of_flags():
        return ""
    _, text = command.read_text(options.INPUT.value, "the prompt")
    return text.removesuffix("\n")  # the line end at the end of a file


def read_rows(path: str) -> list[dict]:
    """Return the prompts of a file, each an object with at least the key "prompt"."""
    name, text = command.read_text(path, "the prompts", "utf-8-sig")
    lines = text.removesuffix("\n").split("\n")
    objects = name.endswith((".jsonl", ".json")) or path == "-" and lines[0].startswith("{")
    rows = []
    for number, line in enumerate(lines, 1):
        row: Any = line.removesuffix("\r")
        if objects:
            if not line.strip():
                continue
            try:
                row = json.loads(line, parse_constant=_refuse_constant)
            except ValueError as error:
                raise ValueError(
                    f"{name}, line {number} is not JSON ({error}); write one object a line"
                ) from None
        row = {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(
                f'{name}, line {number} has no text under the key "prompt"; write '
                '{"prompt": TEXT}'
            )
        texts = row.get("candidates", [])
        if options.MODE.value == "ranking" and not (
            isinstance(texts, list) and all(isinstance(each, str) for each in texts)
        ):
            raise ValueError(
                f"{name}, line {number} has candidates that are not a list of texts; write "
                "[TEXT, TEXT]"
            )
        if not isinstance(row.get("adapter", ""), str | None):
            raise ValueError(
                f"{name}, line {number} has an adapter that is not a name; write "
                '"adapter": NAME, or null for none'
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{name} holds no prompts; write one a line")
    return rows


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which JSON does not have; write null")
