"""Measure what a model remembers of its training text: a report as HTML and JSON.

    python launch/audit.py --workdir=RUN
    python launch/audit.py --workdir=RUN --parts=extraction,membership --reference=OTHER_RUN
    python launch/audit.py --workdir=HF_FOLDER --data=PREPARED --output=REPORT

extraction      the share of passages of the training text that the model continues word for word,
                by length of the prefix and by how often they stand there
canaries        exposure of the secrets that launch/prepare_data.py --canaries=10 planted
membership      whether a score tells training text from held-out text: AUC with its interval
personal_data   what the recipe's rules find in texts that the model writes

RUN/audit.html shows the figures, RUN/audit.json has them all (docs/privacy.md).

Split the model over devices, also of several processes (launch/cluster/launch.py --script=audit):

    python launch/audit.py --workdir=RUN --set=mesh.tensor=4 --set=mesh.data=2

Exit codes: 0 done, 2 bad input, 6 another process ended (134: detected by JAX).
"""

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.auditing import options, perform
from mtnlg_jax.cli.decoding import devices, fitting

flags.adopt_module_key_flags(devices)
flags.adopt_module_key_flags(fitting)
flags.adopt_module_key_flags(options)


def main() -> None:
    from mtnlg_jax import compat
    from mtnlg_jax.interop import registry

    compat.quiet()
    registry.register()
    devices.check_of_mesh(options.SET.value)
    folder = perform.output()
    with devices.started(options.SET.value, lambda: perform.check_folder(folder)):
        perform.perform(folder)


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
