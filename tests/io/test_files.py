"""Files and folders take their place whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from s2d.errors import InputError
from s2d.io.files import in_place_of


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with in_place_of(tmp_path / "a" / "model") as made:
            made.mkdir()
            (made / f"{text}.txt").write_text(text)
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["model", "new.txt"]


def test_what_is_written_beside_it_goes_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = os.replace

    def note(source: Any, target: Any) -> None:
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr("os.replace", note)
    with in_place_of(tmp_path / "a.onnx") as made:
        made.write_text("names b")
        made.with_name("z.data").write_text("b")
    assert moved == ["z.data", "a.onnx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "z.data"]


def test_what_the_disk_did_not_take_is_not_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with (
        pytest.raises(InputError, match=f"could not write {tmp_path}/a: No space left"),
        in_place_of(tmp_path / "a") as made,
    ):
        made.write_text("a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
def test_an_unfinished_folder_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "kept").write_text("kept")
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)), in_place_of(target) as made:
        made.mkdir()
        (made / "half").write_text("h")
        raise error
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "kept"]


def test_the_old_folder_returns_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "kept").write_text("kept")
    replace = os.replace

    def refuse_the_new(source: Any, to: Any) -> None:
        if Path(source).name == "model" and Path(source).parent != tmp_path:
            raise OSError(5, "Input/output error")
        replace(source, to)

    monkeypatch.setattr("os.replace", refuse_the_new)
    message = "could not write .*model: Input/output error; nothing was changed there"
    with pytest.raises(InputError, match=message), in_place_of(target) as made:
        made.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "kept"]
