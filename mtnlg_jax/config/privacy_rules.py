"""Rules of differential privacy: what would break the guarantee is refused."""

from typing import Any

from mtnlg_jax.config.checks import Rules, check_rules, refuse_changed
from mtnlg_jax.config.schema import Config

_KEYS = (
    "dp_clip_norm",
    "dp_delta",
    "dp_unit",
    "dp_source_rows",
    "dp_accountant",
    "dp_secret",
)

_RULES: Rules = (
    (
        lambda c: c.mesh.expert > 1,
        "mesh.expert={c.mesh.expert} with differential privacy: an expert takes tokens of several "
        "shards of rows at once, so its gradient is not of one unit; set mesh.expert=1 and raise "
        "mesh.data",
    ),
    (
        lambda c: c.model.moe.moe_router_enable_expert_bias,
        "model.moe.moe_router_enable_expert_bias moves with the loads of a whole batch, without "
        "noise, which breaks differential privacy; set it to False and balance experts by "
        "model.moe.moe_aux_loss_coeff, a loss of each row",
    ),
    (
        lambda c: c.train.reduce_dtype != "float32",
        "train.reduce_dtype={c.train.reduce_dtype} rounds clipped gradients before their noise, so "
        "that one unit may change a sum by more than optimizer.dp_clip_norm; set it to float32",
    ),
    (
        lambda c: any(stage.distill for stage in c.train.stages),
        "train.stages with distill: a teacher passes on what it has seen, without noise, which "
        "breaks differential privacy; leave distill out, or start from other weights by --init=RUN",
    ),
    (
        lambda c: c.train.spike_policy != "none",
        "train.spike_policy={c.train.spike_policy} with differential privacy: a step that is left "
        "out for its loss tells of single examples, and one that is done again spends epsilon "
        "again; set it to none",
    ),
    (
        lambda c: c.optimizer.dp_source_rows > 1 and c.optimizer.dp_unit != "source",
        "optimizer.dp_source_rows={c.optimizer.dp_source_rows} is for whole sources, and "
        "optimizer.dp_unit={c.optimizer.dp_unit} protects one row; set optimizer.dp_unit=source",
    ),
    (
        lambda c: c.train.stats_every > 0,
        "train.stats_every={c.train.stats_every} writes norms, activations and noise of single "
        "batches without noise, which breaks differential privacy; set it to 0",
    ),
    (
        lambda c: c.train.global_batch_size < c.optimizer.rows_of_unit,
        "train.global_batch_size={c.train.global_batch_size} is less than the "
        "optimizer.dp_source_rows={c.optimizer.dp_source_rows} of one source; raise it, or lower "
        "these",
    ),
)


def noise_keys(settings: dict[str, Any]) -> set[str]:
    """Return the keys of ``settings``, as config.json has them, that are not for publication: with
    them the noise of differential privacy could be taken away. These are the path of the secret
    and, where there is none, the seed."""
    optimizer = settings.get("optimizer", {})
    target = optimizer.get("dp_target_epsilon") is not None
    private = target or optimizer.get("dp_noise_multiplier", 0) > 0
    seed = {"train.seed"} if private and not optimizer.get("dp_secret") else set()
    return {"optimizer.dp_secret"} | seed


def check_privacy(config: Config) -> None:
    """Raise ValueError if a setting breaks the guarantee, or if one acts only with it and it is
    off."""
    if config.optimizer.private:
        check_rules(_RULES, config)
    else:
        why = (
            "is for differential privacy, and optimizer.dp_noise_multiplier=0 turns it off; set "
            "that to 1, or optimizer.dp_target_epsilon to 8"
        )
        refuse_changed(config.optimizer, _KEYS, why, "optimizer.")
