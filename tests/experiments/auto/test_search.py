"""A promise from end to end, on a tiny trained model, through onnxruntime in a child process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_text import make_data, make_model, make_texts

import s2d
from s2d.checkpoint import save
from s2d.cli import main
from s2d.errors import InputError
from s2d.experiments.auto.ladder import first
from s2d.experiments.auto.promise import Promise
from s2d.experiments.auto.rounds import Rounds
from s2d.experiments.auto.search import auto
from s2d.experiments.auto.search_records import File, Records
from s2d.experiments.auto.verdict import status_of, what_would_help
from s2d.experiments.recipe import make_recipe
from s2d.experiments.runner import Runner
from s2d.experiments.watcher import Silent
from s2d.export import open_exported
from s2d.export.runtime import find_runtime
from s2d.models import Loaded, load
from s2d.tasks import Task, create
from s2d.tasks.base import Outcomes
from s2d.training.loop import train
from s2d.training.train_settings import TrainSettings

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("promise")


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Loaded, torch.nn.Module, Task]:
    loaded = load(make_model(folder / "bert"))
    task = create("text-classification", data=make_data(folder / "words", train=700, test=100), max_length=24)
    model = task.build(loaded)
    train(model, task, TrainSettings(steps=60, batch_size=32, lr=3e-3, head_lr=1e-2), seed=0)
    save(model.eval(), folder / "trained", tokenizer=loaded.tokenizer)
    return loaded, model, task


@pytest.fixture(scope="module")
def met(folder: Path, trained: tuple[Loaded, torch.nn.Module, Task]) -> Any:
    """A promise that the first candidate keeps, in no time."""
    loaded, model, task = trained
    return auto(loaded, model, task, runtime="onnxruntime", within=20.0, minutes=0.001, out=folder / "out")


def test_a_kept_promise_names_a_file_that_scores_so_in_the_runtime(
    met: Any, folder: Path, trained: tuple[Loaded, torch.nn.Module, Task]
) -> None:
    _, model, task = trained
    assert (met.status, met.exit_code) == ("MET", 0) and met.file == str(folder / "out" / "model.onnx")
    runner = open_exported(met.file)
    full, found = (task.evaluate(each, "validation")["accuracy"] for each in (model, runner))
    row = met.frontier[-1]
    assert row.accepted and row.ran and row.ms > 0 and row.score == pytest.approx(found)
    assert met.full == pytest.approx(full) and row.drop.points == pytest.approx(full - found)
    assert row.bytes == Path(met.file).stat().st_size
    assert json.loads(json.dumps(met.to_dict()))["exit_code"] == 0


def test_another_promise_uses_what_was_judged_and_takes_the_old_result_away(
    met: Any, folder: Path, trained: tuple[Loaded, torch.nn.Module, Task]
) -> None:
    loaded, model, task = trained
    out = folder / "stricter"
    shutil.copytree(folder / "out", out)
    began = (out / "auto.json").stat().st_mtime
    verdict = auto(loaded, model, task, runtime="onnxruntime", within=0.2, minutes=0.001, out=out)
    assert (verdict.status, verdict.exit_code, verdict.file) == ("NOT SURE", 3, None)
    assert not (out / "model.onnx").exists() and (out / verdict.frontier[0].file).is_file()
    assert len(verdict.frontier) == 1 and (out / "auto.json").stat().st_mtime > began
    assert "more examples in validation" in verdict.help


def test_the_command_its_exit_codes_and_its_json(met: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantize", str(folder / "trained"), "--task", "text-classification", "--data", str(folder / "words")]
    words += ["-o", "task.max_length=24", "--method", "auto", "--for", "onnxruntime", "--out", str(folder / "out")]
    words += ["--minutes", "0.001", "--json", str(folder / "verdict.json")]
    assert main([*words, "--within", "20"]) == 0
    assert "MET: " in capsys.readouterr().out
    assert json.loads((folder / "verdict.json").read_text())["verdict"]["status"] == "MET"
    assert main([*words, "--within", "20", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "w8a8" in told and "w8a16" in told and "minutes" in told and "a4" not in told


def test_openvino_runs_its_own_file(folder: Path, trained: tuple[Loaded, torch.nn.Module, Task]) -> None:
    pytest.importorskip("openvino")
    loaded, model, task = trained
    verdict = auto(loaded, model, task, runtime="openvino", within=20.0, minutes=0.001, out=folder / "openvino")
    assert verdict.status == "MET" and verdict.file == str(folder / "openvino" / "model.xml")
    assert (folder / "openvino" / "model.bin").is_file()
    row = verdict.frontier[-1]
    file = folder / "openvino" / "model.xml"
    found = task.evaluate(open_exported(file, runtime="openvino"), "validation")["accuracy"]
    assert row.ran and row.ms is not None and row.ms > 0 and row.score == pytest.approx(found)
    assert row.bytes == sum((folder / "openvino" / f"model.{end}").stat().st_size for end in ("xml", "bin"))


class Interrupting(Silent):
    """Presses Ctrl-C when so many candidates have begun."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def advance(self, done: int, note: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interruption_leaves_the_file_and_the_next_call_goes_on(
    met: Any, folder: Path, trained: tuple[Loaded, torch.nn.Module, Task]
) -> None:
    loaded, model, task = trained
    out, tried = folder / "interrupted", 0
    shutil.copytree(folder / "out", out)
    for moment in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            auto(loaded, model, task, runtime="onnxruntime", within=20.0, out=out, watcher=Interrupting(moment))
        assert open_exported(out / "model.onnx") is not None
        left = json.loads((out / "auto.json").read_text())
        records = Records.open(out, left["key"])
        assert len(records.scored) == tried + moment - 1 and len(records.files) == 1, "what was tried is kept"
        assert not list(out.rglob(".*-????????")), "and nothing half made"
        tried = len(records.scored)


