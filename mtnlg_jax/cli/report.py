"""Write the report of a run, one page that needs neither network nor scripts.

    python launch/report.py --workdir=RUN

A run writes RUN/report.html at its end; this command writes it at any time, also of a run that is
training or was killed. Beside another run, with its curves and the settings that differ:

    python launch/report.py --workdir=RUN --compare=OTHER --output=both.html

Exit codes: 0 done, 2 bad input.
"""

from mtnlg_jax import command

with command.flag_group("The report"):
    _WORKDIR = command.define_path("workdir", None, "folder of the run", required=True)
    _COMPARE = command.define_path("compare", None, "folder of another run to show beside it")
    _OUTPUT = command.define_path("output", None, "file to write; default: RUN/report.html")


def main() -> None:
    from mtnlg_jax.train.report import build

    print("wrote", build.write(_WORKDIR.value, _COMPARE.value, _OUTPUT.value))


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
