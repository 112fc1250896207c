"""Write long texts with a small model; kill the writer everywhere, and let it go on."""

import dataclasses
import json
import re

import pytest

from mtnlg_jax.decode.results import Generated
from mtnlg_jax.tasks.writing import write as writing
from mtnlg_jax.tasks.writing.record import Record, opened, read_lines
from mtnlg_jax.tasks.writing.request import Request, check_request, composer_of
from mtnlg_jax.tasks.writing.text import count_words, ends_sentence
from mtnlg_jax.tasks.writing.write import write

SHORT = Request(
    "story", "the whale and Anna", 120, "en", ("The sea", "The storm"), candidates=2, piece=40
)
TOPICS = {"en": "the whale and Anna", "zh": "鲸鱼和王小明"}


class Kept(Record):
    """A record in memory whose lines a test reads."""

    def __init__(self, lines=()):
        super().__init__(lines)
        self.lines = []

    def add(self, decision):
        self.lines.append(decision)


class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("en", 400),
        ("zh", 400),
        pytest.param("en", 2000, marks=pytest.mark.slow),
        pytest.param("zh", 2000, marks=pytest.mark.slow),
    ],
)
def test_the_words_asked_for_are_written(model, language, words):
    request = Request("story", TOPICS[language], words, language, candidates=2)
    record = Kept()
    document = write(*model, request, record=record)
    assert words * 0.9 <= document.words <= words * 1.1
    assert document.words == sum(count_words(section.text) for section in document.sections)
    # The text ends at a sentence if any candidate of its last piece did.
    *_, last = (line for line in record.lines if "candidates" in line)
    ended = any(ends_sentence(each["text"]) for each in last["candidates"])
    assert ends_sentence(document.text) == ended and document.text.endswith("\n")
    # Every section stands in the text, in order, below its heading.
    whole = "\n\n".join(f"## {each.heading}\n\n{each.text}" for each in document.sections)
    assert document.text == whole + "\n"
    assert all(
        section.words > 0.8 * words / len(document.sections) for section in document.sections
    )
    # The context of 192 holds none of the sections: each has several pieces and memories.
    assert all(section.pieces > 1 for section in document.sections)
    kinds = [line["type"] for line in record.lines]
    pieces = sum(section.pieces for section in document.sections)
    assert kinds[0] == "outline" and kinds[-1] == "end"
    assert (kinds.count("piece"), kinds.count("memory")) == (pieces, pieces - 1)
    assert document.calls == sum(line.get("calls", 0) for line in record.lines)


def test_every_choice_is_the_best_of_its_scores(model):
    record = Kept()
    weights = {"logprob": 1.0, "repetition": 4.0, "span": 1.0, "outline": 0.5, "coherence": 0.25}
    write(*model, dataclasses.replace(SHORT, weights=weights), record=record)
    pieces = [line for line in record.lines if line["type"] == "piece"]
    assert len(pieces) > 3
    for piece in pieces:
        candidates = piece["candidates"]
        assert len(candidates) == 2 and any(each["allowed"] for each in candidates)
        for each in candidates:
            assert set(each["parts"]) == set(weights)
            total = sum(weights[name] * value for name, value in each["parts"].items())
            assert each["score"] == pytest.approx(total)
        chosen = candidates[piece["chosen"]]
        assert chosen["score"] == max(each["score"] for each in candidates if each["allowed"])
    assert any(piece["chosen"] != 0 for piece in pieces)


@pytest.mark.parametrize(
    ("text", "kept"),
    [("The whale swam nor", "The whale swam"), ("The whale swam.", "The whale swam.")],
)
def test_a_last_piece_that_its_length_ends_keeps_whole_words(model, text, kept):
    composer = composer_of(SHORT, model.tokenizer, model.decoder.context)
    writer = writing._Writer(model.decoder, composer, SHORT, Kept(), None, lambda words: None)
    tokens = tuple(model.tokenizer.encode(text))
    result = Generated(0, tokens, text, "length", (-1.0,) * len(tokens))
    assert writer.kept_of(result, aim=9, last=True, opens=True).text == kept


def test_prompts_carry_the_memory_on(model, monkeypatch):
    prompts = []
    generate = writing.generate

    def spy(decoder, tokenizer, asked, config, **options):
        prompts.append(asked[0])
        return generate(decoder, tokenizer, asked, config, **options)

    monkeypatch.setattr(writing, "generate", spy)
    record = Kept()
    document = write(*model, SHORT, record=record)
    memories = [line for line in record.lines if line["type"] == "memory"]
    written = [
        prompt for prompt in prompts if prompt.endswith("Summary of the text above:") is False
    ]
    assert len(written) == len(memories) + 1
    for memory, prompt in zip(memories, written[1:], strict=True):
        if "The text so far: " in prompt:
            shown = re.search("The text so far: (.*)\n", prompt)[1]
            assert memory["summary"].startswith(shown)
        facts = re.search("Names and facts: (.*)\n", prompt)
        assert not facts or facts[1].split("; ")[0] == memory["facts"][0]
    assert sum("The text so far: " in prompt for prompt in written) > len(memories) / 2
    # The end of the text stands last, so that what is written continues it.
    first = document.sections[0].text
    assert any(first.startswith(p.split("Text:\n")[1]) and p.split("Text:\n")[1] for p in written)


