"""For all tests."""

from __future__ import annotations

import gc

import pytest

from s2d.optional import declare_missing_operators

declare_missing_operators()  # tests import transformers by themselves, some before s2d does


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What may take longest begins first, so that no process has a long test left when the others are done."""
    items.sort(key=allowed, reverse=True)  # all others stay in their order


def allowed(item: pytest.Item) -> float:
    """The seconds that a test asks for, if it asks for more than all others have."""
    asked = item.get_closest_marker("timeout")
    return float(asked.args[0]) if asked and asked.args else 0.0


def pytest_collection_finish() -> None:
    """What the libraries hold by now stays; else each collection of garbage looks at all of it, 0.4 s a time."""
    gc.freeze()
