"""The settings of the optimizer and of its learning rate.

The comment above a field is its description in docs/configuration.md.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from mtnlg_jax.config.ranges import (
    PATH,
    Count,
    CountFrom0,
    NotNegative,
    OptionalCount,
    OptionalCountFrom0,
    OptionalPositive,
    Positive,
    Range,
    Share,
    ShareAbove0,
    ShareBelow1,
)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate (docs/schedules.md). The schedule counts samples, so a
    batch ramp leaves it as it is. The defaults of b1, b2, eps, weight_decay, clip_grad_norm and
    min_learning_rate_ratio are those of GPT-3."""

    # muon: orthogonal updates for the matrices of the blocks, AdamW for all other parameters. soap:
    # AdamW in the eigenbasis of Shampoo's statistics (Vyas 2024) for these matrices. lion: the sign
    # of a mean of gradients (Chen 2023).
    name: Literal["adamw", "muon", "lion", "soap"] = "adamw"
    # Peak of the learning rate.
    learning_rate: Positive = 3e-4
    # Lowest learning rate, as a share of the peak.
    min_learning_rate_ratio: Share = 0.1
    # Curve of the learning rate after the warm-up, as Megatron-LM's --lr-decay-style. wsd: stable,
    # then a decay.
    lr_decay_style: Literal["cosine", "linear", "inverse_square_root", "constant", "wsd"] = "cosine"
    # Share of the run's samples over which the learning rate rises.
    warmup_fraction: ShareBelow1 = 0.01
    # In place of warmup_fraction: samples over which the learning rate rises. None: by
    # warmup_fraction.
    warmup_samples: OptionalCountFrom0 = None
    # Share of the run's samples at which the curve reaches its lowest value. Above 1 the run ends
    # before the curve does.
    decay_fraction: Positive = 1.0
    # In place of decay_fraction: samples at which the curve reaches its lowest value, whatever the
    # length of the run. None: by decay_fraction.
    decay_samples: OptionalCount = None
    # Curve of the decay of wsd, as Megatron-LM's --lr-wsd-decay-style.
    wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    # Share of the run's samples, or of each cycle's, that is the decay of wsd.
    wsd_decay_fraction: ShareAbove0 = 0.1
    # Equal parts of the curve. Each begins at the peak and ends at the lowest value (warm restarts,
    # Loshchilov 2017).
    lr_cycles: Count = 1
    # Decay of AdamW's first moment; of lion, the weight of the past in the sign.
    b1: ShareBelow1 = 0.9
    # Decay of AdamW's second moment, and of soap's statistics; of lion, of its mean of gradients.
    b2: ShareBelow1 = 0.95
    # Momentum of muon.
    muon_momentum: ShareBelow1 = 0.95
    # Type in which moments of matrices and tables are held between steps; they are computed in
    # float32. bfloat16 and int8 are rounded stochastically; docs/memory.md has the measured loss.
    moments_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    # Steps from one turn of soap's bases to the next.
    precondition_frequency: Count = 10
    # Longest side of a matrix for which soap keeps a basis; longer ones are not turned.
    max_precond_dim: Count = 10_000
    # Added to the denominator of AdamW.
    eps: ShareAbove0 = 1e-8
    # Decoupled weight decay of matrices and embeddings. Norms and biases have none.
    weight_decay: NotNegative = 0.1
    # Largest norm of the gradients; larger ones are scaled down. 0: off.
    clip_grad_norm: NotNegative = 1.0
    # Largest norm of the update of all parameters together, before weight decay and learning rate;
    # larger ones are scaled down. 0: off.
    clip_update_norm: NotNegative = 0.0
    # Rank of low-rank adaptation (Hu 2021). Above 0 the model's parameters are frozen and
    # lora_targets train a product of two factors of this rank. 0: off.
    lora_rank: CountFrom0 = 0
    # The product is scaled by lora_alpha / lora_rank.
    lora_alpha: Positive = 16.0
    # Matrices to adapt: q, k, v, o of attention; in, gate, out of the MLP. The default is that of
    # Hu 2021.
    lora_targets: tuple[str, ...] = ("q", "v")
    # Type in which the frozen matrices of the blocks are held (QLoRA, Dettmers 2023): float32, int8
    # with one scale for each output, or 4-bit NF4 with one for each 64 inputs.
    lora_base: Literal["float", "int8", "nf4"] = "float"
    # Differential privacy (DP-SGD, Abadi 2016; docs/privacy.md): standard deviation of the noise on
    # the sum of a step's clipped gradients, as a multiple of dp_clip_norm. 0: off.
    dp_noise_multiplier: NotNegative = 0.0
    # In place of dp_noise_multiplier: the epsilon at the end of the run, for which the noise is
    # found before training. None: off.
    dp_target_epsilon: OptionalPositive = None
    # Largest norm of the gradient of one unit; larger ones are scaled down.
    dp_clip_norm: Positive = 1.0
    # Delta of the guarantee, below 1 / units. None: 1 / units^1.1.
    dp_delta: Annotated[float | None, Range(0, 1, low_open=True, high_open=True)] = None
    # Unit that the guarantee protects. example: one row of the batch. source: all rows of one
    # source of the data, such as the texts of one person.
    dp_unit: Literal["example", "source"] = "example"
    # Most rows that a source gives to a step; only with dp_unit=source.
    dp_source_rows: Count = 1
    # How epsilon is computed: pld: from the distribution of the privacy loss (Koskela 2020), the
    # tightest. rdp: from Renyi divergences (Mironov 2017), faster and 10 to 40 % higher.
    dp_accountant: Literal["pld", "rdp"] = "pld"
    # File with secret random bytes, from which noise and samples are drawn. Empty: from train.seed,
    # with which whoever knows it can take the noise away again.
    dp_secret: str = field(default="", metadata=PATH)

    @property
    def private(self) -> bool:
        """Whether training is differentially private."""
        return self.dp_noise_multiplier > 0 or self.dp_target_epsilon is not None

    @property
    def rows_of_unit(self) -> int:
        """The rows of a batch that a unit of differential privacy takes."""
        return self.dp_source_rows if self.dp_unit == "source" else 1
