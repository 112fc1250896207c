"""Compare the class for lm-evaluation-harness with the harness's own class `hf`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval")

import make_harness as made

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.data.tokenizer import train_tokenizer
from mtnlg_jax.decode import group_scoring
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.evaluate import harness_options, lm_eval
from mtnlg_jax.evaluate.harness import MtnlgLM
from mtnlg_jax.evaluate.perplexity import evaluate_text
from mtnlg_jax.model.transformer import init_parameters

CLOSE = 1e-4
KINDS = ("gpt2", "llama")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: made.write_model(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def models(folders):
    return {kind: MtnlgLM(str(folder)) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def fixtures():
    return json.loads((Path(made.__file__).parent / "fixtures/harness.json").read_text())


def assert_same(found, want):
    for name in ("loglikelihood", "written"):
        values, greedy = zip(*found[name], strict=True)
        expected, expected_greedy = zip(*want[name], strict=True)
        np.testing.assert_allclose(values, expected, atol=CLOSE, err_msg=name)
        assert greedy == expected_greedy
    # float32 sums of a window have an ulp of 1.2e-4.
    for value, expected in zip(
        found["loglikelihood_rolling"], want["loglikelihood_rolling"], strict=True
    ):
        assert value == pytest.approx(expected, abs=CLOSE, rel=2e-7)
    for name in want.keys() - {"loglikelihood", "written", "loglikelihood_rolling"}:
        assert found[name] == want[name], name


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_equals_that_of_hugging_face(kind, models, fixtures):
    assert_same(made.answers(models[kind], chat=kind == "llama"), fixtures[kind])
    # Otherwise flags would prove nothing. Some texts become other tokens than were written.
    assert {greedy for _, greedy in fixtures[kind]["written"]} == {True, False}


def test_real_weights_and_tasks_answer_as_with_hugging_face(shared, fixtures):
    found = made.real_answers(MtnlgLM(str(shared / made.STORIES)), shared)
    want = fixtures["stories"]
    assert found.keys() == want.keys()
    assert found.pop("generate_until") == want["generate_until"]
    rolling = found.pop("loglikelihood_rolling")
    np.testing.assert_allclose(rolling, want["loglikelihood_rolling"], atol=CLOSE, rtol=2e-7)
    for case, answers in found.items():
        values, greedy = zip(*answers, strict=True)
        expected, expected_greedy = zip(*want[case], strict=True)
        np.testing.assert_allclose(values, expected, atol=CLOSE, err_msg=case)
        assert greedy == expected_greedy, case


def test_another_boundary_would_be_seen(models, fixtures, monkeypatch):
    """Tokens of context and continuation apart, as a plain class would make them."""

    def apart(self, context, continuation):
        return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)

    monkeypatch.setattr(MtnlgLM, "_encode_pair", apart)
    with pytest.raises(AssertionError, match="loglikelihood"):
        assert_same(made.answers(models["llama"], chat=True), fixtures["llama"])


def test_a_mesh_and_int8_answer_as_one_device(models, folders):
    want = models["llama"].loglikelihood(made.instances("loglikelihood", made.PAIRS))
    over = MtnlgLM.create_from_arg_string(
        f"workdir={folders['llama']},tensor=2,data=4",
        {"batch_size": 1, "max_batch_size": None, "device": None},
    )
    found = over.loglikelihood(made.instances("loglikelihood", made.PAIRS))
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in want], atol=CLOSE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in want]
    assert over.decoder.mesh.shape["tensor"] == 2
    rounded = MtnlgLM(str(folders["llama"]), weights="int8", max_length=40)
    values = rounded.loglikelihood(made.instances("loglikelihood", made.PAIRS[:9]))
    differences = [abs(a - b) for (a, _), (b, _) in zip(values, want, strict=False)]
    assert 1e-4 < max(differences) < 2
    assert rounded.max_length == 40


def test_contexts_are_read_once_and_few_programs_are_compiled(models, monkeypatch):
    read = []
    shapes = set()
    real = group_scoring._score

    def counted(params, tokens_BS, *arrays, **options):
        read.append(tokens_BS.size)
        shapes.add((tokens_BS.shape, options["branches"]))
        return real(params, tokens_BS, *arrays, **options)

    monkeypatch.setattr(group_scoring, "_score", counted)
    words = ["the", "cat", "sat", "mat", "in", "at", "on", "street"]
    draws = np.random.default_rng(0)
    requests = []
    for _ in range(100):
        context = " ".join(draws.choice(words, draws.integers(5, 25)))
        requests += [(context, f" {' '.join(draws.choice(words, 3))}") for _ in range(4)]
    model = models["gpt2"]
    model.loglikelihood(made.instances("loglikelihood", requests), disable_tqdm=True)
    tokens = sum(len(model.tok_encode(context + more)) for context, more in requests)
    assert sum(read) < 0.6 * tokens
    assert len(shapes) <= 12


def test_what_cannot_be_scored_or_followed_is_refused(models, folders):
    model = models["gpt2"]

    def scores(*pair):
        return model.loglikelihood(made.instances("loglikelihood", [pair]), disable_tqdm=True)

    with pytest.raises(ValueError, match="continuation '' after 'the cat' has no tokens"):
        scores("the cat", "")
    with pytest.raises(ValueError, match=r"has 1\d\d tokens, and the model reads 64"):
        scores("the cat", made.LONG)
    with pytest.raises(ValueError, match="min_tokens, which nothing here follows"):
        harness_options.generation_of({"until": ["a"], "min_tokens": 3})
    with pytest.raises(ValueError, match="max_gen_toks=64 leaves no room"):
        model.generate_until(made.instances("generate_until", [("a", {"max_gen_toks": 64})]))
    with pytest.raises(ValueError, match="unknown beams in --model_args; there are workdir"):
        MtnlgLM(str(folders["gpt2"]), beams=3)
    for wrong, message in (
        ({"max_length": "abc"}, "max_length=abc must be a whole number of at least 2"),
        ({"block_tokens": 0}, "block_tokens=0 must be a whole number of at least 1"),
        ({"add_bos_token": "maybe"}, "add_bos_token=maybe must be True or False"),
        ({"checkpoint": "newest"}, "checkpoint=newest in --model_args is none of best, last, ema"),
        ({"workdir": ""}, "names no model; give workdir=RUN"),
        ({"prefix_token_id": 999}, r"prefix_token_id=999 is outside .* 0 to"),
    ):
        with pytest.raises(ValueError, match=message):
            MtnlgLM(**{"workdir": str(folders["gpt2"]), "dtype": None} | wrong)
    with pytest.raises(ValueError, match="tensor=0"):
        MtnlgLM(str(folders["gpt2"]), tensor=0)
    with pytest.raises(ValueError, match="no chat template"):
        model.apply_chat_template([{"role": "user", "content": "hi"}])


def test_settings_of_tasks_become_ours():
    given = {"until": "x", "max_gen_toks": 5, "do_sample": True, "top_p": 0.9, "use_cache": True}
    found = harness_options.generation_of(given, seed=3)
    assert found.until == ("x",)
    assert found.decode.stop_strings == ("x",)
    assert (found.decode.max_new_tokens, found.decode.top_p) == (5, 0.9)
    assert (found.decode.temperature, found.decode.seed) == (1.0, 3)
    greedy = harness_options.generation_of({"do_sample": False, "temperature": 0.5, "top_p": 0.9})
    assert (greedy.decode.temperature, greedy.decode.top_p) == (0.0, 1.0)
    assert greedy.decode.max_new_tokens == harness_options.NEW_TOKENS
    assert harness_options.generation_of({"temperature": 0.5}).decode.temperature == 0.5


def test_whole_texts_score_as_by_perplexity():
    """Where one window holds a text, with a tokenizer of this package."""
    tokenizer = train_tokenizer(["the cat sat on a mat in the street\n", "then he ran\n"] * 9, 290)
    config = ModelConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=64,
    )
    decoder = unstack(config, init_parameters(config, 0))
    model = MtnlgLM.of(decoder, tokenizer, add_bos_token=False)
    text = "the cat sat in the street"
    (found,) = model.loglikelihood_rolling(made.instances("loglikelihood_rolling", [(text,)]))
    want = evaluate_text(decoder, tokenizer, text)
    assert found == pytest.approx(-want.loss * want.tokens, abs=1e-4)
    assert model.tok_decode(model.tok_encode(text)) == text
    with_bos = MtnlgLM.of(decoder, tokenizer)
    assert with_bos.tok_encode(text) == [tokenizer.bos_id, *model.tok_encode(text)]


def test_samples_of_one_context_differ(models):
    """`repeats` of a task are equal requests."""
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    requests = made.instances("generate_until", [("the cat", settings)] * 3)
    texts = models["gpt2"].generate_until(requests, disable_tqdm=True)
    assert len(set(texts)) == 3
    assert texts == models["gpt2"].generate_until(requests, disable_tqdm=True)


TASK = """\
task: cats
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Return a folder with the task `cats`, of two rows."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"query": "the cat sat on", "choices": ["the mat", "a"], "gold": 1},
        {"query": "in the", "choices": ["street", "cat"], "gold": 0},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "cats.yaml").write_text(TASK.replace("DATA", str(tmp_path / "rows.jsonl")))
    return folder


