"""Serve a trained model over HTTP: OpenAI's API, ranking, filling, and a page to try them.

    python launch/serve.py --workdir=RUN
    python launch/serve.py --workdir=RUN --port=8000 --weights=int8 --slots=8

Open http://127.0.0.1:8000/ for the page, or call it:

    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "Once upon a time", "max_tokens": 32}'

It serves this machine alone unless --host and API keys are given. A file of keys has one key a
line, each with optional limits, and only its owner may read it:

    openssl rand -hex 24 > keys.txt && chmod 600 keys.txt
    python launch/serve.py --workdir=RUN --host=0.0.0.0 --api_keys=keys.txt

Split the model over devices, also of several processes (launch/cluster/launch.py --script=serve
starts them; process 0 listens):

    python launch/serve.py --workdir=RUN --set=mesh.tensor=4

Check on the loaded model that the text of a request does not depend on the others:

    python launch/serve.py --workdir=RUN --selftest

Adapters that PEFT has saved become models of their own, which requests name:

    python launch/serve.py --workdir=BASE --lora=polite=FOLDER --lora=terse=FOLDER

SIGTERM and Ctrl-C let running requests finish and refuse new ones with 503; a second one ends the
server at once. docs/serving.md describes the API.

Exit codes: 0 ended by a signal, or --selftest passed; 1 --selftest failed; 2 bad input, which
includes a port in use and keys that others may read.
"""

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.decoding import devices, fitting, held_flags
from mtnlg_jax.cli.serving import options, start

for module in (options, held_flags, devices, fitting):
    flags.adopt_module_key_flags(module)


def main() -> int:
    """Check the flags, bind the port, load the models and serve until a signal."""
    return start.serve()


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
