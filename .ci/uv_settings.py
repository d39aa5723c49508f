"""What pip is configured with, as the variables that uv reads: uv has the same options, but reads none of pip's files.

eval "$(.venv/bin/python .ci/uv_settings.py)"
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

# pip's option: uv's variable, and what stands between several values.
OPTIONS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
}
SECTIONS = ("global", "install", ":env:")  # the later one counts


def settings(listed: str) -> dict[str, str]:
    """Variables of uv, from what ``pip config list`` prints."""
    lines = [found.groups() for found in re.finditer(r"^(\S+?)\.([a-z-]+)='(.*)'$", listed, re.MULTILINE)]
    found = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # as pip: the best version of all indexes
    for section in SECTIONS:
        for where, option, value in lines:
            if where == section and option in OPTIONS:
                name, between = OPTIONS[option]
                found[name] = between.join(value.replace("\\n", " ").split())
    return found


if __name__ == "__main__":
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    for variable, value in settings(told.stdout).items():
        print(f"export {variable}={shlex.quote(value)}")
