"""The flags of `cli.evaluate`, and what it does after they are checked."""

import json
from typing import TYPE_CHECKING

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.decoding import devices, fitting

if TYPE_CHECKING:
    from mtnlg_jax.config import Config

# Parameters, those that a text changes, and Adam's two moments of them.
ADAPTING_COPIES = 4

with command.flag_group("The run and the text"):
    WORKDIR = command.define_path(
        "workdir",
        None,
        "folder of a run or of a Hugging Face model, or a GGUF file",
        required=True,
    )
    CHECKPOINT = command.define_checkpoint()
    INPUT = command.define_path("input", None, "file or folder to score, - for standard input")
    TEXT_KEY = flags.DEFINE_string(
        "text_key",
        "text",
        "key or column of the text in JSON and Parquet; a|b: the first that exists",
    )
    ON_ERROR = flags.DEFINE_enum(
        "on_error",
        "raise",
        ["raise", "skip"],
        "damaged documents, bad rows of tasks: stop, or drop and count them",
    )
    ENCODING = flags.DEFINE_string(
        "encoding", "", "encoding of text that is not UTF-8 and does not declare one: cp1252"
    )
    ADAPTER = command.define_path(
        "adapter",
        None,
        "adapter of the model at --workdir: the name of one in the run, its file, or the folder of "
        "a PEFT adapter",
    )
with command.flag_group("Scoring"):
    STRIDE = flags.DEFINE_integer(
        "stride", None, "tokens scored in each window; default: half the context"
    )
    ADAPT = flags.DEFINE_float(
        "adapt",
        0.0,
        "learning rate of dynamic evaluation, which restarts from the trained weights for each "
        "document; 0: the weights stay fixed",
    )
    JSON = flags.DEFINE_bool("json", False, "print one JSON object")
with command.flag_group("A second score, as launch/generate.py would hold the model"):
    DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "type of the products")
    WEIGHTS = flags.DEFINE_enum("weights", None, ["int8"], "type of the weights")
    CACHE = flags.DEFINE_enum("cache", None, ["int8"], "type of the keys and values")


with command.flag_group("Devices"):
    SET = flags.DEFINE_multi_string(
        "set",
        [],
        "mesh.KEY=VALUE: devices to split the model over (data, tensor, expert, context)",
    )


def _check_memory(config: "Config", rounded: dict[str, str]) -> None:
    """Raise ValueError if the model, and the one that is held otherwise, do not fit."""
    from mtnlg_jax.decode.memory import Choices, Plan

    mesh = devices.mesh()
    copies = ADAPTING_COPIES if ADAPT.value else 1
    plans = [Plan(config.model, mesh=mesh, copies=copies)]
    if rounded:
        plans.append(Plan(config.model, mesh=mesh, **rounded))  # type: ignore[arg-type]
    choices = Choices(dtype=False, weights=False, cache=False)
    fitting.check(WORKDIR.value, plans, choices, mesh)


def evaluate(rounded: dict[str, str]) -> None:
    """Score the text and print the report."""
    from mtnlg_jax import compat
    from mtnlg_jax.evaluate.texts import read_texts

    texts, left_out = devices.on_first(
        lambda: read_texts(INPUT.value, TEXT_KEY.value, ON_ERROR.value, ENCODING.value)
    )
    compat.configure_cache()

    # Imported here: bad input is reported before JAX is imported, which takes longer.
    from mtnlg_jax.evaluate.run_score import as_json, describe, score_run

    score = score_run(
        WORKDIR.value,
        CHECKPOINT.value,
        texts,
        STRIDE.value,
        ADAPT.value,
        rounded,
        devices.mesh(),
        before=lambda config, _: _check_memory(config, rounded),
    )
    if JSON.value:
        print(json.dumps(as_json(score, left_out), allow_nan=False))
        return
    if left_out:
        counts = ", ".join(f"{count:,} {what}" for what, count in left_out.items())
        devices.note(f"{INPUT.value}: {counts}")
    print(describe(INPUT.value, score))
