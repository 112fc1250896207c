"""launch/tune_attention.py on the CPU, at the smallest shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtnlg_jax.model.kernels import blocks

ROOT = Path(__file__).resolve().parents[2]


def run(*flags, code=0):
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        [sys.executable, "launch/tune_attention.py", *flags],
        cwd=ROOT,
        env=environment,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def test_a_sweep_replaces_what_it_timed_and_keeps_the_rest(tmp_path):
    table = tmp_path / "blocks.json"
    other = {
        "device": "H100",
        "impl": "pallas_gpu",
        "dtype": "bfloat16",
        "head_width": 128,
        "length": 2048,
        "causal": True,
        "pass": "forward",
        "q": 64,
        "kv": 128,
        "stages": 2,
        "ms": None,
        "source": "not timed",
    }
    stale = other | {
        "device": "cpu",
        "impl": "xla",
        "dtype": "float32",
        "head_width": 8,
        "length": 128,
        "pass": "both",
        "ms": 1e9,
    }
    table.write_text(json.dumps({"rows": [other, stale]}))
    said = run(
        f"--table={table}",
        "--lengths=128",
        "--widths=8",
        "--heads=1",
        "--tokens=128",
        "--causal=yes",
    )
    entries = {(entry.device, entry.impl): entry for entry in blocks.read(table.read_text())}
    assert set(entries) == {("H100", "pallas_gpu"), ("cpu", "xla"), ("cpu", "xla_blockwise")}
    assert (
        entries["H100", "pallas_gpu"].ms is None and entries["H100", "pallas_gpu"].blocks.kv == 128
    )
    for impl in ("xla", "xla_blockwise"):
        entry = entries["cpu", impl]
        assert (
            0 < entry.ms < 1e4
            and entry.source.startswith("timed")
            and f"{impl:<14} float32 H=8 T=128" in said
        )
    assert entries["cpu", "xla_blockwise"].blocks[:2] == (
        128,
        128,
    )  # the only sizes that fit a length of 128


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lengths=12,x"], "--lengths=12,x must be integers above 0"),
        (
            ["--impls=pallas_tpu"],
            "'pallas_tpu' does not run on cpu in float32; choose from xla_blockwise, xla",
        ),
        (["--dtypes=float64"], "unknown type 'float64'; choose from float32"),
        (["--table={}/broken.json"], "is not a table of block sizes"),
        (["--heads=0"], "heads"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, words):
    (tmp_path / "broken.json").write_text("[1, 2")
    said = run(*(flag.format(tmp_path) for flag in flags), code=2)
    assert words in said and said.strip().count("\n") == 0


def test_every_entry_of_the_committed_table_has_a_source():
    for entry in blocks.table():
        assert entry.kind in blocks.PASSES and len(entry.source) > 10
        assert (entry.ms is None) == (not entry.source.startswith("timed")), entry
