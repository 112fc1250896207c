"""Show how a run lies on a mesh, and which mesh to choose, by arithmetic; nothing is allocated.

Every tensor of a config: its dims, its shape, how it is split, and its bytes on a device:

    python launch/plan.py --config=configs/mtnlg_530b.py
    python launch/plan.py --config=configs/tiny.py --set=mesh.tensor=2 --devices=4

The fastest layouts of a config on these chips, as --set flags:

    python launch/plan.py --config=configs/mtnlg_530b.py --chips=H100:1024

The same; then the first two are compiled and ranked by their predicted seconds, minutes for each:

    python launch/plan.py --config=configs/ladder.py:7.5b --chips=v5p:64 --prove=2

The share of the peak at which a run computed, written to RUN/calibration.json; then layouts that
are estimated with it:

    python launch/plan.py --calibrate=RUN --chips=H100:8
    python launch/plan.py --chips=H100:1024 --calibration=RUN/calibration.json

Exit codes: 0 done, 2 bad input, which includes a run that does not fit.
"""

import dataclasses
from pathlib import Path

from absl import flags

from mtnlg_jax import command

# Not there where a wheel is installed.
_MTNLG = Path(__file__).resolve().parents[2] / "configs" / "mtnlg_530b.py"

with command.flag_group("The config"):
    _CONFIG = command.define_path(
        "config",
        str(_MTNLG) if _MTNLG.is_file() else None,
        "a file of configs/ or a Hugging Face folder",
    )
    _SET = flags.DEFINE_multi_string("set", [], "a value of the config, such as mesh.tensor=4")
with command.flag_group("The table of tensors"):
    _DEVICES = flags.DEFINE_integer(
        "devices",
        None,
        "number of devices, where mesh.data=-1 takes what is left; default: one replica",
        lower_bound=1,
    )
with command.flag_group("The fastest layouts"):
    _CHIPS = flags.DEFINE_string(
        "chips", None, "kind and number, such as H100:1024 or v5p:1024: rank the layouts on them"
    )
    _TOP = flags.DEFINE_integer("top", 5, "number of layouts to print", lower_bound=1)
    _PROVE = flags.DEFINE_integer(
        "prove",
        0,
        "number of the fastest layouts to compile and to rank by their predicted seconds",
        lower_bound=0,
    )
    _CALIBRATION = command.define_path(
        "calibration", None, "a calibration.json, whose efficiency replaces that of MT-NLG"
    )
with command.flag_group("Calibration"):
    _CALIBRATE = command.define_path(
        "calibrate", None, "folder of a run: measure its efficiency on --chips"
    )

# For configs whose tokenizer decides: GPT-2's 50,257, padded to a multiple of 128 x tensor 8.
VOCABULARY = 51200


def main() -> None:
    from mtnlg_jax.config import load_config
    from mtnlg_jax.hardware import CHIPS, parse_chips
    from mtnlg_jax.interop import registry

    registry.register()
    if _CALIBRATE.value:
        if _PROVE.value or not _CHIPS.value:
            raise ValueError(
                "--calibrate needs --chips, such as H100:8 for the run's, and takes no --prove"
            )
        from mtnlg_jax.planning.calibration import calibrate

        print(calibrate(_CALIBRATE.value, *parse_chips(_CHIPS.value)))
        return
    if _CONFIG.value is None:
        raise ValueError("--config is missing; name the file of a run, as --config=my_run.py")
    chips = parse_chips(_CHIPS.value) if _CHIPS.value else None
    config = load_config(_CONFIG.value, _SET.value)
    if config.model.vocab_size is None:
        print(
            f"model.vocab_size is the tokenizer's; planned with {VOCABULARY:,}, "
            "--set=model.vocab_size=... for another"
        )
        model = dataclasses.replace(config.model, vocab_size=VOCABULARY)
        config = dataclasses.replace(config, model=model)
    if chips:
        from mtnlg_jax.planning import prove, search
        from mtnlg_jax.planning.layout_report import job_of, layout_report

        topology = prove.topology_of(*chips) if _PROVE.value else None
        job, origin = job_of(config, chips[0], _CALIBRATION.value)
        found = search.search(job, chips[1] * CHIPS[chips[0]].devices)
        print(layout_report(job, origin, *chips, found, _TOP.value), flush=True)
        if topology is not None:
            print()
            for line in prove.proofs(job, topology, found, _PROVE.value):
                print(line, flush=True)
    elif _PROVE.value:
        raise ValueError(f"--prove={_PROVE.value} needs --chips, such as --chips=v5p:64")
    else:
        from mtnlg_jax.planning.tensor_table import tensor_table

        print(tensor_table(config, _DEVICES.value))


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
