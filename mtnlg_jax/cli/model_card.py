"""Write the model card and data statement of a run, each figure from a file of it.

    python launch/model_card.py --workdir=RUN
    python launch/model_card.py --workdir=RUN --about=about.yaml --license=apache-2.0
    python launch/model_card.py --workdir=RUN --output=FOLDER/README.md     beside an exported model
    python launch/model_card.py --workdir=RUN --watts_per_device=400 --pue=1.1 \\
        --carbon_kg_per_kwh=0.4

The card is Markdown with the YAML head that huggingface_hub reads. Its figures are of config.json,
data.json, metrics.jsonl, starts.jsonl, environment.json, checkpoints/, evaluations/, audit.json,
bias.json and privacy.json; its last section names the file and key of each. What no file records
is called unknown, and what --about does not state is said not to be stated.

--about is YAML, or Markdown with a heading for each text. docs/model_card.md lists the keys.

A card is written again over one of its own. The notes between its two marks are kept, and a card
that was edited elsewhere is only replaced with --overwrite.

Exit codes: 0 done, 2 bad input.
"""

from absl import flags

from mtnlg_jax import command

_WORKDIR = command.define_path("workdir", None, "folder of the run", required=True)
_OUTPUT = command.define_path("output", None, "file to write; default: README.md in the run")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace any file at --output")
_SHOW_PATHS = flags.DEFINE_bool(
    "show_paths", False, "show absolute local paths whole; default: their last names alone"
)
with command.flag_group("What the authors state"):
    _ABOUT = command.define_path("about", None, "YAML or Markdown file with the authors' texts")
    _STATED = {
        "license": flags.DEFINE_string("license", None, "identifier of the Hub, as apache-2.0"),
        "language": flags.DEFINE_string("language", None, "codes of ISO 639, as en,zh"),
        "contact": flags.DEFINE_string("contact", None, "whom to write to"),
        "intended_use": flags.DEFINE_string("intended_use", None, "what the model is for"),
        "out_of_scope_use": flags.DEFINE_string(
            "out_of_scope_use", None, "what the model is not for"
        ),
    }
with command.flag_group("Energy"):
    _WATTS = flags.DEFINE_float(
        "watts_per_device",
        None,
        "watts of a device; default: the vendor's figure where it is known",
    )
    _PUE = flags.DEFINE_float(
        "pue", None, "power of the data center over that of its machines, at least 1"
    )
    _CARBON = flags.DEFINE_float("carbon_kg_per_kwh", None, "kg of carbon dioxide per kWh")


def main() -> None:
    from mtnlg_jax import compat
    from mtnlg_jax.evaluate.card.about import read_about
    from mtnlg_jax.evaluate.card.card import build_card, default_output
    from mtnlg_jax.evaluate.card.compute_facts import Energy
    from mtnlg_jax.evaluate.card.written import check_output, write_card

    compat.quiet()
    energy = Energy(_WATTS.value, _PUE.value, _CARBON.value)
    output = _OUTPUT.value or default_output(_WORKDIR.value)
    stated = read_about(_ABOUT.value, {key: flag.value for key, flag in _STATED.items()})
    # Without --output the folder is the run's, whose own error is the clearer one.
    if _OUTPUT.value is not None:
        check_output(output, _OVERWRITE.value)
    folder = output.rpartition("/")[0] or "."
    card = build_card(_WORKDIR.value, folder, stated, energy, _SHOW_PATHS.value)
    check_output(output, _OVERWRITE.value)
    write_card(card, output)
    known = sum(fact.known for fact in card.facts)
    print(f"{output}: {known:,} figures, each with its source; unknown:")
    for label in dict.fromkeys(fact.label for fact in card.facts if not fact.known):
        print(f"  {label}")


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)
