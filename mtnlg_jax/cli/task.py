"""Do a task with a trained model, and score its answers.

Five tasks on one text of --input or standard input, in English or Chinese, which is detected:

    echo "Once upon a time" | python launch/task.py --workdir=RUN --task=continue
    python launch/task.py --workdir=RUN --task=translate --input=FILE --set=decode.num_beams=1
    python launch/task.py --workdir=RUN --task=sentiment --input=FILE
    python launch/task.py --workdir=RUN --task=answer --input=QUESTION --passages=FOLDER

Answer many rows, or each text of a folder (docs/many_inputs.md); write a text of any length about
the topic of --input (docs/writing.md). The same command goes on after an interruption:

    python launch/task.py --workdir=RUN --task=sentiment --inputs=ROWS --outputs=ANSWERS.jsonl
    python launch/task.py --workdir=RUN --task=write --kind=story --words=2000 --input=FILE \\
        --output=STORY.md

Score the answers to many rows beside those of a trivial baseline; score existing answers, which are
those of --output or of any other source, without a model:

    python launch/task.py --workdir=RUN --task=answer --eval=ROWS --output=ANSWERS.jsonl
    python launch/task.py --task=answer --score=ANSWERS.jsonl

Write rows as prompts and answers to fine-tune on, which requires no run:

    python launch/task.py --task=summarise --input=ROWS --make_pairs=OUT.jsonl
    python launch/prepare_data.py --input=OUT.jsonl --output=DATA --tokenizer=RUN/tokenizer \\
        --answer='{answer}'

ROWS and --examples are .jsonl, .json (also in SQuAD's layout), .csv, .parquet or columns separated
by tabs (.tsv, .txt), also compressed. A row has an input, a reference and, in some sets, a context
and choices. The layouts of well-known sets are recognized by their keys, which a note reports. For
other layouts --columns names the key (a.b inside objects), the number from 0 or the head of each
column, several as sol1+sol2. --labels gives references the names of the task's labels:

    SST-2         --task=sentiment --eval=dev.tsv --labels=0=negative,1=positive
    Tatoeba       --task=translate --eval=cmn.txt (zh into en: --columns=input=1,reference=0)
    ARC           --task=answer --eval=arc.jsonl
                  --columns=input=query,choices=choices,reference=gold
    Winogrande    --task=continue --eval=winogrande.jsonl (scores the text after the blank)
    LAMBADA       --task=continue --eval=lambada.jsonl --last_word

The reference of a row with choices is a choice's text, its letter or its number. reference=KEY@0 or
KEY@1 gives the number of the first choice; KEY@letter and KEY@text exclude numbers
(tasks.examples.read_rows describes what happens without them). --normalise divides the scores of
choices: sum is acc of lm-evaluation-harness, per_char its acc_norm (characters without the space
before them), per_byte the same in UTF-8; --eval prints the accuracy of all three.

--templates=FILE changes the prompts, for example to those of a fine-tuned model; {choices} in one
lists the choices by letters and ranks the letters (see tasks.templates). --passages=FOLDER looks up
passages to answer from and cites them. --profile=FILE shows what fits of a person's facts, samples
of style and preferences. --set=decode.KEY=VALUE changes a setting of the task's decoding;
--set=KEY=VALUE does the same. --preset=NAME sets those that choose tokens (docs/presets.md).

An input longer than the context is worked on by parts, none of it left out (--length, --glossary,
--document, --cite, --aspects; docs/long_texts.md); --eval cuts it as other harnesses do, unless
--long=parts is given.

--output=FILE.jsonl receives each answer as soon as it is known, so nothing is lost. The keys of a
line, and of --json, are those of tasks.answers.Answer, Choice and Evaluation.

Exit codes: 0 done, 1 the metrics failed (the answers are kept, and their file is named), 2 bad
input, 6 another process ended (134: detected by JAX).
"""

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.decoding import devices, fitting, held_flags, preset_flag, shared_flags
from mtnlg_jax.cli.task_modes import (
    long_options,
    many_options,
    options,
    profiles,
    writing,
    writing_options,
)
from mtnlg_jax.cli.task_modes.answering import answer_input
from mtnlg_jax.cli.task_modes.checks import check_flags, check_output
from mtnlg_jax.cli.task_modes.many import answer_file, check_outputs
from mtnlg_jax.cli.task_modes.pairs import make_pairs
from mtnlg_jax.cli.task_modes.scoring import evaluate_rows, score_answers

# --help lists the flags of these modules.
own = (options, long_options, many_options, writing_options, profiles)
for module in (*own, held_flags, preset_flag, shared_flags, devices, fitting):
    flags.adopt_module_key_flags(module)


def main() -> None:
    from absl import logging

    from mtnlg_jax.interop import registry
    from mtnlg_jax.tasks.templates import task_of

    registry.register()
    # Before anything imports JAX, which logs at INFO each backend that is missing.
    logging.set_verbosity(logging.WARNING)
    writing.check_flags()
    if options.TASK.value == writing.NAME:
        writing.write_document()
        return
    task = task_of(options.TASK.value, options.TEMPLATES.value)
    check_flags()
    registry.adapt(options.WORKDIR.value, shared_flags.ADAPTER.value, held_flags.CHECKPOINT.value)
    if options.SCORE.value:
        score_answers(task)
    elif options.MAKE_PAIRS.value:
        make_pairs(task)
    elif many_options.INPUTS.value:
        with devices.started(shared_flags.SET.value, lambda: check_outputs(task)):
            answer_file(task)
    else:
        with devices.started(shared_flags.SET.value, check_output):
            (evaluate_rows if options.EVAL.value else answer_input)(task)


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
