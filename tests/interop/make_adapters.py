"""Write what PEFT computes with small random adapters, with a Python that has torch, transformers
and peft:

    python tests/interop/make_adapters.py FOLDER [NAME ...]

Each folder is what save_pretrained writes, and expected.npz: the logits of a batch. All factors are
random, B too: zeros hide mistakes. The bases are the models of families/ and fixtures/.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

HERE = Path(__file__).parent
LENGTH = 24

# name -> (folder of the base, arguments of LoraConfig)
ADAPTERS: dict[str, tuple[str, dict]] = {
    # Grouped heads; ranks and scales of their own.
    "llama": (
        "families/llama3",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 6, "down_proj": 2},
            "alpha_pattern": {r".*\.v_proj": 9},
        },
    ),
    # Conv1D and fused queries, keys and values; one layer alone.
    "gpt2": (
        "fixtures/untied",
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["c_attn", "c_proj", "c_fc"],
            "fan_in_fan_out": True,
            "layers_to_transform": [1],
            "layers_pattern": "h",
        },
    ),
    # Queries, keys and values of one head after another.
    "neox": (
        "families/gpt_neox",
        {"r": 3, "lora_alpha": 6, "target_modules": r".*\.(query_key_value|dense_4h_to_h)"},
    ),
    # Rotary pairs are neighbors; DoRA, biases and a norm as a whole.
    "gptj": (
        "families/gptj",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "k_proj", "out_proj", "fc_in"],
            "use_dora": True,
            "bias": "all",
            "modules_to_save": ["ln_f", "lm_head"],
        },
    ),
}


def make(name: str, folder: Path) -> None:
    base, given = ADAPTERS[name]
    torch.manual_seed(zlib.crc32(name.encode()))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(HERE / base, dtype=torch.float32)
    model = get_peft_model(loaded, LoraConfig(task_type="CAUSAL_LM", **given)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                # Numbers that float16 holds exactly make small files.
                parameter += 0.2 * torch.randn_like(parameter)
                parameter.copy_(parameter.half().float())
        vocabulary = loaded.config.vocab_size
        tokens = torch.randint(3, vocabulary, (2, LENGTH))
        logits = model(tokens).logits
        model.half().save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = f"../../{base}"
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)
    np.savez_compressed(
        folder / "expected.npz", tokens=tokens.numpy(), logits=logits.numpy().astype(np.float32)
    )


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for chosen in sys.argv[2:] or ADAPTERS:
        make(chosen, target / chosen)
