"""s2d beside what people would pick instead: one table of other people's quantizers on the same models.

    python benchmarks/peers/run.py --install PEER ...
    python benchmarks/peers/run.py --bed text --data banking77 --model adamw:0=FOLDER --model s2d:0=FOLDER
        [--peer NAME ...] [--row ROW ...] [--way NAME ...] [--rows 770] [--again] [--json docs/results/peers.json]

A bed is `text` (MiniLM, a folder of `s2d condition`), `image` (DINOv2-small, a file of `benchmarks/vision.py`; the data
are the folder of CIFAR-10's tables) or `language` (a decoder and a folder with test.txt and valid.txt). Every peer
gets the same plain model, the same calibration examples (128 texts, 64 images, 8 windows) and the same test rows.

A peer that needs packages of its own has an environment under --out: a virtual environment on top of the running
interpreter's packages, with the versions of `by_PEER.txt`. Each cell is a process there with a time limit, and its
result a file under --out: what is there is not computed again, unless --again names it by peer, row or way. A peer that
fails, hangs or runs out of memory is a row with the last line of its error. --json collects all cells under --out.

seconds are processor seconds of quantizing, imports included; peak_mb is the most memory of the process meanwhile; for
files the size, and the speed of one row on one thread beside torch's file in full precision, the fastest of 60 turns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from peers.contract import IMAGE, LANGUAGE, ROWS, TEXT, Job, Way

from s2d.io.files import JSON, read_json, write_json
from s2d.io.provenance import measured, run_metadata

HERE = Path(__file__).resolve().parent
PEERS = sorted(
    (file.stem[3:] for file in HERE.glob("by_*.py")), key=lambda name: (name != "plain", name == "s2d", name)
)
CALLED = {"plain": "none", "s2d": "s2d itself"}  # in the tables, beside the models that are called s2d
ABSENT = "not installed"
ROUNDS = 60


def environment(peer: str, out: Path) -> Path:
    """The interpreter of a peer: its own where one was installed, else this one."""
    own = out / "environments" / peer / "bin" / "python"
    return own if own.exists() else Path(sys.executable)


def install(peer: str, out: Path) -> None:
    """A peer's versions, on top of the packages of this interpreter; torch stays the one that is here."""
    wanted = HERE / f"by_{peer}.txt"
    if not wanted.exists():
        print(f"{peer}: runs with the packages that are here")
        return
    folder = out / "environments" / peer
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, stdout=-1, text=True
    )
    (Path(own.stdout.strip()) / "running.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", wanted], check=True)
    print(f"{peer}: installed")


def ways_of(peer: str) -> tuple[str, list[Way]]:
    """The package that a peer needs, and its ways, in the order of the rows."""
    module = importlib.import_module(f"peers.by_{peer}")
    found = [way for each in vars(module).values() for way in getattr(each, "ways", [])]
    return module.PACKAGE, sorted(found, key=lambda way: ROWS.index(way.row))


def wanted(options: argparse.Namespace, peer: str) -> list[Way]:
    """The ways of a peer that a call asks for."""
    return [
        way
        for way in ways_of(peer)[1]
        if options.bed in way.beds
        and (not options.row or way.row in options.row)
        and (not options.way or way.name in options.way)
    ]


def cell(options: argparse.Namespace, model: str, peer: str, way: Way) -> Path:
    """The file of a result."""
    conditioning, seed, _ = parts(model)
    return options.out / "cells" / f"{options.bed}-{conditioning}-{seed}-{options.rows}-{peer}-{way.name}.json"


def parts(model: str) -> tuple[str, int, str]:
    """Name, seed and source of NAME:SEED=SOURCE."""
    named, _, source = model.partition("=")
    name, _, seed = named.partition(":")
    return name, int(seed or 0), source


def missing(options: argparse.Namespace, model: str, peer: str) -> list[Way]:
    """The ways that have no result yet."""
    found = []
    for way in wanted(options, peer):
        path = cell(options, model, peer, way)
        if not path.exists() or str(read_json(path).get("failed", "")).startswith(ABSENT):
            found.append(way)
    return found


def failed(options: argparse.Namespace, model: str, peer: str, way: Way, reason: str) -> None:
    """A row that says why there is no number."""
    write_json(cell(options, model, peer, way), {**about(options, model, peer, way), "value": None, "failed": reason})
    print(f"{model.partition('=')[0]} {way.row} {peer} {way.name}: {reason}", flush=True)


