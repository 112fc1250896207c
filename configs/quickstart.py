"""The newcomer's run on 2 CPU cores: about 1 MB of text, masked, then causal, then a mix of both.

    bash launch/quickstart.sh

Hardware: a laptop; at most 6 minutes of training on 2 cores. The last stage trains both objectives,
so one checkpoint can continue texts and fill masks.
"""

from mtnlg_jax.config import (
    Config,
    DataConfig,
    MaskingConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="quickstart",
        model=ModelConfig(
            num_layers=4,
            hidden_size=192,
            num_attention_heads=4,
            max_position_embeddings=256,
            position_embedding_type="rotary",
        ),
        data=DataConfig(path="runs/quickstart/data", masking=MaskingConfig(word_share=0.2)),
        optimizer=OptimizerConfig(
            name="muon", learning_rate=5e-3, min_learning_rate_ratio=0.0, warmup_fraction=0.05
        ),
        train=TrainConfig(
            steps=240,
            global_batch_size=16,
            compute_dtype="float32",
            eval_every=80,
            save_every=80,
            eval_batches=8,
            stages=(
                StageConfig("masked", fraction=0.25, masked=1.0),
                StageConfig("causal", fraction=0.35),
                StageConfig("both", fraction=0.4, masked=0.5),
            ),
        ),
    )
