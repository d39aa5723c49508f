"""onnxruntime's own quantizers, on the model's ONNX file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peers.contract import ENCODERS, TEXT, Job, Row, way

PACKAGE = "onnxruntime"


def by_onnxruntime(source: Path, target: Path, examples: Iterable[Row], **settings: Any) -> None:
    """Its static quantizer; at its defaults without settings."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Rows(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(examples)

        def get_next(self) -> Any:
            return next(self.left, None)

    quantize_static(source, target, Rows(), **settings)


def _static(job: Job, source: Path, padded: bool = False, **settings: Any) -> Path:
    target = job.folder / "model.onnx"
    by_onnxruntime(source, target, job.feeds(padded), **settings)
    return target


@way("w8a8-static", "quantize_static on torch's file, padded texts", file=True, beds=(TEXT,))
def static_torch(job: Job) -> Path:
    """The range of the masked scores is that of the mask."""
    return _static(job, job.torch_file, padded=True)


@way("w8a8-static", "quantize_static, its defaults", file=True, beds=ENCODERS)
def static(job: Job) -> Path:
    """On the file whose masks are bounded."""
    return _static(job, job.s2d_file)


@way("w8a8-static", "quantize_static, int8 a channel, percentile", file=True, beds=ENCODERS)
def static_percentile(job: Job) -> Path:
    """What its page advises where min-max loses. It takes calibration texts of one length only."""
    from onnxruntime.quantization import CalibrationMethod

    return _static(job, job.s2d_file, padded=True, per_channel=True, calibrate_method=CalibrationMethod.Percentile)


@way("w8a8-static", "quantize_static, products only, uint8 activations, int8 a channel", file=True, beds=ENCODERS)
def static_products(job: Job) -> Path:
    """The operators that have integer kernels."""
    from onnxruntime.quantization import QuantType

    products = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True, "activation_type": QuantType.QUInt8}
    return _static(job, job.s2d_file, **products)


def _four(job: Job, activation: str) -> Path:
    from onnxruntime.quantization import QuantType

    kinds = {"weight_type": QuantType.QInt4, "activation_type": getattr(QuantType, activation)}
    return _static(job, job.s2d_file, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, **kinds)


@way("w4a8-static", "quantize_static, products only, int4 a channel, uint8 activations", file=True, beds=ENCODERS)
def static_w4a8(job: Job) -> Path:
    """The products of attention and the head as well."""
    return _four(job, "QUInt8")


@way("w4a4-static", "quantize_static, products only, int4 a channel, uint4 activations", file=True, beds=ENCODERS)
def static_w4a4(job: Job) -> Path:
    """4-bit activations too."""
    return _four(job, "QUInt4")


@way("w8a8-dynamic", "quantize_dynamic, its defaults", file=True, alone=True, beds=ENCODERS)
def dynamic(job: Job) -> Path:
    """Products only; one range a tensor and call."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(job.torch_file, job.folder / "model.onnx")
    return job.folder / "model.onnx"


@way("w8a8-dynamic", "quantize_dynamic, int8 a channel", file=True, alone=True, beds=ENCODERS)
def dynamic_channel(job: Job) -> Path:
    """A scale a channel for weights."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(job.torch_file, job.folder / "model.onnx", per_channel=True)
    return job.folder / "model.onnx"


@way("w4a16", "MatMulNBitsQuantizer: int4 in blocks of 32", file=True, beds=ENCODERS)
def blocks(job: Job) -> Path:
    """Rounded; the kernel for weights in blocks, the head included."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    made = MatMulNBitsQuantizer(onnx.load(job.torch_file), block_size=32, is_symmetric=True)
    made.process()
    made.model.save_model_to_file(str(job.folder / "model.onnx"))
    return job.folder / "model.onnx"
