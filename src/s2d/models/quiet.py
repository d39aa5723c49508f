"""Context managers around other libraries' long-winded loading: nothing printed, nothing collected in vain."""

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
    log, hub = transformers.utils.logging, logging.getLogger("huggingface_hub")
    verbosity, bars, hub_level = log.get_verbosity(), log.is_progress_bar_enabled(), hub.level
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    hub.setLevel(logging.CRITICAL)
    try:
        # Some progress bars obey no setting; all of them write to the standard error of the moment.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
        hub.setLevel(hub_level)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """No search for reference cycles: it doubles the time of code that makes millions of objects and no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
