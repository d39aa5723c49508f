"""Every python and bash block of the pages is run, or says why not.

What a block is, the line right above it says:

    <!-- ci -->                            `.ci/run` runs it at the root of a fresh clone (.ci/readme_commands.py)
    <!-- skip: next "needs a GPU" -->      nobody runs it, for that reason
    <!-- in CI: {"--steps 250": "--steps 2"} -->   run here with words replaced, for time or want of a download
    anything else                          run here as it stands

"Here" is one empty folder and one Python namespace a page, blocks in order. What a reader brings along (a model, a
folder of pictures) is made by ``<!-- invisible-code-block: python ... -->`` on the page; PAGE is its
path. The syntax is Sybil's but for
the first and the third.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import SkipTest

import pytest

pytest.importorskip("transformers")
sybil = pytest.importorskip("sybil", reason="sybil is not installed: pip install sybil")

from sybil.evaluators.python import PythonEvaluator  # noqa: E402
from sybil.parsers.markdown import CodeBlockParser, SkipParser  # noqa: E402

from s2d.cli import main  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^[ >]*```(\w*)[ \t]*$.*?^[ >]*```[ \t]*$", re.MULTILINE | re.DOTALL)
ABOVE = re.compile(r"^<!-- (.*) -->\n\s*\Z", re.MULTILINE)
NOT_CODE = {
    "text",
    "yaml",
    "json",
    "bibtex",
    "html",
    "javascript",
    "js",
    "cpp",
    "c",
    "swift",
    "kotlin",
    "java",
}  # no CI here runs these


def comment_above(example: sybil.Example) -> str:
    """The comment in the line above a block, or nothing."""
    found = ABOVE.search(example.document.text[: example.start])
    return found[1] if found else ""


def prepared(example: sybil.Example) -> str:
    """The block's code, padded so that a traceback names the line of the page, with CI's words in place."""
    code = str(example.parsed)
    kind, _, words = comment_above(example).partition(": ")
    for there, here in json.loads(words).items() if kind == "in CI" else ():
        assert there in code, f"{example.path}:{example.line}: the block does not say {there!r}"
        code = code.replace(there, here)
    return code


def commands_of_s2d(code: str) -> list[list[str]] | None:
    """The words behind each `s2d`, if a block is nothing but its commands, without the shell's own signs."""
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    words = [line for line in lines if line]
    shell = re.search(r"[|<>$;&`~]|(?<!\[)\*", re.sub(r"'[^']*'|\"[^\"$`]*\"|#.*", "", code))
    return None if shell or any(line[0] != "s2d" for line in words) else [line[1:] for line in words]


class Bash:
    """One shell a block, which stops at the first failure; plain s2d commands in this process, which saves imports."""

    def __call__(self, example: sybil.Example) -> None:
        code, where = prepared(example), f"{example.path}:{example.line}"
        if (commands := commands_of_s2d(code)) is not None:
            for words in commands:
                with warnings.catch_warnings():
                    assert main(words) == 0, f"{where}: s2d {shlex.join(words)}"
            return
        here = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
            "HF_HUB_OFFLINE": "1",
        }
        command = ["bash", "-euo", "pipefail", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **here}, check=False)
        assert done.returncode == 0, f"{where}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


class Python(PythonEvaluator):
    def __call__(self, example: sybil.Example) -> None:
        example.parsed = sybil.Lexeme(prepared(example), example.parsed.offset, example.parsed.line_offset)
        super().__call__(example)


def blocks(page: Path) -> list[sybil.Example]:
    parsers = [CodeBlockParser("python", Python()), CodeBlockParser("bash", Bash()), SkipParser()]
    document = sybil.Sybil(parsers=parsers).parse(page)
    document.namespace["PAGE"] = page
    return list(document.examples())


def run(page: Path) -> list[str]:
    """Run a page's blocks; the reasons of those that are not."""
    reasons = []
    for example in blocks(page):
        if comment_above(example) == "ci":
            continue
        try:
            example.evaluate()
        except SkipTest as why:
            reasons.append(str(why))
    return reasons


def with_code(pages: list[Path]) -> list[Path]:
    return [page for page in pages if re.search(r"^[ >]*```(python|bash)", page.read_text("utf-8"), re.MULTILINE)]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("page", with_code(PAGES), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    for reason in run(page):
        assert len(reason.split()) >= 2, f"{page.name}: a skipped block must say why"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_block_hides_behind_an_unknown_language(page: Path) -> None:
    languages = {match[1] for match in FENCE.finditer(page.read_text("utf-8"))}
    assert languages <= NOT_CODE | {"python", "bash"}


def test_ci_runs_the_pages_that_say_so() -> None:
    command = next(line for line in (ROOT / ".ci" / "run").read_text("utf-8").splitlines() if "readme_commands" in line)
    marked = [page for page in PAGES if re.search(r"^<!-- ci -->$", page.read_text("utf-8"), re.MULTILINE)]
    assert [page.relative_to(ROOT).as_posix() for page in marked] == re.findall(r"\S+\.md", command)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("s2d a --b c  # why\ns2d d 'e f'\n", [["a", "--b", "c"], ["d", "e f"]]),
        ("s2d a \\\n  --b\n", [["a", "--b"]]),
        ("s2d run -o 'x=[a,b]' -o 'y={c: null}'\n", [["run", "-o", "x=[a,b]", "-o", "y={c: null}"]]),
        ('s2d a --b "*c*"\n', [["a", "--b", "*c*"]]),
        ('s2d a "$HOME"\n', None),
        ("s2d a > b\n", None),
        ("s2d a b/*\n", None),
        ("make\n", None),
    ],
)
def test_plain_commands_are_told_from_shell(code: str, expected: list[list[str]] | None) -> None:
    assert commands_of_s2d(code) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```python\nx = 1\n```\n```python\nassert x == 1\n```\n", []),
        ("```bash\nfalse\n```\n", AssertionError),
        ("```python\n1 / 0\n```\n", ZeroDivisionError),
        ('<!-- skip: next "needs a GPU" -->\n\n```bash\nfalse\n```\n', ["needs a GPU"]),
        ("<!-- ci -->\n```bash\nfalse\n```\n", []),
        ('<!-- in CI: {"false": "true"} -->\n```bash\nfalse\n```\n', []),
        ('<!-- in CI: {"more": "less"} -->\n```bash\ntrue\n```\n', AssertionError),
        ("<!-- invisible-code-block: python\nx = 2\n-->\n```python\nassert x == 2\n```\n", []),
    ],
)
def test_a_page_fails_when_a_block_does(tmp_path: Path, text: str, expected: list[str] | type[Exception]) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    if isinstance(expected, list):
        assert run(page) == expected
    else:
        with pytest.raises(expected):
            run(page)
