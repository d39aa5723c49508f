"""The page in a real browser, where one is installed: it renders, answers to clicks and keys, and nothing is logged.

With S2D_SCREENSHOTS=FOLDER the pages are kept there as pictures, at the sizes of a desktop and of a phone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.browsers import SIZES, chromium, needs_chromium
from tests.report import sample
from tests.report.test_hostile import HOSTILE, attack, everywhere

from s2d.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright, which drives the browser")
pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


class Opened:
    """A page in the browser, and everything that it logged."""

    def __init__(self, browser: Any, path: Path, size: str = "desktop", scheme: str = "light") -> None:
        width, height = SIZES[size]
        phone = size == "phone"
        view = {"width": width, "height": height}
        context = browser.new_context(viewport=view, color_scheme=scheme, is_mobile=phone, has_touch=phone)
        context.set_offline(True)
        self.page = context.new_page()
        self.logged: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.logged.append(message.text))
        self.page.on("pageerror", lambda error: self.logged.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def scroll(self) -> None:
        """To the end and back, so that everything that is drawn when it is seen is drawn."""
        self.page.evaluate(
            """async () => {
                for (let y = 0; y < document.body.scrollHeight; y += 500) {
                    scrollTo(0, y); await new Promise((done) => setTimeout(done, 30));
                }
                scrollTo(0, 0); await new Promise((done) => setTimeout(done, 30));
            }"""
        )

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text()

    def close(self) -> None:
        own = self.page.url
        self.page.context.close()
        assert self.logged == []
        assert [url for url in self.asked if url != own and not url.startswith(("data:", "blob:"))] == []


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    contents = {"run": sample.run(), "trend": sample.trend(), "audit": sample.audit()}
    return {name: write_report(content, folder / f"{name}.html") for name, content in contents.items()}


@pytest.mark.parametrize("name", ["run", "trend", "audit"])
@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_every_chart_is_drawn_and_the_page_fits(
    browser: Any, pages: dict[str, Path], name: str, size: str, scheme: str
) -> None:
    opened = Opened(browser, pages[name], size, scheme)
    opened.scroll()
    drawn = opened.page.locator(".chart:visible").evaluate_all("(all) => all.map((one) => one.children.length > 0)")
    assert len(drawn) >= 3 and all(drawn)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    if kept := os.environ.get("S2D_SCREENSHOTS"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        opened.page.screenshot(path=Path(kept) / f"report-{name}-{size}-{scheme}.png", full_page=True)
    opened.close()


def test_a_weight_is_chosen_in_the_map_by_mouse_by_keys_and_in_the_list(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["run"])
    article = "#close-up article:visible"
    assert "encoder.layer.0.output.dense.weight" in opened.text(f"{article} h3")
    assert opened.count(f"{article} .pictures .chart .main-svg") > 0
    cell = opened.page.locator(".layer-0 table.map").first.locator("td[data-weight]").first
    cell.click()
    assert "encoder.layer.0.attention.self.query.weight" in opened.text(f"{article} h3")
    assert opened.count(f"{article} .panels .chart") == 2  # spectrum and PCDR; no picture, no history
    cell.focus()
    opened.page.keyboard.press("ArrowRight")
    opened.page.keyboard.press("Enter")
    assert "encoder.layer.0.attention.self.key.weight" in opened.text(f"{article} h3")
    opened.page.locator("#next").click()
    assert "encoder.layer.0.attention.self.value.weight" in opened.text(f"{article} h3")
    opened.page.locator("#choose").select_option("encoder.layer.1.output.dense.weight")
    assert opened.count(f"{article} .panels .chart") == 3
    opened.close()


def test_the_map_switches_tables_sort_and_copy_and_the_theme_turns(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["run"])
    page = opened.page
    page.locator("label:has(#measure-4)").click()
    assert page.locator(".layer-4").is_visible() and not page.locator(".layer-0").is_visible()
    page.locator("details:has(#audit-table) > summary").click()
    heading = page.locator("#audit-table thead button", has_text="output max / RMS")
    heading.click()
    column = heading.evaluate("(button) => button.closest('th').cellIndex")
    values = f"Array.from(document.querySelectorAll('#audit-table tbody tr'), (r) => +r.cells[{column}].dataset.sort)"
    shown = [value for value in page.evaluate(values) if value]
    assert shown == sorted(shown, reverse=True) and shown[0] == pytest.approx(214)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("[data-copy=audit-table]").click()
    playwright.expect(page.locator("#status")).to_have_text("74 rows copied")
    assert len(page.evaluate("navigator.clipboard.readText()").splitlines()) == 75
    before = page.locator("#close-up .xtick text").first.evaluate("(text) => getComputedStyle(text).fill")
    page.locator("#theme").click()
    assert page.locator("#close-up .xtick text").first.evaluate("(text) => getComputedStyle(text).fill") != before
    opened.close()


def test_hostile_names_stay_words_in_every_chart(browser: Any, tmp_path: Path) -> None:
    content = everywhere(sample.run(), attack)
    content["audits"] = {key + HOSTILE: audit for key, audit in content["audits"].items()}
    opened = Opened(browser, write_report(content, tmp_path / "hostile.html"))
    opened.page.on("dialog", lambda dialog: opened.logged.append("a dialog: " + dialog.message) or dialog.dismiss())
    opened.scroll()
    assert opened.count("img") == 0 and opened.count(".chart a") == 0
    assert "<script>alert(1)" in opened.page.locator("#close-up .stage").inner_text()
    opened.page.locator("#close-up .stage .chart").first.hover()
    opened.close()


def test_the_page_prints(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["run"], scheme="dark")
    printed = opened.page.pdf(format="A4", print_background=True)
    assert printed.startswith(b"%PDF") and len(printed) > 20_000
    opened.close()
