"""The page in a real browser: a picture is dropped and cut, asked about, and answered while one watches."""

import base64
import shutil

import pytest
from fake_engine import FakeEngine
from serving import data_uri, expected, picture, question, running, wait_for

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
DROP = """([data, type]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0))
  const transfer = new DataTransfer()
  transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }))
  const event = type === "paste" ? new ClipboardEvent(type, { clipboardData: transfer, bubbles: true })
    : new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true })
  document.body.dispatchEvent(event)
}"""
PICTURE = picture(size=(180, 80))  # becomes 3 x 2 slices and the whole


@pytest.fixture(scope="module")
def browser():
  with playwright.sync_playwright() as play:
    browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def served(processor):
  with running(processor, FakeEngine(rows=1, pause=0.01, words=12), max_tokens=300) as url:
    yield url


@pytest.fixture
def page(browser, served):
  context = browser.new_context(viewport={"width": 390, "height": 780})
  context.set_default_timeout(15_000)
  page, complaints = context.new_page(), []
  refused = "Failed to load resource: the server responded with a status of 400"
  page.on("console", lambda message: message.text.startswith(refused) or complaints.append(message.text))
  page.on("pageerror", lambda error: complaints.append(str(error)))
  page.on("request", lambda request: request.url.startswith((served, "data:")) or complaints.append(request.url))
  page.goto(served)
  page.wait_for_selector("#state[data-state=ok]")
  yield page
  assert complaints == []
  context.close()


def test_a_dropped_picture_is_cut_asked_about_and_answered(page, processor):
  page.evaluate(DROP, [base64.b64encode(PICTURE).decode(), "drop"])
  page.wait_for_selector("#tray b")
  assert page.inner_text("#tray figcaption").startswith(
    "28 visual tokens · 3 × 2 slices and the whole · 180\u00a0×\u00a080"
  )
  assert page.locator("#tray .badge").all_inner_texts() == ["1", "2", "3", "4", "5", "6"]
  assert page.locator("#tray .cut").count() == 3
  page.keyboard.type("what is it")  # the question has the focus
  page.keyboard.press("Enter")
  page.wait_for_selector(".answered:not(.writing)")
  first = question(pictures=[data_uri(PICTURE)], max_tokens=300)
  said = expected(processor, first, count=12)
  assert page.inner_text(".answered .text") == said
  assert "12 answered" in page.inner_text(".answered .facts")
  assert page.locator("#tray figure").count() == 0 and page.locator(".asked .badge").count() == 6

  page.keyboard.type("and now")
  page.keyboard.press("Enter")
  page.wait_for_selector(".answered:not(.writing) >> nth=1")
  turns = [*first["messages"], {"role": "assistant", "content": said}, {"role": "user", "content": "and now"}]
  assert page.locator(".answered .text").nth(1).inner_text() == expected(
    processor, first | {"messages": turns}, count=12
  )
  page.click("#new")
  assert page.locator(".turn").count() == 0 and page.is_visible("#drop")


def test_a_pasted_picture_can_be_taken_out_and_one_that_is_none_is_told(page):
  page.evaluate(DROP, [base64.b64encode(PICTURE).decode(), "paste"])
  page.wait_for_selector("#tray b")
  page.click("#tray .remove")
  assert page.locator("#tray figure").count() == 0
  page.evaluate(DROP, [base64.b64encode(b"no picture").decode(), "paste"])
  page.wait_for_selector("#tray figcaption.bad")
  assert "cannot be read as a picture" in page.inner_text("#tray figcaption")


def test_stop_settings_and_errors(page, served):
  served.engine.words = 10**4
  page.fill("#question", "what is it")
  page.keyboard.press("Enter")
  page.wait_for_selector(".writing .text:not(:empty)")
  page.keyboard.press("Escape")
  page.wait_for_selector(".answered:not(.writing)")
  assert "stopped" in page.inner_text(".answered .facts")
  wait_for(lambda: served.engine.running == 0 and served.engine.cancelled)

  served.engine.words = 12
  page.click("summary")
  page.fill("#max-tokens", "3")
  page.keyboard.press("Escape")
  page.fill("#question", "what is it")
  page.click("#send")
  page.wait_for_selector(".answered:not(.writing) >> nth=1")
  assert "3 answered" in page.locator(".facts").nth(1).inner_text()
  assert "cut off at the longest answer" in page.locator(".facts").nth(1).inner_text()

  page.click("summary")
  page.fill("#max-tokens", "100000")
  page.keyboard.press("Escape")
  page.fill("#question", "what is it")
  page.click("#send")
  page.wait_for_selector(".answered.failed")
  assert "max_tokens is at most 300 here" in page.inner_text(".answered.failed .text")
  assert page.input_value("#question") == "what is it"  # to be sent once more


def test_nothing_is_wider_than_a_small_screen(page):
  page.evaluate(DROP, [base64.b64encode(PICTURE).decode(), "drop"])
  page.wait_for_selector("#tray b")
  assert page.evaluate("document.documentElement.scrollWidth") <= 390
