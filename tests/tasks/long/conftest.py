"""Provide a tiny random model with 256 positions, and texts of any number of words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.data.tokenizer import train_tokenizer
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.tasks.long.citing import CITE
from mtnlg_jax.tasks.long.summary_prompts import summary_task
from mtnlg_jax.tasks.templates import TASKS

ENGLISH = "the whale swam north captain slept cabin cook afraid price service good bad sea".split()
CHINESE = "鲸鱼向北游去船长睡觉厨师害怕价格服务好坏大海"


def _text_of(language: str, words: int, seed: int = 0) -> str:
    """Return paragraphs of 1 to 6 sentences with ``words`` words or Chinese characters in all."""
    rng = np.random.default_rng(seed)
    paragraphs = []
    left = words
    while left > 0:
        sentences = []
        for _ in range(rng.integers(1, 7)):
            length = min(int(rng.integers(5, 16)), left)
            if length < 1:
                break
            left -= length
            chosen = rng.choice(ENGLISH if language == "en" else list(CHINESE), length)
            if language == "en":
                sentences.append(" ".join(chosen).capitalize() + ".")
            else:
                sentences.append("".join(chosen) + "。")
        paragraphs.append((" " if language == "en" else "").join(sentences))
    return "\n\n".join(paragraphs)


@pytest.fixture(scope="session")
def text_of():
    return _text_of


@pytest.fixture(scope="session")
def random_model():
    """Return (decoder, tokenizer) of a model with random weights and 256 positions."""
    texts = [_text_of("en", 400), _text_of("zh", 400)]
    tasks = [*TASKS.values(), CITE]
    for kind in ("news", "abstract", "product"):
        tasks += [summary_task(TASKS["summarise"], kind, 20, each) for each in ("en", "zh")]
    for task in tasks:
        for template in task.templates.values():
            texts.append(template.instruction + template.prompt + template.passage)
            texts.append("".join(word for _, word in template.labels))
    tokenizer = train_tokenizer([f"{text}\n" for text in texts] * 4, 700)
    config = ModelConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=256,
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), abstract_model(config)[1]
    )
    return unstack(config, params), tokenizer