def about(options: argparse.Namespace, model: str, peer: str, way: Way) -> JSON:
    """What a row is of."""
    conditioning, seed, _ = parts(model)
    names = {TEXT: "MiniLM", IMAGE: "DINOv2-small", LANGUAGE: "SmolLM2"}
    row = {"task": options.data.name, "model": names[options.bed], "conditioning": conditioning, "seed": seed}
    row |= {"spec": way.row, "method": peer, "observer": way.about, "split": "test", "way": way.name}
    language = options.bed == LANGUAGE
    return row | {"metric": "perplexity" if language else "accuracy", "higher_is_better": not language}


def serve(options: argparse.Namespace, model: str) -> None:
    """In an environment: load the bed once, then one forked process for every missing cell of its peers."""
    from peers.beds import BEDS

    *_, source = parts(model)
    more = {"max_length": options.max_length} if options.bed == TEXT else {}
    bed = BEDS[options.bed](source, options.data, options.rows, **more)
    cells = [(peer, way) for peer in options.peer for way in missing(options, model, peer)]
    files = options.out / "files" / model.partition("=")[0].replace(":", "-") / options.bed
    if any(way.file for _, way in cells) and not (files / "torch.onnx").exists():
        write_files(bed, files)
    for peer, way in cells:
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - the child's, too
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            code = 1
            try:
                run(options, model, peer, way, bed, files)
                code = 0
            except BaseException as error:
                print(f"\n{type(error).__name__}: {last_line(str(error)) or 'no message'}", flush=True)
            finally:
                os._exit(code)
        status = waited(child, options.minutes * 60)
        log.seek(0)
        if status != 0:
            text = log.read()
            if options.verbose:
                print(text)
            reason = last_line(text)
            if status is None:
                reason = f"stopped after {time.monotonic() - started:.0f} s: the limit"
            elif status < 0:
                reason = "killed: out of memory?" if status == -signal.SIGKILL else f"signal {-status}"
            failed(options, model, peer, way, reason)
        else:
            row = read_json(cell(options, model, peer, way))
            print(f"{model.partition('=')[0]} {way.row} {peer} {way.name}: {row['value']:.2f}", flush=True)


def waited(child: int, seconds: float) -> int | None:
    """The exit status of a process, negative for a signal; None where it was stopped at the limit."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.2)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def last_line(text: str) -> str:
    """The last line that says something, cut, without folders of this machine."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[-1] if lines else ""
    for folder in (str(Path.cwd()), str(Path.home()), tempfile.gettempdir(), sysconfig.get_path("purelib")):
        line = line.replace(folder, "...")
    return line[:200]


def write_files(bed: Any, folder: Path) -> None:
    """The ONNX files that peers start from: torch's own, and the one with bounded masks."""
    from s2d.export import example_of
    from s2d.export.conditioned import export_conditioned, find_compiler
    from s2d.export.onnx import write_onnx

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        export_conditioned(bed.model, made, compiler=find_compiler("any"), inputs=bed.calibration)
        write_onnx(bed.model, example_of(bed.calibration), made / "torch.onnx", opset=20)
        made.rename(folder)


def run(options: argparse.Namespace, model: str, peer: str, way: Way, bed: Any, files: Path) -> None:
    """One cell: quantize, score, time, write."""
    with tempfile.TemporaryDirectory() as scratch:
        job = Job(bed.model, bed.part, bed.calibration, bed.labelled, files, Path(scratch))
        before = time.process_time()
        with measured() as cost:
            made = way.quantize(job)
        row = about(options, model, peer, way)
        row |= {
            "seconds": round(time.process_time() - before, 1),
            "wall_seconds": cost.seconds,
            "peak_mb": cost.peak_mb,
        }
        if isinstance(made, Path):
            row |= timed(made, files / "torch.onnx", bed)
            from s2d.export import open_exported

            made = open_exported(made)
        row["value"] = bed.score(made, way.alone)
        package, _ = ways_of(peer)
        row |= {"rows": sum(len(labels) for _, labels in bed.test), "version": version(package), "commit": commit()}
        write_json(cell(options, model, peer, way), row)


def timed(file: Path, full: Path, bed: Any) -> JSON:
    """Size of a file with what lies beside it, and its speed beside full precision, one row on one thread."""
    from s2d.export import open_exported
    from s2d.export.gate import take_turns

    one = {name: value[:1] for name, value in bed.test[0][0].items()}
    made, plain = (partial(open_exported(each), **one) for each in (file, full))
    ms, full_ms = (min(each) for each in take_turns([made, plain], ROUNDS))
    size = sum(
        each.stat().st_size for each in file.parent.iterdir() if each.stem == file.stem and each.suffix != ".json"
    )
    return {"megabytes": size / 1e6, "milliseconds": ms, "speedup": full_ms / ms}


