"""Narayanan's weak-scaling ladder: ten models of 1.7 billion to 1 trillion parameters, each on its
own number of GPUs.

    python launch/pretrain.py --config=configs/ladder.py:7.5b --set=data.path=PREPARED --workdir=RUN

The name after the colon is the row: 1.7b, 3.6b, 7.5b, 18.4b, 39.1b, 76.1b, 145.6b, 310.1b, 529.6b
or 1008b.

Hardware: 32 to 3,072 A100 (80 GB). They reached 135 to 163 TFLOP/s each, 43 to 52 % of peak,
counting the recomputed forward pass.
Source: Narayanan et al. 2021, arXiv 2104.04473, Table 1. The paper times steps but does not
train to the end, and does not give a micro-batch or a learning rate.
"""

from mtnlg_jax.config import Config, MeshConfig, ModelConfig, TrainConfig

# fmt: off
ROWS = {
    # row    layers  width  heads  pipe  data  tensor  batch
    "1.7b":   ( 24,   2304,    24,    1,   32,      1,   512),
    "3.6b":   ( 30,   3072,    32,    1,   32,      2,   512),
    "7.5b":   ( 36,   4096,    32,    1,   32,      4,   512),
    "18.4b":  ( 40,   6144,    48,    1,   32,      8,  1024),
    "39.1b":  ( 48,   8192,    64,    2,   32,      8,  1536),
    "76.1b":  ( 60,  10240,    80,    4,   32,      8,  1792),
    "145.6b": ( 80,  12288,    96,    8,   24,      8,  2304),
    "310.1b": ( 96,  16384,   128,   16,   15,      8,  2160),
    "529.6b": (105,  20480,   128,   35,    9,      8,  2520),
    "1008b":  (128,  25600,   160,   64,    6,      8,  3072),
}
# fmt: on


def get_config(row: str) -> Config:
    if row not in ROWS:
        raise ValueError(f"the ladder has no row {row!r}; choose one of {', '.join(ROWS)}")
    layers, width, heads, pipe, data, tensor, batch = ROWS[row]
    return Config(
        name=f"ladder_{row}",
        model=ModelConfig(
            num_layers=layers, hidden_size=width, num_attention_heads=heads, vocab_size=51200
        ),
        mesh=MeshConfig(pipe=pipe, data=data, tensor=tensor, zero=0),
        train=TrainConfig(
            steps=20,
            global_batch_size=batch,
            micro_batch_size=1,
            # A pipeline stage holds few layers, so it can recompute less.
            recompute="elementwise" if pipe > 1 else "full",
        ),
    )
