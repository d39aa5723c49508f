"""Whether the model hub can be reached, found out before a client waits half a minute for it."""

from __future__ import annotations

import contextlib
import logging
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from types import ModuleType

from s2d.models.quiet import quiet_log
from s2d.optional import require


def offline() -> bool:
    """Whether the hub is switched off (``HF_HUB_OFFLINE``) or its name does not even resolve.

    Behind a proxy names may not resolve and the hub be reachable all the same, so there it counts as reachable.
    """
    hub = require("huggingface_hub", "hf")
    if hub.constants.HF_HUB_OFFLINE:
        return True
    if urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(urllib.parse.urlparse(hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """While the hub cannot be reached, its client uses only earlier downloads, without waiting."""
    hub: ModuleType = require("huggingface_hub", "hf")
    before = hub.constants.HF_HUB_OFFLINE
    hub.constants.HF_HUB_OFFLINE = offline()
    try:
        with quiet_log("", logging.CRITICAL), quiet_log("huggingface_hub", logging.CRITICAL):
            yield
    finally:
        hub.constants.HF_HUB_OFFLINE = before