def version(package: str) -> str:
    """Of an imported package."""
    names = importlib.metadata.packages_distributions().get(package.partition(".")[0], [])
    names = [name for name in names if package.replace(".", "-") in name] or names or [package]
    return f"{names[0]} {importlib.metadata.version(names[0])}"


def commit() -> str:
    """Of this repository, short; "+" behind it where files differ from it."""
    git = ["git", "-C", str(HERE)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, stdout=-1, text=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], check=True, stdout=-1, text=True).stdout
        return name + "+" * bool(changed.strip())
    return ""


def collected(options: argparse.Namespace) -> None:
    """All cells as the records of a results file."""
    rows = [read_json(path) for path in sorted(options.out.glob("cells/*.json"))]
    models = ["MiniLM", "DINOv2-small", "SmolLM2"]
    order = {each: at for names in (models, ROWS, PEERS) for at, each in enumerate(names)}
    rows.sort(
        key=lambda r: (
            [order[r[field]] for field in ("model", "spec", "method")] + [r["way"], r["seed"], r["conditioning"]]
        )
    )
    said = {(peer, way.name): way.about for peer in PEERS for way in ways_of(peer)[1]}
    for row in rows:
        row["observer"] = said.get(
            (row["method"], row["way"]), row["observer"]
        )  # its words may be newer than its number
        row["method"] = CALLED.get(row["method"], row["method"])
    versions = sorted({row["version"] for row in rows if "version" in row})
    commits = sorted({row["commit"] for row in rows if "commit" in row})
    write_json(options.json, {"run": run_metadata(peers=versions, commits=commits), "records": rows})


def main() -> int:
    """Install, or fill the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", nargs="+", choices=PEERS)
    parser.add_argument("--bed", choices=(TEXT, IMAGE, LANGUAGE), default=TEXT)
    parser.add_argument("--model", action="append", default=[], metavar="NAME:SEED=SOURCE")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--row", nargs="+", choices=ROWS)
    parser.add_argument("--way", nargs="+")
    parser.add_argument("--rows", type=int, default=0, help="test rows; all without it")
    parser.add_argument("--max-length", type=int, default=48, help="tokens of a text")
    parser.add_argument("--minutes", type=float, default=10.0, help="limit of a cell")
    parser.add_argument("--again", action="store_true", help="compute what --peer, --row and --way name once more")
    parser.add_argument("--out", type=Path, default=Path("build/peers"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--verbose", action="store_true", help="print what a failing peer wrote")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for peer in options.install or []:
        install(peer, options.out)
    if options.serve:
        serve(options, options.model[0])
        return 0
    if options.model and options.data is None:
        parser.error("--model needs --data")
    for model in options.model:  # a wrong name is no failure of a peer, so it makes no row
        named, _, source = model.partition("=")
        if not source or not (named.partition(":")[2] or "0").isdecimal():
            parser.error(f"--model {model}: give NAME:SEED=SOURCE, such as adamw:0=FOLDER")
        for path in [options.data] + [Path(source)] * (options.bed != LANGUAGE):
            if not path.exists():
                parser.error(f"there is no {path}")
    for model in options.model:
        fill(options, model)
    if options.json:
        collected(options)
    return 0


def fill(options: argparse.Namespace, model: str) -> None:
    """The missing cells of a model, one environment after the other; peers without one of their own share."""
    shared: dict[Path, list[str]] = {}
    for peer in options.peer:
        if options.again:
            for way in wanted(options, peer):
                cell(options, model, peer, way).unlink(missing_ok=True)
        if not (ways := missing(options, model, peer)):
            continue
        python = environment(peer, options.out)
        there = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({ways_of(peer)[0]!r}) is None)"
        if not subprocess.run([python, "-c", there], stderr=subprocess.DEVNULL).returncode:
            shared.setdefault(python, []).append(peer)
            continue
        for way in ways:
            failed(options, model, peer, way, f"{ABSENT}; python benchmarks/peers/run.py --install {peer}")
    for python, peers in shared.items():
        words = ["--serve", "--bed", options.bed, "--model", model, "--data", options.data, "--peer", *peers]
        words += ["--rows", options.rows, "--minutes", options.minutes, "--out", options.out]
        words += ["--max-length", options.max_length]
        words += ["--verbose"] * options.verbose + (["--row", *options.row] if options.row else [])
        words += ["--way", *options.way] if options.way else []
        done = subprocess.run([python, __file__, *map(str, words)], stderr=subprocess.PIPE, text=True)
        for peer in peers if done.returncode else []:
            for way in missing(options, model, peer):
                failed(options, model, peer, way, last_line(done.stderr) or f"exit {done.returncode}")


if __name__ == "__main__":
    sys.exit(main())
