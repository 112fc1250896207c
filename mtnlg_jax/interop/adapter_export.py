"""PEFT's low-rank adapters, out: the factors of a run as an adapter of its base.

Factors of ours that one tensor of theirs holds share its A, side by side: a fused tensor of
queries, keys and values has three times the rank, or the same where the three A are equal.
"""

import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtnlg_jax.config import Config, ModelConfig
from mtnlg_jax.foreign import is_gguf
from mtnlg_jax.interop.adapter_config import CONFIG, TENSORS, AdapterConfig
from mtnlg_jax.interop.adapter_runs import base_family, open_base, original_of, run_of_base
from mtnlg_jax.interop.families import FAMILIES
from mtnlg_jax.interop.interchange import Interchange
from mtnlg_jax.interop.recognize import is_model
from mtnlg_jax.interop.shards import cast, write_tensors
from mtnlg_jax.train import adapter_file, lora
from mtnlg_jax.train.arrays import StoredArrays
from mtnlg_jax.train.checkpoint import Run, find_run


class Pair(NamedTuple):
    """The factors of a tensor of theirs."""

    first: np.ndarray  # A (R, inputs)
    second: np.ndarray  # B (outputs, R)


def to_adapter(
    workdir: str, folder: Path, dtype: str, which: str, base: str | None
) -> tuple[Run, str]:
    """Write the adapter of the run in ``workdir`` to ``folder``; return the run and a report.

    Raises ValueError if the run has none, or if PEFT cannot hold it.
    """
    run, config, factors = _read(workdir, which)
    base = base or config.train.init
    interchange = Interchange(config.model, FAMILIES[_family(workdir, base, config.model)])
    scale = config.optimizer.lora_alpha / config.optimizer.lora_rank
    # A folder that PEFT is to load is named by its whole path.
    named = os.path.abspath(base) if os.path.exists(base) else base
    kind = "float32" if dtype == "source" else dtype
    pairs, settings = write_adapter(folder, interchange, factors, scale, named, kind)
    count = sum(pair.first.size + pair.second.size for pair in pairs.values())
    lines = [
        f"adapter    {count:,} parameters for {len(pairs)} matrices, rank {settings['r']}, "
        f"lora_alpha {settings['lora_alpha']:g}, of {', '.join(settings['target_modules'][:8])}",
        f"numbers    from float32 to {kind}",
        f"base       {base}",
    ]
    if not is_model(base) or is_gguf(base):
        lines.append(
            "           transformers needs it as a folder: launch/convert.py "
            f"--from={base} --to=FOLDER, then this with --base=FOLDER"
        )
    lines.append(f"checkpoint of step {run.step}")
    return run, "\n".join(lines)


