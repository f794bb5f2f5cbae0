"""Single keys from a terminal, without Enter where the system has termios (POSIX); elsewhere Enter ends each line."""

from __future__ import annotations

import codecs
import os
import select
import signal
import sys
import threading
import unicodedata
from typing import Any

ESCAPE = "\x1b"
BACKSPACE = ("\x7f", "\b")
END = ("", "\x04")  # of the input: closed, or Ctrl-D
PATIENCE = 0.05  # seconds in which the rest of an arrow key arrives


class Keyboard:
    """Reads the keys of a terminal, or the characters of a pipe or a file; used in a `with`.

    Inside the `with`, a terminal neither waits for Enter nor shows what is typed, and Ctrl-C raises KeyboardInterrupt
    at once, whatever it did outside.

    file: with a file descriptor; None: standard input.
    """

    def __init__(self, file: Any = None):
        self._fd = (sys.stdin if file is None else file).fileno()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._modes: list[Any] | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def read(self) -> str:
        """The next key, in lower case and half width (an input method may be on); "" at the end of the input.

        A key that sends several characters, such as an arrow, gives the first one: "\\x1b".
        """
        key = ""
        while not key:
            if not (byte := self._byte()):
                return ""
            key = self._decoder.decode(byte)
        if key == ESCAPE and self._modes is not None:
            self._skip_sequence()
        return unicodedata.normalize("NFKC", key).lower()

    def __enter__(self) -> Keyboard:
        try:
            import termios
            import tty
        except ImportError:  # not POSIX
            return self
        if os.isatty(self._fd):
            self._modes = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
            if threading.current_thread() is threading.main_thread():
                self._handlers[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
                # After Ctrl-Z the shell has set the terminal to its own modes.
                self._handlers[signal.SIGCONT] = signal.signal(signal.SIGCONT, lambda *_: tty.setcbreak(self._fd))
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if self._modes is not None:
            import termios

            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._modes)

    def _skip_sequence(self) -> None:
        """Read what follows an escape: "[A" for an arrow (ECMA-48, section 5.4), the key itself for Alt with a key."""

        def next_byte() -> bytes:
            return self._byte() if select.select([self._fd], [], [], PATIENCE)[0] else b""

        if next_byte() in (b"[", b"O"):
            while (byte := next_byte()) and not 0x40 <= byte[0] <= 0x7E:
                pass

    def _byte(self) -> bytes:
        try:
            return os.read(self._fd, 1)
        except OSError:  # the terminal is gone
            return b""
