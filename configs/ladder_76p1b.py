"""Row 6 of 10 of Narayanan's weak-scaling ladder: 76.1 billion parameters.

    python launch/pretrain.py --config=configs/ladder_76p1b.py --set=data.path=PREPARED --workdir=RUN

Hardware: 1,024 A100 (80 GB); 140 TFLOP/s each, 45 % of peak, recompute counted.
Source: Narayanan et al. 2021, arXiv 2104.04473, Table 1. It times steps, trains nothing to the end, and gives
no micro-batch and no learning rate.
"""

from mtnlg_jax.config import Config, MeshConfig, ModelConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="ladder_76p1b",
        model=ModelConfig(num_layers=60, hidden_size=10240, num_attention_heads=80, vocab_size=51200),
        mesh=MeshConfig(pipe=4, data=32, tensor=8, zero=0),
        train=TrainConfig(steps=20, global_batch_size=1792, micro_batch_size=1, recompute="elementwise"),
    )
