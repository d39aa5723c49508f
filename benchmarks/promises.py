"""Are promises kept? The command, cell by cell, and the truth on a test split that it never saw, in a fresh process.

    python benchmarks/promises.py trained:vit-fashion --task image-classification --data DIR --runs build/promises \
        --for onnxruntime openvino --within 1.0 0.5 --json docs/results/auto.json

A cell is one runtime and one promise: ``s2d quantize --method auto`` in a process of its own, in one folder for each
runtime. Then every file that was judged, the named one among them, is opened in its runtime in another process and
scored on the test split. A verdict MET is false when the named file loses more than was promised there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d.errors import InputError
from s2d.io.files import JSON, read_json, write_json
from s2d.io.provenance import run_metadata

if TYPE_CHECKING:
    from s2d.tasks import Task

_CORRELATED = 24  # of the legal candidates, evenly


def add_subject(parser: argparse.ArgumentParser) -> None:
    """The words that say which model is asked to keep a promise, and on what."""
    parser.add_argument("model")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("-o", action="append", default=[])


def task_of(arguments: argparse.Namespace) -> Task:
    """The task that these words name."""
    from s2d.experiments.recipe import make_recipe
    from s2d.tasks import create

    content = {"model": arguments.model, "task": {"name": arguments.task, "data": arguments.data}}
    recipe = make_recipe(content, arguments.o)
    return create(recipe.task.name, **recipe.task.options)


def afresh(arguments: argparse.Namespace, option: str, value: object) -> JSON:
    """What this file says with a further option, in a fresh process."""
    words = [sys.executable, __file__, arguments.model, "--task", arguments.task, "--data", arguments.data]
    words += [word for each in arguments.o for word in ("-o", each)]
    done = subprocess.run([*words, option, json.dumps(value)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def score(arguments: argparse.Namespace) -> None:
    """In the fresh process: print the scores as JSON."""
    from s2d.export import open_exported
    from s2d.models import load
    from s2d.tasks.evaluation import evaluate, model_for

    task = task_of(arguments)
    plain = model_for(load(arguments.model), task)
    found: dict[str, Any] = {"full": evaluate(plain, task, split="test")[task.primary], "test": task.sizes()["test"]}
    for file, runtime in json.loads(arguments.score).items():
        found[file] = evaluate(open_exported(file, runtime=runtime), task, split="test")[task.primary]
    print(json.dumps(found))


def correlate(arguments: argparse.Namespace) -> None:
    """In the fresh process: predicted and measured drops of all candidates of a folder's ladder, and Pearson's r.

    Beside the runtime's legal candidates the same with weights of 3 and 2 bits, whose drops are far above chance. The
    scores are corrected by the search's first three measured candidates only. Drops are measured in simulation on the
    test split, which the search never saw.
    """
    from s2d.experiments.auto.candidates import Candidate
    from s2d.experiments.auto.ladder import forms
    from s2d.experiments.auto.promise import Promise
    from s2d.experiments.auto.search import Search
    from s2d.experiments.auto.search_records import SCORES, Records
    from s2d.experiments.auto.simulation import as_in_file
    from s2d.experiments.watcher import Silent
    from s2d.models import load
    from s2d.quant.numerics.formats import integer_format
    from s2d.tasks.evaluation import evaluate, model_for

    runtime, folder = json.loads(arguments.correlate)
    task = task_of(arguments)
    loaded = load(arguments.model)
    promise = Promise.parse(runtime, arguments.within[0])
    search = Search(loaded, model_for(loaded, task), task, promise, Path(folder), 0, Silent())
    records = Records.open(Path(folder), search.key())
    tried = [each for each in records.scored.values() if not each.candidate.repaired]
    records.scored = {each.candidate.key: each for each in tried[:3]}
    full, rows = evaluate(search.model, task, split="test")[task.primary], []
    sign = 1.0 if task.higher_is_better else -1.0
    low = [
        replace(form, weight=replace(form.weight, format=integer_format(bits, signed=True)))
        for form in forms(search.runtime, narrow=True)
        for bits in (3, 2)
        if form.weight is not None
    ]
    legal = [each for each, _ in search.climbing.expected(records)]
    search.simulation.score(Path(folder) / SCORES, low, [])
    forecast = search.climbing.forecast(records)
    legal = legal[:: -(-len(legal) // _CORRELATED)]
    for candidate in [*legal, *(Candidate(spec, "rtn", search.tables, "low") for spec in low)]:
        points = forecast.points(candidate)
        try:
            made = as_in_file(search.simulation.quantized(candidate, Path(folder)), candidate)
        except InputError:
            continue  # a method that does not fit this model
        lost = sign * (full - evaluate(made, task, split="test")[task.primary])
        rows.append({"candidate": candidate.label, "predicted": points, "lost": lost})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    told: JSON = {"candidates": rows}
    for name, most in (("pearson", math.inf), ("pearson_below_3_points", 3.0)):
        part = [(row["predicted"], row["lost"]) for row in rows if row["lost"] < most]
        told[name] = statistics.correlation(*zip(*part, strict=True))
    print(json.dumps(told))


def cell(arguments: argparse.Namespace, runtime: str, within: float) -> JSON:
    """One promise."""
    out, answer = arguments.runs / runtime, arguments.runs / f"{runtime}-{within:g}.json"
    words = [sys.executable, "-m", "s2d.cli", "quantize", arguments.model, "--task", arguments.task]
    words += ["--data", arguments.data, *(word for each in arguments.o for word in ("-o", each))]
    words += ["--method", "auto", "--for", runtime, "--within", f"{within:g}", "--out", str(out), "--json", str(answer)]
    if arguments.minutes:
        words += ["--minutes", f"{arguments.minutes:g}"]
    start = time.monotonic()
    code = subprocess.run(words).returncode
    found = read_json(answer)["verdict"]
    assert code == found["exit_code"], f"the command ended with {code}"
    return {"runtime": runtime, "within": within, "seconds": time.monotonic() - start, "verdict": found}


def records_of(arguments: argparse.Namespace, cells: list[JSON]) -> list[JSON]:
    """A number each, for the tables of the docs: a named file is in bold, files of one name are counted."""
    records = []
    for each in cells:
        seen: Counter[str] = Counter()
        named = [row for row in each["verdict"]["frontier"] if row["accepted"]][-1:]
        for row in each["verdict"]["frontier"]:
            seen[row["name"]] += 1
            title = row["name"] if seen[row["name"]] == 1 else f"{row['name']} ({seen[row['name']]})"
            values = {
                "MB": row["bytes"] / 1e6,
                "times as fast": row["speedup"],
                "lost on validation": row["drop"]["points"],
                "at most": row["drop"]["upper"],
                "lost on test": row["lost_on_test"],
            }
            about = {
                "task": Path(arguments.data).stem,
                "model": arguments.model.rpartition(":")[2],
                "conditioning": f"{each['runtime']}, {each['within']:g}: {each['verdict']['status']}",
                "spec": f"**{title}**" if row in named else title,
                "split": "test",
            }
            records += [{**about, "metric": metric, "value": value} for metric, value in values.items()]
    return records


def judge(arguments: argparse.Namespace, runtime: str, cells: list[JSON]) -> JSON:
    """Put the truth into the cells of a runtime: what every judged file loses on the test split, in a fresh process.

    Returns:
        The score of full precision, and the number of test examples.
    """
    rows = [row for each in cells for row in each["verdict"]["frontier"]]
    places = {row["file"]: str(arguments.runs / runtime / row["file"]) for row in rows}
    scores = afresh(arguments, "--score", {place: runtime for place in places.values()})
    for row in rows:
        row["test"] = scores[places[row["file"]]]
        row["lost_on_test"] = scores["full"] - row["test"]  # of metrics where more is better
    for each in cells:
        named = [row for row in each["verdict"]["frontier"] if row["accepted"]]
        each["false_met"] = each["verdict"]["status"] == "MET" and named[-1]["lost_on_test"] > each["within"]
        print(f"{runtime} {each['within']:g}: {each['verdict']['status']}, false: {each['false_met']}", flush=True)
    return scores


def main() -> None:
    """Every cell, then the truth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subject(parser)
    parser.add_argument("--for", dest="runtimes", nargs="+", default=["onnxruntime"])
    parser.add_argument("--within", nargs="+", type=float, default=[1.0, 0.5], help="in this order")
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--runs", type=Path, default=Path("build/promises"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--correlation", action="store_true", help="of predicted and measured drops, which takes long")
    parser.add_argument("--score", help=argparse.SUPPRESS)
    parser.add_argument("--correlate", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.score:
        return score(arguments)
    if arguments.correlate:
        return correlate(arguments)
    cells: list[JSON] = []
    told: JSON = {}
    for runtime in arguments.runtimes:
        made = [cell(arguments, runtime, within) for within in arguments.within]
        scores = judge(arguments, runtime, made)
        cells += made
        if arguments.correlation:
            told[runtime] = afresh(arguments, "--correlate", [runtime, str(arguments.runs / runtime)])
            print({name: value for name, value in told[runtime].items() if name != "candidates"})
        if arguments.json:  # after every runtime, as each takes long
            about = run_metadata(model=arguments.model, full_on_test=scores["full"], test_examples=scores["test"])
            content = {"run": about, "records": records_of(arguments, cells), "cells": cells, "correlation": told}
            write_json(arguments.json, content)


if __name__ == "__main__":
    main()
