"""Train a low-rank adapter on somebody's texts: a short run of the training loop on a frozen model.

The run and its data lie in a folder beside the adapter while it is trained, so that the same call
resumes after an interruption. The caller removes the folder once the adapter is written.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtnlg_jax import compat, foreign, storage
from mtnlg_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    override,
    validate,
)
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.data.store.prepared import PREPARED
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.store.tokens import Tokens
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.train import lora, privacy
from mtnlg_jax.train.adapter_file import Adapter, adapter_config, identity_of, open_base
from mtnlg_jax.train.arrays import StoredArrays
from mtnlg_jax.train.checkpoint import find_run
from mtnlg_jax.train.loop import train

# Longer contexts are cut: a person's texts are few, and attention over them is not what changes.
LONGEST = 512
BATCH = 8
EPOCHS = 6
LEAST_STEPS = 20
MOST_STEPS = 600
EVALUATIONS = 12
# Evaluations in a row without a lower held-out loss, after which training ends.
PATIENCE = 3


@dataclasses.dataclass(frozen=True)
class AdaptSettings:
    """How an adapter is trained."""

    rank: int = 8
    learning_rate: float = 2e-3
    steps: int | None = None  # None: by the size of the texts
    targets: tuple[str, ...] = ()  # (): all matrices, or attention alone in a model with experts
    heldout: float = 0.1  # share of the texts that is not trained on
    seed: int = 0
    overrides: tuple[str, ...] = ()  # further settings of the run: "section.key=value"


@dataclasses.dataclass(frozen=True)
class Texts:
    """Where a person's texts are, and how they are read; see `data.prepare.prepare`."""

    path: str
    text_key: str = "text"
    on_error: str = "raise"
    encoding: str = ""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A new adapter, and the held-out part of the texts that it was trained on."""

    adapter: Adapter
    held_out: Tokens
    tokenizer: Tokenizer


def train_adapter(
    workdir: str,
    texts: Texts,
    folder: str,
    settings: AdaptSettings | None = None,
    *,
    progress: bool = True,
    announce: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Train an adapter of the model at ``workdir``, which is read and not changed.

    ``folder`` holds the data and the run; if a call with the same arguments was interrupted, it is
    resumed from there, and what another call left is removed. The adapter is that of the
    evaluation with the lowest held-out loss.

    Raises ValueError on bad texts or settings, before any training, and what `train.loop.train`
    raises.
    """
    settings = settings or AdaptSettings()
    base = open_base(workdir)
    identity = identity_of(*base)
    config = lora.without(base[0].config)
    _refuse_masked(config, workdir)
    _keep_matching(folder, [workdir, identity, dataclasses.asdict(settings), _state_of(texts)])
    data = os.path.join(folder, "data")
    try:
        if not storage.exists(data, PREPARED):
            _prepare(workdir, texts, data, settings.heldout, progress)
        parts = ("train", "heldout")
        training, held_out = (open_tokens(storage.join(data, part)) for part in parts)
        run_config = config_of(config, workdir, data, training, settings)
        _check_size(texts, training, held_out, run_config)
    except (ValueError, FileNotFoundError):
        # A person's texts do not stay where they cannot be trained on.
        shutil.rmtree(folder, ignore_errors=True)
        raise
    run = os.path.join(folder, "run")
    summary = train(run_config, run, progress, announce, out_of_patience)
    adapter, step = _adapter_of(run, identity)
    trained = {
        "documents": training.documents,
        "bytes": training.predicted[1],
        "tokens": training.predicted[0],
        "steps": run_config.train.steps,
        "best_step": step,
        "seconds": round(summary.seconds, 1),
        **_spent(run),
    }
    adapter = dataclasses.replace(adapter, trained=trained)
    return Trained(adapter, held_out, base[0].tokenizer)


def _prepare(workdir: str, texts: Texts, data: str, heldout: float, progress: bool) -> None:
    """Write the tokens of ``texts``, by the tokenizer of the model, into the folder ``data``."""
    tokenizer = workdir
    if foreign.reader_of(workdir) is None:
        tokenizer = storage.join(workdir, "tokenizer")
    prepare(
        texts.path,
        data,
        tokenizer=tokenizer,
        heldout=heldout,
        text_key=texts.text_key,
        on_error=texts.on_error,
        encoding=texts.encoding,
        overwrite=True,
        progress=progress,
    )


def out_of_patience(evaluations: Sequence[Mapping[str, Any]], most: int = PATIENCE) -> bool:
    """Return whether the held-out loss has not fallen for the last ``most`` evaluations."""
    # A loss that is not finite is None in the records of an earlier start.
    found = [each.get("causal_loss") for each in evaluations]
    losses = [math.inf if loss is None or math.isnan(loss) else loss for loss in found]
    best = min(losses, default=math.inf)
    return bool(losses) and len(losses) - 1 - losses.index(best) >= most


