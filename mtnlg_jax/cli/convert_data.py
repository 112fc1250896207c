"""Token arrays to Megatron's .bin and .idx and back, and either to text.

    python launch/convert_data.py --from=OUT/train --to=PREFIX                  for Megatron: the
        same tokens
    python launch/convert_data.py --from=PREFIX --to=OUT --tokenizer=FOLDER     a prepared folder,
        to train from
    python launch/convert_data.py --from=OUT/train --to=text.jsonl.zst          {"text": ...} of
        each document
    python launch/convert_data.py --from=PREFIX --to=text.jsonl --tokenizer=FOLDER

launch/pretrain.py also trains from PREFIX as it is (--set=data.path=PREFIX
--set=data.tokenizer=FOLDER). Exit codes: 0 done, 2 bad input.
"""

from absl import flags

from mtnlg_jax import command

_FROM = command.define_path(
    "from", None, "folder of token arrays, as OUT/train, or a Megatron prefix", required=True
)
_TO = command.define_path(
    "to", None, "Megatron prefix, folder, or a file .jsonl, .jsonl.gz, .jsonl.zst", required=True
)
_TOKENIZER = command.define_path(
    "tokenizer", "", "folder of the tokenizer; default: the one beside the token arrays"
)
_HELDOUT = flags.DEFINE_float(
    "heldout", 0.01, "of a folder made from PREFIX: share of the last documents held out"
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "replace what is at --to, once the new one is whole"
)


def main() -> None:
    from mtnlg_jax.data.store.convert import convert

    print(convert(_FROM.value, _TO.value, _TOKENIZER.value, _HELDOUT.value, _OVERWRITE.value))


def run() -> None:
    """Parses the command line, does what it says and exits."""
    command.run(main)
