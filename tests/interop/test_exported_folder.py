"""A folder that `convert` writes is whole to transformers: weights, tokenizer, template, ends."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from mtnlg_jax.config import Config, DecodeConfig, TrainConfig, load_config
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.data.tokenizer import load_tokenizer
from mtnlg_jax.data.tokenizer.chat import Chat
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.interop import registry
from mtnlg_jax.interop.families import FAMILIES, model_of
from mtnlg_jax.interop.huggingface import convert
from mtnlg_jax.interop.interchange import Interchange
from mtnlg_jax.interop.shards import write_shards
from mtnlg_jax.train.init_from import keep_originals
from mtnlg_jax.train.loop import train

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "data"))
from hub_folders import FOLDERS  # noqa: E402

registry.register()
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [{"role": "user", "content": "the man"}]
PROMPTS = ["the man in", "def f(x):", "天地"]
READ = """
    import json, sys
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder, prompts, messages = sys.argv[1], *map(json.loads, sys.argv[2:])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    found = {"dtype": str(model.dtype), "ends": model.generation_config.eos_token_id}
    model = model.float()
    template = tokenizer.apply_chat_template
    found["chat"] = template(messages, add_generation_prompt=False, tokenize=False)
    found["tokens"] = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=8, do_sample=False)[0].tolist()
        found["tokens"].append(out)
    print(json.dumps(found))
"""


@pytest.fixture
def chat(tmp_path) -> Path:
    """Return a folder of a random Llama with a chat template and two end tokens."""
    folder = FOLDERS["qwen"](tmp_path / "chat")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((HERE / "families/llama3/config.json").read_text())
    config |= {"vocab_size": 336, "bos_token_id": 330, "pad_token_id": 330, "eos_token_id": 332}
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [332, 330], "pad_token_id": 330}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    table = Interchange(model_of(config), FAMILIES["llama"]).table
    rng = np.random.default_rng(0)
    sizes = {name: 4 * int(np.prod(entry.shape)) for name, entry in table.items()}

    def values(name: str) -> np.ndarray:
        return rng.normal(0.1, 0.3, table[name].shape).astype(np.float32)

    write_shards(folder, sizes, values, 5)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_reads_all_of_a_chat_model(chat, tmp_path, dtype):
    python = os.environ.get("TRANSFORMERS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip("needs torch and transformers: set TRANSFORMERS_PYTHON to a Python with both")
    convert(chat, tmp_path / "run")
    folder = tmp_path / "model"
    convert(tmp_path / "run", folder, dtype=dtype, max_shard_size=5e-5)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    done = subprocess.run(
        [python, "-c", textwrap.dedent(READ), folder, json.dumps(PROMPTS), json.dumps(MESSAGES)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    run, decoder = load_decoder(folder)
    assert found["dtype"] == f"torch.{dtype}"
    assert found["ends"] == [332, 330] == list(run.tokenizer.eos_ids)
    assert found["chat"] == Chat(run.tokenizer).text(MESSAGES)
    ids = [run.tokenizer.encode(prompt) for prompt in PROMPTS]
    results = generate(decoder, run.tokenizer, ids, DecodeConfig(max_new_tokens=8))
    ours = [[*before, *each.tokens] for before, each in zip(ids, results, strict=True)]
    theirs = [[i for i in tokens if i not in found["ends"]] for tokens in found["tokens"]]
    assert ours == theirs


def test_a_template_in_its_own_file_is_exported_as_trained_with(chat, tmp_path):
    (chat / "chat_template.jinja").write_text(TEMPLATE + "own file")
    convert(chat, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    assert (tmp_path / "back/chat_template.jinja").read_text() == TEMPLATE + "own file"
    # Conversations may have been prepared with another one.
    tokenizer = load_tokenizer(tmp_path / "run/tokenizer")
    tokenizer.companions = {**tokenizer.companions, "chat_template.jinja": b"of the data"}
    shutil.rmtree(tmp_path / "run/tokenizer")
    tokenizer.save(tmp_path / "run/tokenizer")
    convert(tmp_path / "run", tmp_path / "back", overwrite=True)
    assert (tmp_path / "back/chat_template.jinja").read_text() == "of the data"


# --- runs that start from a model


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def started_from(init: Path) -> Config:
    return Config(train=TrainConfig(init=os.fspath(init)))


@pytest.mark.parametrize("source", ["chat", "families/bert", "run"])
def test_a_run_that_starts_from_a_model_keeps_what_a_converted_one_keeps(chat, tmp_path, source):
    registry.register()
    model = chat
    if source.startswith("families"):
        # Token types are added to its embedding, so that tensors are kept whole.
        model = Path(shutil.copytree(HERE / source, tmp_path / "model"))
        for path in FOLDERS["characters"](tmp_path / "letters").iterdir():
            shutil.copy(path, model)
    convert(model, tmp_path / "run")
    wanted = content_of(tmp_path / "run/huggingface")
    init = tmp_path / "run" if source == "run" else model
    (tmp_path / "started/huggingface").mkdir(parents=True)
    (tmp_path / "started/huggingface/old").touch()  # of an earlier start, from another model
    keep_originals(started_from(init), os.fspath(tmp_path / "started"))
    assert content_of(tmp_path / "started/huggingface") == wanted
    assert len(wanted) > 2
    assert ("kept.safetensors" in wanted) == source.startswith("families")
    # A run that starts from random parameters has none.
    keep_originals(Config(), os.fspath(tmp_path / "started"))
    assert not os.listdir(tmp_path / "started")


@pytest.mark.slow
def test_a_run_that_started_from_a_chat_model_is_exported_as_one(chat, tmp_path):
    registry.register()
    (tmp_path / "text.txt").write_text("the man in the town where I was born\n" * 400)
    prepare(tmp_path / "text.txt", tmp_path / "data", tokenizer=os.fspath(chat), heldout=0.0)
    config = load_config(
        os.fspath(chat),
        [
            f"train.init={chat}",
            f"data.path={tmp_path / 'data'}",
            "train.steps=2",
            "train.global_batch_size=8",
            "data.sequence_length=16",
        ],
    )
    train(config, os.fspath(tmp_path / "run"), show_progress=False)
    convert(tmp_path / "run", tmp_path / "back")
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (chat / name).read_bytes()
    run, _ = load_decoder(tmp_path / "back")
    assert list(run.tokenizer.eos_ids) == [332, 330]
    assert Chat(run.tokenizer).text(MESSAGES)
    # A second start resumes, and leaves what is kept.
    train(config, os.fspath(tmp_path / "run"), show_progress=False)
    kept = content_of(tmp_path / "run/huggingface")
    assert kept["generation_config.json"] == (chat / "generation_config.json").read_bytes()
