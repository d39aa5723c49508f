"""A torchvision whose operators were never registered, as beside a torch of another build; each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BROKEN = "import torch\ntorch.library.register_fake('torchvision::nms')(lambda *_: None)\nVALUE = 3\n"
PROGRAM = "from s2d.optional import declare_missing_operators\ndeclare_missing_operators()\n"


def run(folder: Path, package: str, program: str) -> subprocess.CompletedProcess[str]:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(package)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(("program", "works"), [(PROGRAM, True), ("", False)])
def test_it_imports_once_its_operators_are_declared(tmp_path: Path, program: str, works: bool) -> None:
    done = run(tmp_path, BROKEN, program + "import torchvision\nprint(torchvision.VALUE)")
    assert (done.stdout == "3\n") == works
    assert ("operator torchvision::nms does not exist" in done.stderr) != works


@pytest.mark.parametrize("package", ["raise RuntimeError('another fault')", "import no_such_module"])
def test_other_faults_are_left_to_its_own_import(tmp_path: Path, package: str) -> None:
    done = run(tmp_path, package, PROGRAM + "print('declared nothing')\nimport torchvision")
    assert done.stdout == "declared nothing\n"
    assert "another fault" in done.stderr or "no_such_module" in done.stderr


def test_a_whole_one_is_left_alone(tmp_path: Path) -> None:
    check = "import torch\nprint(hasattr(torch.ops.torchvision, 'nms'))"
    assert run(tmp_path, "VALUE = 3\n", PROGRAM + check).stdout == "False\n"
