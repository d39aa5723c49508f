"""Does conditioning help other people's quantizers? The arms of a run under each library that is installed.

    python benchmarks/others.py [RUN] [--split validation] [--json FILE]

RUN is a finished run of a recipe, runs/demo unless named: every arm and seed in it is quantized by every library that
is installed, with that library's own code and defaults, and scored by the run's own task; s2d only reads the model.
The libraries, beside torch.ao: pip install torchao optimum-quanto brevitas llmcompressor. What is simulated in floating
point says "simulated".
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s2d.io.files import read_json, write_json
from s2d.io.provenance import code_digest, run_metadata
from s2d.models import load
from s2d.tasks import create
from s2d.tasks.base import calibration_inputs
from s2d.tasks.evaluation import evaluate

Inputs = list[dict[str, Any]]
Quantizer = Callable[[nn.Module, Inputs], nn.Module]
QUANTIZERS: dict[tuple[str, str], Quantizer] = {}


def quantizer(library: str, name: str) -> Callable[[Quantizer], Quantizer]:
    """Add a row: the package that is imported, and what the table calls it."""

    def add(function: Quantizer) -> Quantizer:
        QUANTIZERS[library, name] = function
        return function

    return add


def _torchao(model: nn.Module, config: Any) -> nn.Module:
    from torchao.quantization import quantize_

    quantize_(model, config)
    return model


@quantizer("torchao", "torchao W8A8: int8 weights per channel, int8 activations per token")
def torchao_w8a8(model: nn.Module, inputs: Inputs) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _torchao(model, Int8DynamicActivationInt8WeightConfig())


@quantizer("torchao", "torchao W4A8: int4 weights in groups of 32, int8 activations per token")
def torchao_w4a8(model: nn.Module, inputs: Inputs) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig
    from torchao.quantization.granularity import PerGroup

    return _torchao(
        model, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    )


@quantizer("torchao", "torchao W4: int4 weights per channel, activations kept")
def torchao_w4(model: nn.Module, inputs: Inputs) -> nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis

    return _torchao(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0)))


@quantizer("torchao", "torchao W4A4, simulated: int4 weights per channel, int4 activations per token")
def torchao_w4a4(model: nn.Module, inputs: Inputs) -> nn.Module:
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    activation = IntxFakeQuantizeConfig(torch.int4, "per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int4, "per_channel", is_symmetric=True)
    return _torchao(model, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))


def _quanto(model: nn.Module, inputs: Inputs, weights: str, activations: str | None) -> nn.Module:
    from optimum import quanto

    types: dict[str, Any] = {"weights": getattr(quanto, weights)}
    if activations is not None:
        types["activations"] = getattr(quanto, activations)
    quanto.quantize(model, **types)
    if activations is not None:
        with torch.no_grad(), quanto.Calibration():
            for batch in inputs:
                model(**batch)
    quanto.freeze(model)
    return model


@quantizer("optimum.quanto", "quanto W8A8: int8 weights per channel, int8 activations, one static scale per tensor")
def quanto_w8a8(model: nn.Module, inputs: Inputs) -> nn.Module:
    return _quanto(model, inputs, "qint8", "qint8")


@quantizer("optimum.quanto", "quanto W4A8: int4 weights in groups, int8 activations, one static scale per tensor")
def quanto_w4a8(model: nn.Module, inputs: Inputs) -> nn.Module:
    return _quanto(model, inputs, "qint4", "qint8")


@quantizer("optimum.quanto", "quanto W4: int4 weights in groups, activations kept")
def quanto_w4(model: nn.Module, inputs: Inputs) -> nn.Module:
    return _quanto(model, inputs, "qint4", None)


@quantizer("optimum.quanto", "quanto W2: int2 weights in groups, activations kept")
def quanto_w2(model: nn.Module, inputs: Inputs) -> nn.Module:
    return _quanto(model, inputs, "qint2", None)


def _brevitas(model: nn.Module, inputs: Inputs, weights: int, activations: int) -> nn.Module:
    """Every Linear as Brevitas' own, with its usual quantizers; ranges of inputs at its percentile (99.999)."""
    from brevitas import nn as brevitas_nn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8WeightPerChannelFloat, ShiftedUint8ActPerTensorFloat

    settings = {
        "weight_quant": Int8WeightPerChannelFloat.let(bit_width=weights),
        "input_quant": ShiftedUint8ActPerTensorFloat.let(bit_width=activations),
    }
    model = layerwise_quantize(model, {nn.Linear: (brevitas_nn.QuantLinear, settings)})
    with torch.no_grad(), calibration_mode(model):
        for batch in inputs:
            model(**batch)
    return model.eval()


