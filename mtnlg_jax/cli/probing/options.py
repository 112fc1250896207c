"""The flags of `cli.bias`."""

from absl import flags

from mtnlg_jax import command

with command.flag_group("The model and the result"):
    WORKDIR = command.define_path(
        "workdir",
        None,
        "folder of a run or of a Hugging Face model, or a GGUF file",
        required=True,
    )
    ADAPTER = command.define_path(
        "adapter",
        None,
        "adapter of the model at --workdir: the name of one in the run, its file, or the folder of "
        "a PEFT adapter",
    )
    OUTPUT = command.define_path(
        "output",
        None,
        "FILE.json to write, with FILE.html beside it; default: bias.json in the run",
    )
    JSON = flags.DEFINE_bool("json", False, "print the JSON object in place of the tables")
    TOP = flags.DEFINE_integer("top", 10, "words of each printed table", lower_bound=1)
with command.flag_group("Associations"):
    ASSOCIATIONS = flags.DEFINE_bool(
        "associations", True, "measure the words that the model writes about groups"
    )
    LANGUAGE = flags.DEFINE_enum(
        "language", None, ["en", "zh"], "of the prompts; default: en, or that of --prompts"
    )
    PROMPTS = command.define_path(
        "prompts", None, "JSON or TSV file of groups and templates, in place of the built-in ones"
    )
    SETS = flags.DEFINE_list(
        "sets", [], "names of sets of the prompts, such as gender,identifiers; default: all"
    )
    LEXICON = command.define_path(
        "lexicon",
        None,
        "SentiWordNet 3.0, or lines of word<TAB>score: the words that count, and their scores",
    )
    WORDS = command.define_path(
        "words", None, "words that count, one a line, in place of those of the lexicon"
    )
with command.flag_group("Sampling"):
    SAMPLES = flags.DEFINE_integer(
        "samples", 800, "outputs of each prompt; 0: rank words, and sample nothing", lower_bound=0
    )
    BATCH = flags.DEFINE_integer("batch", 64, "outputs that are written together", lower_bound=1)
    MAX_NEW_TOKENS = flags.DEFINE_integer(
        "max_new_tokens", 50, "tokens of an output, which ends with its sentence", lower_bound=1
    )
    TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "temperature of sampling")
    TOP_P = flags.DEFINE_float("top_p", 0.9, "sample from the most likely tokens of this share")
    MIN_COUNT = flags.DEFINE_integer(
        "min_count", 10, "outputs below which a word is left out of the tables", lower_bound=1
    )
    SEED = flags.DEFINE_integer(
        # Each has the random numbers of 2^22 outputs, of 2^32.
        "seed",
        0,
        "seed of sampling and of intervals",
        lower_bound=0,
        upper_bound=1023,
    )
with command.flag_group("Paired sentences"):
    PAIRS = command.define_paths(
        "pairs", "CSV, TSV or JSON lines: CrowS-Pairs, WinoBias, Winogender; may be repeated"
    )
    STATISTICS = command.define_path(
        "statistics",
        None,
        "TSV with the columns occupation and bls_pct_female, for pairs without such a column",
    )
with command.flag_group("Devices"):
    SET = flags.DEFINE_multi_string(
        "set",
        [],
        "mesh.KEY=VALUE: devices to split the model over (data, tensor, expert, context)",
    )
