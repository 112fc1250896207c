"""Turn text into a folder to train from: tokenizer, token arrays, held-out part.

Text as it is: plain text, JSON lines, JSON, tables, Parquet, HTML, WARC, also compressed:

    python launch/prepare_data.py --output=data/python           the embedded text: no download
    python launch/prepare_data.py --input=novels --output=data/novels --vocab_size=16000
    python launch/prepare_data.py --input=web.jsonl.zst --output=data/web --tokenizer=gpt2_files
    python launch/prepare_data.py --input=rows.parquet --text_key='body|text' --output=data/rows
    python launch/prepare_data.py --input=old.csv --encoding=cp1252 --on_error=skip --output=OUT

The data recipe of MT-NLG, with a report.html. After an interruption the same command continues:

    python launch/prepare_data.py --config=configs/data/english.py --input=FOLDER \\
        --test_sets=EVAL --output=OUT
    ... --stages=clean,duplicates,paragraphs    some of the stages; without "tokens" the result is
                                                text
    ... --set=duplicates.threshold=0.7          a setting of mtnlg_jax/data/recipe/settings.py
    ... --processes=8 | --engine=ray            on this machine, or on a Ray cluster (RAY_ADDRESS)

Prompts with answers, for the configs/finetune_*.py, which train on the answers alone:

    python launch/prepare_data.py --input=pairs.jsonl --output=data/pairs \\
        --tokenizer=RUN/tokenizer --prompt='{title}\\n{text}\\nSummary:' --answer=' {summary}'

Images with captions, or features of another encoder (.npy), for a model with model.prefix:

    python launch/prepare_data.py --input=pairs.jsonl --output=data/captions --image=image \\
        --image_size=32 --answer='{caption}'
    python launch/prepare_data.py --input=clips.parquet --output=data/clips --prefix=features \\
        --prompt='{question}' --answer=' {answer}'

Conversations, which train the assistant's turns alone, by the chat template of a tokenizer:

    python launch/prepare_data.py --input=chats.jsonl --output=data/chats \\
        --tokenizer=RUN/tokenizer --messages=messages --sequence_length=1024 --show=3

Exit codes: 0 done, 2 bad input.
"""

import os
import shlex

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.preparation import options
from mtnlg_jax.data.prepare import describe, prepare

flags.adopt_module_key_flags(options)  # --help lists them


def main() -> None:
    from mtnlg_jax.interop import registry

    registry.register()
    options.check()
    recipe = options.CONFIG.value is not None
    info = _make() if recipe else _prepare()
    print(describe(info))
    output = options.OUTPUT.value
    if recipe:
        print(f"report: {output}/report.html")
    if "tokenizer" in info:  # a recipe without the stage "tokens" leaves nothing to train on
        config = "--config=configs/small.py"
        if options.prefix() is not None:
            config = "--config=configs/shapes.py, or another with this model.prefix"
        elif options.ANSWER.value is not None or options.MESSAGES.value is not None:
            config = "--config=configs/finetune_sentiment.py, or another that fits"
        path = shlex.quote(output)
        print(f"next: python launch/pretrain.py {config} --set=data.path={path} --workdir=RUN")


def _prepare() -> dict:
    """Prepare text as it is."""
    return prepare(
        options.INPUT.value,
        options.OUTPUT.value,
        prompt=options.prompt(),
        answer=options.ANSWER.value,
        prefix=options.prefix(),
        messages=options.MESSAGES.value,
        chat_template=options.CHAT_TEMPLATE.value,
        sequence_length=options.SEQUENCE_LENGTH.value,
        show=options.SHOW.value,
        overwrite=options.OVERWRITE.value,
        **options.settings(),
    )


def _make() -> dict:
    """Prepare text by the recipe of --config."""
    # Imported here: a recipe needs pyarrow, matplotlib and more, which plain text does not.
    from mtnlg_jax.data.recipe.run import make
    from mtnlg_jax.data.recipe.settings import load_recipe, with_flags
    from mtnlg_jax.data.recipe.stages import in_processes, on_ray

    ray = options.ENGINE.value == "ray"
    if ray and options.PROCESSES.value:
        raise ValueError("--processes is for this machine; a Ray cluster uses all of its own")
    recipe = load_recipe(options.CONFIG.value, tuple(options.SET.value))
    recipe = with_flags(
        recipe,
        stages=options.STAGES.value,
        test_sets=options.TEST_SETS.value,
        skip_sources=options.SKIP_SOURCES.value,
        **options.settings(given=True, canaries=recipe.canaries),
    )
    return make(
        recipe,
        options.INPUT.value,
        options.OUTPUT.value,
        engine=on_ray() if ray else in_processes(options.PROCESSES.value or os.cpu_count() or 1),
        overwrite=options.OVERWRITE.value,
    )


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
