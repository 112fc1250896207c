"""The smallest run that uses every part of the code, for tests and for trying a change.

    python launch/pretrain.py --config=configs/tiny.py --set=data.path=PREPARED --workdir=RUN

Hardware: one CPU core, a few seconds. PREPARED is a folder that launch/prepare_data.py wrote.
Source: chosen for speed; it learns little.
"""

from mtnlg_jax.config import Config, DecodeConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="tiny",
        model=ModelConfig(
            num_layers=2, hidden_size=64, num_attention_heads=4, max_position_embeddings=64
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.1),
        train=TrainConfig(
            steps=20,
            global_batch_size=8,
            compute_dtype="float32",  # bfloat16 is emulated on most CPUs
            eval_every=10,
            eval_batches=2,
            save_every=10,
        ),
        decode=DecodeConfig(max_new_tokens=16),
    )
