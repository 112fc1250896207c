"""Summaries by low-rank adaptation of a run of configs/small.py, on 2 CPU cores. It trains 32,768
numbers, the factors A and B.

The input is JSON: {"source": "... or a list of sentences", "target": "..."}. Rows of SciTLDR have
several targets; this takes the first:
jq -c '{source: .source, target: .target[0]}' train.jsonl > pairs.jsonl

    python launch/prepare_data.py --input=pairs.jsonl --output=DATA --tokenizer=BASE/tokenizer \\
        --prompt='{source}\\nSummary:' --answer=' {target}'
    python launch/pretrain.py --config=configs/finetune_summary.py --init=BASE \\
        --set=data.path=DATA --workdir=RUN
    python launch/generate.py --workdir=RUN --num_beams=4 \\
        --prompt="$(cat abstract.txt)"$'\\nSummary:'

BASE is the folder of the run to start from. RUN is used like any other run: its factors are merged
into the weights when it is loaded. --set=optimizer.lora_rank=0 trains all parameters. If a text and
its summary exceed 512 tokens, the beginning of the text is left out.

Source: Hu 2021 for the adapted matrices. The quality of the summaries has not been measured.
"""

from mtnlg_jax.config import (
    Config,
    DecodeConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)

_BASE = "BASE"  # replaced by --init


def get_config() -> Config:
    return Config(
        name="finetune_summary",
        model=ModelConfig(
            num_layers=4,
            hidden_size=256,
            num_attention_heads=4,
            max_position_embeddings=512,
            position_embedding_type="rotary",
            dropout_rate=0.1,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            min_learning_rate_ratio=0.0,
            warmup_fraction=0.05,
            weight_decay=0.0,
            lora_rank=8,
            lora_alpha=16.0,
        ),
        train=TrainConfig(
            steps=300,
            global_batch_size=4,
            compute_dtype="float32",
            eval_every=50,
            save_every=50,
            stages=(StageConfig("summaries"),),
            init=_BASE,
        ),
        decode=DecodeConfig(max_new_tokens=64),
    )
