"""The content of a folder, so that two may be compared."""

import json
from pathlib import Path
from typing import Any

from minirlhf.runs.checkpoint import COUNTERS_FILE, MANIFEST_FILE


def snapshot(folder: Path) -> dict[str, Any]:
    """Name -> content, of everything below a folder."""
    return {str(path.relative_to(folder)): path.is_file() and content(path) for path in folder.rglob("*")}


def content(path: Path) -> Any:
    """The bytes of a file; of a checkpoint's counters and their sum, all but what depends on the times in the log."""
    try:
        if path.name == COUNTERS_FILE:
            read = json.loads(path.read_bytes())
            return {**read, "run": read["run"] and read["run"]["rewards"]}
        if path.name == MANIFEST_FILE:
            return {**json.loads(path.read_bytes())["sha256"], COUNTERS_FILE: None}
    except (ValueError, TypeError, KeyError):  # damaged
        pass
    return path.read_bytes()
