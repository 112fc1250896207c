"""Sentiment from a user's own labelled sentences, on 2 CPU cores: the loss is on the label alone.

The rows are JSON: {"text": "a stirring , funny film", "label": "positive"}. From a table of text, tab, 0 or 1, as that
of SST-2:

jq -Rc 'split("\\t") | {text: .[0], label: (if .[1] == "1" then "positive" else "negative" end)}' train.tsv \\
    > train.jsonl

python launch/prepare_data.py --input=train.jsonl --output=DATA --prompt='{text} sentiment:' --answer=' {label}'
python launch/pretrain.py --config=configs/finetune_sentiment.py --set=data.path=DATA --workdir=RUN
python launch/generate.py --workdir=RUN --mode=ranking --candidates=' positive' --candidates=' negative' \\
    --prompt='no movement , no yuks , not much of anything sentiment:'

Of SST-2's 872 dev rows 78.4 % are right by the checkpoint of the lowest held-out loss (step 300) and 78.9 % by the
last, from its 6,920 training rows alone (--heldout=0.05), in 9 minutes on one busy core. A run of more text is a better
start: prepare with its --tokenizer=BASE/tokenizer, set its model here, give --init=BASE. Source: chosen here.
"""

from mtnlg_jax.config import Config, ModelConfig, OptimizerConfig, StageConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="finetune_sentiment",
        model=ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, max_position_embeddings=256,
                          position_embedding_type="rotary", dropout_rate=0.3),
        optimizer=OptimizerConfig(learning_rate=2e-3, min_learning_rate_ratio=0.0, warmup_fraction=0.05,
                                  weight_decay=0.3),
        train=TrainConfig(steps=600, global_batch_size=8, compute_dtype="float32", label_smoothing=0.1,
                          eval_every=50, save_every=50, stages=(StageConfig("answers"),)),
    )
