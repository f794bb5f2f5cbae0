"""Texts from standard input, a small batch at a time, and bars for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from minirlhf.common.printing import show, text_table

BAR = 30  # characters of a full bar
Item = TypeVar("Item")


def batches(texts: Sequence[str] | None, size: int) -> Iterator[list[str]]:
    """Lists of 1 to `size` texts: those given, or, for None, the lines of standard input as they arrive."""
    if texts is not None:
        return chunks(list(texts), size)
    if sys.stdin.isatty():
        show("waiting for texts, one a line; Ctrl-D ends them", sys.stderr)
    return arriving_lines(sys.stdin.buffer, size)


def chunks(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """The items in order, in lists of `size`; the last one may be shorter."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def arriving_lines(stream: Any, size: int) -> Iterator[list[str]]:
    """Lists of 1 to `size` lines of UTF-8, without blank ones; reads on only when all that arrived is handed out.

    stream: binary and buffered, as `sys.stdin.buffer`. Raises ValueError with the number of a line that is not UTF-8.
    """
    number, rest, came = 0, b"", b"not asked yet"
    while came:
        came = stream.read1(2**16)  # what is there, up to 64 KiB
        *lines, rest = (rest + came).split(b"\n") if came else (rest, b"")
        for batch in chunks(lines, size):
            texts = []
            for line in batch:
                number += 1
                try:
                    texts.append(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r"))
                except UnicodeDecodeError as error:
                    raise ValueError(f"line {number} of standard input is not valid UTF-8: {error}") from error
            visible = [text for text in texts if text.strip()]
            if visible:
                yield visible


def bars(probabilities: Mapping[str, float]) -> str:
    """A line for each label: its probability, and a bar of that length."""
    rows = [(label, f"{p:.3f}", "#" * round(BAR * p)) for label, p in probabilities.items()]
    return "\n".join(text_table(rows, left=3, indent="  "))
