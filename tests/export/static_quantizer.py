"""onnxruntime's static quantizer on a file as `s2d export --for any` leaves it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from s2d.export.conditioned import strip
from s2d.export.onnx import write_onnx
from s2d.optional import require


def write_stripped(model: nn.Module, inputs: dict[str, Tensor], path: Path) -> Path:
    """A model as a file at opset 20 without the exporter's metadata."""
    onnx = require("onnx", "export")
    write_onnx(model.eval(), inputs, path, opset=20)
    made = onnx.load(os.fspath(path))
    strip(made)
    onnx.save(made, os.fspath(path))
    return path


def in_8_bits(path: Path, inputs: dict[str, Tensor], **settings: Any) -> Path:
    """Quantize a file beside it, calibrated by one batch; at the quantizer's defaults without settings."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Rows(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{name: value.numpy() for name, value in inputs.items()}])

        def get_next(self) -> Any:
            return next(self.left, None)

    target = path.with_suffix(".int8.onnx")
    quantize_static(path, target, Rows(), **settings)
    return target
