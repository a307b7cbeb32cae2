"""The page in a real browser: a class is picked, the button pressed, a picture shown; no request goes elsewhere."""

from __future__ import annotations

import shutil
import threading
import time

import pytest

from lamamba.app.session import THREAD_NAME
from lamamba.sampling.settings import read_image_metadata
from tests.app.test_page import server  # noqa: F401 (a fixture)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 30_000


@pytest.fixture
def page(server):  # noqa: F811
    """The page in headless Chromium, with the addresses of its requests and its errors."""
    playwright = pytest.importorskip("playwright.sync_api", reason="a browser test needs playwright")
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        pytest.skip(f"no browser is installed; one of {', '.join(BROWSERS)} would do")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        visit = browser.new_page(viewport={"width": 1280, "height": 900})
        visit.requested, visit.errors = [], []
        visit.on("request", lambda request: visit.requested.append(request.url))
        visit.on("pageerror", lambda error: visit.errors.append(str(error)))
        visit.goto(server.url)
        visit.wait_for_selector("#go", timeout=SECONDS)
        yield visit
        browser.close()


def choose(page, *names):
    boxes = page.locator("#classes label")
    for k in range(boxes.count()):
        box = boxes.nth(k)
        if (text := box.inner_text().strip()).isdigit():
            box.locator("input").set_checked(text in names)


def test_pick_a_class_press_the_button_and_a_picture_appears(page, tmp_path):
    choose(page, "3")
    page.click("#go")
    page.wait_for_selector("#picture img", timeout=SECONDS)
    page.wait_for_function("document.querySelector('#status').innerText.includes('pictures in')", timeout=SECONDS)
    # 4 x 2 digits, enlarged; the browser needs a moment to load them
    page.wait_for_function("document.querySelector('#picture img').naturalWidth > 500", timeout=SECONDS)
    assert page.evaluate("document.querySelector('#picture img').naturalHeight") > 250

    with page.expect_download() as waiting:
        page.click("#keep")
    waiting.value.save_as(tmp_path / "saved.png")
    assert waiting.value.suggested_filename == "lamamba_3_seed0.png"
    facts = read_image_metadata(tmp_path / "saved.png")
    assert facts.labels == (3,) * 8
    assert facts.seeds == tuple(range(8))

    home = page.url.rstrip("/")
    assert page.errors == []
    assert [url for url in page.requested if not url.startswith((home, "data:", "blob:"))] == []


def test_no_class_is_a_message_and_the_page_goes_on(page):
    choose(page)
    page.click("#go")
    page.wait_for_selector("text=No class is chosen: pick at least one.", timeout=SECONDS)
    assert "Traceback" not in page.content()
    choose(page, "5")
    page.click("#go")
    page.wait_for_function("document.querySelector('#status').innerText.includes('pictures in')", timeout=SECONDS)


def test_stop_ends_a_long_sampling(page):
    page.click("#more button")
    field = page.locator("#more input[type=number]").first
    field.fill("250")
    field.press("Tab")
    page.click("#go")
    page.wait_for_function("document.querySelector('#status').innerText.includes('of 250')", timeout=SECONDS)
    assert is_sampling()
    page.click("#stop")
    page.wait_for_selector("text=Stopped.", timeout=SECONDS)
    until = time.monotonic() + 10                                               # alone it would take twice as long
    while is_sampling() and time.monotonic() < until:
        page.wait_for_timeout(50)
    assert not is_sampling()


def test_on_a_phone_the_picture_is_above_the_controls(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(300)
    tops = [page.evaluate(f"document.querySelector('{name}').getBoundingClientRect().top") for name in (
        "#head", "#picture", "#classes", "#go")]
    assert tops == sorted(tops)
    assert page.evaluate("document.querySelector('#picture').getBoundingClientRect().bottom") < 844
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def is_sampling():
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())
