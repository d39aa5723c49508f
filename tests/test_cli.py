"""The command line: help without torch, tables and JSON, and one clear line for whatever is wrong."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from tests.tiny_text import make_data, make_model, make_texts

from s2d.cli import main
from s2d.experiments.recipe import read_recipe
from s2d.experiments.recipe_files import read_text

COMMANDS = ("demo", "audit", "condition", "quantize", "evaluate", "run", "report", "doctor")
TASK = ("--task", "text-classification", "--data")


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("accelerate")
    return make_model(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def conditioned(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("conditioned") / "model"
    settings = ("-o", "train.batch_size=16", "-o", "train.lr=1e-3", "-o", "task.max_length=24")
    assert main(["condition", str(model), *TASK, str(data), "--out", str(out), "--steps", "6", *settings, "-q"]) == 0
    return out


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one line on standard error of a command that must fail."""
    capsys.readouterr()
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("s2d: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


def test_condition_without_labels(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out, notes = str(make_texts(tmp_path / "texts.txt", 64)), tmp_path / "model", tmp_path / "run.json"
    settings = ("--data", data, "-o", "task.max_length=16", "-q")
    more = ("--objective", "distill", "--minutes", "0.02", "-o", "train.batch_size=8", "--json", str(notes))
    assert main(["condition", str(model), *settings, *more, "--out", str(out)]) == 0
    training = json.loads(notes.read_text())["training"]
    assert 1 <= training["steps"] < 10_000 and training["seconds"] >= 1.2, "the time decides"
    judge = ("evaluate", str(out), "--task", "unlabelled-text", *settings, "--json", str(notes))
    capsys.readouterr()
    assert main([word for word in judge if word != "-q"]) == 0
    assert f"the original is {model}, which {out} was made from" in " ".join(capsys.readouterr().out.split())
    found = json.loads(notes.read_text())["records"]
    assert main([*judge, "-o", f"task.original={model}"]) == 0
    assert [each["value"] for each in found] == [each["value"] for each in json.loads(notes.read_text())["records"]]
    values = {record["metric"]: record["value"] for record in found}
    assert 50 < values["cosine"] < 100 and values["drift"] == pytest.approx(100 - values["cosine"])


def test_a_language_model_at_the_encoders_strength_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.txt").write_text("".join(f"story {i} of the robin and wren {i % 17}\n" for i in range(200)))
    command = ["condition", "new:llama-tiny", "--task", "language-modeling", "--steps", "1"]
    command += ["--data", str(tmp_path), "-o", "task.window=32"]
    distill = ["--objective", "distill"]
    for name, more, told in (
        ("a", [], "decay.strength=0.005"),
        ("b", ["-o", "decay.strength=0.005"], ""),
        ("c", distill, "decay.budget=0.1"),
        ("d", [*distill, "-o", "decay.budget=0.1"], ""),
    ):
        assert main([*command, *more, "--out", str(tmp_path / name)]) == 0
        said = capsys.readouterr().err
        assert f"begin with -o {told}" in said if told else "begin with" not in said


# -- help --------------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_needs_no_torch() -> None:
    code = "import sys; from s2d.cli import main; main(['--help']); print(*sys.modules)"
    done = fresh(code)
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.splitlines()[-1].split())
    assert not modules & {"torch", "transformers", "numpy", "yaml"}
    assert all(command in done.stdout for command in COMMANDS)
    if hasattr(os, "wait4"):  # processor time of a help page; a busy machine cannot lengthen it much
        seconds = []
        for _ in range(3):
            process = subprocess.Popen([sys.executable, "-m", "s2d.cli", "--help"], stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds.append(usage.ru_utime + usage.ru_stime)
        assert min(seconds) <= 0.5


def test_recipes_are_listed_and_shown_without_torch() -> None:
    code = "import sys; from s2d.cli import main; main(['recipes', {}]); print(*sys.modules)"
    for arguments in ("'list'", "'show', 'minilm-docstrings'"):
        done = fresh(code.format(arguments))
        assert done.returncode == 0 and "minilm" in done.stdout, done.stderr
        assert "torch" not in done.stdout.splitlines()[-1].split()


def test_the_shell_completes_commands_and_options() -> None:
    def completed(words: str) -> list[str]:
        asked = {"_S2D_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        command = [sys.executable, "-c", "import sys; from s2d.cli import main; sys.exit(main())"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | asked, timeout=60, check=True)
        return done.stdout.split()

    assert completed("s2d qua") == ["quantize"]
    assert completed("s2d quantize --sp") == ["--spec"]


TEACHING = (*COMMANDS, "export", "bench", "recipes", "recipes list", "recipes show", "recipes new")


@pytest.mark.parametrize("command", TEACHING)
def test_every_command_teaches_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"Example: s2d {command}" in text


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "condition" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("s2d ")


# -- the straight line -------------------------------------------------------------------------------------------------


def test_condition_writes_a_model_and_nothing_else(conditioned: Path) -> None:
    assert (conditioned / "model.safetensors").is_file()
    assert [path.name for path in conditioned.parent.iterdir()] == ["model"]


def test_audit_graph_shows_who_writes_what(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "graph.json"
    texts = tmp_path / "texts.txt"
    texts.write_text("one text\nand another one\n", encoding="utf-8")
    assert main(["audit", str(model), "--data", str(texts), "--graph", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    query = "encoder.layer.1.attention.self.query.weight"
    line = next(line for line in shown.splitlines() if f"product {query} " in line)
    assert "exact encoder.layer.0.output.LayerNorm.weight" in line and "masked by attention_mask" in line
    heads = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_attention_heads"]
    assert "blocks encoder.layer: 2" in shown and f" {heads} heads" in shown
    calls = json.loads(file.read_text(encoding="utf-8"))["calls"]
    assert [call["kind"] for call in calls if query in call["parameters"]] == ["product"]


def test_audit_prints_and_writes(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the old apple\na very good hammer and one wren\n")
    file, page = tmp_path / "audit.json", tmp_path / "audit.html"
    assert main(["audit", str(model), "--data", str(texts), "--json", str(file), "--html", str(page), "-q"]) == 0
    assert capsys.readouterr().out == ""
    content = json.loads(file.read_text())
    assert content["kind"] == "audit" and len(content["records"]) == 12  # two blocks of six linear layers
    assert "<html" in page.read_text()
    assert main(["audit", str(model), "--data", str(texts), "--include", "*.output.dense*", "--rows", "2"]) == 0
    told = capsys.readouterr().out
    assert "output.dense" in told.replace("\n", "")
    assert "PCDR₁       share of the outliers" in told and "w4a4 error  change of the typical" in told
    assert main(["audit", str(model), "--data", str(texts), "--rows", "2", "--html", str(page)]) == 0
    told = capsys.readouterr().out
    assert "10 more weights: --rows 12" in told and f"HTML page: {page}" in told


def test_quantize_saves_what_evaluate_reads(
    conditioned: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "w4a4", tmp_path / "plan.json"
    task = (*TASK, str(data), "-o", "task.max_length=24")
    common = ("quantize", str(conditioned), "--observer", "mse")
    assert main([*common, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "encoder.encoder.layer.0.attention.self.query.weight" in plan
    assert main([*common, *task, "--out", str(out), "--json", str(file), "-q"]) == 0
    assert {"run", "plan"} == json.loads(file.read_text()).keys()
    scores = []
    for name in (conditioned, out):
        assert main(["evaluate", str(name), *task, "--json", str(tmp_path / "score.json"), "-q"]) == 0
        record = json.loads((tmp_path / "score.json").read_text())["records"][0]
        scores.append(record["spec"])
        assert record["model"] != str(name) and record["conditioning"] == f"s2d ({conditioned})"
        assert record["metric"] == "accuracy" and 0 <= record["value"] <= 100
    assert scores == ["fp32", "w4a4"]
    capsys.readouterr()
    assert main(["evaluate", str(out), *task]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_quantize_trains_on_the_grid_without_labels(tmp_path: Path) -> None:
    model = make_model(tmp_path / "bert")
    weights = load_file(model / "model.safetensors")
    # Larger matrices, or all texts have the same embedding.
    large = {name: 10 * value if value.ndim == 2 else value for name, value in weights.items()}
    save_file(large, model / "model.safetensors", {"format": "pt"})
    texts = make_texts(tmp_path / "texts.txt", 256)
    task = ("--task", "unlabelled-text", "--data", str(texts), "-o", "task.max_length=16", "-q")
    cosines = {}
    for name, more in (
        ("rounded", ()),
        ("trained", ("--steps", "60", "-o", "qat.lr=5e-3", "-o", "train.batch_size=16")),
    ):
        out, score = tmp_path / name, tmp_path / f"{name}.json"
        common = ("quantize", str(model), "--spec", "w3a3", "--method", "rotation")
        assert main([*common, *more, *task, "--out", str(out)]) == 0
        assert not (tmp_path / f"{name}.training").exists()
        assert main(["evaluate", str(out), *task, "--json", str(score)]) == 0
        records = {record["metric"]: record for record in json.loads(score.read_text())["records"]}
        cosines[name] = records["cosine"]["value"]
        assert records["cosine"]["spec"] == "w3a3"
    assert 100 - cosines["trained"] < 0.7 * (100 - cosines["rounded"])


def test_a_budget_of_bits_is_kept_and_explained(
    conditioned: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "mixed", tmp_path / "plan.json"
    task = (*TASK, str(data), "-o", "task.max_length=24")
    where = ("--out", str(out), "--json", str(file))
    assert main(["quantize", str(conditioned), *task, "--budget", "4.5 bits", *where]) == 0
    printed = capsys.readouterr().out
    assert "bits a weight on average" in printed and "of all error at 3 bits" in printed
    weights = [site for site in json.loads(file.read_text())["plan"] if site["what"] == "weight" and site["format"]]
    bits = [int(site["format"].removeprefix("int")) for site in weights]
    sizes = [math.prod(site["shape"]) for site in weights]
    average = sum(b * size for b, size in zip(bits, sizes, strict=True)) / sum(sizes)
    assert 3 < average <= 4.5 and len(set(bits)) > 1
    assert main(["evaluate", str(out), *task]) == 0
    # A runtime multiplies by the inputs that the spec names, whatever the weights' widths.
    given = ("--budget", "5 bits", "--spec", "w4a8", "--for", "onnxruntime", "--out", f"{out}-held")
    assert main(["quantize", str(conditioned), *task, *given, "--json", str(file)]) == 0
    sites = [site for site in json.loads(file.read_text())["plan"] if site["format"]]
    assert len({site["format"] for site in sites if site["what"] == "weight"}) > 1
    assert {site["format"] for site in sites if site["what"] == "input"} == {"uint8"}


def test_run_prints_a_table_and_report_reads_its_results(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"model: {model}\ntask: {{name: text-classification, data: {data}, max_length: 24}}\n"
        "train: {steps: 2, batch_size: 8}\nquantize: {specs: [fp32, w4a4], observers: [minmax, mse]}\naudit: false\n"
    )
    assert main(["run", str(recipe), "--out", str(tmp_path / "run"), "--json", str(tmp_path / "r.json")]) == 0
    shown = capsys.readouterr()
    assert all(word in shown.out for word in ("AdamW + S2D", "W4A4", "minmax", "mean", "gain", "accuracy"))
    assert "seed 0: 2 steps" in shown.err
    assert len(json.loads((tmp_path / "r.json").read_text())["records"]) == 6
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "run" / "results.json"), "--out", str(page)]) == 0
    assert "<html" in page.read_text()


def test_recipes_and_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list"]) == 0
    assert "minilm-banking77" in capsys.readouterr().out
    assert main(["recipes", "show", "minilm-banking77"]) == 0
    assert "seeds: [0, 1, 2]" in capsys.readouterr().out
    assert main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 0
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert "rtn" in found["methods"] and found["extras"]["hf"].startswith("transformers 5.")
    for extra, text in found["extras"].items():
        assert re.match(r"\w[\w-]* \d", text) or f'pip install "s2d[{extra}]"' in text


# -- bad input ---------------------------------------------------------------------------------------------------------


def damaged(model: Path, folder: Path, how: str) -> Path:
    """A copy of the model that cannot be used."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "nan":
        tensors["encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "pickle":
        weights.unlink()

        class Attack:
            def __reduce__(self) -> Any:
                return (os.mkdir, (str(folder / "attacked"),))

        torch.save({"weight": Attack()}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "model.safetensors"),
        ("nan", "weight encoder.layer.1.output.dense.weight holds 1 NaN or Inf"),
        ("pickle", "would run code"),
    ],
)
@pytest.mark.parametrize("command", ["audit", "condition", "quantize", "evaluate"])
def test_damaged_models(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, message: str, command: str
) -> None:
    name, out = str(damaged(model, tmp_path / "damaged", how)), str(tmp_path / "out")
    task = (*TASK, str(data))
    rest = {
        "audit": ["--json", out],
        "condition": [*task, "--out", out],
        "quantize": ["--out", out],
        "evaluate": [*task],
    }
    assert message in fails(capsys, command, name, *rest[command])
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
    assert not (tmp_path / "damaged" / "attacked").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "nowhere/at/all"], "no folder or file 'nowhere/at/all'"),
        (["audit", "{here}"], "is not a model folder"),
        (["audit", "{here}/notes.txt"], "is not a model file"),
        (["audit", "{model}", "--include", "*.outptu.dense*"], "close names: encoder.layer.1.output.dense"),
        (["audit", "{model}", "--spec", "w1a4"], "1 bits is not possible"),
        (["audit", "{model}", "--data", "{here}/none.txt"], "no folder or file"),
        (["audit", "{model}", "--data", "{here}/empty.txt"], "no text in it"),
        (["audit", "{model}", "--json", "{here}"], "is a folder; name a file"),
        (["audit"], "Missing argument 'MODEL...'; see s2d audit --help"),
        (["audit", "{model}", "--graph", "--html", "graph.html"], "--graph shows one model as a table"),
        (["audit", "{model}", "{model}", "--graph"], "give one MODEL"),
        (["audit", "{model}", "--row", "5"], "No such option: --row"),
        (["audti", "{model}"], "No such command 'audti'"),
        (
            ["quantize", "{model}", "--method", "gptx", "--out", "{out}"],
            "unknown quantization method 'gptx'; choose from",
        ),
        (["quantize", "{model}", "--observer", "max", "--out", "{out}"], "unknown observer 'max'"),
        (["quantize", "{model}", "--spec", "four", "--out", "{out}"], "unknown quantization spec 'four'"),
        (["quantize", "{model}"], "add --out FOLDER, or --dry-run"),
        (["quantize", "{model}", "--out", "{out}", "--steps", "9"], "--steps trains, so it needs a loss and data"),
        (
            ["quantize", "{model}", *TASK, "{data}", "--out", "{out}", "--steps", "9", "--observer", "mse"],
            "--steps learns the ranges; leave out --observer",
        ),
        (["quantize", "{model}", "--out", "{out}", *TASK, "{data}", "-o", "qat.lr=1e-3"], "add --steps"),
        (["quantize", "{model}", "--budget", "some", "--dry-run"], "a budget is a number of bits a weight"),
        (["quantize", "{model}", "--budget", "2", "--dry-run"], "is below the smallest choice, 3; raise it"),
        (["quantize", "{model}", "--out", "{here}/notes.txt"], "is a file; name a folder"),
        (["quantize", "{model}", "--out", "{here}/notes.txt/deep"], "cannot be written"),
        (["quantize", "{model}", "--out", "{here}"], "exists and is not a quantized model of s2d"),
        (["evaluate", "{model}"], "add --task, one of detection, docstrings"),
        (["evaluate", "{model}", "--task", "docstring"], "unknown task 'docstring'; did you mean docstrings?"),
        (["evaluate", "{model}", *TASK, "{data}"], "has only 32 positions"),
        (["evaluate", "{conditioned}", *TASK, "{data}", "--split", "tset"], "split='tset': input should be 'train'"),
        (["evaluate", "{conditioned}", "--task", "text-classification"], "needs the option 'data'"),
        (["condition", "{model}", *TASK, "{data}", "--out", "{out}", "--preset", "papre"], "preset='papre' is unknown"),
        (
            ["condition", "{model}", *TASK, "{data}", "--out", "{out}", "-o", "decay.threshold=2"],
            "threshold=2 is out of",
        ),
        (
            ["condition", "{model}", *TASK, "{data}", "--out", "{out}", "-o", "decay.strength=-1"],
            "strength=-1 is out of",
        ),
        (["condition", "{model}", *TASK, "{data}", "--out", "{out}", "-o", "train.lrr=1"], "did you mean lr?"),
        (["condition", "{model}", *TASK, "{data}", "--out", "{out}", "--steps", "0"], "Invalid value for '--steps'"),
        (["condition", "{model}", *TASK, "{data}"], "add --out FOLDER"),
        (["condition", "{model}", "--objective", "distill", "--out", "{out}"], "needs texts or images; add --data"),
        (["condition", "{model}", "--objective", "destill", "--out", "{out}"], "choose from task, distill"),
        (["condition", "{model}", *TASK, "{data}", "--objective", "distill", "--out", "{out}"], "leave out --task"),
        (["condition", "{model}", *TASK, "{data}", "--minutes", "0", "--out", "{out}"], "train.minutes=0.0"),
        (
            [
                "condition",
                "{model}",
                *TASK,
                "{data}",
                "--out",
                "{out}",
                "-o",
                "task.max_length=24",
                "-o",
                "decay.max_rank=99",
            ],
            "max_rank=99 exceeds the rank",
        ),
        (
            [
                "condition",
                "{model}",
                *TASK,
                "{data}",
                "--out",
                "{out}",
                "-o",
                "task.max_length=24",
                "-o",
                "decay.include=x.y",
            ],
            "no weight of the model matches 'x.y'",
        ),
        (
            ["condition", "{model}", *TASK, "{here}/odd.csv", "--out", "{out}", "-o", "task.max_length=24"],
            "odd.csv, line 3",
        ),
        (["run", "minilm-dcostrings"], "did you mean minilm-docstrings"),
        (["run", "minilm-docstrings", "-o", "train.steps"], "write key=value"),
        (["run", "minilm-docstrings", "--out", "{here}/notes.txt", "-o", "model={model}"], "is a file; name a folder"),
        (["recipes", "show", "nothing"], "there is no recipe 'nothing'"),
        (["report", "{here}/notes.txt"], "is not a JSON file"),
        (["report", "{here}/none.json"], "No such file"),
        (["report", "{here}/other.json"], "not a results file of s2d"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    model: Path,
    data: Path,
    conditioned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    here, out = tmp_path / "here", tmp_path / "out"
    here.mkdir()
    (here / "notes.txt").write_text("not a model")
    (here / "empty.txt").write_text("\n")
    (here / "other.json").write_text("{}")
    (here / "odd.csv").write_text("text,label\nthe apple,fruit\nthe saw,tools,again\n")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    places = {"model": model, "data": data, "conditioned": conditioned, "here": here, "out": out}
    assert message in fails(capsys, *(word.format(**places) if "{" in word else word for word in arguments))
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before, "nothing half-written"


def test_conditioning_tells_its_settings_and_history_as_json(model: Path, data: Path, tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    settings = ("--seed", "3", "--steps", "2", "-o", "train.batch_size=16", "-o", "task.max_length=24")
    arguments = ["condition", str(model), *TASK, str(data), "--out", str(tmp_path / "out"), *settings]
    assert main([*arguments, "--json", str(told), "-q"]) == 0
    content = json.loads(told.read_text())
    assert content["run"]["seed"] == 3 and content["training"]["steps"] == 2 and len(content["training"]["losses"]) == 2


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_that_cannot_be_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written" in fails(capsys, "quantize", str(model), "--out", str(tmp_path / "out"))


@pytest.mark.parametrize("command", ["audit", "condition", "quantize"])
def test_a_full_disk(
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    texts = tmp_path / "texts.txt"
    texts.write_text("the old apple\n")
    rest = {
        "audit": ["--data", str(texts), "--json", str(out)],
        "condition": [*TASK, str(data), "--out", str(out), "--steps", "2", "-o", "task.max_length=24"],
        "quantize": ["--data", str(texts), "--out", str(out)],
    }
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in fails(capsys, command, str(model), *rest[command])
    assert not out.exists() and not list(tmp_path.rglob(".*"))


def test_ctrl_c_says_how_to_continue(
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import signal

    from s2d.commands import terminal

    out = tmp_path / "out"
    arguments = [
        "condition",
        str(model),
        *TASK,
        str(data),
        "--out",
        str(out),
        "-o",
        "task.max_length=24",
        "--steps",
        "4",
    ]
    real = terminal.Watch.advance

    def press(self: Any, done: int, note: str = "") -> None:
        real(self, done, note)
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(terminal.Watch, "advance", press)
        line = fails(capsys, *arguments, code=130)
    assert f"To continue: s2d condition {model}" in line and f"--out {out}" in line
    assert not out.exists() and (tmp_path / "out.training" / "state.pt").is_file()
    steps: list[int] = []
    monkeypatch.setattr(terminal.Watch, "advance", lambda self, done, note="": steps.append(done))
    assert main(arguments) == 0
    assert steps == [3, 4] and out.is_dir() and not (tmp_path / "out.training").exists()


def test_a_defect_of_ours_is_one_line_and_leaves_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from s2d.experiments import recipe_files

    def broken() -> None:
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr(recipe_files, "packaged", broken)
    line = fails(capsys, "recipes", "list", code=1)
    assert "ZeroDivisionError: oh; the traceback is in" in line
    place = Path(line.rpartition(" in ")[2].strip())
    assert "in broken" in place.read_text()
    place.unlink()


def test_too_little_memory_says_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from s2d.experiments import recipe_files

    def greedy() -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(recipe_files, "packaged", greedy)
    assert "use smaller batches" in fails(capsys, "recipes", "list")


def test_a_recipe_of_ones_own_starts_from_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    assert main(["recipes", "new", str(file)]) == 0
    assert file.read_text() == read_text("minilm-banking77")[1]  # comments and all
    assert main(["recipes", "new", str(file)]) == 2 and "exists already" in capsys.readouterr().err
    other = tmp_path / "other.yaml"
    assert (
        main(["recipes", "new", str(other), "--like", str(file), "-o", "train.steps=7", "-o", "task.max_length=9"]) == 0
    )
    recipe, origin = read_recipe(str(other))[1], read_recipe("minilm-banking77")[1]
    assert (recipe.train.steps, recipe.task.options["max_length"]) == (7, 9)
    assert recipe.task.options["data"] == origin.task.options["data"] and recipe.arms == origin.arms
    assert main(["recipes", "new", str(tmp_path / "a.yaml"), "-o", "train.stepps=7"]) == 2
    assert "did you mean steps?" in capsys.readouterr().err
    assert not (tmp_path / "a.yaml").exists()
    assert main(["recipes", "new", str(tmp_path / "a.txt")]) == 2 and ".yaml" in capsys.readouterr().err


def test_what_one_process_does_is_refused_under_torchrun(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "s2d audit runs in one process; start it without torchrun" in fails(capsys, "audit", str(model))
    given = ("quantize", str(model), *TASK, str(data), "--out", str(tmp_path / "out"))
    said = fails(capsys, *given, "--method", "smoothquant+gptq")
    assert "smoothquant cannot divide the calibration data among processes" in said and "gptq, rotation, rtn" in said
    assert "--budget and --dry-run work in one process" in fails(capsys, *given, "--budget", "4 bits")


def test_the_time_left_is_never_more_than_the_stage_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    from s2d.commands import terminal

    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    written = io.StringIO()
    watch = terminal.Watch(Console(file=written, width=120))
    for seconds in (math.inf, 100.0):
        watch.stage("candidates", 40, seconds)
        for done in (1, 2):
            now += 40.0
            watch.advance(done)
    told = [line.rpartition("about ")[2] for line in written.getvalue().splitlines()]
    assert told == ["1560 s left", "1520 s left", "60 s left", "20 s left"]
