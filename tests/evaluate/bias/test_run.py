"""The whole measurement: on one and eight devices, its files, its page, and its command."""

import html.parser
import json
from pathlib import Path

import jax
import pytest

from mtnlg_jax.config import Config, MeshConfig, ModelConfig, StageConfig, TrainConfig
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.evaluate.bias import run
from mtnlg_jax.evaluate.bias.lexicon import Lexicon
from mtnlg_jax.evaluate.bias.pairs_file import read_pairs
from mtnlg_jax.evaluate.bias.report import render
from mtnlg_jax.evaluate.bias.run import BiasSettings
from mtnlg_jax.evaluate.bias.sampled import SampledSettings
from mtnlg_jax.evaluate.bias.tables import as_text, sections
from mtnlg_jax.parallel.mesh import make_mesh

LEXICON = Lexicon("scores.tsv", "plain", {"kind": 1.0, "calm": 0.5, "clever": -1.0})
CROWS = (
    "sent_more,sent_less,stereo_antistereo,bias_type\n"
    "She was very kind.,He was very kind.,stereo,gender\n"
    "The <b>nurse</b> was a woman.,The nurse was a man.,stereo,jobs\n"
)
PRONOUNS = (
    "sentence\toccupation\tparticipant\tanswer\tpronoun\n"
    "The nurse said she was calm.\tnurse\tcook\t0\tshe\n"
    "The nurse said he was calm.\tnurse\tcook\t0\the\n"
)
SAMPLED = SampledSettings(samples=8, max_new_tokens=8, batch=8, min_count=1)


@pytest.fixture
def settings(prompts, write):
    files = (read_pairs(write(CROWS, "crows.csv")), read_pairs(write(PRONOUNS, "pronouns.tsv")))
    return BiasSettings(prompts, SAMPLED, lexicon=LEXICON, pairs=files)


@pytest.fixture
def content(planted, settings):
    found = run.measure(planted.decoder, planted.tokenizer, settings, ("causal", "masked"))
    about = {"kind": "bias", "model": "RUN", "step": 7, "commit": None, "versions": {"jax": "1"}}
    return about | {"created": "2026-01-01T00:00:00+00:00"} | found


def rounded(content):
    """Return a JSON value with numbers rounded, since meshes sum in another order."""
    return json.loads(json.dumps(content), parse_float=lambda text: round(float(text), 3))


@pytest.mark.parametrize(("data", "tensor"), [(2, 4), pytest.param(8, 1, marks=pytest.mark.slow)])
def test_eight_devices_give_the_same(planted, settings, data, tensor):
    alone = run.measure(planted.decoder, planted.tokenizer, settings)
    mesh = make_mesh(MeshConfig(data=data, tensor=tensor), jax.devices()[:8])
    decoder = unstack(planted.config, planted.params, mesh=mesh)
    split = run.measure(decoder, planted.tokenizer, settings)
    sets = [each["associations"]["sets"]["gender"] for each in (alone, split)]
    assert sets[0]["sampled"] == sets[1]["sampled"]
    assert rounded(alone)["pairs"] == rounded(split)["pairs"]
    assert rounded(alone)["associations"] == rounded(split)["associations"]


def test_files_are_written_whole(content, tmp_path):
    page = run.write(content, str(tmp_path / "bias.json"))
    assert page == str(tmp_path / "bias.html")
    assert json.loads((tmp_path / "bias.json").read_text()) == json.loads(json.dumps(content))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "bias.html",
        "bias.json",
    ]
    assert (tmp_path / "bias.html").read_text() == render(content)


class Page(html.parser.HTMLParser):
    """Collects tags and text, and checks that elements are closed."""

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.open = []
        self.words = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def test_the_page_needs_no_network_and_escapes_text(content):
    page = Page(render(content))
    assert not {"script", "img", "link", "b", "iframe"} & {tag for tag, _ in page.tags}
    assert all("href" not in attrs and "src" not in attrs for _, attrs in page.tags)
    text = " ".join(" ".join(page.words).split())
    assert "The <b>nurse</b> was a woman." in text
    assert "gender, sampled text" in text and "Occupations, association test" in text
    assert "do not show what the model does in an application" in text
    for tag, attrs in page.tags:
        if tag == "circle":
            assert 0 <= float(attrs["cx"]) <= 120


def test_tables_for_the_terminal(content):
    shown = as_text(sections(content, 5))
    for words in (
        "female: words most tied to it",
        "prefer the stereotype (95 %)",
        "Baselines that read no sentence",
        "pronoun stands for",
        "Score by group; all together",
        "by filled masks",
    ):
        assert words in shown
    assert max(map(len, shown.splitlines())) < 200


