"""Write mxfp4/: a tiny gpt-oss with its experts in MXFP4, and what transformers makes of it.

    python tests/interop/make_mxfp4.py

This needs torch and transformers. The halves of each tensor are random bytes; scales of 110 to 132
include numbers far below 1.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

FOLDER = Path(__file__).parent / "mxfp4"


def main() -> None:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=2,
        sliding_window=8,
        max_position_embeddings=64,
    )
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    stored = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    expected = {}
    for name in list(stored):
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        experts, inputs, outputs = stored.pop(name).shape
        groups = inputs // 32
        blocks = torch.randint(0, 256, (experts, outputs, groups, 16), dtype=torch.uint8)
        scales = torch.randint(122, 126, (experts, outputs, groups), dtype=torch.uint8)
        scales[0, 0] = 110
        scales[0, 1] = 127
        stored[name + "_blocks"] = blocks
        stored[name + "_scales"] = scales
        unpacked = convert_moe_packed_tensors(blocks, scales).float()
        expected[name] = unpacked.numpy()
        model.get_parameter(name).data = unpacked
    for name, value in stored.items():
        if value.dtype == torch.bfloat16:
            model.get_parameter(name).data = value.float()
    tokens = torch.randint(0, 40, (2, 12))
    with torch.no_grad():
        logits = model(tokens).logits
    FOLDER.mkdir(exist_ok=True)
    save_file(stored, FOLDER / "model.safetensors", metadata={"format": "pt"})
    written = config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
    written = {"architectures": ["GptOssForCausalLM"]} | written
    (FOLDER / "config.json").write_text(json.dumps(written, indent=1) + "\n")
    arrays = {"tokens": tokens.numpy(), "logits": logits.float().numpy(), **expected}
    np.savez_compressed(FOLDER / "expected.npz", **arrays)


if __name__ == "__main__":
    main()
