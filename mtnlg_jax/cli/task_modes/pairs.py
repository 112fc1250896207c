"""--make_pairs: write rows as prompts and answers to fine-tune on."""

import os
from typing import TYPE_CHECKING, Any

from mtnlg_jax.cli.decoding.output import dump
from mtnlg_jax.cli.task_modes import options, performing
from mtnlg_jax.cli.task_modes.rows import read_rows

if TYPE_CHECKING:
    from mtnlg_jax.tasks.templates import Task


def make_pairs(task: "Task") -> None:
    """Write a JSON line for each row of --input, and print the first."""
    from mtnlg_jax.config import DecodeConfig
    from mtnlg_jax.storage import write_file
    from mtnlg_jax.tasks.prompts import pairs

    path = options.MAKE_PAIRS.value
    rows = read_rows(task, options.INPUT.value, options.LIMIT.value)
    size: dict[str, Any] = {}
    if options.WORKDIR.value:
        run, _ = performing.load(1, DecodeConfig())
        size = {"tokenizer": run.tokenizer, "context": run.config.model.max_position_embeddings}
    made = pairs(task, rows, language=options.LANGUAGE.value, **size)
    lines = "".join(dump(pair) + "\n" for pair in made)
    write_file(*os.path.split(path), lines.encode())
    print(f"{len(made):,} pairs in {path}; the first:\n{made[0]['prompt']}[{made[0]['answer']}]")
