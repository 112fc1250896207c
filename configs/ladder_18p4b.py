"""Row 4 of 10 of Narayanan's weak-scaling ladder: 18.4 billion parameters.

    python launch/pretrain.py --config=configs/ladder_18p4b.py --set=data.path=PREPARED --workdir=RUN

Hardware: 256 A100 (80 GB); 135 TFLOP/s each, 43 % of peak, recompute counted.
Source: Narayanan et al. 2021, arXiv 2104.04473, Table 1. It times steps, trains nothing to the end, and gives
no micro-batch and no learning rate.
"""

from mtnlg_jax.config import Config, MeshConfig, ModelConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="ladder_18p4b",
        model=ModelConfig(num_layers=40, hidden_size=6144, num_attention_heads=48, vocab_size=51200),
        mesh=MeshConfig(pipe=1, data=32, tensor=8, zero=0),
        train=TrainConfig(steps=20, global_batch_size=1024, micro_batch_size=1, recompute="full"),
    )
