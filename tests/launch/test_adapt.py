"""Run launch/adapt.py, and launch/generate.py with several adapters in one batch."""

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from mtnlg_jax.cli.decoding import held_flags, shared_flags
from mtnlg_jax.cli.generation import adapters, options
from mtnlg_jax.config import Config, DecodeConfig, ModelConfig, to_json
from mtnlg_jax.data.tokenizer import train_tokenizer
from mtnlg_jax.decode.adapters import stack
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.model.transformer import init_parameters
from mtnlg_jax.train import lora
from mtnlg_jax.train.adapter_file import (
    Adapter,
    adapter_config,
    identity_of,
    load_adapter,
    open_base,
    path_of,
    write,
)

sys.path.append(str(Path(__file__).resolve().parents[1] / "decode"))
from runs import save_run  # noqa: E402

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
TEXT = "The old whale swam north past a red ship, and nobody woke in the storm. " * 40


def launch(script, *arguments):
    command = [sys.executable, LAUNCH / script, *arguments]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.returncode, found.stdout, found.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random run with one adapter, "loud", and the text of a person."""
    folder = tmp_path_factory.mktemp("launch")
    tokenizer = train_tokenizer([TEXT], 290)
    model = ModelConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=32,
        vocab_size=tokenizer.vocab_size,
    )
    save_run(folder / "run", Config(model=model), init_parameters(model, 0), tokenizer)
    (folder / "run" / "config.json").write_text(to_json(Config(model=model)))
    (folder / "text.txt").write_text(TEXT)
    config = adapter_config(model, 2, 4.0, ("q", "out"))
    rng = np.random.default_rng(0)
    factors = {
        name: rng.normal(0, 1, leaf.shape).astype(np.float32)
        for name, leaf in lora.abstract_adapters(config)["blocks"].items()
    }
    identity = identity_of(*open_base(folder / "run"))
    write(path_of(folder / "run", "loud"), Adapter(config, factors, identity, {}))
    return folder


def test_rows_name_their_adapters(folder):
    rows = [
        {"prompt": "The old", "adapter": "loud"},
        {"prompt": "The old", "adapter": None},
        {"prompt": "A red ship", "adapter": path_of(folder / "run", "loud")},
        {"prompt": "The old"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = (f"--workdir={folder / 'run'}", f"--prompts={folder / 'rows.jsonl'}", "--temperature=0")
    code, out, err = launch("generate.py", *given, "--adapter=loud", "--max_new_tokens=8")
    assert code == 0, err
    found = [json.loads(line)["sequences"][0]["tokens"] for line in out.splitlines()]
    run, decoder = load_decoder(folder / "run")
    decoder = stack(decoder, {"loud": load_adapter(folder / "run", "loud")})
    wanted = [
        list(
            generate(
                decoder, run.tokenizer, [prompt], DecodeConfig(max_new_tokens=8), adapters=[name]
            )[0].tokens
        )
        for prompt, name in (("The old", "loud"), ("The old", None), ("A red ship", "loud"))
    ]
    assert found == [*wanted, wanted[0]] and found[0] != found[1]


def test_unknown_adapters_are_refused_before_the_model_is_loaded(folder):
    run = f"--workdir={folder / 'run'}"
    code, _, err = launch("generate.py", run, "--adapter=quiet", "--prompt=The")
    assert code == 2 and "has no adapter 'quiet': it has loud" in err and err.count("\n") == 1
    (folder / "bad.jsonl").write_text('{"prompt": "The", "adapter": 3}\n')
    code, _, err = launch("generate.py", run, f"--prompts={folder / 'bad.jsonl'}")
    assert code == 2 and "line 1 has an adapter that is not a name" in err


def test_rows_over_stages_are_refused_before_the_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(options, "WORKDIR", Mock(value=str(folder / "run")))
    monkeypatch.setattr(held_flags, "CHECKPOINT", Mock(value="best"))
    monkeypatch.setattr(shared_flags, "ADAPTER", Mock(value=None))
    assert list(adapters.load([{"adapter": "loud"}, {"adapter": None}], stages=1)) == ["loud"]
    assert adapters.load([{"adapter": None}], stages=2) == {}
    with pytest.raises(ValueError, match=r"do not decode over stages \(mesh.pipe=2\)"):
        adapters.load([{"adapter": "loud"}], stages=2)


@pytest.mark.slow
def test_a_trained_adapter_is_used_by_its_name(folder):
    run = folder / "run"
    given = [f"--workdir={run}", f"--texts={folder / 'text.txt'}", "--adapter=me"]
    training = ["--steps=4", "--rank=2", f"--others={folder / 'text.txt'}", "--json"]
    code, out, err = launch("adapt.py", *given, *training)
    assert code == 0, err
    report = json.loads(out)
    assert report["adapter"] == path_of(run, "me") and Path(report["adapter"]).is_file()
    assert report["person"]["after"] < report["person"]["before"]
    code, out, err = launch("adapt.py", *given, *training)
    assert code == 2 and "--overwrite" in err
    scored = (f"--workdir={run}", "--adapter=me", f"--input={folder / 'text.txt'}", "--json")
    code, out, err = launch("evaluate.py", *scored)
    assert code == 0, err
    assert json.loads(out)["bits_per_byte"] == pytest.approx(report["others"]["after"], abs=1e-4)
