"""Sentiment from your own labeled sentences, on 2 CPU cores. The loss is on the label alone.

The input is a table of text, tab, 0 or 1, like that of SST-2. launch/task.py makes the prompts:

    python launch/task.py --task=sentiment --input=train.tsv --labels=0=negative,1=positive \\
        --make_pairs=pairs.jsonl
    python launch/prepare_data.py --input=pairs.jsonl --output=DATA --prompt='{prompt}' \\
        --answer='{answer}' --heldout=0.05
    python launch/pretrain.py --config=configs/finetune_sentiment.py --set=data.path=DATA \\
        --workdir=RUN
    python launch/task.py --workdir=RUN --task=sentiment --eval=dev.tsv \\
        --labels=0=negative,1=positive

To distill RUN into a student of one layer, on the same DATA:

    python launch/pretrain.py --config=configs/finetune_sentiment.py --set=data.path=DATA \\
        --workdir=STUDENT --set=model.num_layers=1 --set='train.stages=[{"name": "taught",
        "distill": "RUN", "distill_temperature": 2.0, "distill_weight": 0.8}]'

Result: trained on the 6,920 rows of SST-2 alone, the run labels 77.8 % of the 872 dev rows
correctly, its student 77.4 %. The run keeps the newest checkpoint rather than the one with the
lowest held-out loss: as the labels become more certain the loss rises, yet more of them are correct
(step 300: 73.7 %).

A run trained on more text is a better start: prepare with --tokenizer=BASE/tokenizer, set its model
here, and give --init=BASE.

Source: chosen here.
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
