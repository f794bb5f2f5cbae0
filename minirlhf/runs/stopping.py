"""Graceful shutdown: finish the step and save on Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The run was asked to stop, and is saved. folder: of the run. done: how far it got."""

    def __init__(self, folder: Path, done: str):
        super().__init__(f"stopped after {done}, which is saved")
        self.folder = folder


class StopRequest:
    """Inside this context the first Ctrl-C or SIGTERM only sets `made`; a second one has its usual effect.

    Has no effect outside the main thread, where Python cannot set handlers.
    """

    def __init__(self) -> None:
        self.made = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # an ignored signal, as under nohup, stays ignored
                    self._handlers[number] = signal.signal(number, self._make)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _make(self, number: int, frame: FrameType | None) -> None:
        """The first signal: stop after this step. Further signals have their usual effect."""
        self.made = True
        for each in self._handlers:
            signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        # Not print, which the signal may have interrupted.
        os.write(2, f"\n{name}: finishing the step, then saving; once more ends it at once\n".encode())
