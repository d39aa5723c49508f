"""Build the wheel twice and look into it: the same bytes, everything of the package, and nothing else.

    .venv/bin/python .ci/check_wheel.py          # needs hatchling and git

Checked: every file that git tracks below src/s2d is in the wheel, byte for byte (recipes, report assets, model
configurations and py.typed among them); the rest is the wheel's own metadata; no tests and no data; two builds are
byte-identical.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    "py.typed",
    "recipes/minilm-banking77.yaml",
    "report/templates/report.css",
    "report/vendor/plotly-basic.min.js",
    "models/configs/vit-tiny.json",
)


def build(folder: str) -> Path:
    """A wheel of the working tree."""
    from hatchling.builders.wheel import WheelBuilder

    os.environ.setdefault("SOURCE_DATE_EPOCH", "1577836800")
    return Path(next(iter(WheelBuilder(str(ROOT)).build(directory=folder, versions=["standard"]))))


def problems(wheel: Path, tracked: list[str]) -> list[str]:
    """What is wrong with a wheel's contents, one line each."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for path in tracked:
            name = path.removeprefix("src/")
            if name not in names:
                found.append(f"{name} is missing")
            elif archive.read(name) != (ROOT / path).read_bytes():
                found.append(f"{name} differs from the tree")
    ours = {path.removeprefix("src/") for path in tracked}
    found += [f"{name} does not belong in it" for name in sorted(names - ours) if ".dist-info/" not in name]
    found += [f"s2d/{name} is not tracked" for name in NEEDED if f"s2d/{name}" not in ours]
    return found


def main() -> int:
    """Build, compare, say."""
    git = ["git", "-C", str(ROOT), "ls-files", "src/s2d"]
    tracked = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split()
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        wheels = [build(one), build(two)]
        digests = [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels]
        found = problems(wheels[0], tracked)
    if len(set(digests)) > 1:
        found.append("two builds differ")
    for line in found:
        print(f"{wheels[0].name}: {line}", file=sys.stderr)
    print(f"{wheels[0].name}: {len(tracked)} files of the package, sha256 {digests[0][:16]} twice")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
