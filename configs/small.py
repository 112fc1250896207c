"""A few million parameters on a few megabytes of one kind of text: novels in 20 to 30 minutes on 2 CPU cores.

python launch/prepare_data.py --input=FOLDER --output=OUT --vocab_size=8000
python launch/pretrain.py --config=configs/small.py --set=data.path=OUT --workdir=RUN

Hardware: 2 cores of a laptop. Source: chosen here, on English and on Chinese novels.
"""

from mtnlg_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="small",
        model=ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=4, max_position_embeddings=256,
                          position_embedding_type="rotary", dropout_rate=0.1),
        optimizer=OptimizerConfig(name="muon", learning_rate=4e-3, min_learning_rate_ratio=0.0,
                                  warmup_fraction=0.03),
        train=TrainConfig(steps=1400, global_batch_size=8, compute_dtype="float32", eval_every=200, save_every=200),
    )
