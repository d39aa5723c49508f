"""The house keeps its shape: floors, public names, and what importing costs."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import s2d

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "s2d"
PUBLIC = {
    "SelectiveSpectralDecay",
    "audit",
    "load",
    "methods",
    "pcdr",
    "quantize",
    "tasks",
    "top_singular",
}
HEAVY = {"torch", "numpy", "transformers", "accelerate", "timm", "open_clip", "scipy", "jinja2", "pydantic", "yaml"}


def python(code: str) -> str:
    """Run code in a fresh interpreter; what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(statement: str) -> set[str]:
    """The top-level modules that a statement brings in."""
    told = python(f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})")
    return set(told.splitlines()[-1].split())


def test_import_contracts_hold() -> None:
    pytest.importorskip("importlinter")
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
        "--no-cache",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_room_stands_on_a_floor() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    floors = next(contract for contract in settings["contracts"] if contract["id"] == "floors")["layers"]
    placed = {room for floor in floors for room in re.findall(r"s2d(?:\.\w+)+", floor)}
    rooms = {
        f"s2d.{path.stem}" for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    rooms |= {
        f"s2d.quant.{path.stem}" for path in (PACKAGE / "quant").iterdir() if path.suffix == ".py" or path.is_dir()
    }
    rooms -= {"s2d.__init__", "s2d.__main__", "s2d.quant", "s2d.quant.__init__", "s2d.quant.__pycache__"}
    assert not rooms - placed, "give these rooms a floor in pyproject.toml, [tool.importlinter]"
    planned = {room for floor in floors for room in re.findall(r"\((s2d(?:\.\w+)+)\)", floor)}
    assert not rooms & planned, "these rooms exist now: take their parentheses away"


def test_no_file_is_longer_than_600_lines_and_none_is_called_utils() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert path.stem != "utils", path
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 600, path


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_the_promised_names_are_public(name: str) -> None:
    assert name in s2d.__all__
    assert callable(getattr(s2d, name))


def test_public_names_exist_and_are_documented() -> None:
    for name in s2d.__all__:
        assert inspect.getdoc(getattr(s2d, name)), f"s2d.{name} has no docstring"
        assert name in dir(s2d)


def test_an_unknown_name_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        s2d.no_such_name  # noqa: B018


def test_typing_information_is_shipped() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_optional_packages_wait_until_they_are_needed() -> None:
    assert not loaded("import s2d") & {"transformers", "accelerate", "timm", "open_clip", "scipy", "jinja2", "datasets"}


def test_the_report_needs_nothing_heavy() -> None:
    assert not loaded("import s2d.report") & HEAVY


@pytest.mark.parametrize("statement", ["import s2d", "import s2d.cli", "from s2d.cli import main; main(['--help'])"])
def test_names_and_help_are_there_without_torch(statement: str) -> None:
    assert not loaded(statement) & HEAVY


def test_version_is_that_of_the_project() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert importlib.import_module("s2d").__version__ == settings["project"]["version"]


def test_functions_that_use_the_package_can_be_sent_to_other_processes() -> None:
    import pickle

    import s2d

    assert pickle.loads(pickle.dumps(s2d)) is s2d
