"""A file of scores that were paid for, which survives kills and which several processes may use at once.

Each entry is one line, appended in one write; local file systems do not interleave such writes. A line that was cut
short or damaged fails its checksum and is skipped, and its text is scored again.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

from minirlhf.io.files import open_for_writing


class ScoreCache:
    """A map from keys to scores in a file of JSON lines, which is created if it does not exist.

    key: any text, best a hash. Raises OSError if the file cannot be written, or is a symbolic link or no regular file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)
        self._scores: dict[str, float] = {}
        self._read = 0  # bytes of the file that are in `_scores`
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
        for line in whole.split(b"\n"):
            try:
                if line:
                    key, score = _parsed(line)
                    self._scores[key] = score
            except ValueError:
                damaged += 1
        return damaged

    def get(self, key: str) -> float | None:
        """The score of a key; None if it is not known."""
        return self._scores.get(key)

    def put(self, key: str, score: float) -> None:
        """Append a score to the file; from any thread. Raises OSError if it cannot be written."""
        self._scores[key] = score
        line = _line(key, score)
        with open_for_writing(self._path, "ab") as file:
            if os.write(file.fileno(), line) != len(line):  # one write of a whole line
                raise OSError(f"{self._path} took only a part of a line: is the disk full?")


def _line(key: str, score: float) -> bytes:
    return (json.dumps({"key": key, "score": score, "crc": _checksum(key, score)}) + "\n").encode("ascii")


def _parsed(line: bytes) -> tuple[str, float]:
    """Raise ValueError for anything but a line of `_line`."""
    try:
        entry = json.loads(line)
        key, score, checksum = entry["key"], entry["score"], entry["crc"]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("not an entry") from error
    if not isinstance(key, str) or not isinstance(score, float) or checksum != _checksum(key, score):
        raise ValueError("not as it was written")
    return key, score


def _checksum(key: str, score: float) -> int:
    return zlib.crc32(json.dumps([key, score]).encode("ascii"))
