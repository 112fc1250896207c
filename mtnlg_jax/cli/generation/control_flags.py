"""Flags of launch/generate.py for the settings of DecodeConfig that steer repetition and
diversity."""

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.decoding.preset_flag import PRESET, preset_scorers
from mtnlg_jax.cli.generation import sliding

with command.flag_group("Repetition and diversity"):
    # Flags by the names of DecodeConfig.
    SETTINGS: dict[str, flags.FlagHolder] = {
        "penalty_alpha": flags.DEFINE_float(
            "penalty_alpha",
            None,
            "contrastive search among --top_k tokens: weight of the similarity to earlier tokens, "
            "[0, 1]",
        ),
        "mirostat_tau": flags.DEFINE_float(
            "mirostat_tau", None, "mean surprise of a token, in bits, to which sampling is steered"
        ),
        "mirostat_eta": flags.DEFINE_float(
            "mirostat_eta", None, "how fast mirostat corrects the surprise"
        ),
        "dry_multiplier": flags.DEFINE_float(
            "dry_multiplier", None, "DRY: penalty of a token that continues a repetition; 0: off"
        ),
        "dry_base": flags.DEFINE_float(
            "dry_base", None, "DRY: factor of the penalty for each token of the repetition"
        ),
        "dry_allowed_length": flags.DEFINE_integer(
            "dry_allowed_length", None, "DRY: shortest repetition whose continuation is penalized"
        ),
        "dry_penalty_last_n": flags.DEFINE_integer(
            "dry_penalty_last_n", None, "DRY: last tokens in which repetitions count; -1: all"
        ),
        "dry_sequence_breakers": flags.DEFINE_multi_string(
            "dry_sequence_breakers",
            None,
            "DRY: a text that ends repetitions, \\n: a line end; repeat for several",
        ),
    }


def check_preset() -> None:
    """Raise ValueError on flags that cannot act beside a preset that ranks its texts."""
    if not preset_scorers():
        return
    for name in ("stream", "stats", "chat", "draft", *sliding.FLAGS):
        flag = flags.FLAGS[name]
        if flag.present and flag.value is not False:
            raise ValueError(
                f"--{name} is for a text as it is written, and --preset={PRESET.value} ranks whole "
                "texts; leave one of the two out"
            )
