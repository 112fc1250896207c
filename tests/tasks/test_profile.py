"""Check profiles: how they are read, which entries a prompt shows, and what is refused."""

import dataclasses
import json

import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.tasks.profile import Entry, Profile, read_profile, with_profile
from mtnlg_jax.tasks.prompts import Row, compose
from mtnlg_jax.tasks.run import perform
from mtnlg_jax.tasks.templates import TASKS

ENTRIES = [
    Entry("fact", "Her whale is called Moby.", 1),
    Entry("fact", "The garden has nine apple trees.", 2),
    Entry("sample", "Oh! what a sea.", 3),
    Entry("preference", "Short answers.", 4),
    Entry("sample", "The whale, she sang.", 5),
]


class Words:
    """Tokens are words: sizes can be counted by hand."""

    prompt_bos = 1
    bos_id = 0

    def encode(self, text):
        return text.split()


def texts(entries):
    return [each.text for each in entries]


def test_preferences_come_first_then_matching_facts_then_samples_of_style():
    profile = Profile(ENTRIES)
    assert texts(profile.ranked("Where is the whale now?")) == [
        "Short answers.",
        *("Her whale is called Moby.", "The whale, she sang."),
        # "the" matches weakly; a fact without a shared word is left out, a sample is not.
        "The garden has nine apple trees.",
        "Oh! what a sea.",
    ]
    assert texts(profile.ranked("Hello")) == [
        *("Short answers.", "Oh! what a sea.", "The whale, she sang.")
    ]


def test_a_profile_takes_at_most_its_share_of_the_context():
    profile = Profile(ENTRIES, share=0.25)
    row = Row("Where is the whale now? " + "and so on " * 80)
    used = []
    for context in (40, 64, 400):
        task, shown = with_profile(TASKS["summarise"], profile, row, Words(), context)
        text = profile.text(shown, "en")
        assert len(text.split()) <= context // 4
        assert task.templates["en"].instruction.startswith(text)
        assert task.templates["zh"] == TASKS["summarise"].templates["zh"]
        used.append(len(shown))
    assert used == [1, 2, 5]
    assert text == (
        "What the person wants:\n- Short answers.\n"
        "About the person:\n- Her whale is called Moby.\n- The garden has nine apple trees.\n"
        "How the person writes:\n- The whale, she sang.\n- Oh! what a sea.\n\n"
    )


def test_a_task_that_needs_its_whole_input_shows_what_fits_beside_it():
    profile = Profile(ENTRIES, share=0.5)
    task = dataclasses.replace(TASKS["translate"], decode=DecodeConfig(max_new_tokens=10))
    counts = []
    for length in (5, 65, 75, 82):
        row = Row("whale " * length)
        changed, shown = with_profile(task, profile, row, Words(), 100)
        compose(changed, row, Words(), 100)  # the input fits, whatever is shown
        counts.append(len(shown))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > counts[-1] == 0


def test_chinese_prompts_have_chinese_heads():
    profile = Profile([Entry("preference", "回答要短。", 1), Entry("fact", "她住在北方。", 2)])
    task, shown = with_profile(TASKS["answer"], profile, Row("北方冷吗？"), Words(), 400)
    assert len(shown) == 2
    assert task.templates["zh"].instruction == (
        "用户的偏好：\n- 回答要短。\n关于用户：\n- 她住在北方。\n\n简短地回答每个问题。\n\n"
    )


def test_entries_and_preferences_that_cannot_fit_are_refused():
    profile = Profile([*ENTRIES, Entry("fact", "many " * 30, 6)], name="me.md")
    with pytest.raises(ValueError, match=r"entry 6 of me\.md, 'many .*takes 34 tokens, and --prof"):
        profile.check(Words(), 100)
    profile.check(Words(), 200)
    # The English head has four words, the Chinese one a single word.
    short = Profile([Entry("preference", "回答要短。", 1)], share=0.05)
    short.check(Words(), 100, "zh")
    with pytest.raises(ValueError, match="entry 1 of the profile, '回答要短。', takes 6 tokens"):
        short.check(Words(), 100, "en")
    wishes = [Entry("preference", f"Wish number {number} is this.", number) for number in range(9)]
    with pytest.raises(ValueError, match=r"the 9 preferences of the profile, .*take 58 tokens"):
        Profile(wishes).check(Words(), 200)


def test_formats_are_read_alike(tmp_path):
    (tmp_path / "me.json").write_text(
        json.dumps({"facts": ["I sail.", "I have a dog."], "style": "Ahoy!", "preferences": []})
    )
    lines = ['"I sail."', '{"kind": "fact", "text": "I have a dog."}', "", '{"kind": "sample", ']
    (tmp_path / "me.jsonl").write_text("\n".join(lines) + '"text": "Ahoy!"}\n')
    (tmp_path / "me.md").write_text(
        "I sail.\n\n## Facts\n- I have a dog.\n\n# Style:\n1. Ahoy!\n\n# 偏好\n"
    )
    (tmp_path / "line.jsonl").write_text('"I sail.\u2028Often."\n')  # JSON takes U+2028 as it is
    assert read_profile(tmp_path / "line.jsonl").entries[0].text == "I sail.\u2028Often."
    expected = [
        *(Entry("fact", "I sail.", 1), Entry("fact", "I have a dog.", 2)),
        Entry("sample", "Ahoy!", 3),
    ]
    for name in ("me.json", "me.jsonl", "me.md"):
        assert list(read_profile(tmp_path / name).entries) == expected, name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "is not valid JSON"),
        ("a.json", '{"hobbies": ["chess"]}', "entry 1: unknown kind 'hobbies'; write fact"),
        ("a.json", "[3]", "entry 1 is not a text"),
        ("a.md", "# Hobbies\n- chess\n", "heading '# Hobbies': unknown kind"),
        ("a.md", "# Facts\n", "has no entries"),
        ("a.md", "- ...\n", "a.md has no words; write facts"),
        ("a.txt", b"\xff", "is not UTF-8 at byte 0"),
    ],
)
def test_bad_profiles_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_profile(path)


def test_answers_name_the_entries_of_their_prompts(memory):
    entries = [Entry("fact", "The captain sleeps.", 1), Entry("preference", "Brief.", 2)]
    profile = Profile(entries, share=0.8)
    rows = ["Who sleeps?", "Where is it?"]
    answers = perform(*memory, TASKS["answer"], rows, profile=profile)
    assert [[each.number for each in answer.profile] for answer in answers] == [[2, 1], [2]]
    assert "- The captain sleeps.\n" in answers[0].prompt
    assert "- The captain sleeps.\n" not in answers[1].prompt
    assert dataclasses.asdict(answers[1])["profile"] == (
        {"kind": "preference", "text": "Brief.", "number": 2},
    )
    with pytest.raises(ValueError, match="--profile_share=0.01 of the context of 160 is 1"):
        perform(*memory, TASKS["answer"], rows, profile=Profile(ENTRIES, share=0.01))
