"""Prove that a config's mesh computes what one device computes, on simulated devices of this CPU.

    python launch/prove.py --config=configs/mtnlg_530b.py
    python launch/prove.py --config=configs/tiny.py --set=mesh.tensor=2 --output=certificate.json
    python launch/prove.py --workdir=RUN     # the run's own config, into RUN/certificate.json

Widths, depth, batch and mesh are shrunk; the axes above 1 stay above 1, and everything else is that
of the config: pipeline schedule, ZeRO, recomputation, types, optimizer, objectives, batch ramp,
experts, context mode, the switches of the model. Needs no data: text is made up.

Printed is the largest relative difference, beside its tolerance and the reason for it, of

loss, gradients   each objective, each tensor, to one device: in float32 and in the config's types
a moved run       a checkpoint restored on another mesh and on one device: state, next losses
Hugging Face      that checkpoint as a model of a family and back, bit for bit

Where the devices are too few for all axes of the config at once, several meshes cover every pair;
--devices=16 or 32 shows more of them together (docs/certificate.md).

Exit codes: 0 all within their tolerances, 1 not, 2 bad input.
"""

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.proving import options, perform

flags.adopt_module_key_flags(options)


def main() -> int:
    from mtnlg_jax.interop import registry

    registry.register()
    perform.check_flags()
    config = perform.given_config()
    perform.simulate_devices()
    from mtnlg_jax import compat

    compat.quiet()
    return perform.perform(config)


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
