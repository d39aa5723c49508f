"""Parse every YAML, TOML and JSON file named on the command line; exit 1 and name those that do not parse."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PARSERS = {
    ".json": json.loads,
    ".toml": tomllib.loads,
    ".yaml": lambda text: list(yaml.safe_load_all(text)),
    ".yml": lambda text: list(yaml.safe_load_all(text)),
    ".cff": lambda text: list(yaml.safe_load_all(text)),
}


def main(paths: list[str]) -> int:
    failed = 0
    for path in map(Path, paths):
        parse = PARSERS.get(path.suffix)
        if parse is None:
            continue
        try:
            parse(path.read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
