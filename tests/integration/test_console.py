"""The console in a real headless Chromium, over a gateway without Ray."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from lib.serving.keys import add_key
from lib.storage import Storage
from tests import programs
from tests.browser import Browser, Page, browser
from tests.console_line import Served, publish_models, served, write_history
from tests.unit.serving_parts import picture

DESKTOP, PHONE = (1280, 900), (390, 844)
ANSWERED = "document.querySelectorAll('.answer .bars .best').length === 3"
LABELS = "[...document.querySelectorAll('.answer strong')].map((label) => label.textContent)"
SHIFTS = """
new Promise((resolve) => new PerformanceObserver((list) => resolve(
  list.getEntries().filter((e) => !e.hadRecentInput).reduce((sum, e) => sum + e.value, 0)
)).observe({type: "layout-shift", buffered: true}) || setTimeout(() => resolve(0), 300))
"""
# WCAG 2.2, 1.4.3: every text that can be read, against the first ground behind it that is opaque.
CONTRAST = """
(() => {
  const parse = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b]
    .map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, alpha = 1] = parse(getComputedStyle(at).backgroundColor);
      if (alpha > 0.8) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const isText = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!isText || !element.checkVisibility({visibilityProperty: true})) continue;
    if (element.closest(":disabled, .unseen, .skip, noscript")) continue;
    const style = getComputedStyle(element);
    const ink = parse(element instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(ink), light(ground(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${element.textContent.trim().slice(0, 30)}`);
  }
  return found;
})()
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Console:
    """A console that can be opened."""

    line: Served
    storage: Storage
    browser: Browser

    @property
    def url(self) -> str:
        return self.line.url

    def check(self, page: Page) -> None:
        """No complaint was logged, and nothing was asked of another host."""
        assert page.complaints() == []
        assert {urlsplit(url).netloc for url in page.requested()} == {urlsplit(self.url).netloc}

    def labels(self) -> list[str]:
        """Return the last label of each answer."""
        last = {label["request_id"]: label["label"] for label in self.line.labels}
        return list(last.values())


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    programs.require("chromium")
    with browser(tmp_path_factory.mktemp("chromium") / "profile") as made:
        yield made


@pytest.fixture
def console(
    tmp_path: Path, chromium: Browser, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Console]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    storage = Storage(str(tmp_path / "storage"))
    publish_models(storage)
    write_history(storage, time.time())
    with served(storage) as line:
        yield Console(line=line, storage=storage, browser=chromium)


def shoot(page: Page, tmp_path: Path, name: str) -> None:
    """Keep a picture for people to look at; RAYLINE_SCREENSHOTS names the folder."""
    folder = Path(os.environ.get("RAYLINE_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(folder / f"{name}.png")


def draw_one(page: Page, *, is_touch: bool = False) -> None:
    """Draw the digit 1, off the middle: a stroke, a little slanted."""
    x, y, width, height = page.centre("#canvas")
    points = [
        (x + width * (0.22 - 0.06 * step / 12), y + height * (step / 12 - 0.5) * 0.6)
        for step in range(13)
    ]
    page.drag(points, is_touch=is_touch)


def draw_seven(page: Page) -> None:
    x, y, width, height = page.centre("#canvas")
    bar = [(x + width * (step / 10 - 0.5) * 0.5, y - height * 0.28) for step in range(11)]
    leg = [
        (x + width * (0.25 - 0.32 * step / 12), y + height * (0.6 * step / 12 - 0.28))
        for step in range(13)
    ]
    page.drag(bar + leg)


def test_draw_see_every_version_and_correct_it(console: Console, tmp_path: Path) -> None:
    with console.browser.page() as page:
        page.show(console.url, *DESKTOP)
        page.until("document.querySelectorAll('#samples img').length === 10")
        draw_one(page)
        page.until(ANSWERED)
        assert page.evaluate(LABELS) == ["1", "1", "1"]
        page.click("#clear")
        assert page.evaluate(LABELS) == ["–", "–", "–"]
        draw_seven(page)
        page.until(ANSWERED)
        assert page.evaluate(LABELS) == ["7", "7", "7"]
        shares = page.evaluate(
            "[...document.querySelectorAll('.answer .best .value')].map((v) => v.textContent)"
        )
        assert len(set(shares)) == 3, "versions answer by themselves"
        assert console.labels() == []
        page.until("!document.getElementById('truth').disabled")
        page.click("#classes button:nth-child(10)")
        note = page.until("document.querySelector('#truth-note').textContent.startsWith('Stored')")
        assert note
        assert console.labels() == ["9", "9", "9"]
        page.click("#classes button:nth-child(8)")
        page.until("document.querySelectorAll('.answer.right').length === 3")
        assert console.labels() == ["7", "7", "7"]
        shoot(page, tmp_path, "desktop-light")
        page.scheme("dark")
        shoot(page, tmp_path, "desktop-dark")
        console.check(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_within_its_width(
    console: Console, tmp_path: Path, scheme: str
) -> None:
    with console.browser.page() as page:
        page.show(console.url, *PHONE, is_dark=scheme == "dark")
        page.until("document.querySelectorAll('#samples img').length === 10")
        draw_one(page, is_touch=True)
        page.until(ANSWERED)
        assert page.evaluate(LABELS) == ["1", "1", "1"]
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
        small = page.evaluate(
            "[...document.querySelectorAll('button, select')].filter((b) => b.checkVisibility() &&"
            " b.getBoundingClientRect().height < 24).length"
        )
        assert small == 0, "WCAG 2.5.8: targets of 24 px"
        page.until("!document.getElementById('truth').disabled")
        shoot(page, tmp_path, f"phone-{scheme}")
        assert page.evaluate(CONTRAST) == []
        console.check(page)


def test_traffic_charts_and_rollout_are_drawn_without_jumps(console: Console) -> None:
    with console.browser.page() as page:
        page.show(console.url, *DESKTOP)
        page.until("document.querySelectorAll('.chart svg').length === 4")
        lines = page.evaluate(
            "[...document.querySelectorAll('.chart')]"
            ".map((chart) => chart.querySelectorAll('.line').length)"
        )
        assert lines == [2, 4, 2, 1]
        assert page.evaluate("document.querySelectorAll('.chart .mark').length") == 3
        split = page.evaluate("document.getElementById('split').getAttribute('aria-label')")
        assert split == "Traffic split: version 3 90.0\u00a0%, version 4 10.0\u00a0%"
        ranks = page.evaluate(
            "[...document.querySelectorAll('tbody th')].map((head) => head.textContent)"
        )
        assert ranks == ["Version 3", "Version 4", "Version 5"]
        assert "user-7 → version 4" in page.evaluate("document.getElementById('pins').textContent")
        assert page.evaluate("document.querySelector('[aria-current=step]').textContent") == "5 %"
        assert page.evaluate("document.querySelectorAll('.gates li').length") == 3
        assert page.evaluate(SHIFTS) < 0.1
        for scheme in ("light", "dark"):
            page.scheme(scheme)
            assert page.evaluate(CONTRAST) == [], scheme
        console.check(page)


def test_it_works_by_keyboard_alone(console: Console) -> None:
    with console.browser.page() as page:
        page.show(console.url, *DESKTOP)
        page.until("document.querySelectorAll('#samples img').length === 10")

        def tab_to(condition: str) -> None:
            for _ in range(40):
                page.key("Tab", 9)
                if page.evaluate(f"Boolean(document.activeElement.{condition})"):
                    break
            else:
                raise AssertionError(condition)
            style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert style == "solid", "focus can be seen"

        tab_to("querySelector('[alt=\"Sample of 4\"]')")
        page.key("Enter", 13, "\r")
        page.until(ANSWERED)
        page.until("!document.getElementById('truth').disabled")
        tab_to("matches('#classes button:nth-child(5)')")
        page.key("Enter", 13, "\r")
        page.until("document.querySelector('#truth-note').textContent.startsWith('Stored')")
        assert console.labels() == ["4", "4", "4"]
        assert page.evaluate("document.activeElement.textContent") == "4"
        console.check(page)


def test_where_a_key_is_asked_for_the_page_asks_and_keeps_it_in_the_tab(
    console: Console, tmp_path: Path
) -> None:
    key = add_key(console.storage, "day")
    with served(console.storage) as line, console.browser.page() as page:
        page.show(line.url, *DESKTOP)
        page.until("document.getElementById('key-dialog').open")
        shoot(page, tmp_path, "key")
        for typed in ("wrong", key):
            page.call("Input.insertText", text=typed)
            page.key("Enter", 13, "\r")
            if typed == "wrong":
                page.until("document.getElementById('key-problem').textContent.includes('valid')")
        page.until("document.querySelectorAll('.answer').length === 3")
        assert not page.evaluate("document.getElementById('key-dialog').open")
        kept = page.evaluate("[sessionStorage.getItem('rayline-key'), localStorage.length]")
        assert kept == [key, 0]
        assert page.evaluate("document.cookie") == ""


def test_without_a_key_the_page_says_so_and_asks_when_told(console: Console) -> None:
    add_key(console.storage, "day")
    with served(console.storage) as line, console.browser.page() as page:
        page.show(line.url, *DESKTOP)
        page.until("document.getElementById('key-dialog').open")
        page.key("Escape", 27)
        page.until("document.getElementById('state').textContent.includes('key is needed')")
        assert not page.evaluate("document.getElementById('key-dialog').open")
        page.click("#key")
        page.until("document.getElementById('key-dialog').open")


def test_pictures_of_other_classes_are_uploaded(console: Console, tmp_path: Path) -> None:
    file = tmp_path / "blue.png"
    file.write_bytes(picture(np.full((40, 60, 3), (4, 60, 200), np.uint8)))
    with console.browser.page() as page:
        page.show(console.url, *DESKTOP)
        page.until("document.querySelectorAll('.answer').length === 3")
        page.evaluate(
            "{ const s = document.getElementById('model'); s.value = 'shapes';"
            " s.dispatchEvent(new Event('change')); }"
        )
        page.until("document.querySelectorAll('.answer').length === 1")
        assert not page.evaluate("document.getElementById('canvas').checkVisibility()")
        page.upload("#file", file)
        page.until("document.querySelector('.answer strong').textContent === 'circle'")
        page.until("!document.getElementById('truth').disabled")
        shoot(page, tmp_path, "upload")
        page.click("#classes button:nth-child(3)")
        page.until("document.querySelectorAll('.answer.wrong').length === 1")
        assert console.labels() == ["star"]
        text = tmp_path / "notes.txt"
        text.write_text("no picture")
        page.upload("#file", text)
        page.until("document.getElementById('problem').textContent.startsWith('notes.txt')")
        console.check(page)


def test_a_gateway_that_goes_away_is_told_and_comes_back(console: Console) -> None:
    with console.browser.page() as page:
        page.show(console.url, *DESKTOP)
        page.until("document.getElementById('state').classList.contains('live')")
        page.call("Network.emulateNetworkConditions", offline=True, latency=0,
                  downloadThroughput=-1, uploadThroughput=-1)  # fmt: skip
        page.until("document.getElementById('state').classList.contains('lost')")
        assert page.evaluate("document.querySelectorAll('.answer').length") == 3
        page.call("Network.emulateNetworkConditions", offline=False, latency=0,
                  downloadThroughput=-1, uploadThroughput=-1)  # fmt: skip
        page.until("document.getElementById('state').classList.contains('live')")


def test_a_line_without_jobs_or_traffic_has_a_whole_page(tmp_path: Path, chromium: Browser) -> None:
    storage = Storage(str(tmp_path / "storage"))
    publish_models(storage)
    storage.delete(f"data/sets/{'e' * 32}.json")
    with served(storage) as line, chromium.page() as page:
        page.show(line.url, *DESKTOP)
        page.until("document.querySelectorAll('.answer').length === 3")
        page.until("document.querySelectorAll('.chart .empty').length === 4")
        shoot(page, tmp_path, "empty")
        assert page.complaints() == []


def test_the_api_page_works_offline(console: Console, tmp_path: Path) -> None:
    with console.browser.page() as page:
        page.show(f"{console.url}/docs", *DESKTOP)
        page.until("document.querySelectorAll('.opblock').length > 5", wait_s=30)
        shoot(page, tmp_path, "docs")
        console.check(page)


def test_the_drawing_is_sent_as_the_training_images_are(console: Console) -> None:
    with console.browser.page() as page:
        page.show(console.url, *DESKTOP)
        page.until("document.querySelectorAll('.answer').length === 3")
        draw_one(page)
        page.until(ANSWERED)
        pixels = np.array(
            page.evaluate(
                "[...document.getElementById('small').getContext('2d')"
                ".getImageData(0, 0, 28, 28).data]"
            ),
            np.float64,
        ).reshape(28, 28, 4)[:, :, 0]
    rows, columns = np.nonzero(pixels > 30)
    assert 19 <= rows.max() - rows.min() + 1 <= 21
    assert pixels.max() > 250
    weight = pixels / pixels.sum()
    centre = (
        (weight.sum(axis=1) * np.arange(28)).sum(),
        (weight.sum(axis=0) * np.arange(28)).sum(),
    )
    assert math.dist(centre, (13.5, 13.5)) < 0.7
    assert len(columns)
