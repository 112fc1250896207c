"""Read what launch/bias.py is given, measure, print and write."""

import json
import os
from typing import TYPE_CHECKING

from mtnlg_jax import command, foreign, storage
from mtnlg_jax.cli.decoding import devices, fitting, held_flags
from mtnlg_jax.cli.probing import options

if TYPE_CHECKING:
    from mtnlg_jax.config import Config
    from mtnlg_jax.evaluate.bias.lexicon import Lexicon
    from mtnlg_jax.evaluate.bias.read import Prompts
    from mtnlg_jax.evaluate.bias.run import BiasSettings

_OF_ASSOCIATIONS = (options.LANGUAGE, options.PROMPTS, options.SETS, options.LEXICON, options.WORDS)
_OF_SAMPLING = (
    options.BATCH,
    options.MAX_NEW_TOKENS,
    options.TEMPERATURE,
    options.TOP_P,
    options.MIN_COUNT,
)


def check_flags() -> None:
    """Raise ValueError on flags that conflict or have no effect, before anything is read."""
    if not options.ASSOCIATIONS.value:
        if not options.PAIRS.value:
            raise ValueError(
                "--noassociations leaves nothing to measure; give --pairs=FILE, or leave it out"
            )
        unused = (*_OF_ASSOCIATIONS, options.SAMPLES, *_OF_SAMPLING)
        command.refuse(unused, "has no effect without --associations")
    elif not options.SAMPLES.value:
        command.refuse(_OF_SAMPLING, "has no effect without --samples above 0")
    if not options.PAIRS.value:
        command.refuse((options.STATISTICS,), "has no effect without --pairs")
    if not options.TEMPERATURE.value > 0:
        raise ValueError(
            f"--temperature={options.TEMPERATURE.value} draws the same output each time; give a "
            "number above 0"
        )
    if not 0 < options.TOP_P.value <= 1:
        raise ValueError(f"--top_p={options.TOP_P.value} is not a share; give 0 to 1, without 0")
    devices.check_of_mesh(options.SET.value)
    output()


def output() -> str:
    """Return the path of the JSON file. Raise ValueError if none follows from the flags."""
    workdir = options.WORKDIR.value
    # Other processes than the first have no --output.
    given = options.OUTPUT.value
    if given is not None and not given.endswith(".json"):
        raise ValueError(
            f"--output={given} does not end with .json; name a JSON file, which gets a page "
            "(.html) beside it"
        )
    if given is None and devices.on_first_process() and foreign.reader_of(workdir) is not None:
        raise ValueError(
            f"--workdir={workdir} is not a run of this package, so the result has no folder; give "
            "--output=FILE.json"
        )
    return given or storage.join(workdir, "bias.json")


def check_output() -> None:
    """Raise OSError if the result cannot be written."""
    if options.OUTPUT.value is not None and not storage.is_remote(options.OUTPUT.value):
        command.check_output(options.OUTPUT)
    elif options.OUTPUT.value is None and not storage.is_remote(options.WORKDIR.value):
        folder = options.WORKDIR.value
        if os.path.isdir(folder) and not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable; give --output=FILE.json elsewhere")


def settings() -> "BiasSettings":
    """Read the files of the flags, and return what is measured.

    Raise ValueError on a file that cannot be used, before the model is loaded.
    """
    from mtnlg_jax.evaluate.bias.lexicon import check_language, read_lexicon, read_words
    from mtnlg_jax.evaluate.bias.pairs_file import read_pairs, read_statistics
    from mtnlg_jax.evaluate.bias.run import BiasSettings
    from mtnlg_jax.evaluate.bias.sampled import SampledSettings

    prompts: Prompts | None = None
    lexicon: Lexicon | None = None
    words: tuple[str, ...] = ()
    if options.ASSOCIATIONS.value:
        prompts = _prompts()
        if options.LEXICON.value is not None:
            lexicon = read_lexicon(options.LEXICON.value)
            check_language(
                list(lexicon.scores), prompts.language, f"--lexicon={options.LEXICON.value}"
            )
        if options.WORDS.value is not None:
            words = tuple(read_words(options.WORDS.value))
            check_language(words, prompts.language, f"--words={options.WORDS.value}")
    known = None if options.STATISTICS.value is None else read_statistics(options.STATISTICS.value)
    return BiasSettings(
        prompts,
        SampledSettings(
            samples=options.SAMPLES.value,
            temperature=options.TEMPERATURE.value,
            top_p=options.TOP_P.value,
            max_new_tokens=options.MAX_NEW_TOKENS.value,
            batch=options.BATCH.value,
            seed=options.SEED.value,
            min_count=options.MIN_COUNT.value,
        ),
        words,
        lexicon,
        tuple(read_pairs(path, known) for path in dict.fromkeys(options.PAIRS.value)),
    )


def _prompts() -> "Prompts":
    from mtnlg_jax.evaluate.bias.read import builtin, chosen, read_prompts

    language = options.LANGUAGE.value
    if options.PROMPTS.value is None:
        prompts = builtin(language or "en")
    else:
        prompts = read_prompts(options.PROMPTS.value, language)
        if language not in (None, prompts.language):
            raise ValueError(
                f"--language={language} and {options.PROMPTS.value} says {prompts.language}; leave "
                "--language out"
            )
    return chosen(prompts, options.SETS.value) if options.SETS.value else prompts


def _check_memory(config: "Config") -> None:
    """Raise ValueError if the model and the caches of the outputs do not fit."""
    from mtnlg_jax.decode.memory import Caches, Choices, Plan

    mesh = devices.mesh()
    sampling = options.ASSOCIATIONS.value and options.SAMPLES.value
    rows = min(options.BATCH.value, options.SAMPLES.value) if sampling else 1
    caches = (Caches(rows, config.model.max_position_embeddings),)
    form = (held_flags.DTYPE.value, held_flags.WEIGHTS.value, held_flags.CACHE.value)
    plan = Plan(config.model, *form, mesh, caches)
    fitting.check(options.WORKDIR.value, [plan], Choices(rows=("--batch", rows)), mesh)


def measure() -> None:
    """Measure the model, print the tables and write the files."""
    given = settings()
    from mtnlg_jax import compat
    from mtnlg_jax.evaluate.bias.run import measure_run, unused_lexicon, write
    from mtnlg_jax.evaluate.bias.tables import as_text, sections

    compat.configure_cache()
    held = {
        "dtype": held_flags.DTYPE.value,
        "weights": held_flags.WEIGHTS.value,
        "cache": held_flags.CACHE.value,
    }
    content = measure_run(
        options.WORKDIR.value,
        held_flags.CHECKPOINT.value,
        given,
        held,
        devices.mesh(),
        before=lambda config, _: _check_memory(config),
    )
    if not devices.on_first_process():
        return
    path = output()
    page = write(content, path)
    if options.JSON.value:
        print(json.dumps(content, ensure_ascii=False, allow_nan=False), flush=True)
    else:
        print(as_text(sections(content, options.TOP.value)), flush=True)
    devices.note(f"{path} and {page} are written")
    unused = unused_lexicon(content)
    if unused is not None:
        # Behind the files, so that the words that were sampled are not lost.
        raise ValueError(f"--lexicon={options.LEXICON.value}: {unused}")