def convert_file(source: str, target: str, base: str | None, dtype: str = "source") -> str:
    """Write an adapter's file of ours into the new folder ``target`` for PEFT; return a report.

    ``base`` is the model that it was trained on. Raises ValueError on another one, and if PEFT
    cannot hold the adapter.
    """
    if base is None:
        raise ValueError(
            f"{source} does not hold its base; give the model that it was trained on with --base"
        )
    if os.path.exists(target):
        raise ValueError(f"--to={target} exists; name another folder, or remove it")
    found = open_base(base)
    adapter = adapter_file.load_adapter(base, source, base=(run_of_base(found), found))
    folder = Path(f"{os.path.abspath(target)}.partial-{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        kind = "float32" if dtype == "source" else dtype
        named = os.path.abspath(base)
        interchange = found.interchange
        factors = dict(adapter.factors)
        _, settings = write_adapter(folder, interchange, factors, adapter.scale, named, kind)
        os.rename(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return (
        f"{source} -> {target}\nadapter    rank {settings['r']}, lora_alpha "
        f"{settings['lora_alpha']:g}, of {', '.join(settings['target_modules'][:8])}\n"
        f"base       {base}"
    )


def write_adapter(
    folder: Path,
    interchange: Interchange,
    factors: dict[str, np.ndarray],
    scale: float,
    base: str,
    dtype: str = "float32",
) -> tuple[dict[str, Pair], dict]:
    """Write ``factors`` (ours by name, stacked over layers) for PEFT; return the pairs and the
    settings that were written."""
    pairs = pairs_of(interchange, factors)
    settings = settings_of(interchange, pairs, scale, base)
    tensors = {}
    for name, pair in pairs.items():
        module = name.removesuffix(".weight")
        for letter, values in (("A", pair.first), ("B", pair.second)):
            full = f"base_model.model.{module}.lora_{letter}.weight"
            tensors[full] = cast(full, values, dtype)
    write_tensors(folder / TENSORS, tensors)
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    _refuse_other_reading(folder, interchange, pairs)
    return pairs, settings


def _read(workdir: str, which: str) -> tuple[Run, Config, dict[str, np.ndarray]]:
    """Return (the run, its config with low-rank adaptation, the factors by name)."""

    def read(path, config: Config):
        if not lora.used(config):
            raise ValueError(
                f"{workdir} was trained without adapters (optimizer.lora_rank=0); leave "
                "--adapters=keep out to write the whole model"
            )
        shapes = lora.abstract_adapters(config)["blocks"]
        stored = StoredArrays(path)
        return config, {name: stored.read(f"lora.blocks.{name}") for name in shapes}

    run = find_run(workdir, which, read)
    config, factors = run.params
    return run, config, factors


def _family(workdir: str, base: str, model: ModelConfig) -> str:
    """Return the family in whose names transformers has the base."""
    original = original_of(workdir)
    return base_family(base, model) if original is None else base_family(workdir, model)


def pairs_of(interchange: Interchange, factors: dict[str, np.ndarray]) -> dict[str, Pair]:
    """Return the factors of each tensor of theirs that ``factors`` (ours, stacked) change."""
    pairs = {}
    for theirs, (tensor, index, shape) in interchange.table.items():
        names = [_factor_names(ours, factors) for ours in tensor.ours]
        if not any(names):
            continue
        if len(shape) != 2 or len(index) != 1:
            raise ValueError(
                f"optimizer.lora_targets adapts experts ({', '.join(tensor.ours)}), for which PEFT "
                "has no layout; write the merged model with --adapters=merge"
            )
        pair = _pair(interchange, theirs, names, factors)
        # Layers that an imported adapter leaves out have only zeros.
        used = np.any(pair.first != 0, 1) | np.any(pair.second != 0, 0)
        if used.any():
            pairs[theirs] = Pair(
                np.ascontiguousarray(pair.first[used]), np.ascontiguousarray(pair.second[:, used])
            )
    if not pairs:
        raise ValueError("all factors of the run are 0; train it first")
    return pairs


def _factor_names(ours: str, factors: dict) -> tuple[str, str] | None:
    name = ours.rpartition(".")[2]
    if lora.target_of(name) is None:
        return None
    names = lora.factor_names(name)
    return names if names[0] in factors else None


def _pair(interchange: Interchange, theirs: str, names: list, factors: dict) -> Pair:
    tensor, (layer,), _ = interchange.table[theirs]
    firsts: list[np.ndarray] = []
    places: list[int | None] = []  # of each part among them
    for pair in names:
        if pair is None:
            places.append(None)
            continue
        array = np.asarray(factors[pair[0]][layer])
        first = array.reshape(-1, array.shape[-1]).T
        same = [place for place, other in enumerate(firsts) if np.array_equal(first, other)]
        places.append(same[0] if same else len(firsts))
        if not same:
            firsts.append(first)
    rank = firsts[0].shape[0]
    parts = []
    for ours, pair, place in zip(tensor.ours, names, places, strict=True):
        outputs = lora.outputs_of(ours.rpartition(".")[2], interchange.shapes[ours][1:])
        part = np.zeros((rank * len(firsts), *outputs), np.float32)
        if pair is not None and place is not None:
            part[place * rank : (place + 1) * rank] = factors[pair[1]][layer]
        parts.append(part)
    return Pair(np.concatenate(firsts), interchange.joined_factors(theirs, parts))


def settings_of(interchange: Interchange, pairs: dict[str, Pair], scale: float, base: str) -> dict:
    """Return the adapter_config.json of ``pairs``, all with ``scale``."""
    ranks = {name.removesuffix(".weight"): len(pair.first) for name, pair in pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: each for module, each in ranks.items() if each != rank}
    masked = interchange.family.masked
    return {
        "peft_type": "LORA",
        "task_type": None if masked else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _alpha(scale, rank),
        # Keys are patterns of names; a dot in one is any character, which no other name has there.
        "rank_pattern": others,
        "alpha_pattern": {module: _alpha(scale, each) for module, each in others.items()},
        "target_modules": _targets(interchange, list(ranks)),
        "fan_in_fan_out": any(interchange.table[name].tensor.columns for name in pairs),
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _alpha(scale: float, rank: int) -> float:
    alpha = scale * rank
    # PEFT writes whole numbers.
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def _targets(interchange: Interchange, modules: list[str]) -> list[str]:
    """Return the shortest ends of names that match ``modules`` and no other matrix."""
    every = [
        name.removesuffix(".weight")
        for name, entry in interchange.table.items()
        if name.endswith(".weight") and len(entry.shape) == 2
    ]
    for parts in (1, 2):
        ends = sorted({".".join(module.split(".")[-parts:]) for module in modules})
        found = [name for name in every if any(name.endswith(f".{end}") for end in ends)]
        if set(found) == set(modules):
            return ends
    return sorted(modules)


def _refuse_other_reading(folder: Path, interchange: Interchange, pairs: dict) -> None:
    """Check that the settings just written name the same matrices and ranks when read."""
    config = AdapterConfig(folder)
    for name, pair in pairs.items():
        module = name.removesuffix(".weight")
        if config.rank(module) != len(pair.first):
            raise ValueError(
                f"PEFT would read rank {config.rank(module)} for {module}, which has "
                f"{len(pair.first)}; write the merged model with --adapters=merge"
            )
