"""Row 10 of 10 of Narayanan's weak-scaling ladder: 1008 billion parameters.

    python launch/pretrain.py --config=configs/ladder_1008b.py --set=data.path=PREPARED --workdir=RUN

Hardware: 3,072 A100 (80 GB); 163 TFLOP/s each, 52 % of peak, recompute counted.
Source: Narayanan et al. 2021, arXiv 2104.04473, Table 1. It times steps, trains nothing to the end, and gives
no micro-batch and no learning rate.
"""

from mtnlg_jax.config import Config, MeshConfig, ModelConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="ladder_1008b",
        model=ModelConfig(num_layers=128, hidden_size=25600, num_attention_heads=160, vocab_size=51200),
        mesh=MeshConfig(pipe=64, data=6, tensor=8, zero=0),
        train=TrainConfig(steps=20, global_batch_size=3072, micro_batch_size=1, recompute="elementwise"),
    )
