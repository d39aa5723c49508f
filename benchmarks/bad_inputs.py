"""What a user's mistakes and hostile files are answered with: the cases of the tests, as tables of Markdown.

    python benchmarks/bad_inputs.py > docs/results/bad-inputs.md

Nothing is written by hand: the tests of the command line run, and whatever a command said when it ended with exit code
1 or 2 becomes a row; below it, the damaged and hostile files of tests/hostile_inputs.py.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import hostile_inputs  # noqa: E402

from s2d import cli  # noqa: E402

HEAD = """# Bad inputs, and what is said

No data file: the script writes the page from the tests themselves.

Written by `python benchmarks/bad_inputs.py` from the tests that run in every change. Their folders are shown as `...`.

"""


def of_commands() -> dict[str, tuple[int, str]]:
    """Exit code and message of each failing command in the tests, by the command."""
    found: dict[str, tuple[int, str]] = {}
    words: list[str] = []
    app, fail = cli.app, cli._fail

    def noting(arguments: Sequence[str] | None, **settings: Any) -> Any:
        words[:] = arguments or []
        return app(arguments, **settings)

    def failing(text: str, code: int) -> int:
        found.setdefault(_short(shlex.join(["s2d", *words])), (code, _short(text)))
        return fail(text, code)

    cli.app, cli._fail = noting, failing  # type: ignore[assignment]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            status = pytest.main(["-q", "-n", "0", str(ROOT / "tests" / "test_cli.py")])
    finally:
        cli.app, cli._fail = app, fail  # type: ignore[assignment]
    if status:
        raise SystemExit("a test failed, see above; no table was written")
    return found


def _short(text: str) -> str:
    """Without the folders of a test run and the names of temporary files."""
    text = re.sub(r"\S*/s2d-\w+\.txt", ".../s2d-traceback.txt", text)
    return re.sub(
        r"(?:/[^\s/'\"]+)*/pytest-[^\s'\"]*?/([^\s/'\"]*)(?=[\s'\":;,)]|$)", r".../\1", " ".join(text.split())
    )


def cell(text: str) -> str:
    """As one cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Print the page."""
    commands = of_commands()
    hostile = io.StringIO()
    with contextlib.redirect_stdout(hostile), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hostile_inputs.main()
    rows = [f"| `{cell(command)}` | {code} | {cell(text)} |" for command, (code, text) in sorted(commands.items())]
    print(HEAD + f"## Commands: {len(rows)}\n\n| command | exit code | message |\n|---|---|---|")
    print("\n".join(rows))
    files = hostile.getvalue().strip()
    print(f"\n## Files: {sum(line.startswith('|') for line in files.splitlines()) - 2}\n\n{files}")


if __name__ == "__main__":
    main()
