"""Turn text into a folder to train from: tokenizer, token arrays, held-out part.

    python launch/prepare_data.py --output=data/python                 the embedded text, no download
    python launch/prepare_data.py --input=novels --output=data/novels --vocab_size=8000
    python launch/prepare_data.py --input=web.jsonl.zst --output=data/web --tokenizer=gpt2_files

Prompts with answers, of which the answers alone are learnt, for the configs/finetune_*.py:

    python launch/prepare_data.py --input=pairs.jsonl --output=data/pairs --tokenizer=RUN/tokenizer \\
        --prompt='{title}\\n{text}\\nSummary:' --answer=' {summary}'
"""

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.data.prepare import describe, prepare

_INPUT = flags.DEFINE_string("input", None, "File or folder: .txt .md .text .jsonl .json (also .gz .zst), "
                             ".parquet; without it, the embedded text.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to make (or gs://, s3://).")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 8000, "Pieces of the tokenizer to train.", lower_bound=1)
_TOKENIZER = flags.DEFINE_string("tokenizer", "bpe", "bpe or unigram, to train one; or the path of one: a "
                                 "folder with a tokenizer or GPT-2's files, or a SentencePiece .model.")
_HELDOUT = flags.DEFINE_float("heldout", 0.02, "Share of the text held out from training, 0 to 0.5.")
_SEED = flags.DEFINE_integer("seed", 0, "Draws the held-out part and the order of the documents.")
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "Key or column of the text in JSON and Parquet.")
_PROMPT = flags.DEFINE_string("prompt", "{prompt}", "With --answer: what is read before it.")
_ANSWER = flags.DEFINE_string("answer", None, "Makes pairs: the answer, with {KEY} for what a JSON row holds there, "
                              "mostly with a space in front: ' {answer}'.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a prepared data set, once the new one is whole.")
_ON_ERROR = flags.DEFINE_enum("on_error", "raise", ["raise", "skip"], "Damaged input: stop, or drop it.")


def main() -> None:
    info = prepare(_INPUT.value, _OUTPUT.value, vocab_size=_VOCAB_SIZE.value, tokenizer=_TOKENIZER.value,
                   heldout=_HELDOUT.value, seed=_SEED.value, text_key=_TEXT_KEY.value,
                   prompt=_PROMPT.value, answer=_ANSWER.value, on_error=_ON_ERROR.value,
                   overwrite=_OVERWRITE.value)
    print(describe(info))
    command = ("--config=configs/small.py" if _ANSWER.value is None else
               "--config=configs/finetune_sentiment.py, or another that fits")
    print(f"next       python launch/pretrain.py {command} --set=data.path={_OUTPUT.value} --workdir=RUN")


if __name__ == "__main__":
    flags.mark_flag_as_required("output")
    command.run(main)
