"""Core ML: an ``.mlpackage`` for Apple's devices, written on any system and run on none but theirs.

coremltools reads the decomposed operators of `decomposed`: codes of weights become constants behind a
``constexpr_blockwise_shift_scale``, inputs a ``quantize`` and a ``dequantize``. Core ML has no ranges that are found
while it runs. Here the package is not run but read back: coremltools unpacks its weights, and they are the values of
the quantized model to the bit.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from s2d.errors import InputError, first_line
from s2d.export import gate
from s2d.export.copies import shared_copy
from s2d.export.decomposed import StaticLinear
from s2d.export.gate import Check, ExportReport
from s2d.export.onnx import Face, tensors_of
from s2d.export.parity import compare_modules
from s2d.export.plain_layers import plain_layers
from s2d.io.files import in_place_of
from s2d.optional import require
from s2d.quant.modules.record import remove

NAME = "Core ML"
SUFFIX = ".mlpackage"


def refuse_without_form(model: nn.Module) -> None:
    """Refuse, before any work, layers that Core ML cannot hold.

    Raises:
        InputError: With the nearest spec.
    """
    require("coremltools", "coreml")
    for layer in plain_layers(model, NAME):
        activation = layer.activation
        if layer.weight.granularity == "group":
            raise InputError(f"{layer.name}: groups of weights are not written for {NAME}; use one scale a channel")
        if activation is not None and (activation.dynamic or activation.format.bits != 8):
            raise InputError(
                f"{layer.name}: {NAME} takes inputs with a static range of 8 bits, or in full precision; the nearest "
                "spec is {base: w8a8, attention: false}"
            )


def export_package(
    model: nn.Module, target: Path, report: ExportReport, example: Mapping[str, Tensor], check: Check
) -> None:
    """Convert a model, read the package back, compare, and move it to the target.

    Args:
        model: Quantized.
        target: ``NAME.mlpackage``; it takes inputs of the sizes of the example.
        report: Filled in; its layers are those that were converted, as torch computes them.
        example: A batch of keyword inputs.
        check: The comparisons and consequences.

    Raises:
        InputError: Core ML cannot hold a layer; coremltools cannot convert the model; what it reads back is different.
    """
    refuse_without_form(model)
    report.embeddings = 0
    prepared = with_codes(model)
    reference = shared_copy(model)
    check.notes("comparing every layer")
    gate.judge_layers(report, *compare_modules(reference, prepared, reference, "", example))
    with in_place_of(target) as made:
        check.notes("converting")
        _convert(prepared, example, made)
        sizes = [each.stat().st_size for each in made.rglob("*") if each.is_file()]
        report.file_mb, report.fp32_mb = sum(sizes) / 1e6, sum(each.numel() for each in model.parameters()) * 4 / 1e6
        check.notes("reading it back")
        kinds, found = read_back(made)
        wanted = {layer.name: layer.weight for layer in plain_layers(model, NAME)}
        lost = [name for name, each in wanted.items() if not _held(each.codes * _column(each.scale, each.codes), found)]
        pairs = sum(isinstance(each, StaticLinear) and each.input is not None for each in prepared.modules())
        report.parity = {"metric": "weights read back", "split": "file", "simulated": len(wanted), "perturbed": 0}
        report.parity["exported"] = len(wanted) - len(lost)
        if lost:
            report.failures.append(f"coremltools reads other weights back, such as those of {lost[0]}")
        rounded = kinds.get("quantize", 0)  # layers that read one tensor in one range share it
        if bool(pairs) != bool(rounded):
            report.failures.append(f"{pairs} inputs are rounded, and the package rounds {rounded}")
        report.about = [
            f"the multiply: not known here, the package was read back and not run; it rounds {rounded} inputs to 8 "
            f"bits and holds {len(wanted) - len(lost)} weights as codes of 8 bits"
        ]
        report.refuse(target, check.force)


def with_codes(model: nn.Module) -> nn.Module:
    """A copy without quantizers whose Linears hold codes, in decomposed operators."""
    made = remove(shared_copy(model))
    for layer in plain_layers(model, NAME):
        bias: Any = made.get_submodule(layer.name).bias
        made.set_submodule(layer.name, StaticLinear(layer.weight, layer.activation, bias))
    return made


def read_back(path: Path) -> tuple[dict[str, int], list[np.ndarray]]:
    """The operators of a package by kind, and its weights as coremltools unpacks them."""
    tools: Any = require("coremltools", "coreml")
    from coremltools.converters.mil.frontend.milproto.load import load  # pyright: ignore[reportMissingImports]

    kinds: dict[str, int] = {}
    weights = []
    with _quiet():
        held = tools.models.MLModel(os.fspath(path), skip_model_load=True)
        spec = held.get_spec()
        program: Any = load(spec, spec.specificationVersion, file_weights_dir=held.weights_dir)
    for function in program.functions.values():
        for operation in function.operations:
            kinds[operation.op_type] = kinds.get(operation.op_type, 0) + 1
            if operation.op_type.startswith("constexpr"):
                weights.append(operation.materialized_val_inference())
    return kinds, weights


def _convert(model: nn.Module, example: Mapping[str, Tensor], path: Path) -> None:
    tools: Any = require("coremltools", "coreml")
    with torch.no_grad():
        outputs = list(tensors_of(model(**example)))
    try:
        with _quiet():
            program = torch.export.export(Face(model, tuple(example)).eval(), tuple(example.values()), strict=False)
            made = tools.convert(
                program.run_decompositions({}),
                outputs=[tools.TensorType(name=name) for name in outputs],
                minimum_deployment_target=tools.target.iOS18,
                compute_precision=tools.precision.FLOAT32,
                skip_model_load=True,
            )
            made.save(os.fspath(path))
    except MemoryError:
        raise
    except Exception as error:  # coremltools' own classes
        raise InputError(f"coremltools cannot convert {type(model).__name__}: {first_line(error)}") from error


def _column(scale: Tensor, codes: Tensor) -> Tensor:
    return scale.view(-1, 1) if scale.ndim else scale.expand(len(codes), 1)


def _held(values: Tensor, found: list[np.ndarray]) -> bool:
    wanted = values.numpy()
    return any(each.shape == wanted.shape and np.array_equal(each, wanted) for each in found)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars and notes on versions."""
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        yield
