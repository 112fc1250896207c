"""lm-evaluation-harness against the server, beside the model's own scores.

LM_EVAL names the command of an environment that has it; skipped without one.
"""

import json
import os
import shutil
import subprocess

import pytest

from mtnlg_jax.decode.scoring import score_rows

pytestmark = pytest.mark.slow
COMMAND = os.environ.get("LM_EVAL") or shutil.which("lm_eval")
ROWS = [
    {"query": "The cat sat on the", "choices": ["mat", "log", "man"], "gold": 0},
    {"query": "The dog sat on the", "choices": ["mat and the dog", "log", "town"], "gold": 1},
    {"query": "天地玄黄,", "choices": ["宇宙洪荒", "日月"], "gold": 0},
]
TASK = """
task: own_rows
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {path}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
"""


def test_scores_are_those_of_the_model(live, tmp_path):
    if COMMAND is None:
        pytest.skip("no lm_eval; name one in LM_EVAL")
    rows = tmp_path / "rows.json"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "own_rows.yaml").write_text(TASK.format(path=rows))
    told = {
        "model": "tiny",
        "base_url": f"http://127.0.0.1:{live.port}/v1/completions",
        "tokenizer_backend": "remote",
        "tokenized_requests": "True",
        "num_concurrent": "2",
        "max_length": str(live.model.decoder.context),
    }
    offline = {name: "1" for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")}
    done = subprocess.run(
        [
            *(COMMAND, "--model", "local-completions", "--tasks", "own_rows"),
            *("--model_args", ",".join(f"{name}={value}" for name, value in told.items())),
            *("--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")),
            "--log_samples",
        ],
        env={**os.environ, **offline, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert [each["doc"]["query"] for each in samples] == [row["query"] for row in ROWS]
    model = live.model
    for sample in samples:
        for choice, (given,) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            # The harness never asks its remote tokenizer for a <bos>.
            context = model.tokenizer.encode(sample["doc"]["query"])
            whole = model.tokenizer.encode(sample["doc"]["query"] + " " + choice)
            start = len(context)
            (numbers,) = score_rows(model.decoder, [whole], [start])
            assert float(given[0]) == pytest.approx(sum(numbers), abs=1e-3)
