"""Sweep tiny random models of many architectures: is the graph true, the plan complete, every method sound?

One command, offline, CPU; interrupted, the same command goes on where it was (rows of other code are made anew):

    python benchmarks/architectures.py [NAME ...] [--json FILE] [--methods rtn,gptq|all|none]

For each architecture, against truths that know nothing of the graph:

    flops      products of the plan's weights and of two activations, over torch's flop counter (attention as plain
               products on both sides; formulas for the grouped products of experts, which torch's counter lacks)
    unlisted   matrices (parameters of 2 or 3 dimensions) that are no row of the plan, are no table, and whose change
               shows in the output
    blocks     those of the graph against the number of layers in the configuration, or in the architecture's paper
    folds      scales that may move: how many, and how far the output of the model, or of the worst block, is off after
               all were moved by random factors
    method     quantize, save, load: 1 if the outputs are finite and the loaded model's those in memory, bit for bit;
               a method that refuses a model says why in one line, which is kept. Searches are cut short: here it counts
               what comes out and comes back, not how well it scores

Exit code 1 if a row is not as it should be.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_architectures import blocks_in, rows
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from s2d import quant
from s2d.checkpoint import load, save
from s2d.errors import InputError
from s2d.io.provenance import code_digest, run_metadata
from s2d.models.graph import Graph
from s2d.models.tracing import trace
from s2d.quant.modules.folding import apply_norm_fold, apply_value_fold, norm_folds, pair_folds
from s2d.quant.ptq import adaround, awq, ptq4vit, svdquant

SPEC: dict[str, Any] = {"base": "w4a8"}
TABLES = frozenset(("embedding", "lookup", "inserted", "bias", "gain", "elementwise", "operand"))
GOAL = 1e-5
awq.STEPS, ptq4vit.ROUNDS, ptq4vit.SPLITS, svdquant.STRENGTHS = 2, 1, 4, (0.0, 0.5)
adaround.reconstruct.__defaults__ = (4,)  # steps


def run(model: nn.Module, batch: Any) -> Any:
    """One forward without gradients or caches."""
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", None):
        config.use_cache = False  # pyright: ignore[reportOptionalMemberAccess]
    with torch.no_grad():
        return model(**batch) if isinstance(batch, dict) else model(batch)


def output(model: nn.Module, batch: Any) -> Tensor:
    """Everything that a model returns, as one vector."""
    return torch.cat([leaf.flatten().double() for leaf in _leaves(run(model, batch)) if leaf.is_floating_point()])


def outputs(model: nn.Module, batch: Any, graph: Graph) -> list[Tensor]:
    """The output of a model, and that of each of its blocks: a head of small weights can hide what they do."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, made: Any) -> None:
        found.append(_leaves(made)[0].detach().double().clone())

    blocks = dict.fromkeys(path for one in graph.blocks if not one.inside for path, _ in one.members)
    hooks = [model.get_submodule(path).register_forward_hook(keep) for path in blocks]
    found.append(output(model, batch))
    for hook in hooks:
        hook.remove()
    return found


