"""The page in a real browser, where one is installed: it renders, its script runs, and nothing is logged."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.report import sample

from s2d.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("content", [sample.run(), sample.audit()], ids=["run", "audit"])
def test_chromium_renders_the_page_without_a_complaint(tmp_path: Path, content: object) -> None:
    assert CHROMIUM is not None
    page = write_report(content, tmp_path / "report.html")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--virtual-time-budget=2000",
        "--dump-dom",
    ]
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=90, check=True)
    assert "CONSOLE" not in done.stderr
    # What the script changes: it shows the theme button and makes every heading of a sortable table a button.
    assert re.search(r'<button type="button" id="theme">(Dark|Light)</button>', done.stdout)
    headings = re.findall(r"<th [^>]*>", re.findall(r'<table id="audit-table".*?</thead>', done.stdout, re.DOTALL)[0])
    assert done.stdout.count('class="sort"') >= len(headings) > 10
