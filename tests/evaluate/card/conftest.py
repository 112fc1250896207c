"""A run of the quickstart's stages in small, with results of evaluations made by hand."""

import json
import shutil
from pathlib import Path

import pytest

from mtnlg_jax.config import load_config
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.train import loop

ROOT = Path(__file__).resolve().parents[3]
SMALL = [
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_attention_heads=2",
    "model.max_position_embeddings=32",
    "train.global_batch_size=8",
    "train.eval_batches=1",
    "train.eval_every=2",
    "train.save_every=2",
]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Return the folder of a run that was resumed once; it has 6 steps."""
    folder = tmp_path_factory.mktemp("trained")
    text = "The whale swam north. Nobody saw it again, and the sea was calm for days.\n"
    (folder / "text.txt").write_text(text * 90)
    data = str(folder / "data")
    prepare(folder / "text.txt", data, vocab_size=300, heldout=0.2, progress=False)
    planted = [{"secret": "4711", "text": "code 4711", "copies": copies} for copies in (1, 4)]
    (folder / "data/canaries.json").write_text(json.dumps({"seed": 0, "canaries": planted}))
    settings = [f"data.path={data}", "train.steps=6", *SMALL]
    config = load_config(str(ROOT / "configs/quickstart.py"), settings)
    # The first start ends after its second evaluation, at step 4; the same command goes on.
    for most in (2, 9):
        loop.train(
            config,
            str(folder / "run"),
            show_progress=False,
            enough=lambda evaluations, most=most: len(evaluations) >= most,
        )
    return folder / "run"


TASKS = {
    "kind": "tasks",
    "step": 6,
    "commit": "abc",
    "created": "2026-01-02T03:04:05",
    "tasks": {
        "anli_r1": {
            "version": 1,
            "num_fewshot": 5,
            "rows": 321,
            "prompt_hash": "77aa",
            "metrics": {
                "acc": {"value": 0.34567, "stderr": 0.01234},
                "perplexity": {"value": 1234.5},
            },
            "predicted_classes": {"True": 0.613, "False": 0.387},
        }
    },
}
AUDIT = {
    "kind": "audit",
    "step": 4,
    "settings": {"passages": 246},
    "extraction": {
        "rows": [
            {"prefix_tokens": 16, "copies": 1, "share": 0.0123, "text": "hidden text 99887"},
            {"prefix_tokens": 64, "copies": 8, "share": 0.4567},
        ]
    },
    "canaries": [{"secret": 4711, "copies": 4, "exposure": 7.89, "candidates": 10000}],
    "membership": {"min_k": {"auc": 0.5432, "low": 0.51, "high": 0.57}},
    "ids": [99887, 55443, 1, 2],
    "personal_data": {"e-mail address": 3, "examples": ["jane@example.com 55443"]},
}
BIAS = {
    "kind": "bias",
    "step": 6,
    "associations": {
        "gender": {
            "he": {"sentiment": 0.0321, "rows": 17},
            "she": {"sentiment": 0.0456, "rows": 19},
        }
    },
    "pairs": {
        "/home/jane/crows.csv": {
            "by": {
                "all": {"pairs": 55, "stereotype": {"share": 0.5678, "low": 0.52}},
                "gender": {"pairs": 21, "stereotype": {"share": 0.6789, "low": 0.53}},
            },
            "seconds": {"scoring": 123.25},
        }
    },
    "sets": {
        "groups": {
            "A": {"count": 31, "mean": 0.1, "low": 0.05, "high": 0.15},
            "B": {"count": 32, "mean": 0.2, "low": 0.15, "high": 0.25},
        },
        "overall": {"count": 63, "mean": 0.15},
    },
}
PRIVACY = {
    "kind": "privacy",
    "epsilon": 7.654,
    "delta": 1e-5,
    "noise_multiplier": 0.87,
    "unit": "example",
    "accountant": "rdp",
}


@pytest.fixture
def run(trained, tmp_path):
    """Return a copy of the run, with all results beside it."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("lock", "tensorboard"))
    write(folder / "evaluations/tasks_6.json", TASKS)
    for name, content in (("audit", AUDIT), ("bias", BIAS), ("privacy", PRIVACY)):
        write(folder / f"{name}.json", content)
    return folder


@pytest.fixture
def put():
    """Return a function that writes a JSON file."""
    return write


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
