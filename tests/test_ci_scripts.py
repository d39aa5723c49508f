"""The scripts that run a page's commands and check configuration files."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.scripts import script

ROOT = Path(__file__).resolve().parent.parent


def test_only_marked_blocks_count() -> None:
    page = "```bash\nno\n```\n<!-- ci -->\n\n```bash\nmake a\nmake b   # why\n```\ntext\n"
    page += "<!-- ci -->\n```python\nx = 1\n```\n<!-- ci -->\n```text\nno\n```\n"
    assert script(".ci/readme_commands.py").marked_blocks(page) == [
        ("bash", "make a\nmake b   # why\n"),
        ("python", "x = 1\n"),
    ]


def test_skipped_lines_are_whole_commands() -> None:
    without = script(".ci/readme_commands.py").without
    assert without("make demo\nmake test  # the tests\nmake test-all\n", ["make test"]) == "make demo\nmake test-all\n"


@pytest.mark.parametrize(("block", "code"), [("true", 0), ("false\ntrue", 1), ("false | true", 1)])
def test_a_failing_command_fails_the_run(tmp_path: Path, block: str, code: int) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"<!-- ci -->\n```bash\n{block}\n```\n")
    command = [sys.executable, str(ROOT / ".ci" / "readme_commands.py"), str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert "+ " in done.stderr  # the shell shows what it runs


def test_a_page_without_commands_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    command = [sys.executable, str(ROOT / ".ci" / "readme_commands.py"), str(page)]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 1


def test_files_that_do_not_parse_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.toml"
    good.write_text("a: 1\n")
    bad.write_text("a = = 1\n")
    check = script(".ci/check_config.py").main
    assert check([str(good)]) == 0
    assert check([str(good), str(bad)]) == 1
    assert "bad.toml" in capsys.readouterr().err


def test_constraints_are_versions_and_nothing_of_the_machine_they_were_made_on() -> None:
    lines = (ROOT / ".ci/constraints.txt").read_text().splitlines()
    names = [line.partition("==")[0] for line in lines[1:]]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.!]*", line) for line in lines[1:])
    assert names == sorted(names) and len(names) == len(set(names))
    assert {"torch", "transformers", "accelerate", "numpy", "pytest", "hatchling"} <= set(names)
    pin = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("TORCH ?= "))
    assert pin.removeprefix("TORCH ?= ") in lines, "the Makefile and the constraints name the same torch"


def test_uv_is_told_what_pip_is_configured_with() -> None:
    listed = ":env:.constraint='/here/c.txt'\n:env:.find-links='/a /b'\nglobal.constraint='/other.txt'\n"
    listed += "global.extra-index-url='https://a/simple\\nhttps://b/simple'\nfreeze.timeout='10'\n"
    told = script(".ci/uv_settings.py").settings(listed)
    assert told["UV_CONSTRAINT"] == "/here/c.txt", "the environment counts more than a file"
    assert told["UV_FIND_LINKS"] == "/a,/b" and told["UV_INDEX"] == "https://a/simple https://b/simple"
    assert set(told) == {"UV_CONSTRAINT", "UV_FIND_LINKS", "UV_INDEX", "UV_INDEX_STRATEGY"}


def test_a_wheel_with_too_much_or_too_little_is_found_out(tmp_path: Path) -> None:
    check, wheel = script(".ci/check_wheel.py"), tmp_path / "s2d-0-py3-none-any.whl"
    tracked = [f"src/s2d/{name}" for name in check.NEEDED]
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in tracked:
            archive.write(ROOT / path, path.removeprefix("src/"))
        archive.writestr("s2d-0.dist-info/METADATA", "")
    assert check.problems(wheel, tracked) == []
    assert check.problems(wheel, tracked[1:]) == [
        "s2d/py.typed does not belong in it",
        "s2d/py.typed is not tracked",
    ]
    assert check.problems(wheel, [*tracked, "src/s2d/cli.py"]) == ["s2d/cli.py is missing"]


def test_make_bench_runs_what_needs_no_argument() -> None:
    line = re.search(r"^BENCHMARKS \?= (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert line is not None
    for name in line[1].split():
        text = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
        arguments = re.findall(r"add_argument\((.+)\)", text)
        assert arguments
        for argument in arguments:
            assert argument.startswith('"-') and "required=True" not in argument, f"{name}.py needs {argument}"