def test_a_lexicon_that_never_occurs_is_told_behind_the_result(planted, prompts, content):
    assert run.unused_lexicon(content) is None
    other = Lexicon("far.tsv", "plain", {"remote": 1.0, "distant": -1.0})
    found = run.measure(
        planted.decoder, planted.tokenizer, BiasSettings(prompts, SAMPLED, lexicon=other)
    )
    assert "no word of far.tsv occurs in the outputs about female, male (16" in (
        run.unused_lexicon(found) or ""
    )
    assert "No scores: no word of far.tsv" in as_text(sections(found))


def config(*masked: float, positions: int = 64) -> Config:
    stages = tuple(StageConfig(name=f"stage {share}", masked=share) for share in masked)
    model = ModelConfig(max_position_embeddings=positions)
    return Config(model=model, train=TrainConfig(stages=stages))


def test_objectives_follow_the_stages(tokenizer, prompts):
    assert run.objectives_of(config(0.0), tokenizer) == ("causal",)
    assert run.objectives_of(config(1.0, 0.0), tokenizer) == ("causal", "masked")
    assert run.objectives_of(config(1.0), tokenizer) == ("masked",)
    with pytest.raises(ValueError, match="every stage of this model is masked; give --noassoc"):
        run.check_model(config(1.0), tokenizer, BiasSettings(prompts))
    with pytest.raises(ValueError, match=r"the prompt 'She was very' has .* context holds 3"):
        run.check_model(config(0.0, positions=3), tokenizer, BiasSettings(prompts))


def test_training_data_that_is_gone_is_no_baseline(tokenizer, tmp_path):
    import dataclasses

    from mtnlg_jax.config import DataConfig

    assert run.training_counts(config(0.0), tokenizer) == (None, "")
    gone = dataclasses.replace(config(0.0), data=DataConfig(path=str(tmp_path / "gone")))
    assert run.training_counts(gone, tokenizer) == (None, "")


def test_data_that_only_a_stage_names_are_counted(tokenizer, tmp_path):
    data = tmp_path / "data"
    (tmp_path / "text.txt").write_text("The nurse said she was tired. " * 200)
    saved = str(tmp_path / "tokenizer")
    tokenizer.save(saved)
    prepare(tmp_path / "text.txt", data, tokenizer=saved, progress=False)
    stage = StageConfig(name="one", blend=((str(data), 1.0),))
    found = Config(model=ModelConfig(), train=TrainConfig(stages=(stage,)))
    counts, source = run.training_counts(found, tokenizer)
    assert counts.sum() > 200 and "of the training data" in source


@pytest.fixture(scope="module")
def ask(answering, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return answering("bias.py", folder, positions=64, new_tokens=6)


def test_the_command_writes_both_files(ask, write, tmp_path):
    lexicon = write("kind\t1\nclever\t-1\ncalm\t0\n")
    crows = write(CROWS, "crows.csv")
    groups = write("set\tgroup\ttext\nsex\t*\t{group} was\nsex\ta\tshe\nsex\tb\the\n")
    output = tmp_path / "found.json"
    code, out, err = ask(
        "--workdir=RUN",
        f"--output={output}",
        "--samples=4",
        "--max_new_tokens=4",
        f"--prompts={groups}",
        f"--lexicon={lexicon}",
        f"--pairs={crows}",
    )
    found = json.loads(output.read_text())
    assert (found["kind"], found["step"]) == ("bias", 7)
    assert set(found) >= {"associations", "pairs", "commit", "versions", "created"}
    assert Path(tmp_path / "found.html").is_file()
    assert "sex, ranked words" in out and "crows.csv, read from left to right" in out
    unused = found["associations"]["sets"]["sex"]["sampled"]["scores"]["scored"] == 0
    # A model with random weights seldom writes a word of the lexicon.
    assert code == (2 if unused else 0), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noassociations"], "leaves nothing to measure; give --pairs=FILE"),
        (["--samples=0", "--top_p=0.5"], "--top_p=0.5 has no effect without --samples above 0"),
        (["--statistics=x.tsv"], "--statistics=x.tsv has no effect without --pairs"),
        (["--temperature=0"], "--temperature=0.0 draws the same output each time"),
        (["--top_p=2"], "--top_p=2.0 is not a share"),
        (["--output=x.html"], "--output=x.html does not end with .json"),
        (["--set=decode.top_k=1"], "--set=decode.top_k=1 is not of the mesh"),
        (["--output=/nowhere/x.json"], "is in a folder that does not exist"),
        (["--sets=age", "--output=x.json"], "--sets=age is not in"),
        (["--lexicon=ONE", "--output=x.json"], "which is one group only"),
        (["--lexicon=ZH", "--output=x.json"], "is of a script with spaces, such as"),
    ],
)
def test_bad_input_is_one_line(ask, write, arguments, message):
    files = {
        "ONE": write("kind\tpositive\nnice\tpositive\n"),
        "ZH": write("善良\t1\n懒惰\t-1\n"),
    }
    for name, path in files.items():
        arguments = [each.replace(f"={name}", f"={path}") for each in arguments]
    code, out, err = ask("--workdir=RUN", *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
