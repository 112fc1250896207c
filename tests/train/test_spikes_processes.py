"""Two processes (gloo on localhost) skip, or go back for, the same spike as one does."""

import json
from pathlib import Path

import jax
import pytest
import test_processes
from planted_run import make_planted, planted_config, records_of

from mtnlg_jax.config import MeshConfig
from mtnlg_jax.train import loop, spikes

PROGRAM = """
    import json
    import sys
    me, port, tests, folder, rule, workdir = int(sys.argv[1]), *sys.argv[2:]
    sys.path.append(tests)
    from pathlib import Path
    from planted_run import planted_config
    from mtnlg_jax.config import MeshConfig
    from mtnlg_jax.train import loop, processes

    processes.start(f"localhost:{port}", 2, me, 100, local_devices=1)
    config = planted_config(Path(folder), MeshConfig(data=2), seed=27, **json.loads(rule))
    with processes.exit_on_failure():
        summary = loop.train(config, workdir, show_progress=False)
        assert summary.spikes == 1
        processes.barrier("the end")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "batches", "near"),
    [("skip", 1, 0), ("rewind", 1, 0), ("rewind", 3, 1)],
    ids=["skip", "rewind", "near copies"],
)
def test_two_processes_leave_out_what_one_does(tmp_path, policy, batches, near, monkeypatch):
    monkeypatch.setattr(test_processes, "PATIENCE", 400)  # for 60 steps on a busy machine
    folder = make_planted(tmp_path)
    here = str(Path(__file__).parent)
    rule = {"spike_window": 16, "spike_deviations": 5.0, "spike_policy": policy}
    rule["spike_leave_out"] = batches
    copies = {"near_every": near, "near_folder": str(tmp_path / "near")}
    given = json.dumps(rule | copies)
    ended = test_processes.run_all(PROGRAM, 2, here, folder, given, tmp_path / "two")
    for code, output in ended:
        assert code == 0, output
    config = planted_config(folder, MeshConfig(data=2), seed=27, **rule)
    make_mesh = loop.make_mesh
    monkeypatch.setattr(loop, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:2]))
    loop.train(config, str(tmp_path / "one"), show_progress=False)
    two = records_of(tmp_path / "two")
    one = records_of(tmp_path / "one")
    assert two.keys() == one.keys() and ("spike", 46) in one
    for key, record in two.items():
        if "loss" in record:
            assert record["loss"] == pytest.approx(one[key]["loss"], rel=1e-3), key
    named = [each["document"] for each in two["spike", 46]["documents"]][:2]
    assert named == [each["document"] for each in one["spike", 46]["documents"]][:2]
    # One of the two processes says so, and one writes.
    assert sum("step 46 (causal, stage causal) is a spike" in output for _, output in ended) == 1
    assert (tmp_path / "two" / spikes.FILE).exists() == (policy == "rewind")
