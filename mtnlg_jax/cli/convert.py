"""Convert a model of another project to a run folder, or a run to a folder of Hugging Face's.

    python launch/convert.py --from=Qwen3-0.6B --to=RUN     config.json, safetensors, tokenizer
    python launch/convert.py --from=MODEL.gguf --to=RUN     with the tokenizer inside
    python launch/convert.py --from=CHECKPOINTS --to=RUN    Megatron-LM: torch_dist, mp_rank_*
    python launch/convert.py --from=CHECKPOINTS/10000 --to=RUN    MaxText, with its config.yml
    python launch/convert.py --from=RUN --to=FOLDER         a run -> a folder for transformers
    python launch/convert.py --from=RUN --to=FOLDER --dtype=bfloat16 --max_shard_size=2

Adapters that PEFT has saved, and those of a run with LoRA:

    python launch/convert.py --from=ADAPTER --to=RUN        a run that trains the adapter further
    python launch/convert.py --from=ADAPTER --to=RUN --adapters=merge --base=FOLDER
    python launch/convert.py --from=RUN --to=ADAPTER --adapters=keep    RUN's adapter, for PEFT
    python launch/convert.py --from=RUN/adapters/NAME.safetensors --base=RUN --to=ADAPTER

The content of --from decides the direction. docs/huggingface.md lists the families, and
docs/megatron.md describes Megatron-LM and MaxText. PyTorch is not needed. A round trip of Hugging
Face's keeps every bit of every tensor, and memory holds one shard and one layer at a time. The
tokenizer and generation_config.json of --from are copied; the report names what has no
counterpart.

Generating, evaluating, planning and --set=train.init take such a folder without conversion.

Exit codes: 0 done, 2 bad input.
"""

from absl import flags

from mtnlg_jax import command

with command.flag_group("Both directions"):
    _FROM = command.define_path(
        "from",
        None,
        "folder of a Hugging Face model, GGUF file, checkpoint of Megatron-LM or MaxText, or run",
        required=True,
    )
    _TO = command.define_path("to", None, "folder to create", required=True)
    _TOKENIZER = command.define_path("tokenizer", None, "folder of a tokenizer, if --from has none")
    _OVERWRITE = flags.DEFINE_bool(
        "overwrite", False, "replace a run or model at --to, once the new one is whole"
    )
with command.flag_group("Low-rank adapters"):
    _ADAPTERS = flags.DEFINE_enum(
        "adapters",
        None,
        ["merge", "keep"],
        "merge the adapters of --from into the model, or keep them apart; default: merge those of "
        "a run, keep PEFT's",
    )
    _BASE = command.define_path(
        "base", None, "model or run that the adapters change; default: the one that they name"
    )
with command.flag_group("From a run to Hugging Face"):
    _CHECKPOINT = command.define_checkpoint(None, "; default: best")
    _DTYPE = flags.DEFINE_enum(
        "dtype",
        "source",
        ["source", "float32", "float16", "bfloat16"],
        "type of the tensors; source: that of the original model, float32 for a run trained here",
    )
    _FAMILY = flags.DEFINE_string(
        "family",
        None,
        "model_type to write; default: that of the original, or the first that computes the same",
    )
    _MAX_SHARD_SIZE = flags.DEFINE_float("max_shard_size", None, "GB per file; default: 5")


def main() -> None:
    from mtnlg_jax import compat
    from mtnlg_jax.interop.adapter_export import convert_file
    from mtnlg_jax.interop.huggingface import convert
    from mtnlg_jax.interop.recognize import is_model
    from mtnlg_jax.train.adapter_file import is_adapter_file

    compat.quiet()
    # A file of a model's weights has its config.json beside it.
    if is_adapter_file(_FROM.value) and not is_model(_FROM.value):
        print(convert_file(_FROM.value, _TO.value, _BASE.value, _DTYPE.value))
        return
    print(
        convert(
            _FROM.value,
            _TO.value,
            dtype=_DTYPE.value,
            max_shard_size=_MAX_SHARD_SIZE.value,
            which=_CHECKPOINT.value,
            tokenizer=_TOKENIZER.value,
            overwrite=_OVERWRITE.value,
            family=_FAMILY.value,
            adapters=_ADAPTERS.value,
            base=_BASE.value,
        )
    )


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
