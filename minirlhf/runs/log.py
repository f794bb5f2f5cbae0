"""What a run leaves behind: statistics, metrics.jsonl, samples.jsonl, config.json, the curve.

A run folder is written by one `RunLog`. A line is in its file when the call returns, where a killed process leaves it,
and on the disk after `flush`, where a power failure does. `resume` cuts the files back to how long they were at a
checkpoint, so that no step is missing or counted twice.
"""

from __future__ import annotations

import io
import json
import math
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minirlhf.rl import ppo
from minirlhf.common.text import json_line
from minirlhf.io.files import flush_folder, read_json, read_jsonl, write_json

if TYPE_CHECKING:
    from minirlhf.rl.rollout import Rollout


METRICS_FILE, SAMPLES_FILE, CONFIG_FILE = "metrics.jsonl", "samples.jsonl", "config.json"


class RunLog:
    """The files of a run in a folder of its own.

    folder: made here; Raises FileExistsError if it exists and is not empty (a run is never overwritten), OSError if
    it cannot be made. config: written to config.json.
    """

    def __init__(self, folder: str | os.PathLike[str], config: Mapping[str, Any]):
        self.folder = Path(folder)
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise FileExistsError(f"{self.folder} exists and is not empty; choose another --output, or --resume it")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / CONFIG_FILE, config)

    @classmethod
    def resume(cls, folder: str | os.PathLike[str], lengths: Mapping[str, int]) -> RunLog:
        """Go on with a run: its files are cut back to these lengths, which `flush` gave; later lines are dropped.

        Raises FileNotFoundError if it is not a run folder, ValueError before anything is cut if lines are lost.
        """
        log = cls.__new__(cls)
        log.folder = Path(folder)
        read_json(log.folder / CONFIG_FILE)
        for name, length in lengths.items():
            if name not in (METRICS_FILE, SAMPLES_FILE) or type(length) is not int or length < 0:
                raise ValueError(f"{log.folder} has no log {name!r} that could be cut back to {length!r} bytes")
            there = log._length(name)
            if there < length:
                raise ValueError(f"{log.folder / name} lost lines: it has {there} bytes, {length} when it was saved")
        for name, length in lengths.items():
            if log._length(name) > length:
                os.truncate(log.folder / name, length)
        return log

    def metrics(self, step: int, stats: Mapping[str, float]) -> None:
        """Append the statistics of a step to metrics.jsonl; NaN and infinities, which JSON has not, become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in stats.items()}
        self._append(METRICS_FILE, {"step": step, **finite})

    def samples(self, step: int, texts: Sequence[str], scores: Sequence[float | None]) -> None:
        """Append texts and their scores, None where there is none, to samples.jsonl."""
        self._append(SAMPLES_FILE, {"step": step, "samples": [list(pair) for pair in zip(texts, scores, strict=True)]})

    def history(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return read_jsonl(self.folder / METRICS_FILE)

    def flush(self) -> dict[str, int]:
        """Put all lines on the disk. Returns the lengths of the files in bytes, for `resume`."""
        for name in (METRICS_FILE, SAMPLES_FILE):
            if (self.folder / name).exists():
                with open(self.folder / name, "ab") as file:
                    os.fsync(file.fileno())
        flush_folder(self.folder)
        return {name: self._length(name) for name in (METRICS_FILE, SAMPLES_FILE)}

    def _append(self, name: str, content: Mapping[str, Any]) -> None:
        line = json_line(content) + "\n"
        with open(self.folder / name, "ab") as file:
            file.write(line.encode("utf-8"))

    def _length(self, name: str) -> int:
        path = self.folder / name
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError(f"{path} is not a file")
        return path.stat().st_size if path.exists() else 0
