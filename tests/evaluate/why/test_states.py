"""Which batches a run had left out when it first met a step."""

import json

from mtnlg_jax.evaluate.why import states


def test_batches_of_later_spikes_were_not_left_out_yet(tmp_path):
    earlier = {"step": 20, "left_out": [[20, 152]], "back_to": 10}
    spike = {"step": 50, "left_out": [[step, 8 * (step - 1)] for step in range(46, 51)]}
    lines = [json.dumps(each) for each in (earlier, spike | {"back_to": 40})]
    (tmp_path / "spikes.jsonl").write_text("\n".join(lines) + "\n")

    def steps(step):
        return sorted(number for number, _ in states.left_out(str(tmp_path), step - 1))

    assert steps(20) == [] and steps(21) == [20]
    # 46 and 47 were trained on before 48, and all of them before the spike.
    assert steps(48) == steps(50) == [20]
    assert steps(51) == [20, 46, 47, 48, 49, 50]
