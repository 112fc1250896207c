"""Convert Hugging Face folders with various tokens, generation settings, values, activations and
ways to store a tied model.
"""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from flax import nnx
from safetensors.numpy import load_file, save_file

from mtnlg_jax.config import Config, DecodeConfig, ModelConfig, to_json
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.data.tokenizer import HubTokenizer, load_tokenizer
from mtnlg_jax.decode.results import encode_prompt, writable
from mtnlg_jax.decode.stopping import ShownSpecials, TextStream
from mtnlg_jax.interop.export import config_of
from mtnlg_jax.interop.families import model_of
from mtnlg_jax.interop.generation import decode_of
from mtnlg_jax.interop.huggingface import convert, read_model
from mtnlg_jax.interop.vocabulary import read_tokenizer, write_tokenizer
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.train.checkpoint import Checkpoints, load_run

HERE = Path(__file__).parent
TIED = HERE / "fixtures/tied"
sys.path.append(str(HERE.parent / "data"))
from hub_folders import FOLDERS, TEXT, byte_level, older_files, write  # noqa: E402


def tensors(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def store(folder, values) -> None:
    save_file(
        {name: np.ascontiguousarray(array) for name, array in values.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def edit(path, **changes) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))


@pytest.fixture
def model(tmp_path):
    """Copy the tied model, so that a test can change it."""
    return Path(shutil.copytree(TIED, tmp_path / "model"))


def resize(folder, rows: int) -> None:
    """Resize the vocabulary to ``rows`` tokens, as model.resize_token_embeddings does."""
    values = tensors(folder)
    table = values["transformer.wte.weight"]
    more = np.full((max(0, rows - len(table)), table.shape[1]), 0.25, np.float32)
    store(folder, values | {"transformer.wte.weight": np.concatenate([table, more])[:rows]})
    edit(folder / "config.json", vocab_size=rows)


# --- added tokens (tokenizer.add_tokens) ----------------------------------------------------------


@pytest.mark.parametrize("how", ["added_tokens.json", "added_tokens_decoder", "tokenizer.json"])
def test_added_words_are_read_from_text(model, tmp_path, how):
    """transformers encodes "ROMEO is" as [268, 220, 72, 82] in all three cases."""
    resize(model, 269)
    if how == "added_tokens.json":
        edit(model / how, ROMEO=268)
    else:
        edit(
            model / "tokenizer_config.json",
            added_tokens_decoder={
                "267": {"content": "<|endoftext|>", "special": True},
                "268": {"content": "ROMEO", "special": False},
            },
        )
    if how == "tokenizer.json":
        other = write(
            tmp_path / "other",
            files={name: (model / name).read_text() for name in ("vocab.json", "merges.txt")},
        )
        edit(other / "added_tokens.json", ROMEO=268)
        content = load_tokenizer(other).files()["tokenizer.json"]
        (model / "tokenizer.json").write_bytes(content)
        (model / "tokenizer_config.json").unlink()
    convert(model, tmp_path / "run")
    tokenizer = load_run(tmp_path / "run").tokenizer
    assert tokenizer.encode("ROMEO is") == [268, 220, 72, 82]
    assert tokenizer.decode([268, 220, 72, 82]) == "ROMEO is" and not tokenizer.is_special[268]
    assert tokenizer.vocab_size == 269 and tokenizer.eos_id == 267
    convert(tmp_path / "run", tmp_path / "back")
    for path in model.iterdir():
        if not path.name.startswith("expected"):
            assert (tmp_path / "back" / path.name).exists(), path.name


def test_special_tokens_of_a_chat_model(tmp_path):
    """Special tokens are text in documents, tokens in a parsed prompt, and not shown in the output.
    As with Hugging Face, the model may write those that are not bos, pad, mask or sep."""
    files = older_files(byte_level())
    settings = {
        "added_tokens_decoder": {
            "0": {"content": "<|endoftext|>", "special": True},
            "330": {"content": "<|im_start|>", "special": True},
            "331": {"content": "<|im_end|>", "special": True},
        },
        "eos_token": "<|im_end|>",
    }
    folder = write(tmp_path / "chat", files=files, **settings)
    tokenizer, outside = read_tokenizer(folder, {}, {}, 332)
    assert outside == [] and tokenizer.eos_id == 331
    text = "<|im_start|>the man<|im_end|>"
    as_text = encode_prompt(tokenizer, text)
    assert not tokenizer.is_special[as_text].any() and tokenizer.decode(as_text) == text
    tokenizer.parse_special = True
    ids = encode_prompt(tokenizer, text)
    assert ids[0] == 330 and ids[-1] == 331 and tokenizer.decode(ids) == "the man"
    assert tokenizer.decode(ids, skip_special=False) == text
    assert writable(tokenizer, 332)[[330, 331]].all() and writable(tokenizer, 332, end=False)[330]
    stream = TextStream(tokenizer)
    shown = TextStream(ShownSpecials(tokenizer))
    for token in (*tokenizer.encode("the"), 330, *tokenizer.encode(" man")):
        stream.push(token)
        shown.push(token)
    assert (stream.text, shown.text) == ("the man", "the<|im_start|> man")


# --- vocabulary and rows --------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [268, 267, 270, 320])
def test_special_tokens_without_a_row_are_left_out(model, tmp_path, rows):
    """The tokenizer was saved with [PAD]; the model was not resized, or to a multiple of 64."""
    resize(model, rows)
    edit(
        model / "tokenizer_config.json",
        pad_token="[PAD]",
        added_tokens_decoder={
            "267": {"content": "<|endoftext|>", "special": True},
            "268": {"content": "[PAD]", "special": True},
            "269": {"content": "<sep>", "special": True},
        },
    )
    edit(model / "config.json", pad_token_id=268)
    if rows < 268:
        with pytest.raises(ValueError, match="has 270 tokens and the model vocab_size=267"):
            convert(model, tmp_path / "run")
        return
    report = convert(model, tmp_path / "run")
    tokenizer = load_run(tmp_path / "run").tokenizer
    assert (
        "left out   [PAD], <sep>: special tokens without a row among the model's 268" in report
    ) == (rows == 268)
    assert tokenizer.vocab_size == min(rows, 270)
    assert tokenizer.pad_id == (267 if rows == 268 else 268)
    assert (f"{rows - 270} more rows" in report) == (rows > 270)
    assert tokenizer.encode("the [PAD]") == load_tokenizer(TIED).encode("the [PAD]")


def test_words_without_a_row_raise_an_error(model, tmp_path):
    edit(model / "added_tokens.json", ROMEO=268)
    with pytest.raises(
        ValueError,
        match="has 269 tokens and the model vocab_size=268, and text yields "
        "'ROMEO'; give --tokenizer=FOLDER",
    ):
        convert(model, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- tokenizers of other kinds --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "characters",
        "characters, bpe",
        "no alphabet, older files",
        "vocab.txt, cased",
        "byte fallback",
        "unigram",
    ],
)
def test_models_with_other_tokenizers_are_converted(tmp_path, name):
    """The ids are compared with transformers in tests/data/test_hub_tokenizer.py."""
    model = FOLDERS[name](tmp_path / "model")
    free = load_tokenizer(model)
    rows = len(free._fast.get_vocab(with_added_tokens=True))
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(TIED / file, model / file)
    edit(model / "config.json", bos_token_id=None, eos_token_id=None)
    resize(model, rows)
    report = convert(model, tmp_path / "run")
    tokenizer = load_run(tmp_path / "run").tokenizer
    assert isinstance(tokenizer, HubTokenizer) and tokenizer.vocab_size <= rows
    assert tokenizer.encode("the man") == free.encode("the man")
    losses = free.losses()
    assert ("a text loses " + ", ".join(losses) in report) == bool(losses)
    if name.startswith("characters"):
        assert tokenizer.eos_id == -1 and "there is no end token" in report
        assert encode_prompt(tokenizer, "") == tokenizer.encode("\n")
        assert tokenizer.decode(tokenizer.encode("the man\n")) == "the man\n"
        assert writable(tokenizer, rows)[: rows - 1].all()
        with pytest.raises(
            ValueError, match="without an end token.* name one of its tokens as eos_token"
        ):
            prepare(None, tmp_path / "out", tokenizer=str(tmp_path / "run/tokenizer"))
    if name == "vocab.txt, cased":
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 3, 0)
        assert tokenizer.prompt_bos and "begin with bos; the end token is [SEP] (3)" in report


