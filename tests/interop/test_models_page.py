"""Compare the table of docs/models.md with the code."""

import json
from pathlib import Path

from mtnlg_jax.interop.families import FAMILIES
from mtnlg_jax.interop.writers import WRITERS

ROOT = Path(__file__).resolve().parents[2]


def test_the_models_page_has_a_row_for_each_family():
    proved: dict[str, list[str]] = {}
    for folder in sorted((Path(__file__).parent / "families").iterdir()):
        kind = json.loads((folder / "config.json").read_text())["model_type"]
        proved.setdefault(kind, []).append(folder.name)
    lines = (ROOT / "docs/models.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    found = {row[0].strip("`"): row[1:] for row in rows if len(row) == 6}
    assert list(found) == list(FAMILIES)
    for kind, (_, objective, _, new_runs, proof) in found.items():
        assert objective == ("masked" if FAMILIES[kind].masked else "causal")
        assert new_runs == ("yes" if kind in WRITERS else "no")
        assert proof == (", ".join(proved.get(kind, [])) or "slow test")
