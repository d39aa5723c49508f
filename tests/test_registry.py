"""The registry that tasks, methods, families and rivals share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from s2d.registry import Registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[int]:
    folder = tmp_path / "registered_things"
    folder.mkdir()
    (folder / "__init__.py").write_text("from s2d.registry import Registry\nKNOWN = Registry('thing', __name__)\n")
    (folder / "b.py").write_text("from registered_things import KNOWN\nKNOWN.add('second', 2)\n")
    (folder / "a.py").write_text("from registered_things import KNOWN\nKNOWN.add('third', 3)\nKNOWN.add('first', 1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [each for each in sys.modules if each.startswith("registered_things")]:
        monkeypatch.delitem(sys.modules, name)
    import registered_things  # pyright: ignore[reportMissingImports]

    return registered_things.KNOWN


def test_modules_are_imported_when_first_asked_for_and_in_their_order(package: Registry[int]) -> None:
    assert "registered_things.a" not in sys.modules
    assert list(package.all().items()) == [("third", 3), ("first", 1), ("second", 2)]


def test_a_name_is_taken_once(package: Registry[int]) -> None:
    package.all()
    with pytest.raises(AssertionError, match="thing first is registered twice"):
        package.add("first", 4)


def test_what_is_handed_out_is_a_copy(package: Registry[int]) -> None:
    package.all().clear()
    package.drop("third")
    assert list(package.all()) == ["first", "second"]