@pytest.mark.parametrize("name", ["alone.json", "spiece.model", "folder"])
def test_a_separate_tokenizer_is_limited_to_the_rows_of_the_model(tmp_path, name):
    """--tokenizer names a file or a folder; its roles are among the model's rows."""
    if name == "alone.json":
        folder = FOLDERS["qwen"](tmp_path / "qwen")
        path = tmp_path / name
        path.write_bytes((folder / "tokenizer.json").read_bytes())
        rows = 333
    else:
        path = tmp_path / "spiece.model"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT * 20),
            model_prefix=str(path.with_suffix("")),
            vocab_size=60,
            minloglevel=2,
        )
        path = tmp_path if name == "folder" else path
        rows = 60
    assert load_tokenizer(path).vocab_size > rows
    tokenizer, outside = read_tokenizer(path, {}, {}, rows)
    assert tokenizer.vocab_size == rows and outside == []
    assert tokenizer.encode("the man") == load_tokenizer(path).encode("the man")
    assert tokenizer.is_special[tokenizer.eos_id] and tokenizer.pad_id < rows
    with pytest.raises(ValueError, match="no mask token"):
        _ = tokenizer.mask_id
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").pad_id == tokenizer.pad_id
    fewer = 329 if name == "alone.json" else 59  # than the tokens that text gives
    with pytest.raises(ValueError, match=f"tokens and the model vocab_size={fewer}"):
        read_tokenizer(path, {}, {}, fewer)


