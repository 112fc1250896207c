"""Run launch/serve.py: what is told before a model is loaded, and the self-test."""

import pytest

pytest.importorskip("starlette")


@pytest.fixture(scope="module")
def ask(answering, tokenizer, tmp_path_factory):
    """Return a function (*arguments) -> (exit code, standard output, standard error)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return answering("serve.py", folder, positions=32, new_tokens=6)


def test_a_model_that_does_not_fit_is_refused_with_fewer_slots_as_a_way_out(ask):
    arguments = ["--workdir=RUN", "--port=0", "--slots=8"]
    code, out, err = ask(*arguments, "--memory=0.00003")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "RUN does not fit: a machine would hold at least" in err
    assert "(8 rows of 32 positions)" in err
    least = ["--dtype=bfloat16", "--weights=int8", "--cache=int8"]
    assert "it fits with --slots=" in ask(*arguments, *least, "--memory=0.00002")[2]


def test_the_self_test_passes(ask):
    code, out, _ = ask("--workdir=RUN", "--selftest", "--slots=2", "--memory=0.1")
    assert code == 0 and "the self-test passed" in out and "compiled meanwhile: 0" in out