def config_of(
    base: Config, workdir: str, data: str, training: Tokens, settings: AdaptSettings
) -> Config:
    """Return the config of the run that trains an adapter.

    A step has BATCH rows. Without ``settings.steps`` the run reads the texts EPOCHS times, in
    LEAST_STEPS to MOST_STEPS steps.
    """
    length = min(base.model.max_position_embeddings, LONGEST)
    steps = settings.steps
    if steps is None:
        wanted = math.ceil(EPOCHS * len(training) / (BATCH * length))
        steps = min(max(LEAST_STEPS, wanted), MOST_STEPS)
    every = max(1, steps // EVALUATIONS)
    # A CPU has no fast products in bfloat16.
    dtype = "float32" if compat.device_kind() == "cpu" else base.train.compute_dtype
    config = Config(
        name="adapter",
        model=base.model,
        mesh=MeshConfig(),
        data=DataConfig(path=data, sequence_length=length),
        optimizer=OptimizerConfig(
            learning_rate=settings.learning_rate,
            min_learning_rate_ratio=0.0,
            warmup_fraction=0.05,
            weight_decay=0.0,
            lora_rank=settings.rank,
            lora_alpha=2.0 * settings.rank,
            lora_targets=settings.targets or _targets_of(base.model),
        ),
        train=TrainConfig(
            steps=steps,
            global_batch_size=BATCH,
            init=os.path.abspath(workdir) if not storage.is_remote(workdir) else workdir,
            seed=settings.seed,
            compute_dtype=dtype,
            eval_every=every,
            save_every=every,
            keep_last=1,
        ),
    )
    config = override(config, *settings.overrides)
    validate(config)
    return config


def _targets_of(model: ModelConfig) -> tuple[str, ...]:
    attention = ("q", "k", "v", "o")
    if model.moe.num_moe_experts:
        return attention
    return (*attention, "in", *(("gate",) if model.gated else ()), "out")


def _refuse_masked(config: Config, workdir: str) -> None:
    if all(stage.masked == 1 for stage in config.train.stages):
        raise ValueError(
            f"{workdir} was trained to fill masks alone, and an adapter learns to continue texts; "
            "give a model with a causal stage"
        )


def _check_size(texts: Texts, training: Tokens, held_out: Tokens, config: Config) -> None:
    """Raise ValueError if there is not enough text to train on, or none to measure on."""
    least = config.sequence_length + 1
    if len(training) < least:
        raise ValueError(
            f"{texts.path} has {len(training):,} tokens to train on, and one row has {least:,}; "
            f"give more texts, or --set=data.sequence_length={max(1, len(training) // 2)}"
        )
    if not held_out.predicted[0]:
        raise ValueError(
            f"nothing of {texts.path} is held out, so nothing tells when to stop; give more "
            "texts, or a larger --heldout"
        )


def _adapter_of(run: str, identity: dict[str, Any]) -> tuple[Adapter, int]:
    """Return the best adapter of a run that has trained one, and its step."""

    def read(path, config: Config) -> Adapter:
        optimizer = config.optimizer
        given = adapter_config(
            config.model, optimizer.lora_rank, optimizer.lora_alpha, optimizer.lora_targets
        )
        stored = StoredArrays(path)
        names = lora.abstract_adapters(given)["blocks"]
        factors = {name: stored.read(f"lora.blocks.{name}") for name in names}
        return Adapter(given, factors, identity, {})

    found = find_run(run, "best", read)
    return found.params, found.step


def _spent(run: str) -> dict[str, Any]:
    """Return what a differentially private run has spent, which outlasts its folder."""
    content = storage.read_file(run, privacy.FILE)
    if content is None:
        return {}
    report = json.loads(content)
    return {f"privacy_{key}": report[key] for key in ("epsilon", "delta", "unit", "units")}


def _keep_matching(folder: str, content: list) -> None:
    """Empty ``folder`` unless it is of a call with the same ``content``."""
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest().encode()
    if storage.read_file(folder, "key") != key:
        shutil.rmtree(folder, ignore_errors=True)
        storage.write_file(folder, "key", key)


def _state_of(texts: Texts) -> list:
    """Return what changes when the texts do: names, sizes and times of files."""
    path = Path(texts.path)
    files: Sequence[Path] = [path]
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
    found = [each.stat() for each in files if each.exists()]
    states = [(each.st_size, each.st_mtime_ns) for each in found]
    return [dataclasses.asdict(texts), [str(each) for each in files], states]
