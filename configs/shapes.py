"""A captioner of pictures of shapes, on 2 CPU cores: docs/images.md.

    python launch/prepare_data.py --input=SHAPES/pairs.jsonl --output=DATA --image=image \\
        --image_size=24 --answer='{caption}' --vocab_size=400
    python launch/pretrain.py --config=configs/shapes.py --set=data.path=DATA --workdir=RUN
    python launch/generate.py --workdir=RUN --image=PICTURE.png

SHAPES/pairs.jsonl is what mtnlg_jax.data.prefix.shapes.write makes.

Result: captions of combinations that training never saw are exact in 99.7 % of 324 pictures.

Source: chosen here.
"""

from mtnlg_jax.config import (
    Config,
    DecodeConfig,
    ModelConfig,
    OptimizerConfig,
    PrefixConfig,
    StageConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="shapes",
        model=ModelConfig(
            num_layers=2,
            hidden_size=64,
            num_attention_heads=4,
            max_position_embeddings=20,
            prefix=PrefixConfig(width=64, image_size=24, patch_size=8),
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup_fraction=0.05, min_learning_rate_ratio=0.0
        ),
        train=TrainConfig(
            steps=700,
            global_batch_size=64,
            compute_dtype="float32",
            eval_every=350,
            eval_batches=8,
            save_every=350,
            stages=(StageConfig("captions"),),
        ),
        decode=DecodeConfig(max_new_tokens=10),
    )
