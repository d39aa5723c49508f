"""Runs that are killed, disks that are full, data that go away, names and files that come from somebody else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.hostile_inputs import CASES
from tests.tiny_text import make_data, make_model

from s2d import cli
from s2d.errors import InputError, visible
from s2d.experiments.recipe import make_recipe
from s2d.experiments.runner import Runner
from s2d.io.files import sweep, write_atomic, write_json

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")
pytest.importorskip("PIL")


@pytest.mark.skipif(sys.platform != "linux", reason="limits and forks of Linux")
def test_a_run_that_is_killed_ends_as_if_it_had_not_been() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/kills.py"), "--small", "--kills", "3", "--seed", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^3 kills in .* 0 failures$", done.stdout, flags=re.MULTILINE), done.stdout


def test_data_that_go_away_are_named_and_the_run_continues_when_they_are_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(tmp_path / "words")
    recipe = make_recipe(
        {
            "model": str(make_model(tmp_path / "bert")),
            "task": {"name": "text-classification", "data": str(data), "max_length": 24},
            "train": {"steps": 3, "batch_size": 8, "save_every": 0},
            "arms": {"adamw": None},
            "audit": False,
            "quantize": {"specs": ["fp32"]},
        }
    )
    steps: list[int] = []

    def advance(self: Any, done: int, note: str = "") -> None:
        if note.startswith("loss"):
            steps.append(done)
            if done == 2 and len(steps) == 2:
                data.rename(tmp_path / "elsewhere")
                raise KeyboardInterrupt

    monkeypatch.setattr("s2d.experiments.runner.Silent.advance", advance)
    with pytest.raises(KeyboardInterrupt):
        Runner("a", recipe, tmp_path / "run").run()
    with pytest.raises(InputError, match="there is no folder or file '.*words' with the data"):
        Runner("a", recipe, tmp_path / "run")
    (tmp_path / "elsewhere").rename(data)
    assert Runner("a", recipe, tmp_path / "run").run()["records"]
    assert steps == [1, 2, 2, 3], "from the state of step 1 on"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory as Linux tells it")
def test_refreshes_audits_and_quantizations_leave_nothing_behind(tmp_path: Path) -> None:
    """In a process of its own: what other tests leave to the garbage collector would be counted here."""
    # 200 records of history are full after 11 refreshes; the first fifth (12) is not looked at.
    options = ["--cycles", "60", "--models", "8", "--points", "5", "--json", str(tmp_path / "soak.json")]
    subprocess.run([sys.executable, str(ROOT / "benchmarks/soak.py"), *options], check=True, capture_output=True)
    parts = json.loads((tmp_path / "soak.json").read_text())["soak"]
    assert [part["cycles"] for part in parts] == [60, 8]
    for found in parts:
        assert found["hooks_left"] == 0
        assert found["objects_growth"] < 200, found
        assert found["memory_growth_mb"] < 8, found


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that nobody may write to, not even root")
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"could not write /proc/s2d/a\.json: .*choose another place"):
        write_json("/proc/s2d/a.json", {})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_pipes_and_devices_are_written_into(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(pipe, lambda file: file.write(b"content") and None)
    assert os.read(reader, 99) == b"content"
    os.close(reader)
    assert pipe.is_fifo(), "not replaced by a file"
    if Path("/dev/full").is_char_device():
        with pytest.raises(InputError, match="No space left on device"):
            write_json("/dev/full", {"a": 1})
        assert Path("/dev/full").is_char_device()


def test_what_killed_writes_left_is_swept_up_when_it_is_old(tmp_path: Path) -> None:
    old = time.time() - 7200
    kept = [tmp_path / name for name in ("state.pt", ".git", ".notes-12345678.txt", ".state.pt-abcdefgh")]
    for path in kept:
        path.write_text("x")
    folder = tmp_path / ".model-a1b2c3d4"
    folder.mkdir()
    (folder / "model.safetensors").write_text("half")
    for path in (kept[0], kept[1], folder / "model.safetensors", folder):
        os.utime(path, (old, old))
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept), "the folder is old; the last file is being written, perhaps"


@pytest.mark.parametrize(("read", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_is_damaged_or_does_harm_is_refused_in_one_line(
    read: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=words) as caught:
        read(tmp_path)
    assert len(visible(" ".join(str(caught.value).split()), 5000)) < 1500
    assert not (tmp_path / "attacked").exists()
    assert time.monotonic() - began < 20


def test_names_reach_the_terminal_without_escapes_and_without_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\x1b]0;owned\x07[red]b[/nothing]\u202e"
    assert cli.main(["audit", name]) == 2
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown and "\\x1b" in shown

    from rich.table import Table

    from s2d.audit.terminal_tables import _Column, _fitting
    from s2d.commands.shared import say, show

    show(_fitting(name, [_Column("weight", [name])], 200, [False]))
    table = Table("[/nothing]")
    table.add_row("[bold]w[/x] :smile:")
    show(table)
    say(False, f"{name}: written\nsecond line")
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out
    assert "[red]b[/nothing]" in out and "[bold]w[/x] :smile:" in out and "\nsecond line\n" in out