def test_more_examples_are_taken_where_a_few_cannot_decide(
    met: Any, folder: Path, trained: tuple[Loaded, torch.nn.Module, Task]
) -> None:
    loaded, model, task = trained
    out = folder / "few"
    shutil.copytree(folder / "out", out)
    content = {**json.loads((out / "auto.json").read_text()), "examples": 12, "files": {}, "rounds": []}
    (out / "auto.json").write_text(json.dumps(content))
    with pytest.raises(KeyboardInterrupt):  # before the first candidate that is tried in simulation
        auto(loaded, model, task, runtime="onnxruntime", within=15.0, out=out, watcher=Interrupting(1))
    records = Records.open(out, content["key"])
    assert (records.extended, len(records.files)) == (1, 1) and 12 < records.examples < task.sizes()["validation"]
    full, (safest,) = records.outcomes("full"), records.files
    assert full is not None
    rounds = Rounds(records, records.files[safest].candidate, full, 15.0, "smallest", True)
    drop = rounds.accepted[safest]
    assert (drop.examples, drop.level) == (records.examples, 0.975), "a second look at the same data"
    assert (out / "model.onnx").is_file(), "12 that agree would show 18 points"


def test_a_killed_call_leaves_the_file_and_the_next_goes_on(
    met: Any, folder: Path, trained: tuple[Loaded, torch.nn.Module, Task]
) -> None:
    out = folder / "killed"
    shutil.copytree(folder / "out", out)
    words = ["quantize", str(folder / "trained"), "--task", "text-classification", "--data", str(folder / "words")]
    words += ["-o", "task.max_length=24", "--method", "auto", "--for", "onnxruntime", "--within", "20"]
    package = Path(s2d.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "s2d.cli", *words, "--out", str(out), "-q"],
        env={**os.environ, "PYTHONPATH": str(package)},
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not json.loads((out / "auto.json").read_text())["scored"]:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert open_exported(out / "model.onnx") is not None
    kept = json.loads((out / "auto.json").read_text())["scored"]
    assert main([*words, "--out", str(out), "--minutes", "0.001", "-q"]) == 0
    assert kept.items() <= json.loads((out / "auto.json").read_text())["scored"].items()


