"""Check what is refused of a record, and that no half of a line survives."""

import json

import pytest

from mtnlg_jax.tasks.writing.record import check_settings, opened, read_lines

SETTINGS = {"words": 9, "decode": {"seed": 1, "top_p": 0.5}}


def test_lines_are_appended_and_read_back(tmp_path):
    output = str(tmp_path / "folder" / "s.md")
    with opened(output, SETTINGS, read_lines(output)) as record:
        assert not record.replays
        record.add({"type": "piece", "text": "one"})
        record.show("one\n")
    lines = read_lines(output)
    assert lines == [{"type": "settings", **SETTINGS}, {"type": "piece", "text": "one"}]
    with opened(output, SETTINGS, lines) as record:
        assert record.replays and record.next("piece")["text"] == "one" and not record.replays
        record.check_text("one two")
        record.add({"type": "memory"})
    assert [line["type"] for line in read_lines(output)] == ["settings", "piece", "memory"]


def test_half_a_line_is_dropped(tmp_path):
    output = str(tmp_path / "s.md")
    whole = json.dumps({"type": "settings", **SETTINGS}) + "\n"
    (tmp_path / "s.md.jsonl").write_text(whole + '{"type": "pie')
    lines = read_lines(output)
    assert len(lines) == 1
    with opened(output, SETTINGS, lines) as record:
        record.add({"type": "memory"})
    assert (tmp_path / "s.md.jsonl").read_text() == whole + '{"type": "memory"}\n'
    (tmp_path / "s.md.jsonl").write_text('{"type": "sett')
    with opened(output, SETTINGS, read_lines(output)):
        pass
    assert (tmp_path / "s.md.jsonl").read_text() == whole


def test_files_that_are_not_ours_to_continue_are_refused(tmp_path):
    output = str(tmp_path / "s.md")
    record = tmp_path / "s.md.jsonl"
    (tmp_path / "s.md").write_text("A text of mine.\n")
    with pytest.raises(ValueError, match="memory://s.md is a URL"):
        read_lines("memory://s.md")
    with pytest.raises(ValueError, match="s.md exists, and no s.md.jsonl beside it"):
        read_lines(output)
    record.write_text('{"type": "settings"}\nnonsense\n{"type": "end"}\n')
    with pytest.raises(ValueError, match="jsonl, line 2: not a line of a record"):
        read_lines(output)
    record.write_text('{"type": "settings"}\n{"type": "end", "words": 1200}\n')
    with pytest.raises(ValueError, match="is finished, with 1,200 words; name another file"):
        read_lines(output)
    record.write_text('{"type": "settings"}\n{"type": "piece"}\n')
    with opened(output, {}, read_lines(output)) as opened_record:
        with pytest.raises(ValueError, match="was changed after it was written"):
            opened_record.check_text("Another text.")
        opened_record.check_text("A text of mine. It goes on.")
        with pytest.raises(ValueError, match="line 2: holds 'piece', and 'memory' was due"):
            opened_record.next("memory")
        with (
            pytest.raises(ValueError, match="another process writes"),
            opened(output, {}, read_lines(output)),
        ):
            pass


def test_the_setting_that_differs_is_named():
    lines = [json.loads(json.dumps({"type": "settings", **SETTINGS, "headings": ("a", "b")}))]
    check_settings("s.md", lines, SETTINGS | {"headings": ("a", "b")})
    check_settings("s.md", [], SETTINGS)
    with pytest.raises(
        ValueError, match="made with words=9, and this command has 10 \\(--words\\)"
    ):
        check_settings("s.md", lines, SETTINGS | {"words": 10})
    with pytest.raises(ValueError, match=r"made with decode.seed=1.* 2 \(--set=decode.KEY\)"):
        check_settings("s.md", lines, {"decode": {"seed": 2, "top_p": 0.5}})
    with pytest.raises(ValueError, match=r"headings=\[\"a\", \"b\"\].*\(--outline\)"):
        check_settings("s.md", lines, {"headings": ("a",)})
