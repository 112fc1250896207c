"""Load published weights straight from their folders, and compare with what transformers computes.

The folders lie in shared/data/weights; their expected.json names the versions.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from flax import nnx

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.data.tokenizer import load_tokenizer
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.infill import fill
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.decode.scoring import score_masked, score_rows
from mtnlg_jax.interop import registry
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.train.checkpoint import load_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def load(shared):
    """Return a function: name of a folder -> (run, decoder, what transformers computed)."""
    registry.register()

    def opened(name: str):
        folder = shared / "data/weights" / name
        run, decoder = load_decoder(folder)
        return run, decoder, json.loads((folder / "expected.json").read_text())

    return opened


def test_a_real_llama_has_the_perplexity_and_the_text_of_transformers(load):
    run, decoder, expected = load("stories260K_llama")
    (log_probs,) = score_rows(decoder, [expected["ids"]], [1])
    assert -float(np.mean(log_probs)) == pytest.approx(expected["mean_nll"], abs=2e-6)
    # What a wrong layout of the rotary pairs would give is far away.
    assert expected["mean_nll_if_rotary_pairs_are_read_as_halves"] > 2
    settings = DecodeConfig(max_new_tokens=100)
    cases = expected["greedy"]
    found = generate(decoder, run.tokenizer, [case["prompt_ids"] for case in cases], settings)
    for case, result in zip(cases, found, strict=True):
        assert list(result.tokens) == case["new_ids"][: len(result.tokens)]
        assert len(result.tokens) > 60 or result.finish_reason == "stop"


@pytest.mark.parametrize(
    "name", [pytest.param("rxnfp_bert_mlm", marks=pytest.mark.slow), "bert_tiny_splade"]
)
def test_a_real_bert_guesses_the_tokens_that_transformers_guesses(load, name):
    run, decoder, expected = load(name)
    mask = run.tokenizer.mask_id
    rows = [case["ids"] for case in expected["texts"]]
    # Each token is masked alone; [CLS] and [SEP] are not.
    spans = [[(at, at + 1) for at in range(1, len(row) - 1)] for row in rows]
    scored = np.concatenate(score_masked(decoder, mask, rows, spans))
    perplexity = math.exp(-scored.mean())
    assert perplexity == pytest.approx(expected["pseudo_perplexity"], rel=2e-5)
    for case in expected["fill"]:
        filled = fill(decoder, run.tokenizer, case["text"], top_k=5)
        for found, (token, _, probability) in zip(filled.masks[0], case["top5"], strict=True):
            if token not in (run.tokenizer.bos_id, run.tokenizer.eos_id):
                assert (found.token, found.probability) == (
                    token,
                    pytest.approx(probability, abs=2e-6),
                )
                break


def test_the_commands_take_the_folder(shared):
    folder = shared / "data/weights/stories260K_llama"
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "launch/generate.py",
            f"--workdir={folder}",
            "--prompt=The cat",
            "--max_new_tokens=12",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The cat and a boy were playing in the p")


@pytest.mark.slow
def test_gemma_270m_has_the_perplexity_and_the_text_of_transformers(shared):
    """GEMMA_GGUF names the file that shared/data/weights/gemma3_270m/README.md assembles; its
    tokenizer.json lies beside it."""
    path = os.environ.get("GEMMA_GGUF")
    if path is None:
        pytest.skip("set GEMMA_GGUF to the file of Gemma 3 270M")
    registry.register()
    run, decoder = load_decoder(path)
    book = shared / "data/pretrain/en/gutenberg/1661_The-Adventures-of-Sherlock-Holmes.txt"
    text = book.read_text(encoding="utf-8")[200_000:206_000]
    row = [2, *run.tokenizer.encode(text)][:1025]
    (log_probs,) = score_rows(decoder, [row], [1])
    assert -float(log_probs.mean()) == pytest.approx(2.942465, abs=1e-4)
    # Where the windows of 512 matter.
    assert -float(log_probs[512:].mean()) == pytest.approx(2.839279, abs=1e-4)
    prompt = "Once upon a time, there was a little girl named Lily."
    ids = [[2, *run.tokenizer.encode(prompt)]]
    (result,) = generate(decoder, run.tokenizer, ids, DecodeConfig(max_new_tokens=32))
    assert re.match(r" She was a very smart girl, and she loved to play", result.text)


@pytest.mark.slow
def test_the_tokenizer_inside_gemma_is_that_of_its_tokenizer_json(shared):
    """GEMMA_GGUF is as above. Lines and whole pages of English and Chinese, and corner cases."""
    path = os.environ.get("GEMMA_GGUF")
    if path is None:
        pytest.skip("set GEMMA_GGUF to the file of Gemma 3 270M")
    inside = load_tokenizer(path)
    beside = tokenizers.Tokenizer.from_file(os.fspath(Path(path).with_name("tokenizer.json")))
    beside.encode_special_tokens = True
    texts = ["  two   spaces\n\n\n\ttabs", "<eos>a<bos>", "▁x ▁▁", "🙂 e\u0301", "[multimodal] x"]
    for language in ("en", "zh"):
        folder = shared / "data/pretrain" / language
        for file in sorted(folder.glob("**/*.txt"))[:2]:
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:1000]
            texts += [*lines, *("\n".join(lines[at : at + 20]) for at in range(0, 1000, 20))]
    assert len(texts) > 4000
    theirs = beside.encode_batch(texts, add_special_tokens=False)
    assert inside.encode_batch(texts) == [found.ids for found in theirs]
    assert (inside.bos_id, inside.eos_ids, inside.pad_id) == (2, (1,), 0)


READ = """
    import sys
    import numpy, torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder, text, to = sys.argv[1:]
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert model.dtype == torch.float32
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()
    numpy.savez(to, ids=ids.numpy(), logits=logits, ends=model.generation_config.eos_token_id)
"""


@pytest.mark.slow
def test_transformers_reads_gemma_270m_as_it_is_exported(tmp_path):
    """GEMMA_GGUF is as above; TRANSFORMERS_PYTHON is a Python with torch and transformers. It takes
    2.5 GB of disk and 5 GB of memory."""
    path = os.environ.get("GEMMA_GGUF")
    if path is None:
        pytest.skip("set GEMMA_GGUF to the file of Gemma 3 270M")
    python = os.environ.get("TRANSFORMERS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip("needs torch and transformers: set TRANSFORMERS_PYTHON to a Python with both")

    def finish(*command) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    script = ROOT / "launch/convert.py"
    finish(sys.executable, script, f"--from={path}", f"--to={tmp_path}/run")
    finish(sys.executable, script, f"--from={tmp_path}/run", f"--to={tmp_path}/model")
    text = "Once upon a time, there was a little girl named Lily. " * 3
    finish(python, "-c", textwrap.dedent(READ), tmp_path / "model", text, tmp_path / "theirs.npz")
    for made in ("run", "model"):  # pytest keeps the folder for some time
        shutil.rmtree(tmp_path / made)
    theirs = np.load(tmp_path / "theirs.npz")
    registry.register()
    run = load_run(path)
    assert theirs["ids"].tolist() == [[run.tokenizer.bos_id, *run.tokenizer.encode(text)]]
    assert theirs["ends"].tolist() in (run.tokenizer.eos_id, list(run.tokenizer.eos_ids))
    model = nnx.merge(abstract_model(run.config.model)[0], run.params)
    logits = np.asarray(model(theirs["ids"].astype(np.int32)))[0]
    assert np.abs(logits).max() > 10
    np.testing.assert_allclose(logits, theirs["logits"], atol=1e-4)
