"""Recipes as text: the packaged ones, YAML files, and overrides by key. This module does not load torch."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from s2d.errors import InputError, choices, first_line

if TYPE_CHECKING:
    from importlib.abc import Traversable  # moved to importlib.resources.abc in Python 3.11

# Limits of a recipe; aliases count each time they are used, so that a few lines cannot fill the memory.
MOST_VALUES, MOST_LEVELS = 100_000, 60


class _Loader(yaml.SafeLoader):
    """Plain data only; and 1e-4 is a number, as in YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf)$|\.(nan|NaN)$"),
    list("-+0123456789."),
)


def _shelf() -> Traversable:
    return importlib.resources.files("s2d") / "recipes"


def packaged() -> dict[str, str]:
    """The recipes that come with s2d: name and one line."""
    return {
        file.name.removesuffix(".yaml"): str(parse(file.read_text(encoding="utf-8"), file.name).get("about", ""))
        for file in sorted(_shelf().iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml")
    }


def read_text(source: str) -> tuple[str, str]:
    """The name and the YAML of a recipe, from a file or from a packaged recipe.

    Raises:
        InputError: There is none; close names are listed.
    """
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return path.stem, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise InputError(f"cannot read the recipe {source}: {reason}") from error
    names = list(packaged())
    if source not in names:
        raise InputError(f"there is no recipe {source!r}; {choices(source, names)} (or name a .yaml file)")
    return source, (_shelf() / f"{source}.yaml").read_text(encoding="utf-8")


def move(override: str, old: str, new: str) -> str:
    """An override of a key that has a shorter name elsewhere: ``decay.strength=1`` for ``arms.s2d.strength=1``."""
    return new + override.removeprefix(old) if override.startswith(old) else override


def _load(text: str) -> Any:
    """Plain data from YAML.

    Raises:
        ValueError: It is not plain data, or expands to far more data than its text (aliases of aliases).
    """
    try:
        content = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (
        TypeError,
        AttributeError,
        KeyError,
        IndexError,
        OverflowError,
    ) as error:  # of an impossible date
        raise ValueError(f"a value that cannot be read ({first_line(error, 80)})") from None
    left = MOST_VALUES
    pending = [(content, 0)]
    while pending:
        value, depth = pending.pop()
        left -= 1
        if left < 0 or depth > MOST_LEVELS:
            raise ValueError("it stands for too much data; write it without aliases")
        if isinstance(value, dict):
            pending += [(item, depth + 1) for item in (*value.keys(), *value.values())]
        elif isinstance(value, (list, tuple, set)):
            pending += [(item, depth + 1) for item in value]
    return content


def parse(text: str, shown: str) -> dict[str, Any]:
    """A recipe's keys and values, unchecked.

    Args:
        text: YAML.
        shown: Its name in messages.

    Raises:
        InputError: It is not YAML, or not a recipe.
    """
    try:
        content = _load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        raise InputError(f"{shown}{place} is not YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None
    except ValueError as error:
        raise InputError(f"{shown} is not a recipe: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{shown} is not a recipe: it should hold keys such as model, task and train")
    return content


def override_in(data: dict[str, Any], override: str) -> None:
    """Apply an override ``"key=value"``, with a dotted key and a YAML value, to a recipe's plain data.

    Raises:
        InputError: It does not have this form, or a part of the key is not a section.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override {override!r}: write key=value, for example train.steps=100")
    try:
        value = _load(text)
    except (yaml.YAMLError, ValueError):
        raise InputError(f"override {override[:80]!r}: the value is not YAML; quote it") from None
    *parents, last = key.strip().split(".")
    place = data
    for parent in parents:
        inner = place.get(parent)
        if inner is not None and not isinstance(inner, dict):
            raise InputError(f"override {override!r}: {parent} is a single value, nothing is below it")
        place[parent] = place = dict(inner or {})
    place[last] = value