def test_a_single_candidate_is_shown_while_it_is_written(model):
    shown = []
    request = dataclasses.replace(SHORT, candidates=1)
    document = write(*model, request, on_text=shown.append)
    assert "".join(shown) + "\n" == document.text
    pieces = sum(section.pieces for section in document.sections)
    assert len(shown) > 2 * pieces
    ranked = []
    document = write(*model, SHORT, on_text=ranked.append)
    assert "".join(ranked) + "\n" == document.text
    assert len(ranked) <= sum(section.pieces for section in document.sections)


def _files(model, output, request=SHORT):
    with opened(str(output), {"words": request.words}, read_lines(str(output))) as record:
        document = write(*model, request, record=record)
    assert output.read_text() == document.text
    return output.read_bytes(), output.with_name(output.name + ".jsonl").read_bytes()


def test_a_writer_killed_at_every_place_writes_the_same(model, tmp_path, monkeypatch):
    request = dataclasses.replace(SHORT, headings=(), words=80)
    whole, record = _files(model, tmp_path / "whole.md", request)
    decisions = record.count(b"\n") - 1
    generate = writing.generate
    add = Record.add
    output = tmp_path / "killed.md"
    kills = 0

    def dying_generate(*arguments, **options):
        # In the middle of a decision: the model has worked, and nothing is recorded.
        generate(*arguments, **options)
        raise Killed

    def dying_add(self, decision):
        # Right after a decision is recorded, before its text is.
        add(self, decision)
        raise Killed

    for number in range(decisions):
        # Half of a line, as a kill inside a write would leave it.
        if number:
            with open(tmp_path / "killed.md.jsonl", "ab") as file:
                file.write(b'{"type": "piece", "sect')
        in_the_middle = number % 2 == 1
        for where, dying in (("generate", dying_generate), ("add", dying_add)):
            if where == "generate" and not in_the_middle:
                continue
            with monkeypatch.context() as patch:
                if where == "generate":
                    patch.setattr(writing, where, dying)
                else:
                    patch.setattr(Record, where, dying)
                try:
                    _files(model, output, request)
                except Killed:
                    kills += 1
            text = output.read_bytes() if output.exists() else b""
            assert whole.startswith(text.rstrip(b"\n"))
    assert kills >= decisions
    lines = output.with_name("killed.md.jsonl").read_bytes()
    assert lines == record
    with pytest.raises(ValueError, match="is finished"):
        read_lines(str(output))
    # The last kill came before the text was complete on the disk or after; both hold all of it.
    assert output.read_bytes() == whole


def test_a_text_that_was_changed_is_not_overwritten(model, tmp_path, monkeypatch):
    output = tmp_path / "s.md"
    add = Record.add
    added = []

    def dying_add(self, decision):
        add(self, decision)
        added.append(decision)
        if len(added) == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Record, "add", dying_add)
        _files(model, output)
    changed = output.read_text().replace("\n\n", "\n\nMine: ", 1)
    output.write_text(changed)
    before = (tmp_path / "s.md.jsonl").read_bytes()
    with pytest.raises(ValueError, match="was changed after it was written"):
        _files(model, output)
    assert output.read_text() == changed
    assert (tmp_path / "s.md.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "stroy"}, "did you mean 'story'"),
        ({"language": "de"}, "choose from en \\(English\\), zh"),
        ({"topic": " \n"}, "the topic is empty"),
        ({"words": 0}, "words=0"),
        ({"weights": {"outlin": 1.0}}, "unknown part"),
    ],
)
def test_a_bad_request_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        check_request(dataclasses.replace(SHORT, **fields))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 2, "temperature": 0.0}, "num_beams=2"),
        ({"num_return_sequences": 2}, "--candidates"),
        ({"temperature": 0.0, "top_p": 1.0}, "the same"),
    ],
)
def test_decoding_that_does_not_draw_candidates_is_refused(settings, words):
    decode = dataclasses.replace(SHORT.decode, **settings)
    if "num_beams" in settings:
        decode = dataclasses.replace(decode, top_p=1.0)
    with pytest.raises(ValueError, match=words):
        check_request(dataclasses.replace(SHORT, decode=decode))


def test_the_record_is_json(model):
    record = Kept()
    write(*model, SHORT, record=record)
    assert json.loads(json.dumps(record.lines)) == record.lines
