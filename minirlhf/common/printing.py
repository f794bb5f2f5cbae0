"""What commands and examples print: one function, one error line, one table for terminals and one for Markdown."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TextIO

from minirlhf.common.text import printable

MARKUP = r"[\\`*_~\[\]<&|$]"  # what Markdown, HTML inside it, or a table would interpret


def show(text: object = "", file: TextIO | None = None) -> None:
    """Print a text, flushed, every line of it `printable`. file: None: standard output."""
    print("\n".join(map(printable, str(text).split("\n"))), file=file, flush=True)


def error_line(error: object) -> str:
    """`error: ...` as one printable line, without line breaks and control characters."""
    return f"error: {printable(' '.join(str(error).split()))}"


def text_table(rows: Sequence[Sequence[str]], left: int = 1, indent: str = "") -> list[str]:
    """Rows of equal length as aligned lines of printable text, columns two spaces apart.

    left: how many of the first columns are aligned to the left; the others are aligned to the right. Chinese
        characters take two columns of the terminal. indent: before each line.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(display_width, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        gaps = [" " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True)]
        padded = [c + gap if i < left else gap + c for i, (c, gap) in enumerate(zip(row, gaps, strict=True))]
        lines.append((indent + "  ".join(padded)).rstrip())
    return lines


def markdown(text: str) -> str:
    """A text as one line of Markdown that shows it as it is: control characters visible, no markup."""
    return re.sub(MARKUP, r"\\\g<0>", printable(text))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, each shown as `markdown` does; the head as it is."""
    lines = [list(head), ["---"] * len(head)]
    lines += [[markdown(cell) for cell in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table that shows texts as they are, for a notebook."""
    lines = [f"<tr>{''.join(f'<th>{escaped(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def escaped(text: object) -> str:
    """A text as HTML: no markup, and `printable`."""
    return html.escape(printable(str(text)))


def display_width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
