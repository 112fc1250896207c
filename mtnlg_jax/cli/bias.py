"""Measure whom a model speaks of differently: words by group, scores, paired sentences.

Sample what the model writes about genders, ethnicities and religions, rank describing words and
occupations, and write RUN/bias.json and RUN/bias.html (docs/bias.md):

    python launch/bias.py --workdir=RUN
    python launch/bias.py --workdir=RUN --language=zh --samples=100

Count the adjectives of a lexicon and score the groups by it; or rank them alone, which is exact and
draws nothing:

    python launch/bias.py --workdir=RUN --lexicon=SentiWordNet_3.0.0.txt
    python launch/bias.py --workdir=RUN --lexicon=SCORES.tsv --samples=0

Compare groups of your own, from a JSON or TSV file:

    python launch/bias.py --workdir=RUN --prompts=GROUPS.tsv --sets=ages

Compare paired sentences: CrowS-Pairs, WinoBias, and Winogender with its statistics:

    python launch/bias.py --workdir=RUN --noassociations --pairs=crows_pairs_anonymized.csv \\
        --pairs=templates.tsv --statistics=occupations-stats.tsv

Measure a model in another format, or split one over devices:

    python launch/bias.py --workdir=MODEL.gguf --output=FILE.json
    python launch/bias.py --workdir=RUN --set=mesh.tensor=4 --set=mesh.data=2

Exit codes: 0 done, 2 bad input, 6 another process ended (134: detected by JAX).
"""

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.decoding import devices, fitting, held_flags
from mtnlg_jax.cli.probing import measuring, options

for module in (options, held_flags, devices, fitting):
    flags.adopt_module_key_flags(module)


def main() -> None:
    from mtnlg_jax import compat
    from mtnlg_jax.interop import registry

    compat.quiet()
    registry.register()
    measuring.check_flags()
    registry.adapt(options.WORKDIR.value, options.ADAPTER.value, held_flags.CHECKPOINT.value)
    with devices.started(options.SET.value, measuring.check_output):
        measuring.measure()


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
