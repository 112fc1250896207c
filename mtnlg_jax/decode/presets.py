"""Named ways to choose tokens: settings of DecodeConfig that other settings can override.

docs/presets.md measures what each does to one model's text.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mtnlg_jax.config import BEAM_ORDER, SAMPLING_LIMITS, DecodeConfig

# The settings that a preset decides, those that it does not name by their defaults. Lengths, ends,
# biases, forced tokens and the seed stay as they are.
DECIDED = (
    *("temperature", *SAMPLING_LIMITS, "mirostat_tau", "mirostat_eta", "penalty_alpha"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size"),
    *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n"),
    *("dry_sequence_breakers", "num_return_sequences", "num_beams", *BEAM_ORDER),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size"),
)


@dataclasses.dataclass(frozen=True)
class Preset:
    """One way to choose tokens."""

    about: str
    decode: Mapping[str, Any]  # settings of DecodeConfig
    # Weights of the scorers by which the best of num_return_sequences texts is chosen; none: the
    # texts are returned as they are.
    scorers: Mapping[str, float] = dataclasses.field(default_factory=dict)


_NUCLEUS = {"temperature": 1.0, "top_p": 0.95}

PRESETS = {
    "greedy": Preset("the most probable token", {}),
    "nucleus": Preset("top_p 0.95 (Holtzman 2019)", _NUCLEUS),
    "typical": Preset("typical_p 0.95 (Meister 2022)", {"temperature": 1.0, "typical_p": 0.95}),
    "mirostat": Preset(
        "a mean surprise of 5 bits (Basu 2021)", {"temperature": 1.0, "mirostat_tau": 5.0}
    ),
    "dry": Preset(
        "the most probable token, where repetitions are penalized by their length (DRY)",
        {"dry_multiplier": 0.8},
    ),
    "contrastive": Preset(
        "contrastive search among 4 (Su 2022)", {"penalty_alpha": 0.6, "top_k": 4}
    ),
    "best": Preset(
        "the best of 8 texts of nucleus with DRY, by likelihood, diversity and coherence",
        _NUCLEUS | {"dry_multiplier": 0.8, "num_return_sequences": 8},
        {"logprob": 1.0, "diversity": 1.0, "coherence": 1.0},
    ),
}


def with_preset(decode: DecodeConfig, name: str) -> DecodeConfig:
    """Return ``decode`` with the settings of preset ``name``.

    Raises ValueError if there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset={name!r}; choose one of {', '.join(PRESETS)}")
    plain = {key: getattr(DecodeConfig, key) for key in DECIDED}
    return dataclasses.replace(decode, **plain | dict(PRESETS[name].decode))
