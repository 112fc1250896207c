"""A few million parameters on a few megabytes of one kind of text: novels, on 2 CPU cores.

python launch/prepare_data.py --input=FOLDER --output=OUT --vocab_size=8000
python launch/pretrain.py --config=configs/small.py --set=data.path=OUT --workdir=RUN

Hardware: 2 cores of a laptop. Source: chosen here. Bits per byte after these 1400 steps, and xz -9e's:

| trained on | scored | bits per byte | xz |
| --- | --- | --- | --- |
| seven English novels, 4.5 MB | The War of the Worlds, unseen | 1.870 | 2.65 |
| Water Margin, in Chinese, 2.5 MB | its held-out end | 2.110 | 2.50, of all of it |
| Water Margin | Journey to the West, unseen, in an edition without commas | 2.946 | 2.80 |

The last line is not won: the two editions are punctuated in different ways, and 600,000 tokens are few: the model
knows them nearly by heart (loss 4.4 there, 5.6 on the held-out end). With a context of 512 and dropout 0.3 the
first 200 kB of Journey to the West go from 3.079 to 3.044.
"""

from mtnlg_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="small",
        model=ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=4, max_position_embeddings=256,
                          position_embedding_type="rotary", dropout_rate=0.1),
        optimizer=OptimizerConfig(name="muon", learning_rate=4e-3, min_learning_rate_ratio=0.0,
                                  warmup_fraction=0.03),
        train=TrainConfig(steps=1400, global_batch_size=8, compute_dtype="float32", eval_every=200, save_every=200),
    )
