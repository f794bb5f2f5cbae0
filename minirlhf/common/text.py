"""Text that cannot steer a terminal, and JSON lines."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from typing import Any


def printable(text: str) -> str:
    """A text that cannot steer a terminal: control and formatting characters become their escapes."""
    return "".join(char.encode("unicode_escape").decode() if _steers(char) else char for char in text)


def json_line(content: Mapping[str, Any]) -> str:
    """A JSON object as one line without its line feed: safe to show in a terminal, and one line to every reader."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    return "".join(json.dumps(char)[1:-1] if _steers(char) else char for char in text)


def _steers(char: str) -> bool:
    """Whether a character controls or formats text, separates lines, or is a lone surrogate."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