CHAT = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


def test_the_files_of_a_chat_model_are_written_as_they_came(tmp_path):
    """Byte for byte, with all ends; a tokenizer that was changed keeps the template."""
    folder = FOLDERS["qwen"](tmp_path / "folder")
    edit(folder / "tokenizer_config.json", chat_template=CHAT, eos_token="<|im_end|>", odd=[1])
    (folder / "chat_template.jinja").write_text(CHAT + "x")
    rows = len(load_tokenizer(folder)._fast.get_vocab(with_added_tokens=True))
    first, second = (
        load_tokenizer(folder)._fast.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")
    )
    closed, _ = read_tokenizer(folder, {}, {"eos_token_id": [first, second]}, rows)
    assert closed.eos_ids == (first, second) and closed.vocab_size == rows
    closed.save(tmp_path / "run")
    files, how = write_tokenizer(load_tokenizer(tmp_path / "run"), 64)
    assert how == "as they came" and len(files) == 3
    for name, content in files.items():
        assert content == (folder / name).read_bytes(), name
    opened = load_tokenizer(folder)  # with <mask> and others behind the last token
    files, how = write_tokenizer(opened, 64)
    assert how == "as tokenizer.json" and files["chat_template.jinja"].decode() == CHAT + "x"
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == CHAT


@pytest.mark.parametrize("name", ["qwen", "vocab.txt", "unigram", "words and masks"])
def test_hub_tokenizers_are_written_and_read_back(tmp_path, name):
    ours = load_tokenizer(FOLDERS[name](tmp_path / "folder"))
    files, how = write_tokenizer(ours, 64)
    assert how == "as tokenizer.json"
    there = write(tmp_path / "there", files={key: value.decode() for key, value in files.items()})
    back = load_tokenizer(there)
    assert back.encode("the man YORICK 天地") == ours.encode("the man YORICK 天地")
    for role in ("bos", "eos", "pad", "mask", "sep"):
        assert getattr(back, f"{role}_id") == getattr(ours, f"{role}_id"), role


# --- generation_config.json -----------------------------------------------------------------------

