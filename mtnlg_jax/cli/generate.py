"""Generate, rank or fill in text with a trained model, or talk with it.

Continue a prompt: greedily, by sampling (--temperature, --top_k, --top_p ...) or by beam search:

    python launch/generate.py --workdir=RUN --prompt="Once upon a time" --temperature=0.8
    python launch/generate.py --workdir=RUN --prompt="Once upon a time" --num_beams=4

Choose tokens against repetition, or write more words than the context holds, with a window that
slides over the text (docs/presets.md, docs/decoding.md):

    python launch/generate.py --workdir=RUN --prompt="Once upon a time" --preset=contrastive
    python launch/generate.py --workdir=RUN --prompt="Once upon a time" --words=5000

Read the prompt from standard input (or --input=FILE), or many prompts from a file:

    python launch/generate.py --workdir=RUN --prompts=PROMPTS.txt --output=ANSWERS.jsonl

Rank candidates, given or generated (by --n=8 samples or by --num_beams=8), and score them by one
scorer or by several with weights:

    python launch/generate.py --workdir=RUN --mode=ranking --prompt="The sky is" \\
        --candidates=" blue" --candidates=" loud"
    python launch/generate.py --workdir=RUN --mode=ranking --prompt="The sky is" --n=8 \\
        --scorer=logprob=1 --scorer=pmi=0.5

Talk with a model that was trained to chat, line by line; /reset begins a new conversation:

    python launch/generate.py --workdir=RUN --chat --system="Answer in one sentence."

Caption an image, or rank captions of it, by a model that was trained with model.prefix:

    python launch/generate.py --workdir=RUN --image=PICTURE.png
    python launch/generate.py --workdir=RUN --image=PICTURE.png --mode=ranking \\
        --candidates="a red ring" --candidates="a blue cross"

Fill in <mask> or [MASK], or show the token ids of a text:

    python launch/generate.py --workdir=RUN --mode=fill --prompt="The captain <mask> the ship."
    python launch/generate.py --workdir=RUN --mode=tokens --prompt="Once upon a time"

Split the model over devices, here heads, MLP and vocabulary over 4 and rows over 2, also of several
processes (launch/cluster/launch.py --script=generate starts them):

    python launch/generate.py --workdir=RUN --set=mesh.tensor=4 --set=mesh.data=2 --prompt=...

An empty prompt starts a new text. --prompts=FILE holds one prompt a line: texts, or in a .jsonl
file objects of the form {"prompt": ..., "candidates": [...]}. The model is loaded once, and each
answer is written to --output as a JSON line as soon as it is known. An object may name its own
"adapter", null for none, in place of --adapter; a batch may have several.

--adapter=NAME is one of launch/adapt.py, and --adapter=FOLDER one that PEFT has saved; --workdir is
its base. Settings that are not given come from config.decode of the run. --set=decode.KEY=VALUE
sets any of them. A setting that has no effect beside the others is refused. The prompt and its
continuation share the context of the model; the text ends when the context is full, unless a flag
such as --words makes a window slide over it.
Control tokens (pad, bos, mask, sep) are not generated. Other special tokens of an imported
tokenizer may be; they appear in the text only with --show_special.

Texts to forbid, to favor or to stop at are given as text: --bad_words="of course"
--suppress_words=the --word_bias=sea:2.5 --stop_words=END. These match with and without a space
before the text, and are also given as ids of --mode=tokens: --suppress_tokens=5,6
--bad_words_ids=7,8 (a sequence) --logit_bias=13:-5 (id and bias) --sequence_bias=7,8:2.5. In these
texts, --stop_strings and --reverse, \\n, \\t, \\r and \\\\ mean line end, tab, carriage return and
backslash. Prompts and candidates are taken literally; write $'\\n' there.

Exit codes: 0 done, 2 bad input, which includes a model that does not fit and one with nonfinite
parameters or scores, 6 another process ended (134: detected by JAX).
"""

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.decoding import devices, fitting, held_flags, preset_flag, shared_flags
from mtnlg_jax.cli.generation import (
    adapters,
    control_flags,
    options,
    prefixes,
    settings_flags,
    sliding,
)
from mtnlg_jax.cli.generation.answering import answer
from mtnlg_jax.cli.generation.chatting import chat
from mtnlg_jax.cli.generation.checks import check_flags, check_output, check_settings
from mtnlg_jax.cli.generation.other_modes import show_tokens
from mtnlg_jax.cli.generation.prompts import read_prompt, read_rows
from mtnlg_jax.cli.generation.settings import given_settings

# --help lists the flags of these modules.
own = (options, prefixes, settings_flags, control_flags, sliding)
for module in (*own, held_flags, preset_flag, shared_flags, devices, fitting):
    flags.adopt_module_key_flags(module)


def main() -> None:
    from mtnlg_jax.interop import registry

    registry.register()
    check_flags()
    path = options.PROMPTS.value
    if not path:
        adapters.merge([])
    if options.MODE.value == "tokens":
        return show_tokens(read_prompt())
    given = sliding.lengthened(given_settings())
    check_settings(given)
    with devices.started(shared_flags.SET.value, check_output):
        if options.CHAT.value:
            return chat(given)
        rows = devices.on_first(
            lambda: read_rows(path) if path else [{"prompt": read_prompt()} | prefixes.of_flags()]
        )
        if path:
            adapters.merge(rows)
        answer(rows, given)


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