def test_a_recipe_compares_its_arms_and_exports_the_most_wanted_file(folder: Path) -> None:
    content = {
        "model": str(folder / "trained"),
        "task": {"name": "text-classification", "data": str(folder / "words"), "max_length": 24},
        "train": {"steps": 2, "batch_size": 16},
        "arms": {"none": None, "s2d": {}},
        "audit": False,
        "quantize": {"specs": ["fp32"], "method": "auto", "for": "onnxruntime", "within": 50, "minutes": 0.001},
        "export": str(folder / "exported" / "best.onnx"),
    }
    results = Runner("tiny", make_recipe(content), folder / "run").run()
    assert {name: each["status"] for name, each in results["promises"].items()} == {"none-0": "MET", "s2d-0": "MET"}
    sizes = [Path(each["file"]).stat().st_size for each in results["promises"].values()]
    assert (folder / "exported" / "best.onnx").stat().st_size == min(sizes)
    assert open_exported(folder / "exported" / "best.onnx") is not None
    assert "Files that keep the accuracy" in (folder / "run" / "report.html").read_text(encoding="utf-8")
    for wrong, said in (({"export": "best.xml"}, "NAME.onnx"), ({"quantize": {}}, "add quantize.method: auto")):
        with pytest.raises(InputError, match=said):
            make_recipe({**content, **wrong})


def test_a_runtime_that_is_not_here_gets_files_and_never_a_met_promise(
    folder: Path, trained: tuple[Loaded, torch.nn.Module, Task]
) -> None:
    loaded, model, task = trained
    verdict = auto(loaded, model, task, runtime="tensorrt", within=20.0, minutes=0.001, out=folder / "elsewhere")
    assert (verdict.status, verdict.file) == ("NOT SURE", None) and "not run" in " ".join(verdict.notes)
    assert (folder / "elsewhere" / verdict.frontier[0].file).is_file() and not verdict.frontier[0].ran


