"""Context managers around other libraries' loading: no output, no needless garbage collection."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No progress bars, load reports, advice or warnings from transformers and the hub's client; errors are raised.

    Args:
        transformers: The imported library.
    """
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    try:
        # Some progress bars obey no setting; all of them write to the standard error of the moment.
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            quiet_log("huggingface_hub", logging.CRITICAL),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


@contextlib.contextmanager
def quiet_log(name: str, level: int) -> Iterator[None]:
    """A logger (the root one for ``""``) passes only messages of at least this level."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """No garbage collection: it doubles the time of code that makes millions of objects and no reference cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
