"""Single keys from a terminal, without Enter.

Left out: systems without termios, which are those that are not POSIX.
"""

from __future__ import annotations

import codecs
import os
import select
import signal
import sys
import termios
import threading
import tty
import unicodedata
from typing import Any

ESCAPE = "\x1b"
BACKSPACE = ("\x7f", "\b")
END = ("", "\x04")  # of the input: closed, or Ctrl-D
PATIENCE = 0.05  # seconds within which the rest of an arrow key arrives


class Keyboard:
    """The keys of a terminal, used in a `with`; of a pipe or a file its characters.

    Within the `with` a terminal neither waits for Enter nor shows what is typed, and Ctrl-C raises KeyboardInterrupt
    at once, whatever it did outside.

    file: with a file descriptor; None: standard input.
    """

    def __init__(self, file: Any = None):
        self._fd = (sys.stdin if file is None else file).fileno()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._modes: list[Any] | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def read(self) -> str:
        """The next key, in lower case and half width (as of an input method that is on); "" at the end of the input.

        Of keys that send several characters, such as the arrows, the first alone: "\\x1b".
        """
        key = ""
        while not key:
            byte = self._byte()
            if not byte:
                return ""
            key = self._decoder.decode(byte)
        if key == ESCAPE and self._modes is not None:
            self._pass_over_sequence()
        return unicodedata.normalize("NFKC", key).lower()

    def __enter__(self) -> Keyboard:
        if os.isatty(self._fd):
            self._modes = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
            if threading.current_thread() is threading.main_thread():
                self._handlers[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
                # After Ctrl-Z the shell has set the terminal as it likes it.
                self._handlers[signal.SIGCONT] = signal.signal(signal.SIGCONT, lambda *_: tty.setcbreak(self._fd))
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if self._modes is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._modes)

    def _pass_over_sequence(self) -> None:
        """Read what follows an escape: of an arrow, say, "[A" (ECMA-48, section 5.4), of Alt with a key that key."""

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