NOT_KEPT = ["watermarking_config={'bias': 2.5}", "guidance_scale=1.5"]
CASES = [
    (
        {
            "eos_token_id": [267, 32],
            "repetition_penalty": 1.5,
            "no_repeat_ngram_size": 2,
            "max_new_tokens": 6,
        },
        {
            "eos_token_id": (267, 32),
            "repetition_penalty": 1.5,
            "no_repeat_ngram_size": 2,
            "max_new_tokens": 6,
        },
        [],
    ),
    (
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 50},
        [],
    ),
    ({"do_sample": True, "top_k": 0}, {"temperature": 1.0}, []),
    (
        {"do_sample": False, "temperature": 0.7, "top_k": 5},
        {},
        ["temperature=0.7 (do_sample is false)", "top_k=5 (do_sample is false)"],
    ),
    ({"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}, {}, []),
    (
        {"num_beams": 4, "length_penalty": 0.8, "early_stopping": True},
        {"num_beams": 4, "length_penalty": 0.8, "early_stopping": True},
        [],
    ),
    (
        {"num_beams": 1, "length_penalty": 0.8, "early_stopping": False},
        {},
        ["length_penalty=0.8 (num_beams is 1)"],
    ),
    (
        {"do_sample": True, "num_beams": 4},
        {"temperature": 1.0, "top_k": 50},
        ["num_beams=4 (beam sampling differs here)"],
    ),
    (
        {"max_length": 30},
        {"max_new_tokens": 30},
        ["max_length=30 (it counts the prompt; max_new_tokens=30 does not)"],
    ),
    ({"max_length": 30, "max_new_tokens": 9}, {"max_new_tokens": 9}, []),
    (
        {
            "bad_words_ids": [[1, 2]],
            "suppress_tokens": [3, 267],
            "begin_suppress_tokens": [4],
            "forced_eos_token_id": [267],
            "stop_strings": "the",
            "sequence_bias": [[[1, 2], 0.5]],
        },
        {
            "bad_words_ids": ((1, 2),),
            "suppress_tokens": (3,),
            "begin_suppress_tokens": (4,),
            "forced_eos_token_id": 267,
            "stop_strings": ("the",),
            "sequence_bias": (((1, 2), 0.5),),
        },
        [],
    ),
    (
        {
            "eos_token_id": 267,
            "pad_token_id": 267,
            "transformers_version": "5",
            "use_cache": True,
            "penalty_alpha": None,
            "guidance_scale": 1.0,
            "output_scores": False,
        },
        {},
        [],
    ),
    (
        {"eos_token_id": [32, 900]},
        {"eos_token_id": (32,)},
        ["eos_token_id [900] (outside the model's 268 rows)"],
    ),
    ({"eos_token_id": 50256}, {}, []),
    ({"watermarking_config": {"bias": 2.5}, "guidance_scale": 1.5}, {}, NOT_KEPT),
    # Contrastive search needs a top_k, which is 50 there by default.
    ({"penalty_alpha": 0.6, "top_k": 4}, {"penalty_alpha": 0.6, "top_k": 4}, []),
    ({"penalty_alpha": 0.6}, {"penalty_alpha": 0.6, "top_k": 50}, []),
    (
        {"penalty_alpha": 0.6, "do_sample": True},
        {"temperature": 1.0, "top_k": 50},
        ["penalty_alpha=0.6 (contrastive search is off)"],
    ),
    (
        {"penalty_alpha": 0.6, "num_beams": 2},
        {"num_beams": 2},
        ["penalty_alpha=0.6 (contrastive search is off)"],
    ),
]


@pytest.fixture(scope="module")
def closed():
    return read_tokenizer(TIED, {"eos_token_id": 267}, {}, 268)[0]


@pytest.mark.parametrize(("generation", "changed", "not_kept"), CASES)
def test_generation_settings_are_kept_or_reported(closed, generation, changed, not_kept):
    assert decode_of(generation, closed, 268) == (DecodeConfig(**changed), not_kept)


def test_generation_settings_out_of_range_raise_an_error(closed):
    for wrong, message in (
        ({"repetition_penalty": -1}, "repetition_penalty=-1 is outside"),
        (
            {"num_beams": 2, "stop_strings": ["a"]},
            "stop_strings cannot be searched while num_beams=2",
        ),
        ({"max_new_tokens": "9"}, "generation_config.json cannot be converted"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_of(wrong, closed, 268)


def test_a_converted_run_keeps_the_generation_settings(model, tmp_path):
    edit(
        model / "generation_config.json",
        eos_token_id=[32, 267],
        repetition_penalty=1.5,
        guidance_scale=1.5,
    )
    report = convert(model, tmp_path / "run")
    decode = load_run(tmp_path / "run").config.decode
    assert decode == DecodeConfig(eos_token_id=(32, 267), repetition_penalty=1.5)
    assert (
        "decoding   as generation_config.json has it: repetition_penalty=1.5, "
        "eos_token_id=(32, 267)" in report
    )
    assert "not kept   of generation_config.json: guidance_scale=1.5" in report
    # A word that ends generation is still text.
    tokenizer = load_run(tmp_path / "run").tokenizer
    assert tokenizer.eos_id == 267 and tokenizer.decode([32]) == "A"
    # In older folders config.json has these settings.
    (model / "generation_config.json").unlink()
    edit(model / "config.json", no_repeat_ngram_size=3, eos_token_id=267)
    convert(model, tmp_path / "older")
    assert load_run(tmp_path / "older").config.decode == DecodeConfig(no_repeat_ngram_size=3)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "position", "value", "dtype"),
    [
        ("transformer.h.0.mlp.c_fc.bias", (3,), np.nan, np.float32),
        ("transformer.wte.weight", (7, 2), np.inf, np.float32),
        ("transformer.h.1.attn.c_attn.weight", (0, 40), -np.inf, np.float16),
        ("transformer.ln_f.weight", (1,), np.nan, jnp.bfloat16),
    ],
)
def test_values_that_are_not_finite_raise_an_error(model, tmp_path, name, position, value, dtype):
    values = tensors(model)
    changed = values[name].astype(dtype)
    changed[position] = value
    store(model, values | {name: changed})
    at = ", ".join(map(str, position))
    with pytest.raises(
        ValueError,
        match=rf"{name} of .*model has 1 values that are not finite "
        rf"\({value} at \[{at}\]\)",
    ):
        convert(model, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_run_with_values_that_are_not_finite_is_not_written(model, tmp_path):
    """The causal mask of older versions may hold -inf, because it is not a parameter."""
    store(
        model, tensors(model) | {"transformer.h.0.attn.masked_bias": np.float32(-np.inf).reshape(1)}
    )
    convert(model, tmp_path / "run")
    run = load_run(tmp_path / "run")
    params = jax.tree.map(lambda leaf: leaf.at[..., 0].set(jnp.nan), run.params)
    folder = tmp_path / "broken"
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(
        3,
        {"params": params, "step": jnp.int32(3)},
        {"config": json.loads(to_json(run.config))},
        wait=True,
    )
    checkpoints.close()
    run.tokenizer.save(folder / "tokenizer")
    (folder / "config.json").write_text(to_json(run.config))
    for dtype in ("source", "float16"):
        with pytest.raises(ValueError, match="parameter .* has .* numbers that are not finite"):
            convert(folder, tmp_path / "model-new", dtype=dtype)
    assert not (tmp_path / "model-new").exists()


# --- how tensors are stored -----------------------------------------------------------------------


def only_head(values):
    return {name.replace("transformer.wte", "lm_head"): array for name, array in values.items()}


@pytest.mark.parametrize(
    "change",
    [
        only_head,
        lambda values: {
            name.removeprefix("transformer."): array for name, array in only_head(values).items()
        },
        lambda values: only_head(
            {name: array.astype(jnp.bfloat16) for name, array in values.items()}
        ),
    ],
)
def test_a_tied_model_may_store_only_its_output_embedding(model, tmp_path, change):
    before = read_model(model)[1]
    store(model, change(tensors(model)))
    convert(model, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    one = tensors(model)
    other = tensors(tmp_path / "back")
    assert one.keys() == other.keys()
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    after = load_run(tmp_path / "run").params
    for left, right in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(left, right, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_removed(model, prefix):
    before = jax.tree.leaves(read_model(model)[1])
    store(model, {prefix + name: array for name, array in tensors(model).items()})
    _, params, origin = read_model(model)
    assert all(
        (left == right).all() for left, right in zip(before, jax.tree.leaves(params), strict=True)
    )
    assert origin["prefix"] == "transformer."


def test_a_missing_embedding_raises_an_error(model, tmp_path):
    store(model, only_head(tensors(model)))
    edit(model / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"wte.weight is missing \(expected \[268, 16\]\)"):
        convert(model, tmp_path / "run")


# --- activations ----------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu_exact",
    "silu": "silu",
    "swish": "silu",
    "gelu_fast": "gelu",
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_survive_a_round_trip(model, name):
    config = json.loads((model / "config.json").read_text()) | {"activation_function": name}
    found = model_of(config)
    assert found.activation == ACTIVATIONS[name]
    assert config_of(found, config)["activation_function"] == name
    assert model_of(config_of(found)) == found


def test_logits_of_other_activations_equal_transformers(model):
    expected = np.load(TIED / "expected_activations.npz")
    _, params, _ = read_model(model)
    config = json.loads((model / "config.json").read_text())
    for name in ("relu", "gelu", "silu"):
        graph = abstract_model(model_of(config | {"activation_function": name}))[0]
        logits = nnx.merge(graph, params)(jnp.asarray(expected["tokens"], jnp.int32))
        np.testing.assert_allclose(logits, expected[name], rtol=0, atol=1e-4)
    assert np.abs(expected["relu"] - expected["gelu"]).max() > 0.1


def test_activations_do_not_change_the_parameter_count():
    sizes = {
        ModelConfig(vocab_size=8, activation=name).parameter_count()
        for name in ("gelu", "gelu_exact", "relu", "silu")
    }
    assert len(sizes) == 1 and Config().model.activation == "gelu"
