"""Flags of launch/task.py other than those of cli.decoding."""

from absl import flags

from mtnlg_jax import command

with command.flag_group("Model"):
    WORKDIR = command.define_path(
        "workdir", None, "folder of a run or of a Hugging Face model, or a GGUF file"
    )
    BATCH = flags.DEFINE_integer(
        "batch", 8, "number of answers that are generated at once", lower_bound=1
    )

with command.flag_group("Task and input"):
    TASK = flags.DEFINE_string(
        "task",
        None,
        "continue, summarise, translate, sentiment, answer or write",
        required=True,
    )
    INPUT = command.define_path(
        "input", None, "file with the text, - for standard input; rows for --make_pairs"
    )
    LANGUAGE = flags.DEFINE_string(
        "language", None, "language of the input, en or zh; default: detect it"
    )
    KIND = flags.DEFINE_string(
        "kind",
        None,
        "of summaries: general (default), news, abstract or product; of --task=write: story "
        "(default), news, review, description or letter",
    )
    TEMPLATES = command.define_path("templates", None, "JSON or Python file with other prompts")

with command.flag_group("Scoring rows"):
    EVAL = command.define_path("eval", None, "file of rows to score")
    SCORE = command.define_path(
        "score",
        None,
        "file of answers to score without a model; it also holds their rows, or --eval does",
    )
    LAST_WORD = flags.DEFINE_bool(
        "last_word",
        False,
        "score the reference, or else the last word of the input, as the end of the text: "
        "accuracy of the greedy answer, and perplexity (--task=continue)",
    )

with command.flag_group("Output"):
    OUTPUT = command.define_path(
        "output",
        None,
        "with --eval: file for the answers, a JSON line for each as soon as it is known; with "
        "--task=write: file for the text",
    )

with command.flag_group("Reading rows"):
    COLUMNS = flags.DEFINE_list(
        "columns", [], "input=KEY,reference=KEY,context=KEY,choices=KEY+KEY"
    )
    LABELS = flags.DEFINE_list("labels", [], "REFERENCE=LABEL,REFERENCE=LABEL")
    LIMIT = flags.DEFINE_integer(
        "limit",
        None,
        "maximum number of rows, drawn by --seed and kept in their order; default: all",
        lower_bound=1,
    )
    SEED = flags.DEFINE_integer(
        "seed",
        None,
        "seed of the rows that --limit draws (default 0); if given, also of the examples of "
        "--shots",
        lower_bound=0,
    )
    MAKE_PAIRS = command.define_path(
        "make_pairs", None, "file to write: a JSON line for each row of --input"
    )

with command.flag_group("Examples in the prompt"):
    EXAMPLES = command.define_path(
        "examples", None, "file of rows to show before the input; a row is never its own example"
    )
    SHOTS = flags.DEFINE_integer(
        "shots",
        None,
        "number of examples to show: the first ones or, with --seed, a random draw for each row; "
        "default: all in their order",
        lower_bound=0,
    )

with command.flag_group("Passages to answer from"):
    PASSAGES = command.define_path("passages", None, "folder or file of texts to answer from")
    BEST = flags.DEFINE_integer("best", 3, "number of passages to look up", lower_bound=1)
    PASSAGE_SIZE = flags.DEFINE_integer(
        "passage_size", 600, "maximum number of characters of a passage", lower_bound=1
    )
    TEXT_KEY = flags.DEFINE_string(
        "text_key", "text", "key or column of the text in --passages of JSON or Parquet"
    )
    ON_ERROR = flags.DEFINE_enum(
        "on_error", "raise", ["raise", "skip"], "what to do about damaged texts in --passages"
    )

with command.flag_group("Labels and choices"):
    CHOICES = flags.DEFINE_multi_string(
        "choices", [], "an answer to choose from, for rows without choices"
    )
    BLANK = flags.DEFINE_string(
        "blank",
        None,
        "mark in the input, such as _, that each choice fills; the text after it is scored "
        "(--task=continue)",
    )
    SCORER = flags.DEFINE_enum(
        "scorer",
        "logprob",
        ["logprob", "pmi", "pseudo_log_likelihood"],
        "how labels and choices are scored",
    )
    NORMALISE = flags.DEFINE_enum(
        "normalise",
        None,
        ["sum", "per_char", "per_byte"],
        "divisor of the scores of choices; default: sum for labels, per_byte for other choices",
    )
