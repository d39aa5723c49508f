"""For all tests."""

from __future__ import annotations

import gc

from s2d.optional import declare_missing_operators

declare_missing_operators()  # tests import transformers by themselves, some before s2d does


def pytest_collection_finish() -> None:
    """What the libraries hold by now stays; else each collection of garbage looks at all of it, 0.4 s a time."""
    gc.freeze()
