"""Translation from your own pairs of sentences, from random parameters, on 2 CPU cores. The
loss is on the translation alone.

The input is a table of source, tab, target, like Tatoeba's. launch/task.py makes the prompts:

    python launch/task.py --task=translate --language=en --input=train.tsv \\
        --make_pairs=pairs.jsonl
    python launch/prepare_data.py --input=pairs.jsonl --output=DATA --prompt='{prompt}' \\
        --answer='{answer}'
    python launch/pretrain.py --config=configs/finetune_translation.py --set=data.path=DATA \\
        --workdir=RUN
    python launch/task.py --workdir=RUN --task=translate --language=en --eval=test.tsv

To distill RUN into a student of half the width, on the same DATA:

    python launch/pretrain.py --config=configs/finetune_translation.py --set=data.path=DATA \\
        --workdir=STUDENT --set=model.hidden_size=96 --set='train.stages=[{"name": "taught",
        "distill": "RUN", "distill_temperature": 2.0}]'

Result: on 515 held-out sentences of Tatoeba's 21,116 English-Chinese pairs, BLEU 14.9 (95 %
interval 13.1 to 16.7) and chrF 14.5, after 15 minutes of processor time. Copying the source scores
0.02 and 0.15.

Source: chosen here.
"""

from mtnlg_jax.config import (
    Config,
    DecodeConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="finetune_translation",
        model=ModelConfig(
            num_layers=3,
            hidden_size=192,
            num_attention_heads=4,
            max_position_embeddings=256,
            position_embedding_type="rotary",
            dropout_rate=0.2,
        ),
        optimizer=OptimizerConfig(
            name="muon", learning_rate=4e-3, min_learning_rate_ratio=0.0, warmup_fraction=0.05
        ),
        train=TrainConfig(
            steps=1000,
            global_batch_size=8,
            compute_dtype="float32",
            label_smoothing=0.1,
            eval_every=100,
            save_every=100,
            stages=(StageConfig("translations"),),
        ),
        decode=DecodeConfig(max_new_tokens=64),
    )
