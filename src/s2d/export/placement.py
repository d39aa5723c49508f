"""Where a runtime puts the nodes of a file: on the device that was asked for, or back on the CPU.

A provider of onnxruntime takes the nodes that it has kernels for; all others run on the CPU without a message. The
session reports the placement (``session.record_ep_graph_assignment_info``, onnxruntime 1.24 and later). OpenVINO says
which nodes a device can run. Nothing is run.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s2d.errors import InputError, choices, first_line
from s2d.export.onnx import CPU
from s2d.optional import require


@dataclass(frozen=True)
class Placement:
    """The device of every node of a file.

    Attributes:
        path: The file.
        provider: The execution provider, or the device of OpenVINO, that was asked for.
        placed: Its nodes, by operator.
        fallen: The nodes that fell back to the CPU, by operator; empty where the CPU was asked for.
    """

    path: str
    provider: str
    placed: dict[str, int]
    fallen: dict[str, int]

    def __str__(self) -> str:
        placed, fallen = sum(self.placed.values()), sum(self.fallen.values())
        text = f"{self.path}: {placed} of {placed + fallen} nodes on {self.provider}"
        if not self.fallen:
            return text
        counted = ", ".join(f"{count} {name}" for name, count in sorted(self.fallen.items(), key=lambda each: -each[1]))
        return f"{text}; back on the CPU: {counted}"

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


def provider_name(text: str) -> str:
    """A provider of this onnxruntime by its name, with or without its ending.

    Raises:
        InputError: This onnxruntime has none; those that it has are listed.
    """
    runtime = require("onnxruntime", "export", at_least="1.24")
    known = {each.removesuffix("ExecutionProvider").lower(): each for each in runtime.get_available_providers()}
    wanted = text.removesuffix("ExecutionProvider").lower()
    if wanted not in known:
        raise InputError(f"this onnxruntime has no provider {text!r}; {choices(text, sorted(known))}")
    return known[wanted]


def placement(path: str | os.PathLike[str], provider: str = CPU) -> Placement:
    """Ask the runtime of a file where it would run its nodes.

    Args:
        path: ``NAME.onnx``, or OpenVINO's ``NAME.xml``.
        provider: An execution provider, such as ``"qnn"`` (see `provider_name`), or a device of OpenVINO.

    Raises:
        InputError: No such file, provider or device; the file cannot be opened.
    """
    if Path(path).suffix == ".xml":
        return _by_openvino(Path(path), "CPU" if provider == CPU else provider)
    runtime = require("onnxruntime", "export", at_least="1.24")
    source, name = Path(path), provider_name(provider)
    if source.suffix != ".onnx" or not source.is_file():
        raise InputError(f"{source} is no ONNX file; nodes are listed for NAME.onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        providers = list(dict.fromkeys((name, CPU)))
        session = runtime.InferenceSession(os.fspath(source), options, providers=providers)
        parts = session.get_provider_graph_assignment_info()
    except Exception as error:  # onnxruntime's own classes, which differ by version
        raise InputError(f"onnxruntime cannot open {source}: {first_line(error)}") from error
    counts: dict[str, Counter[str]] = {}
    for part in parts:
        counts.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    placed = counts.pop(name, Counter())
    return Placement(str(source), name, dict(placed), dict(sum(counts.values(), Counter())))


def _by_openvino(path: Path, device: str) -> Placement:
    core: Any = require("openvino", "openvino").Core()
    known = {each.split(".")[0].lower(): each.split(".")[0] for each in core.available_devices}
    if device.lower() not in known:
        raise InputError(f"this OpenVINO finds no device {device!r}; {choices(device, sorted(known))}")
    if not path.is_file():
        raise InputError(f"{path} is not there; nodes are listed for files")
    model = core.read_model(os.fspath(path))
    able = core.query_model(model, known[device.lower()])
    kinds = {each.get_friendly_name(): each.get_type_name() for each in model.get_ordered_ops()}
    placed = Counter(kind for name, kind in kinds.items() if name in able)
    fallen = Counter(kind for name, kind in kinds.items() if name not in able)
    return Placement(str(path), known[device.lower()], dict(placed), dict(fallen))


def refuse_fallback(found: Placement) -> None:
    """Refuse a file if some of its nodes fell back to the CPU.

    Raises:
        InputError: Nodes fell back; the message names their operators.
    """
    if found.fallen:
        raise InputError(f"{found}; leave out --no-fallback to run it all the same")
