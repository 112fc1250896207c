"""adapter_config.json of PEFT: which matrices a low-rank adapter changes, and by how much.

The rules for names are those of `peft.tuners.tuners_utils.check_target_module_exists` and
`peft.utils.other.get_pattern_key` (PEFT 0.21).
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

# Keys of adapter_config.json that do not change what the adapted model computes.
_NO_EFFECT = frozenset(
    """
    auto_mapping base_model_name_or_path eva_config inference_mode loftq_config lora_dropout
    megatron_core peft_type peft_version qalora_group_size revision runtime_config task_type
    ensure_weight_tying
    """.split()
)
_READ = frozenset(
    """
    alpha_pattern bias exclude_modules fan_in_fan_out init_lora_weights layers_pattern
    layers_to_transform lora_alpha modules_to_save r rank_pattern target_modules use_dora
    use_rslora
    """.split()
)
_MERGE = "merge it with PEFT's merge_and_unload, and give the folder of the merged model"
# These start from factors of the weight itself and change the base as well.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterConfig:
    """The settings of an adapter. Raises ValueError naming what cannot be had here."""

    def __init__(self, folder: str | os.PathLike):
        self.path = Path(folder) / CONFIG
        try:
            found = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self.path} is missing; give a folder that PEFT's save_pretrained has written"
            ) from None
        except ValueError as error:
            raise ValueError(f"{self.path} is not JSON ({error}); copy it again") from None
        if not isinstance(found, dict):
            raise ValueError(f"{self.path} is not an object of settings; copy it again")
        self._found = found
        self._refuse()
        self.base: str = found.get("base_model_name_or_path") or ""
        self.dora = bool(found.get("use_dora"))
        self.modules_to_save: list[str] = list(found.get("modules_to_save") or [])

    def _refuse(self) -> None:
        found = self._found
        kind = found.get("peft_type")
        if kind != "LORA":
            raise ValueError(
                f"{self.path}: peft_type={kind!r} is not low-rank adaptation; only LORA can be "
                f"read; {_MERGE}"
            )
        start = found.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(_CHANGED_BASE):
            raise ValueError(
                f"{self.path}: init_lora_weights={start!r} changes the base as well, which the "
                "adapter does not hold; save it with path_initial_model_for_weight_conversion, or "
                f"{_MERGE}"
            )
        for key in ("r", "lora_alpha"):
            value = found.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(
                    f"{self.path}: {key}={value!r} must be a number above 0; correct it"
                )
        if found.get("bias", "none") not in ("none", "all", "lora_only"):
            raise ValueError(
                f"{self.path}: bias={found['bias']!r} must be none, all or lora_only; correct it"
            )
        left = {
            key: value
            for key, value in found.items()
            if key not in _NO_EFFECT | _READ and value not in (None, False, "", 0)
            if value not in ([], {})
        }
        if left:
            shown = ", ".join(f"{key}={value!r}" for key, value in left.items())
            raise ValueError(
                f"{self.path} has settings that change the model and cannot be had here: {shown}; "
                f"{_MERGE}"
            )

    def changes(self, module: str, *, linear: bool, head: bool) -> bool | None:
        """Return whether the adapter has factors for ``module``; None if the file does not say.

        ``linear``: it is a linear layer, and not an embedding. ``head``: it is the output layer.
        """
        targets = self._found.get("target_modules")
        if not targets:
            return None  # PEFT chose by its own table of model types
        if self._excluded(module):
            return False
        if isinstance(targets, str):
            if targets.lower() == "all-linear":
                return linear and not head
            return re.fullmatch(targets, module) is not None
        if module in targets:
            return True
        if not any(module.endswith(f".{target}") for target in targets):
            return False
        return self._in_layers(module)

    def _excluded(self, module: str) -> bool:
        excluded = self._found.get("exclude_modules") or []
        if isinstance(excluded, str):
            if re.fullmatch(excluded, module):
                return True
        elif any(module == name or module.endswith(f".{name}") for name in excluded):
            return True
        return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save)

    def _in_layers(self, module: str) -> bool:
        """Return whether ``module`` is in one of layers_to_transform, if there are any."""
        layers = self._found.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self._found.get("layers_pattern") or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        for pattern in patterns:
            match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", module)
            if match:
                return int(match["index"]) in ([layers] if isinstance(layers, int) else layers)
        return False

    def rank(self, module: str) -> int:
        return self._of("rank_pattern", module, self._found["r"])

    def scale(self, module: str) -> float:
        """Return the factor of B A."""
        alpha = self._of("alpha_pattern", module, self._found["lora_alpha"])
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self._found.get("use_rslora") else rank)

    def _of(self, key: str, module: str, usual: Any) -> Any:
        # PEFT takes the first pattern that is the end of the name.
        for pattern, value in (self._found.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return usual
