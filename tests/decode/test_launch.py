"""launch/generate.py: three modes, text and JSON, and one line with exit code 2 for what it cannot do."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "generate.py"

# Stands in for a trained run, since training one takes longer than all of this, and answers many command lines
# in one process, since importing JAX takes longer than answering.
DRIVER = """
    import contextlib, io, json, runpy, sys
    import jax, jax.numpy as jnp, numpy as np
    from absl import flags
    from absl.testing import flagsaver
    from mtnlg_jax import command, compat
    from mtnlg_jax.config import Config, DecodeConfig, ModelConfig
    from mtnlg_jax.data.tokenizer import load_tokenizer
    from mtnlg_jax.model.transformer import abstract_model
    from mtnlg_jax.train import checkpoint

    script, folder = sys.argv[1:]
    tokenizer, rng = load_tokenizer(folder), np.random.default_rng(0)
    model = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=tokenizer.vocab_size,
                        max_position_embeddings=32)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), abstract_model(model)[1])
    config = Config(model=model, decode=DecodeConfig(max_new_tokens=6))

    def load_run(workdir, which):
        if workdir != "RUN":
            raise FileNotFoundError(f"{workdir} holds no checkpoint")
        return checkpoint.Run(config, params, tokenizer, 7, {})

    checkpoint.load_run, compat.configure_cache = load_run, lambda: None
    names = runpy.run_path(script)
    for line in sys.stdin:
        request = json.loads(line)
        out, err = io.StringIO(), io.StringIO()
        stdin = io.TextIOWrapper(io.BytesIO(request["stdin"].encode("latin-1")))
        with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            real, sys.stdin = sys.stdin, stdin
            try:
                sys.argv = [script, *request["arguments"]]
                command.run(names["main"])
            except SystemExit as stop:
                code = stop.code or 0
            sys.stdin = real
        print("answer", json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def ask(tokenizer, tmp_path_factory):
    """(*arguments, stdin bytes) -> (exit code, standard output, standard error)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(DRIVER), SCRIPT, folder], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def answer(*arguments, stdin=b""):
        print(json.dumps({"arguments": arguments, "stdin": stdin.decode("latin-1")}), file=process.stdin, flush=True)
        line = next(line for line in process.stdout if line.startswith("answer "))
        return json.loads(line.removeprefix("answer "))

    yield answer
    process.stdin.close()
    process.wait()


def test_generative(ask, tmp_path):
    code, out, err = ask("--workdir=RUN", "--prompt=The cat")
    assert (code, err) == (0, "") and out.startswith("The cat") and len(out) > len("The cat\n")
    assert ask("--workdir=RUN", "--prompt=The cat", "--stream")[1] == out
    assert ask("--workdir=RUN", stdin=b"The cat\n")[1] == out
    (tmp_path / "prompt.txt").write_text("The cat\n")
    assert ask("--workdir=RUN", f"--input={tmp_path / 'prompt.txt'}")[1] == out
    record = json.loads(ask("--workdir=RUN", "--prompt=The cat", "--json")[1])
    assert record["prompt"] + record["sequences"][0]["text"] + "\n" == out
    assert (record["step"], len(record["sequences"][0]["tokens"])) == (7, 6)


def test_settings_reach_the_decoder(ask):
    arguments = ["--workdir=RUN", "--prompt=", "--json", "--temperature=1.5", "--n=2", "--max_new_tokens=4"]
    first, again, other = (json.loads(ask(*arguments, f"--seed={seed}")[1]) for seed in (3, 3, 4))
    assert first == again and first["sequences"][1]["tokens"] == other["sequences"][0]["tokens"]
    assert [len(sequence["tokens"]) for sequence in first["sequences"]] == [4, 4]


def test_several_texts_are_told_apart(ask):
    out = ask("--workdir=RUN", "--prompt=The", "--temperature=1", "--n=2", "--stream")[1]
    assert out.startswith("--- 1 ---\nThe") and "\n--- 2 ---\nThe" in out


def test_the_end_of_the_context_is_told(ask):
    code, out, err = ask("--workdir=RUN", "--prompt=The cat sat on", "--max_new_tokens=99", "--min_new_tokens=99")
    assert code == 0 and err == "(ended: the context of 32 tokens is full)\n"


def test_ranking(ask):
    code, out, err = ask("--workdir=RUN", "--mode=ranking", "--prompt=The", "--candidates= cat", "--candidates= dog",
                         "--candidates= cat", "--normalise=sum")
    lines = out.splitlines()
    assert code == 0 and "sum" in lines[1] and "per_byte" in lines[1]
    assert sorted(line.split()[-1] for line in lines[2:]) == ["cat'", "dog'"]
    sums = [float(line.split()[1]) for line in lines[2:]]
    assert sums == sorted(sums, reverse=True)
    sampled = json.loads(ask("--workdir=RUN", "--mode=ranking", "--prompt=The", "--n=5", "--json")[1])
    assert sum(candidate["count"] for candidate in sampled["candidates"]) == 5
    assert {"text", "sum", "per_token", "per_char", "per_byte", "score"} <= sampled["candidates"][0].keys()


def test_fill(ask):
    code, out, err = ask("--workdir=RUN", "--mode=fill", "--prompt=The <mask> sat", "--guesses=3")
    lines = out.splitlines()
    assert code == 0 and lines[0] == "mask 1" and len(lines) >= 5 and out.count("%") == 3
    record = json.loads(ask("--workdir=RUN", "--mode=fill", "--prompt=The <mask> sat", "--json")[1])
    assert len(record["masks"][0]) == 5 and record["text"].startswith("The ")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--workdir=RUN", "--prompt=a", "--temperature=-1"], "temperature=-1.0"),
    (["--workdir=RUN", "--prompt=a", "--top_p=0"], "top_p=0.0"),
    (["--workdir=RUN", "--prompt=a", "--top_k=many"], "top_k"),
    (["--workdir=RUN", "--prompt=a", "--unknown=1"], "unknown"),
    (["--workdir=RUN", "--prompt=a", "stray"], "'stray'"),
    (["--workdir=RUN", "--prompt=a", "--input=b"], "--prompt and --input"),
    (["--workdir=RUN", "--input=/no/such/file"], "/no/such/file"),
    (["--workdir=OTHER", "--prompt=a"], "OTHER holds no checkpoint"),
    (["--prompt=a"], "--workdir"),
    (["--workdir=RUN", "--prompt=" + "a b " * 40], "context holds 32"),
    (["--workdir=RUN", "--mode=fill", "--prompt=no blank"], "no mask"),
    (["--workdir=RUN", "--mode=ranking", "--prompt=a", "--candidates="], "empty"),
    (["--workdir=RUN", "--mode=dancing", "--prompt=a"], "dancing"),
    (["--workdir=RUN"], "standard input is not UTF-8 at byte 1"),
])
def test_bad_input_is_one_line_and_exit_code_2(ask, arguments, message):
    code, out, err = ask(*arguments, stdin=b"a\xff")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_the_script_itself_exits_with_2():
    done = subprocess.run([sys.executable, SCRIPT, "--wrokdir=RUN"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
