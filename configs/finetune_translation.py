"""Translation from a user's own pairs of sentences, from nothing, on 2 CPU cores: the loss is on
the translation.

The rows are a table of source, tab, target, as Tatoeba's. With the prompts of launch/task.py:

python launch/task.py --task=translate --language=en --input=train.tsv --make_pairs=pairs.jsonl
python launch/prepare_data.py --input=pairs.jsonl --output=DATA --prompt='{prompt}'
--answer='{answer}' python launch/pretrain.py --config=configs/finetune_translation.py
--set=data.path=DATA --workdir=RUN python launch/task.py --workdir=RUN --task=translate
--language=en --eval=test.tsv

A student of half the width that is taught by RUN, on the same DATA:

python launch/pretrain.py --config=configs/finetune_translation.py --set=data.path=DATA
--workdir=STUDENT \\
    --set=model.hidden_size=96 --set='train.stages=[{"name": "taught", "distill": "RUN",
    "distill_temperature": 2.0}]'

Of Tatoeba's 21,116 English-Chinese pairs, 515 sentences held out: BLEU 14.9 (95 %: 13.1 to 16.7)
and chrF 14.5, where copying the source has 0.02 and 0.15; 15 minutes of processor time. Source:
chosen here.
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
