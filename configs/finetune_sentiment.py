"""Sentiment from a user's own labelled sentences, on 2 CPU cores: the loss is on the label alone.

The rows are a table of text, tab, 0 or 1, as that of SST-2. With the prompts of launch/task.py:

python launch/task.py --task=sentiment --input=train.tsv --labels=0=negative,1=positive
--make_pairs=pairs.jsonl python launch/prepare_data.py --input=pairs.jsonl --output=DATA
--prompt='{prompt}' --answer='{answer}' --heldout=0.05 python launch/pretrain.py
--config=configs/finetune_sentiment.py --set=data.path=DATA --workdir=RUN python launch/task.py
--workdir=RUN --task=sentiment --eval=dev.tsv --labels=0=negative,1=positive

A student of one layer that RUN teaches, on the same DATA:

python launch/pretrain.py --config=configs/finetune_sentiment.py --set=data.path=DATA
--workdir=STUDENT \\
    --set=model.num_layers=1 --set='train.stages=[{"name": "taught", "distill": "RUN",
    "distill_temperature": 2.0,
    "distill_weight": 0.8}]'

Of SST-2's 872 dev rows 77.8 % are right, and 77.4 % by the student, from its 6,920 training rows
alone. The newest checkpoint is kept, not that of the lowest held-out loss: labels grow surer, which
raises the loss, while more of them are right (step 300: 73.7 %). A run of more text is a better
start: prepare with its --tokenizer=BASE/tokenizer, set its model here, give --init=BASE. Source:
chosen here.
"""

from mtnlg_jax.config import Config, ModelConfig, OptimizerConfig, StageConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="finetune_sentiment",
        model=ModelConfig(
            num_layers=2,
            hidden_size=64,
            num_attention_heads=4,
            max_position_embeddings=256,
            position_embedding_type="rotary",
            dropout_rate=0.3,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, min_learning_rate_ratio=0.0, warmup_fraction=0.05, weight_decay=0.3
        ),
        train=TrainConfig(
            steps=900,
            global_batch_size=8,
            compute_dtype="float32",
            label_smoothing=0.1,
            eval_every=50,
            save_every=50,
            keep_best=False,
            stages=(StageConfig("answers"),),
        ),
    )
