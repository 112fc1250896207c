"""launch/task.py --task=write from end to end, with a random model, and one line for bad input."""

import json

import pytest

from mtnlg_jax.data.tokenizer import train_tokenizer
from mtnlg_jax.tasks.writing.kinds import FRAMES, KINDS

WRITE = ("--workdir=RUN", "--task=write", "--input={folder}/topic.txt", "--candidates=2")
SHORT = (*WRITE, "--words=30", "--outline={folder}/outline.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("write")
    (folder / "topic.txt").write_text("the whale and the captain\n")
    (folder / "empty.txt").write_text("\n")
    (folder / "outline.md").write_text("# A title\n## The sea\n## The storm\n")
    (folder / "gap.md").write_text("## The sea\n##\n## The storm\n")
    (folder / "long.md").write_text("## " + "The storm came. " * 30 + "\n")
    (folder / "mine.md").write_text("A text of mine.\n")
    return folder


@pytest.fixture(scope="module")
def ask(answering, folder):
    frames = [text for frame in FRAMES.values() for text in vars(frame).values()]
    kinds = [text for kind in KINDS.values() for text in kind.instructions.values()]
    texts = ["\n".join([*frames, *kinds]), "the whale and the captain. The sea, the storm.\n"]
    train_tokenizer(texts * 9, 400).save(folder / "tokenizer")
    answer = answering("task.py", folder / "tokenizer", positions=160, new_tokens=64)
    return lambda *arguments, stdin=b"": answer(
        *(each.replace("{folder}", str(folder)) for each in arguments), stdin=stdin
    )


def test_a_text_is_written_and_reported(ask, folder):
    code, out, err = ask(*SHORT, "--output={folder}/story.md")
    text = (folder / "story.md").read_text()
    assert (code, err) == (0, "") and out.rstrip().endswith("story.md")
    assert text.startswith("## The sea\n\n") and "\n\n## The storm\n\n" in text
    lines = [json.loads(each) for each in (folder / "story.md.jsonl").read_text().splitlines()]
    assert lines[0]["type"] == "settings" and lines[0]["words"] == 30
    assert lines[0]["model"]["step"] == 7 and lines[-1]["type"] == "end"
    # The same text without a file, as JSON and as it is shown.
    code, out, _ = ask(*SHORT, "--json")
    result = json.loads(out)
    assert code == 0 and result["text"] == text and result["headings"] == ["The sea", "The storm"]
    assert {"words", "calls", "tokens_written", "tokens_scored", "seconds"} <= set(result)
    code, out, err = ask(*SHORT)
    assert (code, out) == (0, text) and f"{result['words']} words in 2 sections" in err


def test_a_stopped_text_goes_on(ask, folder):
    code, _, _ = ask(*SHORT, "--output={folder}/on.md")
    assert code == 0
    text = (folder / "on.md").read_bytes()
    record = (folder / "on.md.jsonl").read_bytes()
    lines = record.splitlines(keepends=True)
    # As a kill leaves it: some decisions, half a line, and the text of those before.
    (folder / "on.md.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    (folder / "on.md").write_bytes(text[: text.index(b"\n\n") + 2])
    code, _, err = ask(*SHORT, "--output={folder}/on.md", "--score_weights=span=3")
    assert code == 2 and "made with weights.span=1.0, and this command has 3.0" in err
    code, _, err = ask(*SHORT, "--output={folder}/on.md", "--dtype=bfloat16")
    assert code == 2 and 'held.dtype="float32", and this command has "bfloat16"' in err
    (folder / "on.md.jsonl").write_bytes(b"".join(lines[:3]).replace(b'er": null', b'er": "anna"'))
    code, _, err = ask(*SHORT, "--output={folder}/on.md")
    assert code == 2 and 'held.adapter="anna", and this command has null (--dtype,' in err
    (folder / "on.md.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    code, _, err = ask(*SHORT, "--output={folder}/on.md")
    assert (code, err) == (0, "")
    assert (folder / "on.md").read_bytes() == text
    assert (folder / "on.md.jsonl").read_bytes() == record
    code, _, err = ask(*SHORT, "--output={folder}/on.md")
    assert code == 2 and "on.md is finished, with " in err and "name another" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind=stroy"], "unknown kind=stroy; did you mean 'story'?"),
        (["--language=de"], "language='de' has no prompts to write with"),
        (["--outline={folder}/gap.md"], "gap.md, line 2: the section '##' is empty"),
        (["--outline={folder}/none.md"], "none.md"),
        (["--output={folder}/mine.md"], "mine.md exists, and no mine.md.jsonl beside it"),
        (["--input={folder}/empty.txt"], "empty.txt is empty"),
        (["--score_weights=outlin=1"], "unknown part 'outlin' of a score"),
        (["--score_weights=outline=x"], "'x' is not a number"),
        (["--score_weights=outline"], "as in --score_weights=repetition=4,outline=0"),
        (["--output={folder}/mine.md/story.md"], "mine.md, which is a file; name another file"),
        (["--best=2"], "leave --best out"),
        (["--eval=rows.tsv"], "--task=write writes one text; leave --eval out"),
        (["--set=num_beams=2", "--set=temperature=0"], "num_beams=2"),
        (["--set=temperature=0"], "temperature=0 makes all 2 candidates of a piece the same"),
        (["--words=0"], "words"),
    ],
)
def test_bad_input_is_one_line_before_the_model(ask, folder, arguments, message):
    # The folder of the model is wrong as well, and would be reported if it were read first.
    code, out, err = ask(*WRITE, "--workdir=OTHER", *arguments)
    assert (code, out) == (2, "") and message in err
    assert len(err.strip().splitlines()) == 1
    assert (folder / "mine.md").read_text() == "A text of mine.\n"


def test_what_does_not_fit_the_context_or_the_task_is_refused(ask):
    code, _, err = ask(*WRITE, "--outline={folder}/long.md")
    assert code == 2 and "section 1, 'The storm came." in err and "context of 160" in err
    code, _, err = ask("--workdir=RUN", "--task=summarise", "--words=9", stdin=b"x")
    assert code == 2 and "--words is for --task=write" in err
    code, _, err = ask("--task=write", stdin=b"x")
    assert code == 2 and "--workdir is missing" in err
