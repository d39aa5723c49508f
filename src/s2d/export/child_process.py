"""A runtime is tried in a child process first, so that a crash does not end this process.

onnxruntime and OpenVINO are native code. A graph that their optimizers cannot handle can end the whole process (a
notebook, a long run) instead of raising an error.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from s2d.errors import InputError
from s2d.export.onnx import EXACT, overflows

SECONDS = 600.0  # for one run, loading and optimizing included

_ORT = """
import sys, numpy, onnxruntime as runtime
options = runtime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.log_severity_level = 4
if len(sys.argv) > 3: options.add_session_config_entry(*sys.argv[3:])
feed = dict(numpy.load(sys.argv[2]))
"""
_LOADED = """
try:
    session = runtime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    session.run(None, {each.name: feed[each.name] for each in session.get_inputs()})
except Exception: pass  # the parent meets it again, and says what it is
"""
_OPENVINO = """
import sys, numpy, openvino
feed = dict(numpy.load(sys.argv[2]))
try:
    config = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(sys.argv[1], "CPU", config)
    model({each.get_any_name(): feed[each.get_any_name()] for each in model.inputs})
except Exception: pass
"""


def try_runtime(path: Path, example: Mapping[str, Tensor], *, openvino: bool = False) -> None:
    """Run a file once in another process.

    Args:
        path: ``.onnx`` or ``.xml``.
        example: A batch of keyword inputs.
        openvino: Under OpenVINO instead of onnxruntime.

    Raises:
        InputError: The runtime ended that process, or ran too long. Errors that it raises appear when the caller runs
            the file.
    """
    name, code = ("OpenVINO", _OPENVINO) if openvino else ("onnxruntime", _ORT + _LOADED)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, **{key: value.numpy() for key, value in example.items()})  # pyright: ignore[reportArgumentType]
        words = [sys.executable, "-c", code, os.path.abspath(path), str(inputs)]
        words += EXACT if not openvino and overflows() else ()
        quiet = subprocess.DEVNULL
        try:
            ended = subprocess.run(words, cwd=folder, stdout=quiet, stderr=quiet, timeout=SECONDS).returncode
        except subprocess.TimeoutExpired:
            raise InputError(
                f"{path.name}: {name} did not run this graph once in {SECONDS:g} s, tried in a process of its own; "
                "export a smaller model, or for another runtime"
            ) from None
    if ended < 0:
        try:
            how = signal.Signals(-ended).name
        except ValueError:
            how = f"signal {-ended}"
        raise InputError(
            f"{path.name}: {name} crashed on this graph ({how}) when it was tried in a separate process; "
            "leave the operands of attention in full precision (attention: false), or export for another runtime"
        )
