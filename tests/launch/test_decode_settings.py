"""--set=decode.KEY=VALUE of launch/generate.py and launch/task.py, and the groups of --help."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mtnlg_jax.cli.decoding.settings import merge, read_assignments

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("entries", "settings"),
    [
        ([], {}),
        (["decode.num_beams=4"], {"num_beams": 4}),
        (["num_beams=4"], {"num_beams": 4}),
        (["decode.top_k=3", "top_k=5"], {"top_k": 5}),
        ([" decode.temperature = 1 "], {"temperature": 1.0}),
        (["decode.early_stopping=true"], {"early_stopping": True}),
        (["decode.early_stopping=never"], {"early_stopping": "never"}),
        (["decode.max_time=none"], {"max_time": None}),
        (["decode.stop_strings=('END', 'a=b')"], {"stop_strings": ("END", "a=b")}),
        (["decode.logit_bias=[[13, -5]]"], {"logit_bias": ((13, -5.0),)}),
    ],
)
def test_assignments_are_read_as_the_types_of_their_settings(entries, settings):
    found = read_assignments(entries)
    assert found == settings
    assert [type(value) for value in found.values()] == [type(v) for v in settings.values()]


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ("decode.num_beam=2", ["--set=decode.num_beam=2", "did you mean 'num_beams'", "top_k"]),
        ("model.num_layers=2", ["'model.num_layers'", "write --set=decode.KEY=VALUE", "top_k"]),
        ("decode", ["unknown setting 'decode'", "write --set=decode.KEY=VALUE"]),
        ("decode.top_k", ["has no value", "write --set=decode.top_k=VALUE", "default, 0"]),
        ("decode.top_k=many", ["decode.top_k='many'", "type int", "default, 0"]),
        ("decode.top_p=0", ["decode.top_p=0.0 is outside (0, 1]", "default, 1.0"]),
        ("decode.eos_token_id=5", ["decode.eos_token_id=5", "tuple[int, ...]", "default, ()"]),
        ("length_penalty_type=x", ["length_penalty_type='x'", "choose one of hf, gnmt"]),
    ],
)
def test_a_wrong_assignment_is_refused(entry, parts):
    with pytest.raises(ValueError, match=r"^--set[:=]") as caught:
        read_assignments([entry])
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_flag_and_an_assignment_may_agree_but_not_differ():
    flag_of = {"num_return_sequences": "n"}
    by_flag = {"num_return_sequences": 2, "top_k": 5}
    assert merge(by_flag, {"top_k": 5, "seed": 1}, flag_of) == by_flag | {"seed": 1}
    with pytest.raises(
        ValueError, match="--n gives 2 and --set=decode.num_return_sequences gives 3"
    ):
        merge(by_flag, {"num_return_sequences": 3}, flag_of)


@pytest.mark.parametrize("script", ["generate", "task"])
def test_every_flag_is_in_one_group_of_the_help(script):
    program = f"""
import json
from absl import flags
from mtnlg_jax import command
before = set(flags.FLAGS)
from mtnlg_jax.cli import {script}
groups = map(flags.FLAGS.get_key_flags_for_module, command._GROUPS)
print(json.dumps([sorted(set(flags.FLAGS) - before), [[f.name for f in each] for each in groups]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    defined, groups = json.loads(done.stdout)
    assert len(defined) > 20 and sorted(name for group in groups for name in group) == defined
