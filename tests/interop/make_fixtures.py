"""Write fixtures of two small random GPT-2 models, using a Python with torch and transformers:

    python tests/interop/make_fixtures.py tests/interop/fixtures

Each folder holds the output of save_pretrained, the files of the tokenizer, and expected.npz and
expected.json: logits, loss and gradients of one batch, greedy texts, and the versions that made
them. ``tied`` has the architecture's defaults; ``untied`` has a separate output embedding, another
MLP width and epsilon, and three more rows than its tokenizer has tokens. ``tied`` also has
expected_activations.npz: logits of its tensors with other activation functions.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

PAIRS = [
    "t h",
    "th e",
    "\u0120 the",
    "i n",
    "a n",
    "\u0120 a",
    "o u",
    "e r",
    "\u0120 w",
    "\u0120w a",
    "in g",
]
PROMPTS = ["the man", "In the town where I was born", " a", "天地", "x 12"]
VARIANTS = {
    "tied": {},
    "untied": {
        "tie_word_embeddings": False,
        "n_inner": 40,
        "layer_norm_epsilon": 1e-3,
        "activation_function": "gelu_pytorch_tanh",
        "vocab_size": 271,
    },
}


def byte_characters() -> list[str]:
    """Return GPT-2's characters for the bytes 0 to 255, in the order of its vocabulary."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, visible), *(chr(256 + number) for number in range(256 - len(visible)))]


def write_tokenizer(folder: Path) -> int:
    """Write vocab.json and merges.txt; return the number of tokens, the last one <|endoftext|>."""
    pieces = [*byte_characters(), *(pair.replace(" ", "") for pair in PAIRS), "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *PAIRS, ""]), encoding="utf-8")
    return len(pieces)


def make(folder: Path, changes: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            **{
                "n_layer": 2,
                "n_embd": 16,
                "n_head": 2,
                "n_positions": 48,
                "vocab_size": size,
                "bos_token_id": size - 1,
                "eos_token_id": size - 1,
            }
            | changes
        )
    )
    with torch.no_grad():
        for name, values in model.named_parameters():
            # Large values, and no bias of 0 or scale of 1, which would hide errors.
            scale = name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))
            values.copy_(torch.randn_like(values) * 0.3 + float(scale))
            if name.endswith(("wte.weight", "lm_head.weight")):
                values[94:256] *= 0.1  # make non-ASCII bytes unlikely, so that texts are readable
    model.eval()
    model.save_pretrained(folder)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, size, (2, 13)))
    out = model(tokens, labels=tokens)
    out.loss.backward()
    arrays = {f"gradient.{name}": values.grad.numpy() for name, values in model.named_parameters()}
    np.savez_compressed(
        folder / "expected.npz",
        tokens=tokens.numpy(),
        logits=out.logits.detach().numpy(),
        loss=out.loss.detach().numpy(),
        **arrays,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    greedy = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=16, do_sample=False, pad_token_id=5)[0]
        greedy.append(
            {
                "prompt": prompt,
                "tokens": written.tolist(),
                "text": tokenizer.decode(written, skip_special_tokens=True),
            }
        )
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
    (folder / "expected.json").write_text(
        json.dumps({"versions": versions, "greedy": greedy}, indent=1, ensure_ascii=False),
        encoding="utf-8",
    )


def write_activations(folder: Path) -> None:
    """Write logits of the model in ``folder`` for one row, by activation function."""
    tokens = np.random.default_rng(2).integers(0, 268, (1, 9))
    arrays = {"tokens": tokens}
    for name in ("relu", "gelu", "silu"):
        model = GPT2LMHeadModel.from_pretrained(folder, activation_function=name)
        arrays[name] = model.float().eval()(torch.from_numpy(tokens)).logits.detach().numpy()
    np.savez_compressed(folder / "expected_activations.npz", **arrays)


if __name__ == "__main__":
    for name, changes in VARIANTS.items():
        make(Path(sys.argv[1], name), changes)
    write_activations(Path(sys.argv[1], "tied"))
