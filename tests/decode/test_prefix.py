"""Check decoding and ranking behind an image or features, against full forward passes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx
from runs import save_run

from mtnlg_jax.config import Config, DecodeConfig, MeshConfig, ModelConfig, PrefixConfig
from mtnlg_jax.decode import load
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.rank import rank
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import make_mesh

ROUNDING = 1e-5
POSITIONS = 4
GREEDY = DecodeConfig(max_new_tokens=6, min_new_tokens=6)
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    vocab_size=420,
    max_position_embeddings=32,
    prefix=PrefixConfig(width=6, image_size=8, patch_size=4),
)
FEATURES = dataclasses.replace(MODEL, prefix=PrefixConfig(length=POSITIONS, width=6))


def random_parameters(model):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), abstract_model(model)[1]
    )


@pytest.fixture(scope="module")
def decoder():
    return unstack(MODEL, random_parameters(MODEL))


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (8, 8, 3)).astype(np.uint8)


def full_logprobs(model, image, tokens) -> np.ndarray:
    """Return log-probabilities (S, V) by one forward pass of the whole model over a padded row."""
    marks = [] if image is None else list(range(-1, -1 - POSITIONS, -1))
    row = np.zeros((1, 32), np.int32)
    row[0, : len(marks) + len(tokens)] = [*marks, *tokens]
    prefix = np.zeros((1, *model.prefix.shape), model.prefix.dtype)
    prefix[0] = 0 if image is None else image
    module = nnx.merge(abstract_model(model)[0], random_parameters(model))
    logits = module(jnp.asarray(row), prefix=jnp.asarray(prefix))
    return np.asarray(jax.nn.log_softmax(logits))[0, len(marks) : len(marks) + len(tokens)]


def assert_follows(result, model, tokenizer, image, prompt):
    """Check the log-probability of each new token of a result."""
    read = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    table = full_logprobs(model, image, [*read, *result.tokens])
    wanted = table[len(read) - 1 : -1][np.arange(len(result.tokens)), list(result.tokens)]
    np.testing.assert_allclose(result.logprobs, wanted, atol=ROUNDING)


def test_rows_with_and_without_an_image_share_a_batch(decoder, tokenizer):
    prompts = ["The cat", "", "The cat", "The"]
    images = [picture(0), picture(1), None, picture(0)]
    results = generate(decoder, tokenizer, prompts, GREEDY, prefixes=images)
    for prompt, image, result in zip(prompts, images, results, strict=True):
        assert_follows(result, MODEL, tokenizer, image, prompt)
        (alone,) = generate(decoder, tokenizer, [prompt], GREEDY, prefixes=[image])
        assert alone.tokens == result.tokens
    (plain,) = generate(decoder, tokenizer, ["The cat"], GREEDY)
    assert plain.tokens == results[2].tokens
    # The image counts.
    (other,) = generate(decoder, tokenizer, [""], GREEDY, prefixes=[picture(2)])
    assert other.logprobs != results[1].logprobs


@pytest.mark.parametrize(
    "settings",
    [
        DecodeConfig(max_new_tokens=6, temperature=1.0, num_return_sequences=3, seed=4),
        DecodeConfig(max_new_tokens=6, num_beams=3, num_return_sequences=3),
        DecodeConfig(max_new_tokens=6, prompt_lookup_num_tokens=3),
        DecodeConfig(max_new_tokens=6, repetition_penalty=1.3, no_repeat_ngram_size=2),
    ],
    ids=["samples", "beams", "prompt lookup", "penalties"],
)
def test_every_way_of_decoding_reads_the_image(decoder, tokenizer, settings):
    results = generate(decoder, tokenizer, ["The cat"], settings, prefixes=[picture(0)])
    assert len(results) == settings.num_return_sequences
    for result in results:
        assert_follows(result, MODEL, tokenizer, picture(0), "The cat")


def test_penalties_do_not_act_on_the_tokens_of_a_prefix(decoder, tokenizer):
    """A penalty must find a <bos> in place of a prefix and not some token of the vocabulary."""
    strong = dataclasses.replace(GREEDY, repetition_penalty=50.0)
    (result,) = generate(decoder, tokenizer, [""], strong, prefixes=[picture(0)])
    table = full_logprobs(MODEL, picture(0), [tokenizer.bos_id])
    allowed = table[0, : tokenizer.vocab_size].copy()
    allowed[tokenizer.is_special] = -np.inf
    assert result.tokens[0] == allowed.argmax()


def test_features_and_int8_weights(tokenizer):
    features = np.random.default_rng(1).normal(size=(POSITIONS, 6)).astype(np.float32)
    params = random_parameters(FEATURES)
    (exact,) = generate(unstack(FEATURES, params), tokenizer, ["The"], GREEDY, prefixes=[features])
    assert_follows(exact, FEATURES, tokenizer, features, "The")
    rounded = unstack(FEATURES, params, weights="int8", cache="int8")
    (close,) = generate(rounded, tokenizer, ["The"], GREEDY, prefixes=[features])
    assert abs(close.logprobs[0] - exact.logprobs[0]) < 0.5


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "tensor": 2}, {"data": 1, "pipe": 2, "tensor": 2}], ids=str
)
def test_a_mesh_reads_images(decoder, tokenizer, sizes):
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:4])
    prompts = ["The cat", "", "The"]
    images = [picture(0), None, picture(1)]
    wanted = generate(decoder, tokenizer, prompts, GREEDY, prefixes=images)
    over_mesh = unstack(MODEL, random_parameters(MODEL), mesh=mesh)
    results = generate(over_mesh, tokenizer, prompts, GREEDY, prefixes=images)
    assert [each.tokens for each in results] == [each.tokens for each in wanted]


CANDIDATES = [" sat on the mat", " and the dog", "s in Spain"]


@pytest.mark.parametrize("prompt", ["The cat", ""])
def test_candidates_are_ranked_behind_an_image(decoder, tokenizer, prompt):
    found = rank(decoder, tokenizer, prompt, CANDIDATES, normalise="sum", prefix=picture(3))
    alone = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    for each in found:
        row = [tokenizer.bos_id, *tokenizer.encode(prompt + each.text)]
        start = next(i for i in range(len(row)) if row[: i + 1] != alone[: i + 1])
        table = full_logprobs(MODEL, picture(3), row)
        wanted = table[np.arange(start - 1, len(row) - 1), row[start:]].sum()
        assert each.score == pytest.approx(wanted, abs=1e-4)
    plain = rank(decoder, tokenizer, prompt, CANDIDATES, normalise="sum")
    assert [each.score for each in plain] != [each.score for each in found]


def test_generated_candidates_are_ranked_behind_an_image(decoder, tokenizer):
    settings = DecodeConfig(max_new_tokens=4, temperature=1.0, num_return_sequences=4)
    found = rank(
        decoder, tokenizer, "The", decode=settings, scorers=["logprob", "mbr"], prefix=picture(3)
    )
    for each in found:
        row = [tokenizer.bos_id, *tokenizer.encode("The"), *each.tokens]
        table = full_logprobs(MODEL, picture(3), row)
        first = len(row) - len(each.tokens)
        wanted = table[np.arange(first - 1, len(row) - 1), row[first:]].sum()
        assert each.sum == pytest.approx(wanted, abs=1e-4)


def test_what_does_not_fit_is_refused(decoder, tokenizer):
    def ask(prefix, model=decoder, **options):
        return generate(model, tokenizer, ["The"], GREEDY, prefixes=[prefix], **options)

    with pytest.raises(ValueError, match=r"shape \(4, 4, 3\), and the model takes images"):
        ask(picture(0)[:4, :4])
    with pytest.raises(ValueError, match="holds float64, and an image is uint8"):
        ask(picture(0) / 255)
    text = dataclasses.replace(MODEL, prefix=PrefixConfig())
    with pytest.raises(ValueError, match="reads text alone"):
        ask(picture(0), unstack(text, random_parameters(text)))
    with pytest.raises(ValueError, match="a draft model reads tokens alone"):
        ask(picture(0), draft=decoder)
    with pytest.raises(ValueError, match="2 prefixes for 1 prompts"):
        generate(decoder, tokenizer, ["The"], GREEDY, prefixes=[None, None])
    for prefixes in ([picture(0), None], [None, picture(0)]):
        with pytest.raises(ValueError, match="token -1 is below 0"):
            generate(decoder, tokenizer, [[-1, 5], "The"], GREEDY, prefixes=prefixes)
    with pytest.raises(ValueError, match="pmi reads texts without the prefix"):
        rank(decoder, tokenizer, "The", CANDIDATES, scorers="pmi", prefix=picture(0))
    # A prefix takes positions of the context: 4 + <bos> + 28 are more than 32.
    with pytest.raises(ValueError, match="has 33 tokens and the model's context holds 32"):
        generate(decoder, tokenizer, [[5] * 29], GREEDY, prefixes=[picture(0)])


# --- launch/generate.py


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    config = Config(model=model, decode=GREEDY)
    for number in range(3):
        PIL.Image.fromarray(picture(number)).save(folder / f"{number}.png")
    (folder / "text.png").write_text("no image")
    return save_run(folder, config, random_parameters(model), tokenizer)


@pytest.fixture
def ask(run, capsys):
    from absl import flags
    from absl.testing import flagsaver

    from mtnlg_jax.cli import generate as command

    def answer(*arguments):
        with flagsaver.flagsaver():
            flags.FLAGS.unparse_flags()
            flags.FLAGS(["generate.py", f"--workdir={run}", *arguments])
            command.main()
        return capsys.readouterr().out

    return answer


def test_the_script_reads_an_image(ask, run):
    record = json.loads(ask(f"--image={run}/0.png", "--json"))
    other = json.loads(ask(f"--image={run}/1.png", "--json", "--prompt="))
    assert record["prompt"] == other["prompt"] == ""
    assert record["sequences"][0]["logprobs"] != other["sequences"][0]["logprobs"]
    ranking = [f"--candidates={text}" for text in CANDIDATES]
    found = json.loads(ask(f"--image={run}/0.png", "--mode=ranking", "--json", *ranking))
    assert len(found["candidates"]) == 3


def test_rows_name_their_images(ask, run, tmp_path):
    rows = [{"prompt": "", "image": "0.png"}, {"prompt": "The"}, {"prompt": "", "image": "1.png"}]
    (run / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ask(f"--prompts={run}/rows.jsonl", f"--output={tmp_path}/out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    alone = json.loads(ask(f"--image={run}/1.png", "--json"))
    last = json.loads(lines[2])
    assert last["image"] == "1.png"
    assert last["sequences"][0]["tokens"] == alone["sequences"][0]["tokens"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image={run}/text.png"], "is not an image"),
        (["--image={run}/gone.png"], "cannot be read"),
        (["--prefix={run}/0.png"], "the model takes an image"),
        (["--image={run}/0.png", "--prefix=a.npy"], "both given"),
        (["--image={run}/0.png", "--mode=fill", "--prompt=a"], "--image is for --mode=gen"),
        (["--image={run}/0.png", "--prompts={run}/rows.jsonl"], "--image is for one prompt"),
        (["--prompts={run}/bad.jsonl"], "prompt 2 of 2: .*text.png.* is not an image"),
        (["--image={run}/0.png", "--preset=contrastive"], "contrastive search compares"),
        (["--image={run}/0.png", "--preset=best"], "coherence reads texts without the prefix"),
        (["--prompts={run}/second.jsonl", "--draft=RUN"], "a draft model reads tokens alone"),
        (["--prompts={run}/second.jsonl", "--mode=fill"], "--mode=fill reads text alone"),
        (
            ["--prompts={run}/second.jsonl", "--mode=ranking", "--scorer=pmi", "--output={run}/a"],
            "^pmi reads texts without the prefix",
        ),
    ],
)
def test_an_image_that_cannot_be_read_is_one_error(ask, run, arguments, words, monkeypatch):
    rows = [{"prompt": "", "image": "0.png"}, {"prompt": "", "image": "text.png"}]
    (run / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run / "second.jsonl").write_text("\n".join(map(json.dumps, [{"prompt": "a"}, rows[0]])))
    # All of it is known before a parameter is read.
    monkeypatch.setattr(load, "_assemble", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=words):
        ask(*(argument.format(run=run) for argument in arguments))
    assert not (run / "a").exists()
