"""ExecuTorch: one ``.pte`` file for phones and boards, its Linears run by XNNPACK with 4- or 8-bit weights.

XNNPACK has two integer products for Linears whose inputs are rounded row by row while the model runs: weights of 4 bits
(``8da4w``) and of 8. The codes and scales of the quantized model go into the tensors of torchao from which ExecuTorch
lowers, so nothing is rounded twice. Its product for static inputs of 8 bits (``qs8``) is written in the decomposed
operators of PT2E, and rounds outputs too (see `decomposed`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d.errors import InputError, first_line
from s2d.export import gate
from s2d.export.copies import shared_copy
from s2d.export.decomposed import StaticLinear, set_output_ranges
from s2d.export.gate import Check, ExportReport
from s2d.export.lowering import round_embeddings
from s2d.export.onnx import Face, named, tensors_of
from s2d.export.parity import compare_modules
from s2d.export.placement import Placement, refuse_fallback
from s2d.export.plain_layers import PlainLayer, plain_layers
from s2d.io.files import in_place_of
from s2d.optional import require
from s2d.quant.modules.record import remove

NAME = "ExecuTorch"
SUFFIX = ".pte"
_BLOCK = 32
_MOST_TOKENS = 512
_SPEC = "weight: {bits: 4}, activation: {bits: 8, granularity: token}, attention: false"
_GROUPS = "weight: {bits: 4, granularity: group-32}, activation: {bits: 8, granularity: token}, attention: false"
_INPUTS, _OUTPUTS = "s2d_inputs", "s2d_outputs"


def refuse_without_product(model: nn.Module) -> None:
    """Refuse, before any work, layers for which XNNPACK has no product.

    Raises:
        InputError: A layer has no product; the message gives the reason and the nearest spec.
    """
    require("executorch", "executorch")
    require("torchao", "executorch")
    for layer in plain_layers(model, NAME):
        activation = layer.activation
        if activation is None or activation.format.bits != 8 or activation.format.signed:
            raise InputError(
                f"{layer.name}: {NAME} runs inputs of 8 bits, unsigned, static or with a range for every token; "
                f"the nearest spec is {_SPEC}"
            )
        if not activation.dynamic:
            if layer.weight.scale.ndim == 2 or activation.scale is None or activation.scale.ndim:
                raise InputError(
                    f"{layer.name}: {NAME} has no product of a static input with groups of weights; "
                    f"the nearest spec is {_GROUPS}"
                )
        elif layer.run % _BLOCK:
            raise InputError(
                f"{layer.name}: {NAME} takes a multiple of {_BLOCK} inputs a scale, not {layer.run}; "
                f"the nearest spec is {_GROUPS}"
            )


def export_program(
    model: nn.Module,
    target: Path,
    report: ExportReport,
    example: Mapping[str, Tensor],
    check: Check,
) -> None:
    """Lower a model, run the file, compare it, and move it to the target.

    Args:
        model: Quantized.
        target: ``NAME.pte``; it takes one row at a time, and texts of up to 512 tokens (or the model's own limit).
        report: Filled in; its layers are those that were lowered, as torchao computes them.
        example: A batch of keyword inputs.
        check: The comparisons, measurements and consequences.

    Raises:
        InputError: A layer has no product there; the model cannot be lowered; the comparison failed.
    """
    refuse_without_product(model)
    widths = " and ".join(sorted({"4-bit" if each.bits <= 4 else "8-bit" for each in plain_layers(model, NAME)}))
    reference = shared_copy(model)
    if report.embeddings and not round_embeddings(reference, report.embeddings):
        report.embeddings = 0
    prepared = with_codes(reference)
    check.notes("comparing every layer")
    gate.judge_layers(report, *compare_modules(reference, prepared, reference, "", example))
    static = set_output_ranges(prepared, reference, example)
    with in_place_of(target) as made:
        check.notes("lowering")
        report.placement = replace(_write(prepared, example, made), path=target.name)
        if not check.fallback:
            refuse_fallback(report.placement)
        delegated, left = (sum(each.values()) for each in (report.placement.placed, report.placement.fallen))
        del prepared
        inputs = "static ranges" if static else "a range for every token"
        report.about = [
            f"the multiply: XNNPACK, 8-bit inputs ({inputs}) x {widths} weights; "
            f"{delegated} operators delegated to it, {left} left to ExecuTorch's portable kernels"
        ]
        if static:
            report.about.append(
                f"outputs: XNNPACK rounds those of {static} layers to 8 bits, which is not simulated; their ranges are "
                "those of the example"
            )
        report.file_mb = made.stat().st_size / 1e6
        report.fp32_mb = sum(each.numel() for each in model.parameters()) * 4 / 1e6
        runner = PteModel(made)
        gate.judge(report, reference, runner, example, check)
        if check.time_it:
            one = {name: value[:1] for name, value in example.items()}
            plain = remove(shared_copy(model))
            report.latency_ms["executorch"] = gate.latencies({"torch": plain, "file": runner}, one)
        del runner
        report.refuse(target, check.force)


def with_codes(model: nn.Module) -> nn.Module:
    """A copy without quantizers whose Linears hold the same codes and scales: static ones as decomposed operators, all
    others as torchao's tensors.
    """
    made = remove(shared_copy(model))
    for layer in plain_layers(model, NAME):
        linear: Any = made.get_submodule(layer.name)
        if layer.activation is not None and not layer.activation.dynamic:
            made.set_submodule(layer.name, StaticLinear(layer.weight, layer.activation, linear.bias))
            continue
        linear.weight = nn.Parameter(_tensor(layer), requires_grad=False)
    return made


def _tensor(layer: PlainLayer) -> Tensor:
    from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as intx

    codes, scale = layer.weight.codes, layer.weight.scale
    rows = scale if scale.ndim == 2 else scale.expand(len(codes)).unsqueeze(1).contiguous()
    return intx.IntxUnpackedToInt8Tensor(
        qdata=codes,
        scale=rows,
        zero_point=torch.zeros_like(rows, dtype=torch.int8),
        target_dtype=getattr(torch, "int4" if layer.bits <= 4 else "int8"),
        block_size=(1, codes.shape[1] // rows.shape[1]),
        dtype=torch.float32,
        activation_quantization=intx.IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN,
    )


def _write(model: nn.Module, example: Mapping[str, Tensor], path: Path) -> Placement:
    """Lower a model for one row; return the operators that XNNPACK takes, and those that it leaves."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.devtools.backend_debug import get_delegation_info
    from executorch.exir import to_edge_transform_and_lower

    one = {name: value[:1] for name, value in example.items()}
    with torch.no_grad():
        outputs = list(tensors_of(model(**one)))
    config: Any = getattr(next((each for each in model.modules() if hasattr(each, "config")), None), "config", None)
    most = min(_MOST_TOKENS, getattr(config, "max_position_embeddings", None) or _MOST_TOKENS)
    length = torch.export.Dim("length", min=2, max=most)
    free = tuple({1: length} if v.ndim == 2 and not v.is_floating_point() else {} for v in one.values())
    try:
        program = torch.export.export(
            Face(model, tuple(one)).eval(), tuple(one.values()), dynamic_shapes={"values": free}, strict=False
        )
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            constant_methods={_INPUTS: ",".join(one), _OUTPUTS: ",".join(outputs)},
        )
        found = get_delegation_info(edge.exported_program().graph_module)
        path.write_bytes(edge.to_executorch().buffer)
    except MemoryError:
        raise
    except Exception as error:  # exporter and partitioner have classes of their own
        raise InputError(f"{type(model).__name__} cannot be lowered for {NAME}: {first_line(error)}") from error
    counts = found.delegation_by_operator.items()
    placed = {name: each.delegated for name, each in counts if each.delegated}
    fallen = {name: each.non_delegated for name, each in counts if each.non_delegated}
    return Placement(path.name, "XNNPACK", placed, fallen)


