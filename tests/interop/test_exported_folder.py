"""A folder that `convert` writes is whole to transformers: weights, tokenizer, template, ends."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.data.tokenizer.chat import Chat
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.load import load_decoder
from mtnlg_jax.interop import registry
from mtnlg_jax.interop.families import FAMILIES, model_of
from mtnlg_jax.interop.huggingface import convert
from mtnlg_jax.interop.interchange import Interchange
from mtnlg_jax.interop.shards import write_shards

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
