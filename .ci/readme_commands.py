"""Run the commands that a page shows, so that what people paste is what CI ran.

A fenced block counts when the line ``<!-- ci -->`` stands before it (blank lines between are fine). ``bash`` blocks run
in one shell that stops at the first failure; ``python`` blocks run as a program. Both use the repository's ``.venv``
and start at its root. A line given with ``--skip`` is left out: the caller runs it itself.

    python .ci/readme_commands.py README.md --skip "make test"
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^<!-- ci -->[ \t]*\n\s*^```(bash|python)[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def marked_blocks(page: str) -> list[tuple[str, str]]:
    """The marked blocks of a page in order, as (language, code)."""
    return [(match[1], match[2]) for match in BLOCK.finditer(page)]


def without(code: str, skip: list[str]) -> str:
    """``code`` without the lines that say exactly one of ``skip``, a trailing comment aside."""
    return "".join(line for line in code.splitlines(keepends=True) if re.sub(r"\s+#.*$", "", line).strip() not in skip)


def run(language: str, code: str) -> int:
    """Run one block, showing each command first; the exit code."""
    environment = dict(
        os.environ, PATH=f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}", PYTHONUNBUFFERED="1"
    )
    environment["PS4"] = "+ [$SECONDS s] "  # before each command of a block: since it began
    if language == "python":
        print("\n+ python <<EOF\n" + code + "EOF", flush=True)
        command = [str(ROOT / ".venv" / "bin" / "python"), "-c", code]
    else:
        command = ["bash", "-euxo", "pipefail", "-c", code]  # -x shows each command
    return subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--skip", action="append", default=[], metavar="COMMAND")
    arguments = parser.parse_args()
    for page in arguments.pages:
        blocks = marked_blocks(page.read_text(encoding="utf-8"))
        if not blocks:
            print(f"{page}: no block is marked with <!-- ci -->", file=sys.stderr)
            return 1
        for language, code in blocks:
            code = without(code, arguments.skip)
            if code.strip() and (failed := run(language, code)):
                print(f"{page}: a command failed with exit code {failed}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
