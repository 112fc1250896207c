"""Row 3 of 10 of Narayanan's weak-scaling ladder: 7.5 billion parameters.

    python launch/pretrain.py --config=configs/ladder_7p5b.py --set=data.path=PREPARED --workdir=RUN

Hardware: 128 A100 (80 GB); 142 TFLOP/s each, 46 % of peak, recompute counted.
Source: Narayanan et al. 2021, arXiv 2104.04473, Table 1. It times steps, trains nothing to the end, and gives
no micro-batch and no learning rate.
"""

from mtnlg_jax.config import Config, MeshConfig, ModelConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="ladder_7p5b",
        model=ModelConfig(num_layers=36, hidden_size=4096, num_attention_heads=32, vocab_size=51200),
        mesh=MeshConfig(pipe=1, data=32, tensor=4, zero=0),
        train=TrainConfig(steps=20, global_batch_size=512, micro_batch_size=1, recompute="full"),
    )
