"""Row 9 of 10 of Narayanan's weak-scaling ladder: 529.6 billion parameters.

    python launch/pretrain.py --config=configs/ladder_529p6b.py --set=data.path=PREPARED --workdir=RUN

Hardware: 2,520 A100 (80 GB); 163 TFLOP/s each, 52 % of peak, recompute counted.
Source: Narayanan et al. 2021, arXiv 2104.04473, Table 1. It times steps, trains nothing to the end, and gives
no micro-batch and no learning rate.
"""

from mtnlg_jax.config import Config, MeshConfig, ModelConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="ladder_529p6b",
        model=ModelConfig(num_layers=105, hidden_size=20480, num_attention_heads=128, vocab_size=51200),
        mesh=MeshConfig(pipe=35, data=9, tensor=8, zero=0),
        train=TrainConfig(steps=20, global_batch_size=2520, micro_batch_size=1, recompute="elementwise"),
    )
