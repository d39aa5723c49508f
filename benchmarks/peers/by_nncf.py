"""NNCF, on the model's ONNX file, and on OpenVINO's form of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from peers.contract import ENCODERS, Job, Row, rows, way

PACKAGE = "nncf"
SAMPLES = 128


def by_nncf(source: Path, target: Path, examples: Iterable[Row], **settings: Any) -> None:
    """Its post-training quantizer on ONNX; at its defaults without settings."""
    import nncf  # pyright: ignore[reportMissingImports]
    import onnx

    onnx.save(nncf.quantize(onnx.load(source), nncf.Dataset(list(examples)), subset_size=SAMPLES, **settings), target)


def controlled(
    full: Path,
    target: Path,
    calibration: Iterable[Any],
    examples: list[tuple[Row, int]],
    within: float,
) -> None:
    """Its accuracy control, on OpenVINO's or onnxruntime's model as the target's suffix says.

    Args:
        full: The ONNX file.
        target: ``.xml`` or ``.onnx``.
        calibration: Inputs.
        examples: Inputs and labels that it searches on.
        within: Points of accuracy.
    """
    import nncf  # pyright: ignore[reportMissingImports]
    import onnx
    import openvino

    def hits(model: Any, data: Iterable[Any]) -> tuple[float, None]:
        if isinstance(model, onnx.ModelProto):
            import onnxruntime

            session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
            answer: Any = lambda inputs: session.run(None, inputs)[0]  # noqa: E731
        else:
            answer = lambda inputs: model(inputs)[0]  # noqa: E731
        found = [int(answer(inputs).argmax(-1)[0]) == int(label) for inputs, label in data]
        return float(np.mean(found)), None

    model = openvino.Core().read_model(full) if target.suffix == ".xml" else onnx.load(full)
    made = nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(list(calibration)),
        nncf.Dataset(examples),
        hits,
        max_drop=within / 100,
        subset_size=SAMPLES,
    )
    if target.suffix == ".xml":
        openvino.save_model(made, target, compress_to_fp16=False)
    else:
        onnx.save(made, target)


@way("w8a8-static", "quantize, its defaults", file=True, beds=ENCODERS)
def static(job: Job) -> Path:
    """The whole graph."""
    by_nncf(job.s2d_file, job.folder / "model.onnx", job.feeds())
    return job.folder / "model.onnx"


@way("w8a8-static", "quantize, model_type=TRANSFORMER (SmoothQuant)", file=True, beds=ENCODERS)
def transformer(job: Job) -> Path:
    """What its page advises for transformers, and optimum-intel does."""
    import nncf  # pyright: ignore[reportMissingImports]

    by_nncf(job.s2d_file, job.folder / "model.onnx", job.feeds(), model_type=nncf.ModelType.TRANSFORMER)
    return job.folder / "model.onnx"


@way("w8a8-static", "accuracy control within 1 point, OpenVINO", file=True, beds=ENCODERS)
def control(job: Job) -> Path:
    """It searches on the validation split."""
    found = job.labelled()
    labels = [label for _, each in found for label in each.tolist()]
    examples = list(zip(rows((inputs for inputs, _ in found), job.names), labels, strict=True))
    controlled(job.s2d_file, job.folder / "model.xml", job.feeds(), examples, within=1.0)
    return job.folder / "model.xml"


def _weights(job: Job, **settings: Any) -> Path:
    import nncf  # pyright: ignore[reportMissingImports]
    import openvino

    model = openvino.Core().read_model(job.torch_file)
    made = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, ratio=1.0, group_size=32, **settings)
    openvino.save_model(made, job.folder / "model.xml", compress_to_fp16=False)
    return job.folder / "model.xml"


@way("w4a16", "compress_weights: int4 in groups of 32, OpenVINO", file=True, beds=ENCODERS)
def weights(job: Job) -> Path:
    """Rounded; the last product keeps 8 bits."""
    return _weights(job)


@way("w4a16", "the same, AWQ and scale estimation", file=True, beds=ENCODERS)
def weights_data(job: Job) -> Path:
    """Its ways that see data."""
    import nncf  # pyright: ignore[reportMissingImports]

    return _weights(job, dataset=nncf.Dataset(list(job.feeds())), awq=True, scale_estimation=True)
