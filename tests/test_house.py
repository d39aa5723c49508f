"""The house keeps its shape: floors, public names, and what importing costs."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import s2d
from s2d.moved import MOVED

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
    layers = next(contract for contract in settings["contracts"] if contract["id"] == "floors")["layers"]
    placed = {room for floor in layers for room in re.findall(r"s2d(?:\.\w+)+", floor)}
    rooms = {
        f"s2d.{path.stem}" for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert placed == rooms - {"s2d.__init__", "s2d.__main__"}, "pyproject.toml, [tool.importlinter] lists other rooms"


def test_the_house_keeps_within_its_plan() -> None:
    done = subprocess.run([sys.executable, ROOT / ".ci" / "floors.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_circle_and_a_floor_too_many_are_seen() -> None:
    script = runpy.run_path(str(ROOT / ".ci" / "floors.py"))
    with pytest.raises(SystemExit, match="a -> b -> a"):
        script["floors"]({"a": {"b"}, "b": {"a"}})
    chain = {str(n): {str(n + 1)} for n in range(13)} | {"13": set()}
    assert script["floors"](chain)["0"] == 14
    assert "14 floors; at most 13" in script["complaints"](chain, script["floors"](chain))


def test_no_two_files_share_a_name() -> None:
    shared = {"__init__", "base", "huggingface"}  # a plug-in for a library has that library's name
    commands = {path.stem for path in (PACKAGE / "commands").iterdir()}
    names = Counter(path.stem for path in PACKAGE.rglob("*.py") if path.stem not in shared | commands)
    assert [name for name, count in names.items() if count > 1] == []
    assert "utils" not in names


def test_old_import_paths_still_lead_somewhere() -> None:
    for old, new in MOVED.items():
        with pytest.warns(FutureWarning, match=f"{old} is now {new}"):
            sys.modules.pop(old, None)
            found = importlib.import_module(old)
        current = importlib.import_module(new)
        public = [name for name in vars(current) if not name.startswith("_")]
        assert public and all(getattr(found, name) is getattr(current, name) for name in public)


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
