"""Flags of launch/audit.py."""

from absl import flags

from mtnlg_jax import command

with command.flag_group("The run and its data"):
    WORKDIR = command.define_path(
        "workdir",
        None,
        "folder of a run or of a Hugging Face model, or a GGUF file",
        required=True,
    )
    CHECKPOINT = command.define_checkpoint()
    DATA = command.define_paths(
        "data",
        "a prepared folder that the model was trained on, or the prefix of Megatron's files; "
        "default: those that the run's config names",
    )
    CANARIES = command.define_path(
        "canaries", None, "file of the planted canaries; default: canaries.json in the data"
    )
    REFERENCE = command.define_path(
        "reference",
        None,
        "another run or model with the same tokenizer, against which membership is scored",
    )
    OUTPUT = command.define_path(
        "output",
        None,
        "folder for audit.json and audit.html; default: the run's, which only a run has",
    )

with command.flag_group("What is measured"):
    PARTS = flags.DEFINE_list(
        "parts",
        None,
        "of extraction, canaries, membership, personal_data; default: all that the data allow",
    )
    PASSAGES = flags.DEFINE_integer(
        "passages", 200, "passages of the training text and of the held-out text"
    )
    PREFIXES = flags.DEFINE_list(
        "prefixes", None, "tokens before what the model must reproduce; default: 8,16,32,..."
    )
    CONTINUATION = flags.DEFINE_integer(
        "continuation", None, "tokens it must reproduce; default: 50, or half the context"
    )
    SAMPLES = flags.DEFINE_integer("samples", 4, "samples behind each prefix; 0: greedy alone")
    TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "of samples and written texts")
    TOP_K = flags.DEFINE_integer("top_k", 0, "of samples behind prefixes; 0: all tokens")
    CANDIDATES = flags.DEFINE_integer(
        "candidates", 10_000, "secrets that are ranked against that of each canary"
    )
    MEMBER_TOKENS = flags.DEFINE_integer(
        "member_tokens", None, "tokens of a passage for membership; default: at most 128"
    )
    MIN_K = flags.DEFINE_float("min_k", 20.0, "percent of its tokens that min-k % averages")
    TEXTS = flags.DEFINE_integer("texts", 64, "texts that are searched for personal data")
    TEXT_TOKENS = flags.DEFINE_integer("text_tokens", 128, "most tokens of such a text")
    SEED = flags.DEFINE_integer("seed", 0, "seed of every draw")

with command.flag_group("The report"):
    SHOW_TEXTS = flags.DEFINE_bool(
        "show_texts", False, "show excerpts whole and without masks, and the canaries' secrets"
    )

with command.flag_group("Devices"):
    SET = flags.DEFINE_multi_string(
        "set",
        [],
        "mesh.KEY=VALUE: devices to split the model over (data, tensor, expert, context)",
    )


def prefixes() -> tuple[int, ...]:
    """Return the tokens of the prefixes; () for the default."""
    if PREFIXES.value is None:
        return ()
    try:
        return tuple(map(int, PREFIXES.value or [""]))
    except ValueError:
        raise ValueError(
            f"--prefixes={','.join(PREFIXES.value)} is not a list of numbers, such as 8,16,32"
        ) from None
