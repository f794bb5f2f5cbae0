"""A file of scores that were paid for, which survives kills and which several processes may use at once.

Each entry is one line, appended in one write; local file systems do not interleave such writes. A line that a crash cut
short is skipped, and its text is scored again.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from minirlhf.io.files import StrPath, open_for_writing


class ScoreCache:
    """A map from keys to scores in a file of JSON lines, which is created if it does not exist.

    scores: those of `put` and, after `refresh`, those in the file.
    Raises OSError if the file cannot be written, or is a symbolic link or no regular file.
    """

    def __init__(self, path: StrPath):
        self._path = Path(path)
        self.scores: dict[str, float] = {}
        self._read = 0  # bytes of the file that are in `scores`
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open_for_writing(self._path, "ab+") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if file.read(1) not in (b"", b"\n"):  # a crash cut the last line short: the next one begins a new line
                file.write(b"\n")

    def refresh(self) -> int:
        """Read what any process appended since the last call. Returns how many lines were damaged."""
        with open(self._path, "rb") as file:
            file.seek(self._read)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._read += len(whole)
        damaged = 0
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                key, score = entry["key"], entry["score"]
                if not (isinstance(key, str) and isinstance(score, float) and math.isfinite(score)):
                    raise ValueError("not as it was written")
                self.scores[key] = score
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged += 1
        return damaged

    def put(self, key: str, score: float) -> None:
        """Append a score to the file; from any thread. Raises OSError if it cannot be written."""
        self.scores[key] = score
        line = json.dumps({"key": key, "score": score}).encode("ascii") + b"\n"
        with open_for_writing(self._path, "ab") as file:
            if os.write(file.fileno(), line) != len(line):  # one write of a whole line
                raise OSError(f"{self._path} took only a part of a line: is the disk full?")