@quantizer("brevitas", "Brevitas W8A8, simulated: per channel, one static scale per tensor for inputs")
def brevitas_w8a8(model: nn.Module, inputs: Inputs) -> nn.Module:
    return _brevitas(model, inputs, 8, 8)


@quantizer("brevitas", "Brevitas W4A4, simulated: per channel, one static scale per tensor for inputs")
def brevitas_w4a4(model: nn.Module, inputs: Inputs) -> nn.Module:
    return _brevitas(model, inputs, 4, 4)


def _llmcompressor(model: nn.Module, inputs: Inputs, scheme: Any) -> nn.Module:
    """Its oneshot on the transformers model inside the task's: Linears by round-to-nearest, ranges by its min-max."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from loguru import logger
    from torch.utils.data import DataLoader

    logger.remove()  # a line for every layer
    given = {"scheme": scheme} if isinstance(scheme, str) else {"config_groups": {"linears": scheme}}
    recipe = QuantizationModifier(targets="Linear", **given)
    inside: Any = model.get_submodule("encoder")
    oneshot(model=inside, recipe=recipe, dataset=DataLoader(inputs, batch_size=None), pipeline="basic")
    return model.eval()


@quantizer("llmcompressor", "llm-compressor W8A8: int8 weights per channel, int8 activations per token")
def llmcompressor_w8a8(model: nn.Module, inputs: Inputs) -> nn.Module:
    return _llmcompressor(model, inputs, "W8A8")


@quantizer("llmcompressor", "llm-compressor W4A16: int4 weights in groups of 128, activations kept")
def llmcompressor_w4a16(model: nn.Module, inputs: Inputs) -> nn.Module:
    return _llmcompressor(model, inputs, "W4A16")


def _four_bits(**activations: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=4, strategy="channel", symmetric=True),
        input_activations=QuantizationArgs(num_bits=4, symmetric=False, **activations),
    )


@quantizer("llmcompressor", "llm-compressor W4A4, simulated: per channel, int4 activations per token")
def llmcompressor_token(model: nn.Module, inputs: Inputs) -> nn.Module:
    return _llmcompressor(model, inputs, _four_bits(strategy="token", dynamic=True))


@quantizer("llmcompressor", "llm-compressor W4A4, simulated: per channel, one static scale per tensor")
def llmcompressor_tensor(model: nn.Module, inputs: Inputs) -> nn.Module:
    return _llmcompressor(model, inputs, _four_bits(strategy="tensor", dynamic=False))


@quantizer("torch", "torch.ao W8A8: quantize_dynamic, one scale per tensor and call")
def torch_dynamic(model: nn.Module, inputs: Inputs) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def _torch_static(model: nn.Module, inputs: Inputs, observer: type) -> nn.Module:
    """torch.ao's fake quantizers on inputs and weights of every Linear, ranges observed on the calibration data."""
    from torch.ao.quantization import FakeQuantize, MovingAveragePerChannelMinMaxObserver

    def weight_of(layer: nn.Linear) -> torch.Tensor:
        rows = {"ch_axis": 0, "dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
        fake = FakeQuantize(MovingAveragePerChannelMinMaxObserver, quant_min=-8, quant_max=7, **rows)
        return fake(layer.weight)

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    quantizers = []
    for layer in layers:
        fake = FakeQuantize(observer, quant_min=0, quant_max=15, dtype=torch.quint8)
        fake.disable_fake_quant()
        layer.register_forward_pre_hook(lambda _, args, fake=fake: (fake(args[0]), *args[1:]))
        quantizers.append(fake)
    with torch.no_grad():
        for batch in inputs:
            model(**batch)
        for layer, fake in zip(layers, quantizers, strict=True):
            fake.disable_observer()
            fake.enable_fake_quant()
            layer.weight.copy_(weight_of(layer))
    return model


@quantizer("torch", "torch.ao W4A4, simulated: one static scale per tensor, MinMaxObserver")
def torch_minmax(model: nn.Module, inputs: Inputs) -> nn.Module:
    return _torch_static(model, inputs, torch.ao.quantization.MinMaxObserver)


@quantizer("torch", "torch.ao W4A4, simulated: one static scale per tensor, HistogramObserver")
def torch_histogram(model: nn.Module, inputs: Inputs) -> nn.Module:
    return _torch_static(model, inputs, torch.ao.quantization.HistogramObserver)


def _there(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:
        return False


def arms_of(run: Path) -> list[tuple[str, int, Path]]:
    """(arm, seed, folder of the model) of every finished training."""
    found = []
    for notes in sorted(run.glob("arms/*/training.json")):
        content = read_json(notes)
        found.append((str(content["arm"]), int(content["seed"]), notes.parent / "model"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"))
    parser.add_argument("--split", default="validation")
    parser.add_argument("--json", type=Path, help="results, kept row by row; RUN/others.json unless named")
    arguments = parser.parse_args()
    arms = arms_of(arguments.run)
    if not arms:
        print(f"{arguments.run} holds no finished training; make one: s2d demo", file=sys.stderr)
        return 0
    recipe = read_json(arguments.run / "recipe.json")
    options = dict(recipe["task"])
    task = create(options.pop("name"), **options)
    path = arguments.json or arguments.run / "others.json"
    known = {row["key"]: row for row in (read_json(path)["records"] if path.is_file() else [])}
    rows: dict[tuple[str, str], Quantizer] = {("torch", "full precision"): lambda model, _: model, **QUANTIZERS}
    versions = run_metadata(data_hash=task.fingerprint, split=arguments.split, recipe=recipe["name"])
    for arm, seed, folder in arms:
        loaded = load(folder)
        task.prepare(loaded)
        inputs = calibration_inputs(task, 128, 32, seed)
        for (library, name), quantize in rows.items():
            key = f"{folder.parent.name} {arguments.split} {name} {code_digest('tasks', 'data')}"
            if not _there(library) or key in known:
                continue
            row = {"key": key, "task": recipe["task"]["name"], "model": recipe["model"], "conditioning": arm}
            row |= {
                "seed": seed,
                "spec": name,
                "metric": task.primary,
                "split": arguments.split,
                "higher_is_better": True,
            }
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    model = quantize(copy.deepcopy(loaded.model), inputs)
                    row["value"] = evaluate(model, task, split=arguments.split)[task.primary]
                except Exception as error:  # the other library's affair; the table says so
                    row |= {"value": None, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            known[key] = row
            write_json(path, {"run": versions, "records": list(known.values())})
            print(
                f"{arm}, seed {seed}: {name}: {row['value'] if row['value'] is not None else row['error']}", flush=True
            )
    table(list(known.values()))
    return 0


def table(records: list[dict[str, Any]]) -> None:
    """Markdown: a row per quantizer, a column per arm, the mean over seeds, and the gain over plain fine-tuning."""
    arms = list(dict.fromkeys(row["conditioning"] for row in records))
    print(f"\n| quantizer | {' | '.join(arms)} | gain |\n|---|{'---|' * (len(arms) + 1)}")
    for name in dict.fromkeys(row["spec"] for row in records):
        means = {}
        for arm in arms:
            values = [
                r["value"] for r in records if (r["spec"], r["conditioning"]) == (name, arm) and r["value"] is not None
            ]
            if values:
                means[arm] = statistics.fmean(values)
        gain = f"{means['s2d'] - means['adamw']:+.1f}" if {"s2d", "adamw"} <= means.keys() else "–"
        print(f"| {name} | {' | '.join(f'{means[arm]:.1f}' if arm in means else '–' for arm in arms)} | {gain} |")


if __name__ == "__main__":
    sys.exit(main())
