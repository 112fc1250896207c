"""Personal data in texts: what the recipe's rules find, and whether it stands in the data."""

from mtnlg_jax.data.filter import pii
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.tokenizer import load_tokenizer
from mtnlg_jax.evaluate.audit import personal_data

TEXTS = [
    "Write to jane.doe@example.org today.\nOr call +1 (415) 555-2671, she said.",
    "The mail of <EMAIL> is jane.doe@example.org, not john@example.net.",
    "Nothing is here.",
]


def test_finds_are_what_the_recipe_masks():
    for text in TEXTS:
        masked, counts = pii.mask(text)
        finds = pii.find(text)
        assert len(finds) == sum(counts.values())
        for kind, string in finds:
            text = text.replace(string, f"<{kind.upper()}>")
        assert text == masked


def test_finds_are_counted_and_looked_up_in_the_training_text(tmp_path):
    text = "".join(f"Line {n} of some text for a store.\n" for n in range(400))
    (tmp_path / "a.txt").write_text(text[:4000] + "Ask jane.doe@example.org.\n" + text[4000:])
    prepare(tmp_path / "a.txt", tmp_path / "out", vocab_size=300, heldout=0, progress=False)
    part = open_tokens(tmp_path / "out" / "train")
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    found = personal_data.find(TEXTS)
    assert [each.kind for each in found] == ["email", "phone", "email", "email"]
    assert found[1].line == "Or call +1 (415) 555-2671, she said."
    total, known = personal_data.summarize(TEXTS, found, [part], tokenizer)
    assert total["kinds"]["email"] == {"finds": 3, "different": 2, "in_training": 1}
    assert total["kinds"]["phone"]["in_training"] == 0
    assert (total["finds"], total["different"], total["in_training"]) == (4, 3, 1)
    assert total["placeholders"] == {"email": 1}
    assert known["jane.doe@example.org"]
    assert not known["john@example.net"]
    empty, _ = personal_data.summarize(["a"], [], [part], tokenizer)
    assert (empty["finds"], empty["kinds"]) == (0, {})


def test_each_find_has_its_own_line():
    found = personal_data.find(["From me@example.org to you.\nCopy: me@example.org"])
    assert [each.line for each in found] == ["From me@example.org to you.", "Copy: me@example.org"]
