"""Flags of launch/generate.py other than those of cli.decoding and the settings of DecodeConfig."""

from absl import flags

from mtnlg_jax import command

with command.flag_group("Model"):
    WORKDIR = command.define_path(
        "workdir", None, "folder of a run or of a Hugging Face model, or a GGUF file", required=True
    )

with command.flag_group("Mode and prompts"):
    MODE = flags.DEFINE_enum(
        "mode",
        "generative",
        ["generative", "ranking", "fill", "tokens"],
        "what to do with the prompt",
    )
    PROMPT = flags.DEFINE_string("prompt", None, "the prompt")
    INPUT = command.define_path("input", None, "file that holds the prompt, - for standard input")
    PROMPTS = command.define_path(
        "prompts",
        None,
        "file of prompts, one a line; .jsonl: objects with the key prompt; - for standard input",
    )
    BATCH = flags.DEFINE_integer(
        "batch", 8, "number of prompts of --prompts in a batch", lower_bound=1
    )
    PARSE_SPECIAL = flags.DEFINE_bool(
        "parse_special",
        False,
        "parse special tokens in the prompt, such as <|im_start|>; off: they are plain text",
    )

with command.flag_group("Conversation"):
    CHAT = flags.DEFINE_bool(
        "chat",
        False,
        "talk with a model that was trained to chat: read lines, answer each; /reset begins a new "
        "conversation",
    )
    SYSTEM = flags.DEFINE_string("system", None, "what the system says before the conversation")
    CHAT_TEMPLATE = command.define_path(
        "chat_template", None, "file of a chat template, instead of the one of the tokenizer"
    )

with command.flag_group("Output"):
    OUTPUT = command.define_path(
        "output",
        None,
        "file for the answers to --prompts, one JSON line each; default: standard output",
    )
    STREAM = flags.DEFINE_bool(
        "stream", None, "print text as it is generated; default: on a terminal"
    )
    STATS = flags.DEFINE_bool(
        "stats",
        False,
        "print tokens/s, the limit of the memory bandwidth, and how many guesses were accepted",
    )
    SHOW_SPECIAL = flags.DEFINE_bool(
        "show_special", False, "show special tokens by name in the text"
    )

with command.flag_group("--mode=ranking"):
    CANDIDATES = flags.DEFINE_multi_string(
        "candidates", [], "a text to rank, with its leading space"
    )
    NORMALISE = flags.DEFINE_enum(
        "normalise",
        "per_token",
        ["sum", "per_token", "per_char", "per_byte"],
        "how ranking normalizes log-probabilities",
    )
    SCORER = flags.DEFINE_multi_string(
        "scorer",
        ["logprob"],
        "NAME or NAME=WEIGHT: logprob, gnmt, pmi, noisy_channel, "
        "pseudo_log_likelihood, mbr, self_consistency, repetition, diversity, coherence; repeat to "
        "combine several",
    )
    # By the names of ScorerOptions.
    SCORING = {
        "gnmt_alpha": flags.DEFINE_float(
            "gnmt_alpha", None, "gnmt: 0 disables length normalization"
        ),
        "neutral": flags.DEFINE_string(
            "neutral", None, "pmi, noisy_channel: context without information; default: none"
        ),
        "source": flags.DEFINE_string(
            "source", None, "noisy_channel: text that candidates explain; default: the prompt"
        ),
        "reverse": flags.DEFINE_string(
            "reverse", None, "noisy_channel: prompt for the source, with {candidate} in it"
        ),
        "channel_weight": flags.DEFINE_float(
            "channel_weight", None, "noisy_channel: weight of log p(source | candidate)"
        ),
        "language_weight": flags.DEFINE_float(
            "language_weight", None, "noisy_channel: weight of log p(candidate)"
        ),
        "within_word_l2r": flags.DEFINE_bool(
            "within_word_l2r", None, "pseudo_log_likelihood: also mask the rest of the word"
        ),
        "utility": flags.DEFINE_enum(
            "utility", None, ["chrf", "bleu", "bleu_zh", "token_f1", "exact"], "mbr: the similarity"
        ),
        "answer": flags.DEFINE_string(
            "answer", None, "self_consistency: regular expression of the answer"
        ),
        "votes": flags.DEFINE_enum(
            "votes", None, ["count", "probability"], "self_consistency: how to vote"
        ),
    }

with command.flag_group("--mode=fill"):
    GUESSES = flags.DEFINE_integer(
        "guesses", 5, "number of guesses to show for each mask", lower_bound=1
    )

with command.flag_group("Speculative decoding"):
    DRAFT = command.define_path(
        "draft",
        None,
        "a smaller model with the same tokenizer, as --workdir, for speculative decoding: "
        "it guesses tokens that the model verifies; the distribution of texts does not change",
    )


def is_given(name: str) -> bool:
    """Check whether a flag is on the command line, other than as --noNAME."""
    flag = flags.FLAGS[name]
    return bool(flag.present) and flag.value is not False
