"""Look inside a model: logit lens, attention, loss by token, patches, influential passages.

The token that each layer would predict next (logit lens):

    python launch/inspect.py --workdir=RUN --mode=lens --text="The captain walked to the"

Which tokens each head attends to, and one layer token by token:

    python launch/inspect.py --workdir=RUN --mode=attention --text="The captain slept" --layer=0

A text of any length, shaded by the loss of each token, with what the model expected:

    python launch/inspect.py --workdir=RUN --mode=loss --input=FILE

Which activations carry the difference between two prompts with the same number of tokens: each one
of the clean prompt is put into the pass of the corrupt one, and the share of the logit difference
between two answers that returns is measured:

    python launch/inspect.py --workdir=RUN --mode=patch --clean="Paris is in" \\
        --corrupt="Rome is in" --answers=" France" --answers=" Italy"

Which training passages raise the probability of a continuation, by similarity of projected
gradients (small models; the data of the run, or texts with --passages):

    python launch/inspect.py --workdir=RUN --mode=influence --prompt="The captain" \\
        --continuation=" slept" --most=1000

A model of another format has no folder of results, so give one:

    python launch/inspect.py --workdir=HF_FOLDER --mode=lens --text="Hello" --output=FOLDER

Results go to RUN/inspect as MODE.json, MODE.html and MODE.png. Exit codes: 0 done, 2 bad input.
"""

import os

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.inspection import looking, options

flags.adopt_module_key_flags(options)


def main() -> None:
    from mtnlg_jax import compat
    from mtnlg_jax.interop import registry

    compat.quiet()
    registry.register()
    options.check()
    folder = options.folder()
    texts, names = looking.read_loss_texts()
    compat.configure_cache()

    # Imported here: bad input is reported before JAX is imported, which takes longer.
    from mtnlg_jax.evaluate.inside.files import write_results
    from mtnlg_jax.evaluate.inside.subject import load_subject

    subject = load_subject(options.WORKDIR.value, options.CHECKPOINT.value)
    found = looking.look(subject, texts, names)
    print(found.lines, flush=True)
    written = write_results(folder, options.MODE.value, found.result, found.page, found.picture)
    print("wrote", ", ".join(os.path.join(folder, name) for name in written))


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