class PteModel(nn.Module):
    """A ``.pte`` file that is called as the original was; rows run one after the other."""

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        """Open the file.

        Args:
            path: The file.
            threads: Threads for all files in this process: XNNPACK has one pool.

        Raises:
            InputError: ExecuTorch is missing, or cannot read it.
        """
        super().__init__()
        runtime = require("executorch.runtime", "executorch")
        pools: Any = require("executorch.extension.pybindings.portable_lib", "executorch")
        pools._unsafe_reset_threadpool(threads)
        try:
            self._program = runtime.Runtime.get().load_program(os.fspath(path))
            self.names, self.outputs = (
                self._program.load_method(name).execute([])[0].split(",") for name in (_INPUTS, _OUTPUTS)
            )
            self._method = self._program.load_method("forward")
        except (RuntimeError, AttributeError) as error:
            raise InputError(f"{NAME} cannot run {path}: {first_line(error)}") from error

    def forward(self, **inputs: Tensor) -> Any:
        """As the exported model's forward; inputs that it does not read are left out."""
        rows = []
        for row in range(len(inputs[self.names[0]])):
            found = self._method.execute([inputs[name][row : row + 1].contiguous() for name in self.names])
            rows.append([copy.deepcopy(value) for value in found])  # the memory is the method's own
        values = [torch.cat(column) for column in zip(*rows, strict=True)]
        return named(dict(zip(self.outputs, values, strict=True)))
