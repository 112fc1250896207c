"""Check the pages: links resolve, and the page of settings matches the dataclasses."""

import re
from pathlib import Path

import pytest

from mtnlg_jax.config import page

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_and_code_references_exist(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (path.parent / target).exists(), target
    if path.name != "CHANGELOG.md":  # which names files of its time
        folders = "mtnlg_jax|tests|configs|launch|benchmarks|notebooks"
        for place in re.findall(rf"`((?:{folders})/[\w/.]+\.\w+)(?::[\w.]+)?`", text):
            assert (ROOT / place).exists(), place


def test_the_front_page_links_every_page():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    for path in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{path.name})" in readme, path.name


def test_the_page_of_settings_matches_the_dataclasses():
    assert (ROOT / "docs/configuration.md").read_text() == page.render()


def test_every_setting_has_a_description():
    rows = [line for line in page.render().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    for row in rows:
        assert re.search(r"\| [^|]+\. \|$", row), row
