"""The log of a run: metrics.jsonl, a line of statistics a step, and samples.jsonl, texts with their scores.

A line is in its file when the call returns, so it survives a kill of the process, and on the disk after `flush`, so it
survives a power failure. `flush` also returns length and hash of the files: a checkpoint records them, and `resume`
cuts the files back to that point, so that no step is missing or counted twice, and damage is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from minirlhf.common.text import json_line
from minirlhf.common.validation import is_finite
from minirlhf.io.files import atomic_write, flush_folder, free_path, open_for_writing
from minirlhf.io.training_state import is_count, is_record, is_text

METRICS_FILE, SAMPLES_FILE, CONFIG_FILE = "metrics.jsonl", "samples.jsonl", "config.json"
LOG_FILES = (METRICS_FILE, SAMPLES_FILE)
Marks = dict[str, dict[str, Any]]  # for each file of the log its length in bytes and its SHA-256


class RunLog:
    """The log in an existing folder; one process at a time appends to it.

    Raises OSError if one of its files is a symbolic link or no regular file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        contents = {name: _read(folder / name) for name in LOG_FILES}
        self._digests = {name: hashlib.sha256(content) for name, content in contents.items()}
        self._lengths = {name: len(content) for name, content in contents.items()}

    @classmethod
    def resume(cls, folder: Path, marks: Marks, step: int, rewards: Mapping[int, float | None]) -> RunLog:
        """Go on with a log as it was when `flush` returned these marks; later lines are dropped.

        step: the last one whose lines belong to it. rewards: mean rewards of some of the steps.
        A file that is damaged is named in a warning and kept under another name; in its place come the lines that can
        be read, and for steps whose line is lost, or has another mean reward, one with the mean reward of `rewards`.
        Raises OSError as the constructor, before anything is changed.
        """
        contents = {name: _read(folder / name) for name in LOG_FILES}
        for name, content in contents.items():
            path, mark = folder / name, marks[name]
            saved = content[: mark["bytes"]]
            if hashlib.sha256(saved).hexdigest() == mark["sha256"]:
                if len(content) > len(saved):
                    with open_for_writing(path, "r+b") as file:
                        file.truncate(len(saved))
                continue
            lines, restored = _salvage(content, step, rewards if name == METRICS_FILE else {})
            repaired, aside = b"".join(lines), free_path(path.with_name(f"{name}.damaged"))
            warnings.warn(
                f"{path} is damaged: it is not what it was when step {step} was saved; {len(lines) - restored} lines "
                f"can be read, and {restored} are restored from what the checkpoint knows"
                + (f"; the damaged file is kept as {aside.name}" if repaired != content else ""),
                stacklevel=3,
            )
            if repaired != content:
                atomic_write(aside, content)
                atomic_write(path, repaired)
        return cls(folder)

    def metrics(self, step: int, stats: Mapping[str, float]) -> None:
        """Append statistics of a step to metrics.jsonl; NaN and infinities, which JSON lacks, become null."""
        self._append(METRICS_FILE, {"step": step, **{name: finite(value) for name, value in stats.items()}})

    def samples(self, step: int, scored: Iterable[tuple[str, float | None]]) -> None:
        """Append texts with their scores to samples.jsonl; a text without a score has None."""
        self._append(SAMPLES_FILE, {"step": step, "samples": list(scored)})

    def flush(self) -> Marks:
        """Put all lines on the disk. Returns lengths and hashes of the files, for `resume`."""
        for name in LOG_FILES:
            if (self.folder / name).exists():
                with open_for_writing(self.folder / name, "ab") as file:
                    os.fsync(file.fileno())
        flush_folder(self.folder)
        return {name: {"bytes": self._lengths[name], "sha256": self._digests[name].hexdigest()} for name in LOG_FILES}

    def _append(self, name: str, content: Mapping[str, Any]) -> None:
        line = _line(content)
        with open_for_writing(self.folder / name, "ab") as file:
            file.write(line)
        self._digests[name].update(line)
        self._lengths[name] += len(line)


def is_marks(value: Any) -> bool:
    """Whether `RunLog.flush` may have returned this value."""
    return is_record(value, **dict.fromkeys(LOG_FILES, lambda x: is_record(x, bytes=is_count, sha256=is_text)))


def is_rewards(value: Any) -> bool:
    """Whether a value is the mean reward, finite or None, of steps by their numbers as texts."""
    fits = isinstance(value, dict) and all(re.fullmatch("[0-9]{1,18}", step) for step in value)
    return fits and all(reward is None or is_finite(reward) for reward in value.values())


def finite(value: float) -> float | None:
    """A number as JSON has it: None for one that is not finite."""
    return value if math.isfinite(value) else None


def _read(path: Path) -> bytes:
    """The bytes of a file that will be written; none if it does not exist. Raises OSError if it may not be written.

    A file that has another name besides (`cp -al`, a stranger's archive) is replaced by a copy: that name keeps it.
    """
    try:
        with open_for_writing(path, "r+b") as file:
            content: bytes = file.read()
            shared = os.fstat(file.fileno()).st_nlink > 1
    except FileNotFoundError:
        return b""
    if shared:
        atomic_write(path, content)
    return content


def _salvage(content: bytes, step: int, rewards: Mapping[int, float | None]) -> tuple[list[bytes], int]:
    """The readable lines up to a step, in order, and how many of them were made from `rewards`, theirs being lost.

    A line with another mean reward than in `rewards` was changed, so it is lost as well.
    """
    found: list[tuple[int, bytes]] = []
    intact: set[int] = set()  # steps of which a line has the mean reward that is known
    changed: set[int] = set()  # and of which one has another
    # NULs are what a power failure leaves unwritten; a line twice is a file that was put together wrongly.
    for line in dict.fromkeys(line.strip(b"\0") for line in content.split(b"\n")):
        try:
            entry = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int and 0 <= entry["step"] <= step:
            number = entry["step"]
            if "reward/mean" in entry and number in rewards:
                right = entry["reward/mean"] == rewards[number]
                (intact if right else changed).add(number)
                if not right:
                    continue
            found.append((number, line + b"\n"))
    readable = {number for number, _ in found} - (changed - intact)
    lost = {number: reward for number, reward in rewards.items() if number <= step and number not in readable}
    found += [(number, _line({"step": number, "reward/mean": reward})) for number, reward in lost.items()]
    return [line for _, line in sorted(found, key=lambda pair: pair[0])], len(lost)


def _line(content: Mapping[str, Any]) -> bytes:
    return (json_line(content) + "\n").encode("utf-8")
