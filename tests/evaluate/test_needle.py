"""Pass keys: a model made by hand that copies what followed recalls them, a random one does not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.data.tokenizer import train_tokenizer
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.decode.results import encode_prompt
from mtnlg_jax.evaluate.needle import WORDINGS, measure_needles, needle_prompt
from mtnlg_jax.model.transformer import abstract_model

POSITIONS = 192
CODE = 96  # width of a token's code
BACK = 3  # tokens that must match before the one that is copied


@pytest.fixture(scope="module")
def tokenizer():
    texts = [
        text
        for wording in WORDINGS.values()
        for text in (wording.task, *wording.filler, wording.key, wording.question)
    ]
    return train_tokenizer(texts * 8, 420)


def _config(vocabulary: int) -> ModelConfig:
    return ModelConfig(
        num_layers=2,
        hidden_size=(BACK + 2) * CODE + POSITIONS,
        num_attention_heads=BACK,
        kv_channels=BACK * CODE,
        vocab_size=vocabulary,
        max_position_embeddings=POSITIONS,
        normalization="rmsnorm",
        tie_embeddings=False,
        add_bias=False,
    )


@pytest.fixture(scope="module")
def inductive(tokenizer):
    """Return a decoder that copies the token which followed the last three tokens before.

    Parts of the width: the code of the token, those of the three tokens before it, the code of the
    token to write, the position. Head h of layer 1 reads the token h + 1 positions back; head 0 of
    layer 2 looks for the position whose three tokens before are the newest three.
    """
    config = _config(tokenizer.vocab_size)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract_model(config)[1])
    codes_VC = np.random.default_rng(0).normal(0, CODE**-0.5, (tokenizer.vocab_size, CODE))
    part = [slice(CODE * number, CODE * (number + 1)) for number in range(BACK + 2)]
    place = slice(CODE * (BACK + 2), None)
    arrays = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def array(name):
        return next(leaf for key, leaf in arrays.items() if name in key)

    for name, leaf in arrays.items():
        if "scale" in name:
            leaf[:] = 1
    array("tokens_VD")[:, part[0]] = codes_VC
    array("positions_PD")[:, place] = np.eye(POSITIONS)
    array("head_VD")[:, part[BACK + 1]] = 4 * codes_VC
    q, k, v, o = (array(f"w_{name}_") for name in ("q", "k", "v", "o"))
    unit = np.eye(CODE)
    for head in range(BACK):
        # A query at i points at i - head - 1.
        q[0, place, head, :POSITIONS] = 20 * np.eye(POSITIONS, k=-head - 1)
        k[0, place, head, :POSITIONS] = np.eye(POSITIONS)
        v[0, part[0], head, :CODE] = unit
        # The norm before attention multiplied the code by about (width / 2)^0.5.
        o[0, head, :CODE, part[head + 1]] = unit / (config.hidden_size / 2) ** 0.5
        # A nearer token counts more, where as many match.
        q[1, part[head], 0, CODE * head : CODE * (head + 1)] = (30 - 5 * head) * unit
        k[1, part[head + 1], 0, CODE * head : CODE * (head + 1)] = unit
    v[1, part[0], 0, :CODE] = unit
    o[1, 0, :CODE, part[BACK + 1]] = 2 * unit
    return unstack(config, jax.tree.map(jnp.asarray, params))


@pytest.fixture(scope="module")
def random_decoder(tokenizer):
    config = _config(tokenizer.vocab_size)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.02, x.shape), jnp.float32), abstract_model(config)[1]
    )
    return unstack(config, params)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_copying_model_recalls_and_a_random_one_does_not(
    inductive, random_decoder, tokenizer, language
):
    done = []
    found = measure_needles(
        inductive,
        tokenizer,
        language,
        [POSITIONS],
        (0, 0.5, 1),
        trials=2,
        on_cell=lambda *cells: done.append(cells),
    )
    assert [(each.length, each.depth) for each in found] == [(POSITIONS, 0), (192, 0.5), (192, 1)]
    assert all(each.ranked == each.exact == 1 for each in found), found
    assert done == [(1, 3), (2, 3), (3, 3)]
    other = measure_needles(random_decoder, tokenizer, language, [POSITIONS], [0.5], trials=4)
    assert other[0].ranked <= 0.5 and other[0].exact == 0


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_prompt_is_as_long_as_asked_and_has_its_key_at_its_depth(tokenizer, language, depth):
    length = 500
    made = needle_prompt(tokenizer, length, depth, language, 10, 0.25)
    wording = WORDINGS[language]
    whole = made.prompt + made.answer
    longest = max(len(tokenizer.encode(f" {each}")) for each in wording.filler)
    assert length - longest <= len(encode_prompt(tokenizer, whole)) <= length
    assert made.prompt.endswith(wording.question) and whole.endswith(wording.lead + made.key)
    sentence = wording.key.format(key=made.key)
    before, behind = (
        sum(text.count(each) for each in wording.filler) for text in made.prompt.split(sentence)
    )
    assert before / (before + behind) == pytest.approx(depth, abs=0.03)
    assert len(set(made.candidates)) == 10 and made.answer in made.candidates
    assert needle_prompt(tokenizer, length, depth, language, 10, 0.25) == made
    assert needle_prompt(tokenizer, length, depth, language, 10, 0.5).key != made.key


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_candidate_exceeds_the_length(tokenizer, language):
    """Tokenizers split some keys more than others."""

    class Uneven:
        bos_id = tokenizer.bos_id
        prompt_bos = tokenizer.prompt_bos

        def encode(self, text):
            # As GPT-2's does: some digits are one token together.
            return tokenizer.encode(re.sub(r"([1-6])\d", r"\1", text))

    for length in range(480, 500):
        made = needle_prompt(Uneven(), length, 0.5, language, 10, length / 500)
        sizes = [len(encode_prompt(Uneven(), made.prompt + each)) for each in made.candidates]
        assert min(sizes) < max(sizes) <= length


def test_lengths_by_default_end_with_the_context(random_decoder, tokenizer):
    found = measure_needles(random_decoder, tokenizer, "zh", depths=[0.5], trials=1)
    assert found[-1].length == POSITIONS and {each.trials for each in found} == {1}


def test_bad_settings_raise_an_error(random_decoder, tokenizer):
    with pytest.raises(ValueError, match="unknown language='fr'.*en or zh"):
        measure_needles(random_decoder, tokenizer, "fr")
    with pytest.raises(ValueError, match=r"length=20 does not fit.*without filler has \d+ tokens"):
        measure_needles(random_decoder, tokenizer, lengths=[20])
    with pytest.raises(ValueError, match="length=193 does not fit.*holds 192"):
        measure_needles(random_decoder, tokenizer, lengths=[193])
    with pytest.raises(ValueError, match=r"depth=1.5 is outside \[0, 1\]"):
        measure_needles(random_decoder, tokenizer, depths=[1.5])
    with pytest.raises(ValueError, match="trials=0"):
        measure_needles(random_decoder, tokenizer, trials=0)
    with pytest.raises(ValueError, match="candidates=1 is outside"):
        measure_needles(random_decoder, tokenizer, candidates=1)
