"""Check what authors state: its forms, and the errors of forms that the Hub would not read."""

import pytest

from mtnlg_jax.evaluate.card.about import KEYS, read_about
from mtnlg_jax.evaluate.card.card import build_card
from mtnlg_jax.evaluate.card.page import NOT_STATED

MARKDOWN = """---
license: other
license_name: sea-1.0
language: [en, zh]
---

## Intended use

Writing about **whales**.

### Out-of-scope use

Anything else.
"""


def test_markdown_and_yaml_state_the_same(tmp_path):
    (tmp_path / "about.md").write_text(MARKDOWN)
    (tmp_path / "about.yaml").write_text(
        "license: other\nlicense_name: sea-1.0\nlanguage: en, zh\n"
        "intended_use: Writing about **whales**.\nout_of_scope_use: Anything else.\n"
    )
    found = [read_about(str(tmp_path / name), {}) for name in ("about.md", "about.yaml")]
    values = [{key: stated.value for key, stated in each.items()} for each in found]
    assert values[0] == values[1] and values[0]["language"] == ["en", "zh"]
    assert found[0]["intended_use"].source == "about.md"
    flagged = read_about(str(tmp_path / "about.md"), {"intended_use": "Tests.", "contact": None})
    assert flagged["intended_use"].value == "Tests." and "contact" not in flagged


def test_what_is_not_stated_is_said_not_to_be(run):
    stated = read_about(None, {"intended_use": "Writing about **whales**."})
    above = build_card(str(run), str(run), stated).above
    assert "## Intended use\n\nWriting about **whales**." in above
    titles = ("Out-of-scope use", "Contact", "License", "Curation rationale", "Speaker demographic")
    for title in titles:
        assert f"# {title}\n\n{NOT_STATED}" in above


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.yaml", "license: Apache 2.0", "license 'Apache 2.0' is not an identifier of the Hub"),
        ("a.yaml", "license: 'http://x'", "is not an identifier"),
        ("a.yaml", "license: other", "license other needs a license_name"),
        ("a.yaml", "license_name: x", "license_name goes with license: other"),
        ("a.yaml", "licence: mit", "unknown key 'licence'; choose of license,"),
        ("a.yaml", "language: english", "'english' is not a code of ISO 639"),
        ("a.yaml", "datasets: {a: b}", "must be a list of names"),
        ("a.yaml", "contact: 5", "contact=5 must be text"),
        ("a.yaml", "- a", "is not a mapping"),
        ("a.yaml", "a: [", "is not YAML"),
        ("a.yaml", b"\xff", "is not UTF-8"),
        ("a.md", "text\n## Contact\nme", "has text above its first heading"),
        ("a.md", "## Purpose\nx", "unknown key 'Purpose'"),
    ],
)
def test_other_forms_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words):
        read_about(str(tmp_path / name), {})


def test_every_key_may_be_stated(tmp_path):
    lists = {"language": "en", "license": "mit"}
    (tmp_path / "a.yaml").write_text("".join(f"{key}: {lists.get(key, 'x')}\n" for key in KEYS))
    assert set(read_about(str(tmp_path / "a.yaml"), {})) == set(KEYS)
