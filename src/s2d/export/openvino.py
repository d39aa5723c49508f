"""OpenVINO reads the ONNX file, or its own ``.xml`` with the weights in a second file; both use the same kernels."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.export.fixed_shapes import is_sequence
from s2d.export.onnx import named
from s2d.optional import require
from s2d.quant.modules.sites import Site


def refuse_spans(sites: Sequence[Site], example: Mapping[str, Tensor]) -> None:
    """Refuse ranges of several tokens where the length is free: OpenVINO 2026.4 ends its process on such a graph.

    Args:
        sites: The plan.
        example: A batch of keyword inputs.

    Raises:
        InputError: The first such site, and what to use instead.
    """
    span = next((each for each in sites if each.format is not None and each.granularity == "span"), None)
    if span is not None and any(is_sequence(value) for value in example.values()):
        raise InputError(
            f"{span.name} has a range for {span.group} tokens, which OpenVINO cannot run where the length is free; "
            "name the file NAME.onnx (for onnxruntime), or quantize with one range (w8a8) or one a token (w8a8-token)"
        )


def convert(source: Path, path: Path) -> None:
    """Write an ONNX file as OpenVINO's own form: ``NAME.xml`` and ``NAME.bin``."""
    openvino = require("openvino", "openvino")
    openvino.save_model(openvino.Core().read_model(os.fspath(source)), os.fspath(path), compress_to_fp16=False)


def compiled(path: Path, threads: int = 1) -> Any:
    """The model compiled for the CPU.

    Raises:
        InputError: OpenVINO is missing, or cannot read it.
    """
    openvino = require("openvino", "openvino")
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    try:
        with _signal_stack_kept():
            return openvino.Core().compile_model(os.fspath(path), "CPU", config)
    except RuntimeError as error:
        raise InputError(f"OpenVINO cannot run {path}: {str(error).strip().splitlines()[-1][:300]}") from error


class _SignalStack(ctypes.Structure):
    """``stack_t`` of Linux."""

    _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@contextlib.contextmanager
def _signal_stack_kept() -> Iterator[None]:
    """Leave this thread the signal stack that it had.

    OpenVINO sets its own signal stack while a model is open, and restores the earlier one on closing. If two models
    close in the order in which they opened, the second restores the stack of the first, which is freed: the next
    signal, such as Ctrl-C, is then a segmentation fault. With this, each model restores the stack from before all of
    them.
    """
    if sys.platform != "linux":
        yield
        return
    library, before = ctypes.CDLL(None), _SignalStack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)


def kernels(path: Path) -> dict[str, int]:
    """The number of matrix products of each kind and precision, in the graph that will run."""
    counts: dict[str, int] = {}
    for node in compiled(path).get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind = str(info["layerType"].astype(str)) if "layerType" in info else ""
        if kind in ("FullyConnected", "MatMul", "Convolution", "ScaledDotProductAttentionWithKVCache"):
            name = f"{kind} {info['primitiveType'].astype(str)}"
            counts[name] = counts.get(name, 0) + 1
    return counts


def _sizes(shape: Any) -> list[int | None]:
    return [None if size.is_dynamic else size.get_length() for size in shape]


class OpenVinoModel(nn.Module):
    """An exported model under OpenVINO, called as the original was."""

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        """Read and compile the file (.onnx or .xml)."""
        super().__init__()
        self._compiled = compiled(Path(path), threads)
        self.names = [each.get_any_name() for each in self._compiled.inputs]
        self.outputs = [each.get_any_name() for each in self._compiled.outputs]
        # Whether integers, and the sizes; None where any will do.
        self.shapes: dict[str, tuple[bool, tuple[int | None, ...]]] = {
            each.get_any_name(): (each.get_element_type().is_integral(), tuple(_sizes(each.get_partial_shape())))
            for each in self._compiled.inputs
        }

    def forward(self, **inputs: Tensor) -> Any:
        """As the exported model's forward; inputs that it does not read are left out."""
        found = self._compiled({name: inputs[name].detach().cpu().numpy() for name in self.names if name in inputs})
        values = [torch.from_numpy(found[index].copy()) for index in range(len(self.outputs))]
        return named(dict(zip(self.outputs, values, strict=True)))
