"""For all tests."""

from __future__ import annotations

from s2d.optional import declare_missing_operators

declare_missing_operators()  # tests import transformers by themselves, some before s2d does
