"""The page in headless Chromium; skipped without playwright or a Chromium.

MTNLG_SCREENSHOTS names a folder to which each test writes what it has seen.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

pytestmark = pytest.mark.slow
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 60_000  # milliseconds that a step may take on a busy machine
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def server(make, serving_of):
    # Slow enough to be stopped.
    with serving_of(make(pause=0.05)) as server:
        yield server


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("no Chromium; name one in CHROMIUM")
    with playwright.sync_playwright() as play:
        with play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
            yield browser


@pytest.fixture
def open_page(server, chromium, request):
    """Return a function that opens the page; errors and foreign requests fail the test."""
    wrong: list[str] = []
    opened = []

    def new(**options):
        context = chromium.new_context(locale=options.pop("locale", "en-US"), **options)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("console", lambda told: _check_console(told, wrong))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: _check_own(asked.url, server.port, wrong))
        page.goto(f"http://127.0.0.1:{server.port}/")
        expect(page.locator("#model")).to_have_value("tiny")
        opened.append((page, context))
        return page

    yield new
    for number, (page, context) in enumerate(opened):
        if folder := os.environ.get("MTNLG_SCREENSHOTS"):
            name = f"{request.node.name}-{number}.png"
            page.screenshot(path=Path(folder, name), full_page=True)
        context.close()
    assert wrong == []


def _check_own(url: str, port: int, wrong: list[str]) -> None:
    if not url.startswith(f"http://127.0.0.1:{port}/"):
        wrong.append(f"asked {url}")


def _check_console(told, wrong: list[str]) -> None:
    # The browser tells of every answer that is an error; the page shows those itself.
    if told.type == "error" and "status of 400" not in told.text:
        wrong.append(told.text)


def _set(page, name: str, value: str) -> None:
    page.evaluate("document.getElementById('settings').open = true")
    page.locator(f"#{name}").fill(value)


def test_it_writes_streams_and_shows_alternatives(open_page):
    page = open_page()
    _set(page, "max_tokens", "12")
    _set(page, "temperature", "0")
    page.locator("#prompt").fill("The cat")
    page.locator("#go").click()
    tokens = page.locator("#out .t")
    expect(tokens.first).to_be_visible()
    # The text is shown while it is written.
    expect(page.locator("#go")).to_be_disabled()
    expect(page.locator("#stats")).to_contain_text(re.compile(r"\d"))
    expect(page.locator("#go")).to_be_enabled()
    assert page.locator("#out .given").text_content() == "The cat"
    tokens.first.hover()
    expect(page.locator("#tip")).to_be_visible()
    assert len(page.locator("#tip").text_content().splitlines()) == 5
    page.locator("#append").click()
    whole = page.locator("#prompt").input_value()
    assert whole.startswith("The cat") and len(whole) > len("The cat")


def test_stop_frees_the_row(server, open_page):
    page = open_page()
    _set(page, "max_tokens", "100")
    _set(page, "temperature", "0")
    page.locator("#prompt").fill("The cat")
    before = server.engine.cancelled
    page.locator("#go").click()
    expect(page.locator("#out .t").first).to_be_visible()
    page.locator("#panel-write .halt").click()
    expect(page.locator("#state")).to_have_text("stopped")
    expect(page.locator("#go")).to_be_enabled()
    page.wait_for_timeout(500)
    assert server.engine.cancelled == before + 1 and server.api.running == 0


def test_it_chats_ranks_and_fills(open_page):
    page = open_page()
    _set(page, "max_tokens", "5")
    page.locator("#tab-chat").click()
    page.locator("#say").fill("The cat sat")
    page.locator("#send").click()
    expect(page.locator("#talk .turn")).to_have_count(2)
    expect(page.locator("#send")).to_be_enabled()
    page.locator("#tab-rank").click()
    page.locator("#before").fill("The cat")
    page.locator("#candidates").fill(" sat on the mat\n sat on the log\n sat on the mat")
    page.locator("#order").click()
    # Equal candidates are one row.
    expect(page.locator("#table tbody tr")).to_have_count(2)
    assert page.locator("#table thead th").first.text_content() == "rank"
    page.locator("#tab-fill").click()
    page.locator("#gaps").fill("The <mask> sat")
    page.locator("#guess").click()
    expect(page.locator("#guesses tr")).to_have_count(5)


def test_an_error_is_shown_and_names_the_way_out(open_page):
    page = open_page()
    page.locator("#tab-rank").click()
    page.locator("#before").fill("The cat")
    page.locator("#scorer").fill("best")
    page.locator("#order").click()
    expect(page.locator("#state.bad")).to_contain_text("unknown scorer")


def test_a_reload_keeps_texts_and_settings(open_page):
    page = open_page()
    page.locator("#prompt").fill("The dog\nsat")
    _set(page, "temperature", "0.3")
    page.locator("#tab-rank").click()
    page.locator("#candidates").fill(" one\n two")
    page.reload()
    expect(page.locator("#panel-rank")).to_be_visible()
    assert page.locator("#candidates").input_value() == " one\n two"
    assert page.locator("#temperature").input_value() == "0.3"
    page.locator("#tab-write").click()
    assert page.locator("#prompt").input_value() == "The dog\nsat"


def test_it_works_by_keyboard_alone(open_page):
    page = open_page()
    _set(page, "max_tokens", "100")
    page.locator("#tab-write").focus()
    page.keyboard.press("Tab")
    page.keyboard.type("The cat")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Control+Enter")
    expect(page.locator("#out .t").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#state")).to_have_text("stopped")
    # The tokens are reached by Tab, and show their alternatives.
    page.locator("#out").focus()
    page.keyboard.press("Tab")
    expect(page.locator("#tip")).to_be_visible()
    page.locator("#tab-write").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#panel-chat")).to_be_visible()
    assert page.evaluate("document.activeElement.id") == "tab-chat"


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_it_fits_a_phone_in_both_languages(open_page, locale):
    page = open_page(locale=locale, viewport={"width": 360, "height": 740})
    _set(page, "max_tokens", "8")
    page.locator("#prompt").fill("The cat sat on the mat and the dog sat on the log. " * 2)
    page.locator("#go").click()
    expect(page.locator("#stats")).to_contain_text(re.compile(r"\d"))
    for name in ("write", "chat", "rank", "fill"):
        page.locator(f"#tab-{name}").click()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360, f"{name} is {width} pixels wide"
    chinese = re.search(r"[一-鿿]", page.locator("#tab-write").text_content())
    assert bool(chinese) == (locale == "zh-CN")
    page.locator("#tab-rank").click()
    page.locator("#language").click()
    other = re.search(r"[一-鿿]", page.locator("#tab-write").text_content())
    assert bool(other) != bool(chinese)


def test_a_form_reaches_the_request(open_page):
    pytest.importorskip("llguidance")
    page = open_page()
    _set(page, "max_tokens", "60")
    page.locator("#form").fill(json.dumps({"type": "integer", "minimum": 10, "maximum": 99}))
    page.locator("#prompt").fill("The")
    page.locator("#go").click()
    expect(page.locator("#stats")).to_contain_text(re.compile(r"\d"))
    assert re.fullmatch(r"The\d\d", page.locator("#out").text_content())
