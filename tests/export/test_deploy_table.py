"""The table of docs/deploy.md, what goes where, is what the runtimes' own files say.

PYTHONPATH=src python tests/export/test_deploy_table.py     # write it again
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from s2d import quant
from s2d.export.runtime import Runtime, runtimes
from s2d.quant import QuantSpec

PAGE = Path(__file__).parent.parent.parent / "docs" / "deploy.md"
BEGIN, END = "<!-- what goes where: python tests/export/test_deploy_table.py -->\n", "<!-- end -->\n"
INTEGERS: dict[str, Any] = {"attention": False}
FORMATS: dict[str, Any] = {
    "W8A8": {"base": "w8a8", **INTEGERS},
    "W8A8 symmetric": {"base": "w8a8", "activation": {"format": "int8"}, **INTEGERS},
    "W8A8 powers of two": {
        "weight": {"format": "int8-pow2", "granularity": "tensor"},
        "activation": {"format": "int8-pow2"},
        **INTEGERS,
    },
    "W4A8": {"base": "w4a8", **INTEGERS},
    "W4A8 a token": {"base": "w4a8-token", **INTEGERS},
    "W8A16 (uint16)": {"base": "w8auint16", **INTEGERS},
    "W8A16 (int16)": {"base": "w8aint16", **INTEGERS},
    "W4 groups of 128": {"weight": {"bits": 4, "granularity": "group-128"}, "activation": "keep", **INTEGERS},
    "W4A4": {"base": "w4a4", **INTEGERS},
    "FP8": {"base": "fp8", **INTEGERS},
    "NVFP4": {"base": "nvfp4", **INTEGERS},
    "MXFP4": {"base": "mxfp4", **INTEGERS},
}


def how(runtime: Runtime) -> str:
    """How far the files for a runtime were tried here."""
    if runtime.runner is not None:
        return "run"
    return "run by ORT" if ".onnx" in runtime.files else "read back"


def cell(runtime: Runtime, spec: Any) -> str:
    """What becomes of one format for one runtime; decided as `s2d export --for` decides."""
    if runtime.quantizes_itself:
        return "by itself"
    layer = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(256, 256))])})
    found = runtime.complaint(quant.plan(layer, QuantSpec.parse(spec)))
    assert found is None or found.startswith("layers.0.0: "), found  # the layer, then the reason
    return how(runtime) if found is None else "no"


def table() -> str:
    """The table as text."""
    known = runtimes().values()
    lines = [["", *(runtime.name for runtime in known)], ["---"] * (len(known) + 1)]
    lines += [[name, *(cell(runtime, spec) for runtime in known)] for name, spec in FORMATS.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_page_shows_what_is_legal() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(BEGIN) == 1
    assert text.partition(BEGIN)[2].partition(END)[0] == table(), "run: python tests/export/test_deploy_table.py"


def test_every_format_goes_somewhere_and_every_runtime_takes_one() -> None:
    cells = {name: [cell(runtime, spec) for runtime in runtimes().values()] for name, spec in FORMATS.items()}
    assert all(set(row) - {"no", "by itself"} for name, row in cells.items() if name != "W4A4")
    assert all(set(column) != {"no"} for column in zip(*cells.values(), strict=True))


if __name__ == "__main__":
    before, _, after = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + after.partition(END)[2], encoding="utf-8")
