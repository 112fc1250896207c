"""Convert token arrays to Megatron's .bin and .idx and back, or either to text.

The same tokens for Megatron:

    python launch/convert_data.py --from=OUT/train --to=PREFIX

A prepared folder, to train from; launch/pretrain.py also trains from PREFIX directly
(--set=data.path=PREFIX --set=data.tokenizer=FOLDER):

    python launch/convert_data.py --from=PREFIX --to=OUT --tokenizer=FOLDER

Text, {"text": ...} for each document:

    python launch/convert_data.py --from=OUT/train --to=text.jsonl.zst
    python launch/convert_data.py --from=PREFIX --to=text.jsonl --tokenizer=FOLDER

Exit codes: 0 done, 2 bad input.
"""

from absl import flags

from mtnlg_jax import command

with command.flag_group("All directions"):
    _FROM = command.define_path(
        "from",
        None,
        "folder of token arrays, such as OUT/train, or a Megatron prefix",
        required=True,
    )
    _TO = command.define_path(
        "to", None, "Megatron prefix, folder, or file .jsonl, .jsonl.gz, .jsonl.zst", required=True
    )
    _TOKENIZER = command.define_path(
        "tokenizer", "", "folder of the tokenizer; default: the one beside the token arrays"
    )
    _OVERWRITE = flags.DEFINE_bool(
        "overwrite", False, "replace what is at --to, once the new one is whole"
    )
with command.flag_group("From a Megatron prefix to a prepared folder"):
    _HELDOUT = flags.DEFINE_float(
        "heldout", None, "share of the last documents to hold out, 0 to 0.5; default: 0.01"
    )


def main() -> None:
    from mtnlg_jax.data.store.convert import convert
    from mtnlg_jax.interop import registry

    registry.register()
    print(convert(_FROM.value, _TO.value, _TOKENIZER.value, _HELDOUT.value, _OVERWRITE.value))


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
