"""benchmarks/peers: a real peer scores, a finished cell is not computed again, and a peer that fails is a row."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from tests.scripts import script
from tests.tiny_text import make_data, make_model, make_task

import s2d
from s2d.report.schema import read_results

pytest.importorskip("transformers")


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return script("benchmarks/peers/run.py")


def test_a_peer_scores_resumes_and_fails_as_a_row(
    runner: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, out, table = make_data(tmp_path / "data"), tmp_path / "out", tmp_path / "peers.json"
    loaded = s2d.load(make_model(tmp_path / "plain"))
    s2d.save(make_task(tmp_path / "again", loaded).build(loaded).eval(), tmp_path / "model", tokenizer=loaded.tokenizer)

    def call(*words: str) -> dict[str, dict[str, object]]:
        common = ["--bed", "text", "--model", f"adamw:0={tmp_path / 'model'}", "--data", str(data)]
        common += ["--max-length", "24", "--out", str(out), "--json", str(table)]
        monkeypatch.setattr(sys, "argv", ["run.py", *common, *words])
        assert runner.main() == 0
        return {row["method"]: row for row in json.loads(table.read_text())["records"]}

    monkeypatch.setattr(runner, "environment", lambda peer, out: Path(sys.executable if peer == "torch" else "false"))
    found = call("--peer", "torch", "gptqmodel", "--way", "w4a4_minmax", "w4")
    assert found["gptqmodel"]["value"] is None and "run.py --install gptqmodel" in str(found["gptqmodel"]["failed"])
    scored = found["torch"]
    assert 0 <= scored["value"] <= 100 and scored["rows"] == 45 and scored["peak_mb"] > 0  # type: ignore[operator]
    assert scored["spec"] == "w4a4-static" and str(scored["version"]).startswith("torch 2")
    assert {record.method for record in read_results(json.loads(table.read_text())).records} == {"torch", "gptqmodel"}
    (cell,) = out.glob("cells/*torch*.json")
    made = cell.stat().st_mtime_ns
    call("--peer", "torch", "--way", "w4a4_minmax")
    assert cell.stat().st_mtime_ns == made, "nothing was computed again"


def test_a_peer_that_hangs_is_ended_at_the_limit_and_one_that_fails_says_its_last_line(runner: ModuleType) -> None:
    child = os.fork()
    if child == 0:
        os.setsid()
        time.sleep(60)
        os._exit(0)
    time.sleep(0.1)  # until it leads its group
    assert runner.waited(child, 0.3) is None
    with pytest.raises(ChildProcessError):
        os.waitpid(child, 0)
    assert runner.last_line("Traceback\n  File x\nValueError: no\n\n") == "ValueError: no"


def test_every_way_names_a_row_and_no_two_share_a_cell(runner: ModuleType) -> None:
    for peer in runner.PEERS:
        _, ways = runner.ways_of(peer)
        assert ways and all(way.row in runner.ROWS and way.beds for way in ways)
        assert len({way.name for way in ways}) == len({(way.row, way.about) for way in ways}) == len(ways)
