"""Megatron-Turing NLG: 529.6 billion parameters, 270 billion tokens.

    python launch/pretrain.py --config=configs/mtnlg_530b.py --set=data.path=OUT --workdir=RUN
    python launch/pretrain.py --config=configs/mtnlg_530b.py --workdir=RUN

OUT is the output of configs/data/mtnlg.py, which holds the weights of its sources. Without
data.path the run reads the fifteen sources from data/Books3, data/OpenWebText2, ...
(mtnlg_jax/data/mtnlg_blend.py). launch/prepare_data.py must prepare each with the same --tokenizer.

Hardware: 280 DGX A100 of the paper (2,240 GPUs of 80 GB): tensor 8 x pipe 35 x data 8, 60.1 s a
step at full batch.
Source: Smith et al. 2022, arXiv 2201.11990; the shape is Narayanan et al. 2021, Table 1. Figures
marked [M] are from memory, not from the paper; most agree with the scripts that the same team
published.
"""

from mtnlg_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from mtnlg_jax.data.mtnlg_blend import WEIGHTS

SEQUENCE = 2048
SAMPLES = 270_000_000_000 // SEQUENCE  # of a corpus of 339 billion tokens
WARMUP_SAMPLES = 1_000_000_000 // SEQUENCE
DECAY_SAMPLES = 340_000_000_000 // SEQUENCE
BATCH = 1920
RAMP_START = 32
RAMP_STEP = 32
RAMP_SAMPLES = 12_000_000_000 // SEQUENCE

BLEND = tuple((f"data/{name}", weight) for name, weight in WEIGHTS.items())


def steps_for(samples: int) -> int:
    """Return the steps that consume ``samples`` sequences: 80,087 for SAMPLES, of which the ramp
    with its small batches takes 14,475."""
    steps = done = 0
    while done < samples:
        grown = (BATCH - RAMP_START) // RAMP_STEP * done // RAMP_SAMPLES
        done += min(BATCH, RAMP_START + RAMP_STEP * grown)
        steps += 1
    return steps


def get_config() -> Config:
    return Config(
        name="mtnlg_530b",
        model=ModelConfig(
            num_layers=105,
            hidden_size=20480,
            num_attention_heads=128,
            vocab_size=51200,  # GPT-2's 50,257 padded to a multiple of 128 x tensor 8
            max_position_embeddings=SEQUENCE,
            position_embedding_type="learned",  # [M], as are pre-LayerNorm and the next line
            tie_embeddings=True,
            init_method_std=0.004,  # about sqrt(1 / (3 x hidden_size))
        ),
        # Each replica kept its whole optimizer state. 1F1B [M] handles the growing batch.
        mesh=MeshConfig(pipe=35, data=8, tensor=8, zero=0, schedule="1f1b"),
        data=DataConfig(blend=BLEND),
        optimizer=OptimizerConfig(
            learning_rate=5e-5,  # [M]
            min_learning_rate_ratio=0.1,  # [M]
            warmup_fraction=WARMUP_SAMPLES / SAMPLES,
            decay_fraction=DECAY_SAMPLES / SAMPLES,  # the run ends before the cosine does
            b1=0.9,  # [M], as are the next two and the clipping
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_grad_norm=1.0,
        ),
        train=TrainConfig(
            steps=steps_for(SAMPLES),
            global_batch_size=BATCH,
            micro_batch_size=1,
            rampup_batch_size=(RAMP_START, RAMP_STEP, RAMP_SAMPLES),
            compute_dtype="bfloat16",
            # A pipeline recomputes its stages as well: together the paper's full recompute.
            recompute="elementwise",
        ),
    )
