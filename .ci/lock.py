"""The versions that CI installs, from an environment that works.

    .venv/bin/python .ci/lock.py > .ci/constraints.txt     # after `make setup-dev EXTRAS=...` with no constraints

Packages of this repository, paths and local version labels (``+cpu``) are left out: the file says versions alone.
"""

from __future__ import annotations

import importlib.metadata
import re

OURS = {"s2d", "pip"}


def lines() -> list[str]:
    """``name==version`` of everything installed."""
    found = {}
    for package in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower()
        if name not in OURS:
            found[name] = package.version.partition("+")[0]
    return [f"{name}=={version}" for name, version in sorted(found.items())]


if __name__ == "__main__":
    print("# Made by .ci/lock.py on Python 3.11, Linux. PIP_CONSTRAINT of .ci/run.")
    print("\n".join(lines()))