def _leaves(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    values = found.values() if hasattr(found, "values") else found if isinstance(found, (tuple, list)) else ()
    return [leaf for value in values for leaf in _leaves(value)]


def apart(found: Tensor, wanted: Tensor) -> float:
    """Distance relative to the length."""
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _grouped_flops(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * a[0] * b[-2] * b[-1]


def _counted(model: nn.Module, batch: Any) -> int:
    known: dict[Any, Any] = {torch.ops.aten._grouped_mm: _grouped_flops}
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        known[torch.ops.transformers.grouped_mm_fallback] = _grouped_flops
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        run(model, batch)
    return counter.get_total_flops()


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """The same model every time, with gains and biases that are not those of a fresh one."""
    torch.manual_seed(0)
    model = make().eval()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return model


def spec_for(model: nn.Module, batch: Any) -> dict[str, Any]:
    """W4A8; where a model has nothing but convolutions, which are kept by default, with all of them."""
    try:
        quant.planned(model, quant.QuantSpec.parse(SPEC), [batch])
    except InputError as error:
        if "quantizes nothing" in str(error):
            return {**SPEC, "overrides": {"*": "w4a8"}}
    return SPEC


def graph_and_plan(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The graph, and the plan, against torch's counter and against changes of parameters."""
    spec = spec_for(model, batch)
    model = copy.deepcopy(model).requires_grad_(False)  # the counter wants no leaves that learn
    with sdpa_kernel(SDPBackend.MATH):
        graph = trace(model, batch)
        plan = quant.planned(model, quant.QuantSpec.parse(spec), [batch])
        counted = _counted(model, batch)
        listed = {f"{site.module}{end}".lstrip(".") for site in plan for end in ("", ".weight", ".in_proj_weight")}
        weights = [call for call in graph.calls if call.kind in ("product", "convolution")]
        flops = graph.flops - sum(call.flops for call in weights)
        flops += sum(call.flops for call in weights if listed & set(call.parameters))
        unlisted, tables = _unlisted(model, batch, graph, listed)
    return {
        "flops": 1.0 if flops == counted else flops / max(counted, 1),
        "unlisted": len(unlisted),
        "unlisted_names": unlisted,
        "products": len(graph.products),
        "quantized": sum(site.format is not None for site in plan),
        "sites": len(plan),
        "tables": tables,
        "attentions": len(graph.attentions),
        "norms": len(graph.norms),
        "blocks": sum(len(found.members) // len(found.containers) for found in graph.blocks if not found.inside),
        "masks": len(graph.masks),
        "unknown": sorted({op for op, _ in graph.unknown}),
    }


def _unlisted(model: nn.Module, batch: Any, graph: Graph, listed: set[str]) -> tuple[list[str], int]:
    """Matrices outside the plan whose change shows, and the number of tables, whose change may."""
    before, wrong, tables = output(model, batch), [], 0
    for names in graph.names:
        parameter = model.get_parameter(names[0])
        if parameter.ndim not in (2, 3) or listed & set(names):
            continue
        uses = {call.kind for call in graph.calls_of(names[0])}
        if uses and uses <= TABLES:
            tables += 1
            continue
        kept = parameter.detach().clone()
        parameter.data.add_(1.0)
        if not torch.equal(output(model, batch), before):
            wrong.append(names[0])
        parameter.data.copy_(kept)
    return wrong, tables


def folds(model: nn.Module, batch: Any) -> dict[str, Any]:
    """All scales that may move, moved by random factors at once."""
    model = copy.deepcopy(model)
    graph = trace(model, batch)
    before = outputs(model, batch, graph)
    draw = torch.Generator().manual_seed(2)

    def scale(size: int) -> Tensor:
        return (2.0 * torch.rand(size, generator=draw, dtype=torch.float64) - 1.0).exp()

    norms = [fold for fold in norm_folds(model, graph) if not fold.residual]
    pairs = pair_folds(model, graph)
    for fold in norms:
        apply_norm_fold(model, fold, scale(len(model.get_submodule(fold.norm).get_parameter("weight"))))
    for pair in pairs:
        apply_value_fold(model, pair, scale(pair.rows[1] - pair.rows[0]))
    after = outputs(model, batch, graph)
    return {
        "folds": len(norms) + len(pairs),
        "fold error": max(apart(found, wanted) for found, wanted in zip(after, before, strict=True)),
    }


def method_row(model: nn.Module, batch: Any, method: str, spec: dict[str, Any]) -> tuple[float | None, str]:
    """1 if a method's model is finite and the same when loaded; None and the reason if the method refuses it."""
    try:
        quantized = quant.quantize(model, spec, calibration=[batch], method=method)
    except InputError as error:
        return None, str(error)
    in_memory = output(quantized, batch)
    if not bool(in_memory.isfinite().all()):
        return 0.0, "outputs are not finite"
    with tempfile.TemporaryDirectory() as folder:
        try:
            save(quantized, Path(folder) / "model")
            loaded = load(Path(folder) / "model").model
        except InputError as error:
            return 0.0, f"does not come back: {error}"
        found = output(loaded, batch)
    if found.shape != in_memory.shape or not torch.equal(found, in_memory):
        return 0.0, f"loaded is off by {apart(found, in_memory) if found.shape == in_memory.shape else 'another shape'}"
    return 1.0, ""


def look(name: str, make: Callable[[], nn.Module], batch: Any, methods: Sequence[str]) -> dict[str, Any]:
    """All about one architecture; what breaks is a row of its own."""
    found: dict[str, Any] = {"failures": {}, "refused": {}}
    started = time.process_time()
    try:
        model = made(make)
    except Exception as error:  # an older library, or one that lacks a part
        return found | {"refused": {"model": f"cannot be built here: {_told(error)}"}, "seconds": 0.0}
    wanted = blocks_in(name, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for check in (graph_and_plan, folds):
            try:
                found |= check(model, batch)
            except Exception as error:  # one check must not hide the others
                found["failures"][check.__name__] = _told(error)
        spec = SPEC if "graph_and_plan" in found["failures"] else spec_for(model, batch)
        for method in methods:
            try:
                value, why = method_row(model, batch, method, spec)
            except Exception as error:
                value, why = 0.0, _told(error)
            found[method] = value
            if why:
                found["refused" if value is None else "failures"][method] = why
    found["seconds"] = round(time.process_time() - started, 1)
    if found.get("flops", 1.0) != 1.0:
        found["failures"]["flops"] = f"{found['flops']:.4f} of torch's"
    if found.get("blocks", wanted) != wanted:
        found["failures"]["blocks"] = f"{found['blocks']} for {wanted}"
    if found.get("unlisted"):
        found["failures"]["unlisted"] = ", ".join(found["unlisted_names"][:4])
    if found.get("fold error", 0.0) > GOAL:
        found["failures"]["folds"] = f"the output is off by {found['fold error']:.1e}"
    return found


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


_PLAIN = ("failures", "refused", "unlisted_names", "unknown", "code")


def records(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the schema of the report: one number each."""
    made: list[dict[str, Any]] = []
    for name, row in found.items():
        shared = {"task": "architectures", "conditioning": "none", "spec": "w4a8", "model": name}
        counts = {metric: value for metric, value in row.items() if metric not in _PLAIN and value is not None}
        counts |= {kind: len(row[kind]) for kind in ("refused", "failures")}
        for metric, value in counts.items():
            made.append(
                {
                    **shared,
                    "metric": metric,
                    "value": int(value) if value == int(value) else value,
                    "higher_is_better": metric in quant.methods(),
                }
            )
    return made


def _write(file: Path, found: dict[str, dict[str, Any]], digest: str) -> None:
    lines = ",\n".join(json.dumps(row) for row in records(found))
    about = run_metadata(code=digest, seconds=round(sum(row["seconds"] for row in found.values()), 1))
    kept = json.dumps(found)
    file.write_text(
        f'{{"run": {json.dumps(about, indent=1)},\n"rows": {kept},\n"records": [\n{lines}\n]}}\n', encoding="utf-8"
    )


def _earlier(file: Path | None, digest: str, keep: bool) -> dict[str, dict[str, Any]]:
    """The rows of an interrupted run of the same code, or of any."""
    if file is None or not file.is_file():
        return {}
    known = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return {name: row for name, row in known.items() if keep or row["code"] == digest}


def main() -> int:
    """Print a line an architecture; 1 if something is not as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these (a part of a name)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE, and continue from it")
    parser.add_argument("--methods", default="all", help="all, none, or names with commas between")
    parser.add_argument("--keep", action="store_true", help="keep rows that other code made; each has its digest")
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods = {"all": list(quant.methods()), "none": []}.get(options.methods, options.methods.split(","))
    digest = code_digest("models", "quant", "checkpoint.py")
    found = _earlier(options.json, digest, options.keep)
    for name, make, batch in rows():
        if name in found or (options.names and not any(part in name for part in options.names)):
            continue
        row = found[name] = look(name, make, batch, methods) | {"code": digest}
        same = sum(row.get(method) == 1.0 for method in methods)
        print(
            f"{name:34} flops {row.get('flops', float('nan')):.3f}  unlisted {row.get('unlisted', '?')}  folds "
            f"{row.get('folds', '?')} off {row.get('fold error', float('nan')):.0e}  methods {same} of {len(methods)}, "
            f"{len(row['refused'])} refused  {row['seconds']} s",
            *(f"\n    {what}: {why}" for what, why in row["failures"].items()),
            flush=True,
        )
        if options.json:
            _write(options.json, found, digest)
    if options.json:
        _write(options.json, found, digest)
    wrong = sum(bool(row["failures"]) for row in found.values())
    print(f"{len(found)} architectures, {wrong} with a failure")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
