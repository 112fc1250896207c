"""Turns a GPT-2 of Hugging Face into a run folder, and back; without PyTorch.

    python launch/convert.py --from=gpt2 --to=RUN       config.json, safetensors, tokenizer files ->
        a run
    python launch/convert.py --from=RUN --to=gpt2-new   a run of GPT-2's architecture -> what
        transformers loads

What --from holds decides the direction. There and back every tensor has the same bits. The
tokenizer and generation_config.json of --from come along; the report names what has no counterpart.
Exit codes: 0 done, 2 bad input.
"""

from absl import flags

from mtnlg_jax import command

_FROM = command.define_path(
    "from", None, "folder of a model of Hugging Face's, or of a run", required=True
)
_TO = command.define_path("to", None, "folder to make", required=True)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "source",
    ["source", "float32", "float16", "bfloat16"],
    "tensors for Hugging Face; source: as they came, float32 where the run was trained here",
)
_MAX_SHARD_SIZE = flags.DEFINE_float("max_shard_size", 5.0, "GB in one file for Hugging Face")
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "which checkpoint of a run")
_TOKENIZER = command.define_path("tokenizer", None, "folder of a tokenizer, where --from has none")
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "replace a run or model at --to, once the new one is whole"
)


def main() -> None:
    from mtnlg_jax import compat
    from mtnlg_jax.interop.huggingface import convert

    compat.quiet()
    print(
        convert(
            _FROM.value,
            _TO.value,
            dtype=_DTYPE.value,
            max_shard_size=_MAX_SHARD_SIZE.value,
            which=_CHECKPOINT.value,
            tokenizer=_TOKENIZER.value,
            overwrite=_OVERWRITE.value,
        )
    )


def run() -> None:
    """Parses the command line, does what it says and exits."""
    command.run(main)