def test_the_harness_runs_a_task_by_the_name_of_the_model(tasks, folders, models):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="mtnlg",
        model_args=f"workdir={folders['gpt2']},max_length=60",
        tasks=["cats"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    pairs = [
        ("the cat sat on", " the mat"),
        ("the cat sat on", " a"),
        ("in the", " street"),
        ("in the", " cat"),
    ]
    requests = made.instances("loglikelihood", pairs)
    values = [value for value, _ in models["gpt2"].loglikelihood(requests, disable_tqdm=True)]
    right = [values[1] > values[0], values[2] > values[3]]
    assert found["results"]["cats"]["acc,none"] == np.mean(right)
    assert found["config"]["model_step"] == 0
    values = [each / length for each, length in zip(values, (7, 1, 6, 3), strict=True)]
    right = [values[1] > values[0], values[2] > values[3]]
    assert found["results"]["cats"]["acc_norm,none"] == np.mean(right)


@pytest.mark.slow
def test_the_command_runs_a_task(tmp_path, folders, tasks, capsys):
    arguments = [
        "--model=mtnlg",
        f"--model_args=workdir={folders['gpt2']}",
        "--tasks=cats",
        f"--include_path={tasks}",
    ]
    assert lm_eval.main([*arguments, f"--output_path={tmp_path / 'out'}"]) == 0
    assert "|cats |" in capsys.readouterr().out
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["cats"]["sample_len"] == 2
    assert lm_eval.main([*arguments, "--model_args=workdir=/nowhere"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_only_the_first_process_writes():
    given = ["--model", "mtnlg", "--output_path", "out", "-s", "--limit=3", "--wandb_args=a=b"]
    assert lm_eval.without_output(given) == ["--model", "mtnlg", "--limit=3"]


def test_the_harness_finds_the_model_by_its_name(tmp_path):
    """As the .pth file makes it, which setup.py writes: in a process that imports nothing else."""
    root = Path(__file__).resolve().parents[2]
    code = "import runpy, setuptools; setuptools.setup = lambda **_: None; "
    code += f"print(runpy.run_path({str(root / 'setup.py')!r})['plugin'](), end='')"
    line = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert line.stdout.startswith("import ") and line.stdout.count("\n") == 1
    # Without the finder of an installation that is perhaps older.
    kept = "[each for each in sys.meta_path if getattr(each, '__name__', '') != 'Finder']"
    program = f"import sys\nsys.meta_path[:] = {kept}\n{line.stdout}" + (
        "assert 'mtnlg_jax' not in sys.modules\n"
        "import importlib.util\n"
        "importlib.util.find_spec('lm_eval.models')\n"
        "import lm_eval.models\n"
        "from lm_eval.api.registry import model_registry\n"
        "print('mtnlg' in model_registry, 'hf' in model_registry, 'jax' in sys.modules)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert found.stdout.split() == ["True", "True", "False"]


@pytest.mark.slow
def test_the_installed_harness_has_the_same_answers(tmp_path, fixtures):
    """PEER_PYTHON names a Python with torch, transformers and lm-eval. Default: this one."""
    python = os.environ.get("PEER_PYTHON", sys.executable)
    needed = "import torch, transformers, lm_eval"
    if subprocess.run([python, "-c", needed], capture_output=True).returncode:
        pytest.skip(f"{python} has no torch, transformers and lm-eval; name one in PEER_PYTHON")
    output = tmp_path / "harness.json"
    subprocess.run([python, made.__file__, f"--output={output}"], check=True, capture_output=True)
    fresh = json.loads(output.read_text())
    for kind in KINDS:
        assert_same(fresh[kind], fixtures[kind])
