"""What bits cost a language model, and what shrinking its outlier channels costs it before any training.

    python benchmarks/language_models.py specs MODEL --data DIR [--split test] [--windows 12] [--json FILE] SPEC...
    python benchmarks/language_models.py shrink MODEL --data DIR [--json FILE]

`specs` prints perplexity (windows of 512 tokens, as `s2d evaluate --task language-modeling`) at each SPEC: a short
text, or a mapping in YAML, with ``+METHOD`` behind it for another method than rtn. MODEL is anything that `s2d.load`
reads.
`shrink` lets the decay select its channels once, scales them by e^-a at once, with and without giving the factor to
the weights that read them, and prints KL(original || model) at full precision, with 4-bit inputs (ranges of each
token), and with 4-bit weights too, on one window of validation text.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from s2d.checkpoint import load
from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.io.files import write_json
from s2d.io.provenance import run_metadata
from s2d.models import Loaded
from s2d.models.tracing import trace
from s2d.quant import QuantSpec, quantize
from s2d.quant.modules.folding import norm_folds
from s2d.targets.weights import Target
from s2d.tasks import Task, create
from s2d.tasks.evaluation import model_for
from s2d.tasks.teacher import mean_divergence

CALIBRATION = 8
AMOUNTS = (0.3, 1.0, 3.0)
A4, W4A4 = ({"base": base, "attention": False} for base in ("w16a4-token", "w4a4-token"))


def specs(loaded: Loaded, task: Task, split: Any, wanted: list[str]) -> list[dict[str, Any]]:
    model = model_for(loaded, task)
    inputs = [task.inputs(batch)[0] for batch in task.batches("train", batch_size=1)][:CALIBRATION]
    records = []
    for text in wanted:
        spec, _, method = text.partition("+")
        if spec == "fp32":
            judged = model
        else:
            judged = quantize(model, yaml.safe_load(spec), calibration=inputs, method=method or "rtn")
        records.append({"spec": spec, "method": method or "rtn", **task.evaluate(judged, split, 1)})
        print(f"{text:60} {records[-1]['perplexity']:.2f}", flush=True)
    return records


def shrink(loaded: Loaded, task: Task) -> list[dict[str, Any]]:
    original, model = model_for(loaded, task), task.build(loaded)
    batches = [task.inputs(next(task.batches(split, batch_size=1)))[0] for split in ("train", "validation")]
    channels = _selected(model, batches[0])
    readers = {fold.norm: fold.readers for fold in norm_folds(model, trace(model, batches[0])) if not fold.residual}
    records = []
    ways = [("norms", False), ("norms", True), ("rows", False)]  # of rows no readers are known here
    for amount, (kind, given) in [(0.0, ways[0]), *itertools.product(AMOUNTS, ways)]:
        scaled = copy.deepcopy(model).eval()
        for target, selected in channels:
            if (target.kind == "norm") == (kind == "norms"):
                _scale(scaled, target, selected, math.exp(-amount), readers if given else {})
        found = [_divergence(scaled, original, batches[1], spec) for spec in (None, A4, W4A4)]
        costs = dict(zip(("fp32", "a4", "w4a4"), found, strict=True))
        records.append({"amount": amount, "kind": kind, "given": given, **costs})
        print(records[-1], flush=True)
    return records


def _selected(model: nn.Module, inputs: dict[str, Any]) -> list[tuple[Target, torch.Tensor]]:
    """The channels that the decay selects at its first refresh, without changing anything."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
    decay = SelectiveSpectralDecay(model, optimizer, strength=0.0)
    model.train()
    model(**inputs).logits.logsumexp(-1).mean().backward()
    model.zero_grad()
    optimizer.step()
    named = {target.name: target for target in decay.targets}
    found = [(named[name], c.channels) for name, c in decay._metric.selected.items() if c.channels is not None]
    decay.remove()
    return found


@torch.no_grad()
def _scale(
    model: nn.Module, target: Target, channels: torch.Tensor, factor: float, readers: dict[str, tuple[str, ...]]
) -> None:
    model.get_submodule(target.module_name).get_parameter(target.parameter_name)[channels] *= factor
    for reader in readers.get(target.module_name, ()):
        model.get_submodule(reader).get_parameter("weight")[:, channels] /= factor


@torch.no_grad()
def _divergence(model: nn.Module, original: nn.Module, inputs: dict[str, Any], spec: Any) -> float:
    judged = model if spec is None else quantize(model, QuantSpec.parse(spec), calibration=[inputs])
    return mean_divergence(judged, original, inputs).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("specs", "shrink"))
    parser.add_argument("model")
    parser.add_argument("spec", nargs="*")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--json", type=Path)
    given = parser.parse_intermixed_args()
    loaded = load(given.model)
    task = create("language-modeling", data=given.data, window=given.window, windows=given.windows)
    task.prepare(loaded)
    if given.what == "specs":
        records = specs(loaded, task, given.split, given.spec or ["fp32", "w4a4-token"])
    else:
        records = shrink(loaded, task)
    if given.json is not None:
        about = run_metadata(model_fingerprint=loaded.fingerprint, data_hash=task.fingerprint, settings=vars(given))
        write_json(given.json, {"run": {**about, "settings": str(about["settings"])}, "records": records})


if __name__ == "__main__":
    main()
