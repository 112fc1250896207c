"""A small run on data with one bad document, which one step reads."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from mtnlg_jax.config import MeshConfig
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.train.loop import train

sys.path.append(str(Path(__file__).parent))
from spiked_run import small_config, write_texts  # noqa: E402


@pytest.fixture(scope="session")
def spiked(tmp_path_factory):
    """Return the run: ``folder``, ``config``, ``bad`` (text), and its ``records`` by step."""
    folder = tmp_path_factory.mktemp("spiked")
    bad = write_texts(folder)
    prepare(folder / "texts.jsonl", folder / "data", vocab_size=360, heldout=0.02, progress=False)
    config = small_config(folder / "data")
    config = dataclasses.replace(config, mesh=MeshConfig(data=1))
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: one)
        train(config, str(folder / "run"), show_progress=False)
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    records = {r["step"]: r for r in map(json.loads, lines) if r["kind"] == "train"}
    return SimpleNamespace(folder=folder, run=str(folder / "run"), bad=bad, records=records)