def test_bad_input_is_one_line(met: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ("--task", "text-classification", "--data", str(folder / "words"), "-o", "task.max_length=24")
    one = make_data(folder / "one", train=40, test=10)
    unlabelled = ("--task", "unlabelled-text", "--data", str(make_texts(folder / "lines.txt", 300)))
    (one / "validation.csv").write_text("text,label\nold apple,fruit\n")
    begin = ("quantize", str(folder / "trained"), *task, "--method", "auto", "--out", str(folder / "bad"))
    for more, said in (
        (("--within", "1"), "--for onnxruntime"),
        (("--for", "onnxruntime"), "--within 1"),
        (("--for", "onnxruntime", "--within", "0"), "above 0"),
        (("--for", "onnxruntime", "--within", "1", "--minutes", "-1"), "above 0"),
        (("--for", "onnx-runtime", "--within", "1"), "did you mean onnxruntime"),
        (("--for", "hailo", "--within", "1"), "quantizes by itself"),
        (("--for", "gguf", "--within", "1"), "reads none"),
        (("--for", "onnxruntime", "--within", "1", "--spec", "w8a8"), "leave out --spec"),
        (("--for", "onnxruntime", "--within", "1", "--data", str(one)), "1 example"),
        (("--for", "onnxruntime", "--within", "1", *unlabelled), "no mean over examples"),
    ):
        assert main([*begin, *more]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and "Traceback" not in error, error
    assert main(["quantize", str(folder / "trained"), "--within", "1", "--out", str(folder / "bad")]) == 2
    assert "add --method auto" in capsys.readouterr().err
    other = [*begin[:-1], str(folder / "trained"), "--for", "onnxruntime", "--within", "1"]
    assert main(other) == 2 and "holds something else" in capsys.readouterr().err


# -- what the records say, without a model -----------------------------------------------------------------------------


def hits(wrong: int, count: int = 1000) -> Outcomes:
    return Outcomes.of_hits(torch.arange(count) >= wrong)


def records_of(folder: Path, wrong: dict[str, int], *, ran: bool = True) -> tuple[Records, Rounds]:
    """Three files in the order of a round, each with so many wrong answers; full precision has none wrong."""
    (folder / "candidates").mkdir(parents=True)
    safest = first(find_runtime("onnxruntime"), 8)
    records = Records(folder, {"model": "m"})
    order = []
    for number, (name, count) in enumerate(wrong.items()):
        candidate = replace(safest, rung=name, trained=float(number))
        file = f"candidates/{candidate.key}.onnx"
        (folder / file).write_bytes(b"0" * (1000 - 100 * number))
        ms = 1.0 if ran else None
        records.files[candidate.key] = File(candidate, file, 1000 - 100 * number, ms, ms, ran, 1.0)
        records.save_outcomes(candidate.key, hits(count))
        order.append(candidate)
    records.rounds = [order]
    records.write()
    return records, Rounds(records, safest, hits(0), 1.0, "smallest", True)


def test_a_file_behind_one_that_failed_is_never_named(tmp_path: Path) -> None:
    records, rounds = records_of(tmp_path, {"safe": 0, "broken": 40, "lucky": 0})
    assert rounds.chosen is not None and rounds.chosen.rung == "safe" and len(rounds.accepted) == 1
    assert records.publish(rounds.chosen) == tmp_path / "model.onnx"
    assert (tmp_path / "model.onnx").stat().st_size == 1000 and rounds.finished and not rounds.wanted_most
    rows = rounds.rows()
    assert [row.accepted for row in rows].count(True) == 1 and len(rows) == 3


def test_the_smallest_of_the_accepted_is_the_result_and_nothing_without_one(tmp_path: Path) -> None:
    records, rounds = records_of(tmp_path / "a", {"safe": 0, "smaller": 1, "smallest": 2})
    assert rounds.chosen is not None and rounds.chosen.rung == "smallest" and rounds.wanted_most
    records.publish(rounds.chosen)
    assert (tmp_path / "a" / "model.onnx").stat().st_size == 800
    records.publish(None)
    assert not list((tmp_path / "a").glob("model.*"))
    _, none = records_of(tmp_path / "b", {"bad": 30})
    assert none.chosen is None
    _, elsewhere = records_of(tmp_path / "c", {"safe": 0}, ran=False)
    assert elsewhere.chosen is None and elsewhere.accepted, "a file that was not run keeps no promise for sure"


def test_records_of_something_else_are_refused(tmp_path: Path) -> None:
    records, _ = records_of(tmp_path, {"safe": 0})
    again = Records.open(tmp_path, {"model": "m"})
    assert again.files == records.files and again.rounds == records.rounds
    with pytest.raises(ValueError, match="another model"):
        Records.open(tmp_path, {"model": "n"})
    os.unlink(tmp_path / records.files[next(iter(records.files))].file)
    assert not Records.open(tmp_path, {"model": "m"}).files, "a file that is gone is made again"


def test_verdicts_and_what_would_help(tmp_path: Path) -> None:
    _, rounds = records_of(tmp_path / "a", {"bad": 40})
    (row,) = rounds.rows()
    assert status_of(False, [row.drop], 1.0, True) == "NOT MET"
    told = {"trained": False, "stopped": False}
    assert "--minutes" in what_would_help("NOT MET", row.drop, 1.0, "validation", next=row.drop, **told)
    _, rounds = records_of(tmp_path / "b", {"near": 6})
    (row,) = rounds.rows()
    assert status_of(False, [row.drop], 1.0, True) == "NOT SURE"
    help = what_would_help("NOT SURE", row.drop, 1.0, "validation", next=row.drop, **told)
    assert "more examples in validation" in help
    assert status_of(True, [row.drop], 1.0, False) == "NOT SURE", "a file that was not run"


def test_a_promise_is_checked_before_anything_is_loaded() -> None:
    assert Promise.parse("openvino", 1.0).suffix in (".xml", ".onnx")
    assert Promise.parse("qnn", 0.5).suffix == ".onnx"
