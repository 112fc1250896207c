"""The shape of Mixtral 8x7B: 46.7 billion parameters, of which a token uses 12.9 billion.

    python launch/plan.py --config=configs/mixtral_8x7b.py --chips=v5p:128
    python launch/pretrain.py --config=configs/mixtral_8x7b.py --set=data.path=OUT --workdir=RUN

OUT is the output of launch/prepare_data.py. mesh.expert=8 puts one expert of each layer on a
device. Planner and compiler agree that a step fits (docs/compile_ahead.md).

Hardware: 128 TPU v5p, or any mesh that launch/plan.py finds; not yet timed.
Source: Jiang et al. 2024, arXiv 2401.04088, Table 1. The paper does not say how the model was
trained: optimizer, batch and the weights of the router's losses are chosen here.
"""

from mtnlg_jax.config import (
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="mixtral_8x7b",
        model=ModelConfig(
            num_layers=32,
            hidden_size=4096,
            num_attention_heads=32,
            num_query_groups=8,
            ffn_hidden_size=14336,
            vocab_size=32000,
            max_position_embeddings=4096,  # of the 32,768 of the paper
            position_embedding_type="rotary",
            rotary_base=1e6,
            normalization="rmsnorm",
            activation="swiglu",
            add_bias=False,
            tie_embeddings=False,
            # 8 experts, of which a token visits 2.
            moe=MoEConfig(8, 2, moe_aux_loss_coeff=0.01, moe_z_loss_coeff=1e-3),
        ),
        mesh=MeshConfig(data=16, expert=8, zero=3),
        optimizer=OptimizerConfig(learning_rate=2e-4),
        train=TrainConfig(
            steps=100_000,
            global_batch_size=1024,
            micro_batch_size=2,
            recompute="elementwise",
        ),
    )
