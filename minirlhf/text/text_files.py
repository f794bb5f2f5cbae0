"""Text files that people write: lines with their numbers, JSON objects, and a hash that splits data without a seed."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from minirlhf.io.files import check_content

T = TypeVar("T")
MOST_ITEMS = 10_000_000  # more come only from a generator that never ends
TABLES = {"DataFrame": 'df["{}"]', "Dataset": 'dataset["{}"]', "DatasetDict": 'dataset["train"]["{}"]'}


def listed(items: Any, what: str, example: str, column: str = "") -> list[Any]:
    """The elements of a collection, a set sorted, so that its order is the same in every process.

    what: the name of the elements, in the plural. example: how to give them. column: of a table that holds them; "" for
        elements that are rows themselves, as those of a Dataset are.
    Raises ValueError that names the type for anything else: a text and a mapping are no collections, and a table is
    none of its columns.
    """
    kind = type(items).__name__
    if kind in TABLES and column:
        raise ValueError(f"{what} must be one column of texts, got a {kind}: give {TABLES[kind].format(column)}")
    rows = 'df.to_dict("records")' if kind == "DataFrame" else 'dataset["train"]' if kind == "DatasetDict" else ""
    if rows:
        raise ValueError(f"{what} must be rows, got a {kind}: give {rows}")
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Iterable) or getattr(items, "ndim", 1) == 0:
        got = f"{items!r:.40} of type {kind}" if isinstance(items, (str, bytes)) else f"a {kind}"
        texts = " of texts" if column else ""
        raise ValueError(f"{what} must be a collection{texts}, got {got}: {example}")
    found = list(itertools.islice(items, MOST_ITEMS + 1))
    if len(found) > MOST_ITEMS:
        raise ValueError(f"got more than {MOST_ITEMS} {what}: does the {kind} ever end?")
    return sorted(found, key=str) if isinstance(items, (set, frozenset)) else found


def numbered_lines(path: str | os.PathLike[str], encoding: str = "utf-8") -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers from 1; a byte-order mark and all kinds of ends are accepted.

    Raises as `check_content`, ValueError for an unknown encoding, or with the number of a line that is not in it.
    """
    path = Path(path)
    check_content(path)
    raw = path.read_bytes()
    try:
        text = raw.decode(encoding)
    except UnicodeError as error:
        number = raw[: getattr(error, "start", 0)].count(b"\n") + 1
        other = "gbk" if encoding.lower().replace("_", "-").startswith("utf-8") else "utf-8"
        other = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else other
        hint = f"name the file's encoding by encoding= or --encoding, for instance {other}"
        raise ValueError(f"{path}, line {number} is not {encoding} ({error}); {hint}") from error
    except (LookupError, ValueError) as error:
        raise ValueError(f"encoding must be the name of a text encoding, got {encoding!r}") from error
    return lines_of(text)


def lines_of(text: str) -> list[tuple[int, str]]:
    """The lines of a file's text as `numbered_lines` gives them."""
    # str.splitlines would also split at separators that may stand within a text, such as U+2028.
    end = "\n" if "\n" in text else "\r"  # of files from old spreadsheets
    lines = enumerate(text.removeprefix("\ufeff").split(end), 1)
    return [(number, line.removesuffix("\r")) for number, line in lines if line.strip(" \r")]


def parsed(path: Path, lines: Sequence[tuple[int, str]], parse: Callable[[str], list[T]], what: str) -> list[T]:
    """What `parse` makes of the numbered lines of a file, which must be something.

    Raises ValueError with file and line where `parse` does, and for no result, named by `what`.
    """
    found: list[T] = []
    for number, line in lines:
        try:
            found += parse(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{path} holds no {what}")
    return found


def json_object(line: str) -> dict[str, Any]:
    """The JSON object of a line. Raises ValueError for anything else."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise ValueError(f"this is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got a {type(content).__name__}")
    return content


def check_plain(path: object, lines: Sequence[tuple[int, str]], *fields: str) -> None:
    """Raise ValueError for a file of texts in which every line is a JSON object with one of the fields."""

    def is_row(line: str) -> bool:
        try:
            return not json_object(line).keys().isdisjoint(fields)
        except ValueError:
            return False

    if lines and all(is_row(line) for _, line in lines):
        named = " or ".join(map(repr, fields))
        raise ValueError(f"{path} must hold a text a line, but each is a JSON object with {named}: name it .jsonl")


def text_of(content: Mapping[str, Any], key: str) -> str:
    """The text under an existing key. Raises ValueError for another type."""
    if not isinstance(content[key], str):
        raise ValueError(f"{key} must be a text, got a {type(content[key]).__name__}")
    return content[key]


def split_by_hash(items: Sequence[T], key: Callable[[T], str], share: float) -> tuple[list[T], list[T]]:
    """Hold out the share of the items whose key has a small SHA-256: (train, held_out), in the order given.

    Raises ValueError for a share outside (0, 1), or a side that stays empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share!r}")
    sides: tuple[list[T], list[T]] = ([], [])
    for item in items:  # a JSON file may hold lone surrogates, which have no UTF-8
        digest = hashlib.sha256(key(item).encode("utf-8", "surrogatepass")).digest()
        sides[int.from_bytes(digest[:6], "big") / 2**48 < share].append(item)
    if not all(sides):
        raise ValueError(
            f"with share={share:g} the hash leaves {len(sides[0])} to train on and {len(sides[1])} held out, in "
            f"{len(set(map(key, items)))} groups; give more data or another share"
        )
    return sides
