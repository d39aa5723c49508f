"""The comparison of rivals in small: every stage, cells that are not computed again, and a table of what is there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tests.scripts import script

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "rivals.py"


@pytest.fixture(scope="module")
def rivals() -> Any:
    """The script as a module; one process saves the imports."""
    return script("benchmarks/rivals.py")


def run(rivals: Any, out: Path, methods: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--quick", "--looks", "1", "--ptq", "gptq", "--extra", "smoothquant", "--methods", methods]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options, "--out", str(out)])
    rivals.main()


@pytest.mark.timeout(300)
def test_it_looks_tests_and_tables_and_computes_nothing_twice(
    rivals: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(rivals, tmp_path, "adamw,l2", monkeypatch)
    assert "quick l2 [baseline l2, strength 0.01, kinds [linear, norm]] 0 validation fp32" in capsys.readouterr().out
    cells = {path: path.stat().st_mtime_ns for path in tmp_path.glob("quick/cells/*.json")}
    # Both: full precision and three calibrators on validation; these, gptq and the ratio on test; AdamW by smoothquant.
    assert len(cells) == 2 * 4 + 2 * 6 + 1
    table = (tmp_path / "quick" / "rivals.md").read_text()
    assert table.count("| * |") == 2 and "| method | full | W4A4 rtn, mean | to s2d | W4A4 gptq |" in table
    run(rivals, tmp_path, "adamw,l2", monkeypatch)
    assert "quick l2" not in capsys.readouterr().out, "nothing was computed again"
    assert cells == {path: path.stat().st_mtime_ns for path in tmp_path.glob("quick/cells/*.json")}
    assert (tmp_path / "quick" / "rivals.md").read_text() == table


def test_an_unknown_method_is_named(
    rivals: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(rivals, tmp_path, "adamv", monkeypatch)
    assert "unknown methods adamv; choose from adamw" in capsys.readouterr().err
