"""Text that cannot steer a terminal, and JSON lines."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def printable(text: str) -> str:
    """A text that cannot steer a terminal: control and formatting characters become their escapes."""
    return "".join(char.encode("unicode_escape").decode() if _steers(char) else char for char in text)


def json_line(content: Mapping[str, Any]) -> str:
    """One line of JSON, for every reader's idea of a line, that is safe to show in a terminal; without a line feed."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    return "".join(json.dumps(char)[1:-1] if _steers(char) else char for char in text)


def _steers(char: str) -> bool:
    """Whether a character is for control or formatting, separates lines, or is half of one (a lone surrogate)."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
