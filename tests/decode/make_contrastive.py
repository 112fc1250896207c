"""Write fixtures/contrastive.npz: contrastive search by Hugging Face's generate.

    python tests/decode/make_contrastive.py --output=tests/decode/fixtures/contrastive.npz

This needs torch and transformers 4.46: version 5 has no contrastive search. The models are those of
fixtures/transformers.npz, which make_fixtures.py writes. Each result is (rows, NEW) new tokens,
padded with PAD behind the end token.
"""

import argparse
import json
from pathlib import Path

import make_fixtures as made
import numpy as np

SETTINGS = [
    {"penalty_alpha": 0.6, "top_k": 4},
    {"penalty_alpha": 0.3, "top_k": 6},
    {"penalty_alpha": 0.9, "top_k": 3},
    {"penalty_alpha": 1.0, "top_k": 2},
    {"penalty_alpha": 0.5, "top_k": 13, "repetition_penalty": 1.3},
]
WEIGHTS = Path(__file__).parent / "fixtures" / "transformers.npz"


def prompts_of(settings: dict) -> list[list[int]]:
    """Return prompts of one length where transformers would count padding as seen."""
    return made.prompts((6, 6, 6) if "repetition_penalty" in settings else made.PROMPTS)


def padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompts with padding on the left, and which tokens are theirs."""
    longest = max(map(len, prompts))
    ids, mask = (np.full((len(prompts), longest), fill) for fill in (made.PAD, 0))
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def make() -> dict[str, np.ndarray]:
    import torch
    import transformers
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(1)
    found = {"versions": np.array(f"torch {torch.__version__}, transformers 4.46")}
    assert transformers.__version__.startswith("4.46."), transformers.__version__
    config = GPT2Config(
        n_layer=made.LAYERS,
        n_head=made.HEADS,
        n_embd=made.WIDTH,
        vocab_size=made.VOCABULARY,
        n_positions=made.CONTEXT,
        bos_token_id=made.END,
        eos_token_id=made.END,
        pad_token_id=made.PAD,
    )
    file = np.load(WEIGHTS)
    for number in range(len(made.MODELS)):
        model = GPT2LMHeadModel(config).eval()
        prefix = f"{number}/weights/"
        weights = {
            f"transformer.{name.removeprefix(prefix)}": torch.tensor(file[name])
            for name in file.files
            if name.startswith(prefix)
        }
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) == {"lm_head.weight"}
        model.tie_weights()
        model.generation_config.pad_token_id = made.PAD
        for settings in SETTINGS:
            ids, mask = padded(prompts_of(settings))
            longest = ids.shape[1]
            done = model.generate(
                torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                max_new_tokens=made.NEW,
                **settings,
            )
            new = done[:, longest:].numpy()
            more = ((0, 0), (0, made.NEW - new.shape[1]))
            new = np.pad(new, more, constant_values=made.PAD).astype(np.int8)
            found[f"{number}/{SETTINGS.index(settings)}"] = new
    # A test that uses other settings must fail rather than compare them.
    found["settings"] = np.array(json.dumps(SETTINGS))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True)
    np.savez_compressed(parser.parse_args().output, **make())
