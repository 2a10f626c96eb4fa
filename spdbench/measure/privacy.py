"""Removes private data from texts that go into files: folder names, and secrets of the environment."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|(API|ACCESS|PRIVATE)_?KEY|^KEY$|_(KEY|PAT|PWD|PASS)$", re.IGNORECASE
)
LOGIN = re.compile(r"(?<=://)[^\s/@]+(?=@)")
"""User and password in a URL, or a token in their place."""
QUERY = re.compile(r"(?<=[?&])((?:api[_-]?|access[_-]?)?(?:key|token)|password)=[^&#\s'\"]+", re.IGNORECASE)
"""A key in the query of a URL."""
MIN_SECRET_LENGTH = 8
"""A shorter value would also be replaced within unrelated words."""
HIDDEN = "***"


def names_only(value: Any) -> Any:
    """`value`, plain JSON, with every path in it cut down to its last part, and without secrets."""
    if isinstance(value, str):
        return without_secrets(_last_part(value) if _is_path(value) else value)
    if isinstance(value, Mapping):
        return {key: names_only(item) for key, item in value.items()}
    return [names_only(item) for item in value] if isinstance(value, list | tuple) else value


def without_secrets(text: str) -> str:
    """`hide_secrets`, and the home folder as `~`."""
    text = hide_secrets(text)
    home = os.path.expanduser("~")
    for folder in (home, os.path.realpath(home)):
        if path := folder.rstrip("/"):
            text = re.sub(rf"{re.escape(path)}(?![\w.-])", "~", text)
    return text


def hide_secrets(text: str) -> str:
    """`text` with `***` for the values of variables such as HF_TOKEN, plain or as JSON escapes them, and for the login
    or a key in a URL."""
    secrets = [
        value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= MIN_SECRET_LENGTH
    ]
    hidden = {form for value in secrets for form in (value, json.dumps(value)[1:-1])}
    for value in sorted(hidden, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return QUERY.sub(rf"\1={HIDDEN}", LOGIN.sub(HIDDEN, text))


def _is_path(text: str) -> bool:
    """True if `text` is written as a path. A relative path looks like a hub id, so it counts only if it exists."""
    if text.startswith(("/", "~", "./", "../")):
        return True
    return "/" in text and os.path.exists(text)


def _last_part(text: str) -> str:
    return Path(text).name or text
