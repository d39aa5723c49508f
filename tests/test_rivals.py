"""The comparison of rivals in small: every stage, cells that are not computed again, and a table of what is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "rivals.py"


def rivals(out: Path, *options: str) -> str:
    command = [sys.executable, str(SCRIPT), "--quick", "--looks", "2", "--ptq", "gptq", "--out", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_looks_tests_and_tables_and_computes_nothing_twice(tmp_path: Path) -> None:
    first = rivals(tmp_path, "--methods", "adamw,l2", "--extra", "smoothquant")
    assert "quick l2 [baseline l2, strength 0.01] 0 validation fp32" in first
    cells = {path: path.stat().st_mtime_ns for path in tmp_path.glob("quick/cells/*.json")}
    # Two methods with two looks of 1 + 3 cells; of each the chosen one: 1 + 3 + 1 + 1 on test; AdamW by smoothquant.
    assert len(cells) == 2 * 2 * 4 + 2 * 6 + 1
    table = (tmp_path / "quick" / "rivals.md").read_text()
    assert table.count("| * |") == 2 and "| method | full | W4A4 rtn, mean | W4A4 gptq |" in table
    second = rivals(tmp_path, "--methods", "adamw,l2", "--extra", "smoothquant")
    assert " 0 test " not in second, "nothing was computed again"
    assert cells == {path: path.stat().st_mtime_ns for path in tmp_path.glob("quick/cells/*.json")}
    assert (tmp_path / "quick" / "rivals.md").read_text() == table


def test_an_unknown_method_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="unknown methods adamv; choose from adamw"):
        rivals(tmp_path, "--methods", "adamv")
