"""Translation from a user's own pairs of sentences, from nothing, on 2 CPU cores: the loss is on the translation.

The rows are JSON: {"source": "He ran.", "target": "他跑了。"}. From a table of source, tab, target, as of Tatoeba's:

jq -Rc 'split("\\t") | {source: .[0], target: .[1]}' cmn.txt > pairs.jsonl

python launch/prepare_data.py --input=pairs.jsonl --output=DATA --prompt='{source}\\nChinese:' --answer=' {target}'
python launch/pretrain.py --config=configs/finetune_translation.py --set=data.path=DATA --workdir=RUN
python launch/generate.py --workdir=RUN --num_beams=4 --prompt=$'He ran.\\nChinese:'

A student of half the width that is taught by RUN, on the same DATA:

python launch/pretrain.py --config=configs/finetune_translation.py --set=data.path=DATA --workdir=STUDENT \\
    --set=model.hidden_size=96 --set='train.stages=[{"name": "taught", "distill": "RUN", "distill_temperature": 2.0}]'

Source: chosen here, for 20,000 pairs of short sentences; how well it translates has not been measured.
"""

from mtnlg_jax.config import Config, DecodeConfig, ModelConfig, OptimizerConfig, StageConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="finetune_translation",
        model=ModelConfig(num_layers=3, hidden_size=192, num_attention_heads=4, max_position_embeddings=256,
                          position_embedding_type="rotary", dropout_rate=0.2),
        optimizer=OptimizerConfig(name="muon", learning_rate=4e-3, min_learning_rate_ratio=0.0, warmup_fraction=0.05),
        train=TrainConfig(steps=1000, global_batch_size=8, compute_dtype="float32", label_smoothing=0.1,
                          eval_every=100, save_every=100, stages=(StageConfig("translations"),)),
        decode=DecodeConfig(max_new_tokens=64),
    )
