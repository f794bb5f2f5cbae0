"""Texts in small batches as they arrive, and lines that a terminal or a program can read."""

import io
import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.commands import console
from minirlhf.commands.console import arriving_lines, bars, batches, chunks


def test_chunks():
    assert list(chunks([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]
    assert list(chunks([], 2)) == []


@settings(max_examples=50)
@given(st.lists(st.text(st.characters(exclude_characters="\n\r", codec="utf-8"))), st.integers(1, 4), st.booleans())
def test_every_line_that_is_not_blank_arrives_once_in_order(lines, size, ended):
    """Oracle: splitting the whole text. A byte order mark belongs to the file, not to the first line."""
    lines = [line.removeprefix("\ufeff") for line in lines]
    raw = "\ufeff" + "\n".join(lines) + ("\n" if ended else "")
    came = list(arriving_lines(io.BytesIO(raw.encode()), size))
    assert [text for batch in came for text in batch] == [line for line in lines if line.strip()]
    assert all(1 <= len(batch) <= size for batch in came)


def test_lines_of_other_systems_and_longer_than_a_piece():
    long = "酒" * 100_000
    stream = io.BytesIO(f"a\r\n\r\n{long}\nb".encode())
    assert list(arriving_lines(stream, 8)) == [["a"], [long], ["b"]]  # b may go on until the end


def test_a_line_that_is_not_utf8_is_named_after_those_before_it_came():
    lines = arriving_lines(io.BytesIO("一\n二\n".encode() + "三".encode("gb18030") + b"\n"), 2)
    assert next(lines) == ["一", "二"]
    with pytest.raises(ValueError, match="line 3 of standard input is not valid UTF-8"):
        next(lines)


def test_a_line_is_handed_on_before_the_next_one_comes():
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream, os.fdopen(writing, "wb", buffering=0) as pipe:
        lines = arriving_lines(stream, 16)
        watch = threading.Timer(20, pipe.close)  # if it waits for more than there is, let it end
        watch.start()
        for text in ("一", "二"):
            pipe.write(f"{text}\n".encode())
            assert next(lines) == [text]
        pipe.write("三\n四\n五".encode())
        assert next(lines) == ["三", "四"]
        watch.cancel()
        pipe.close()
        assert list(lines) == [["五"]]


def test_no_more_is_read_than_is_asked_for():
    class Endless(io.RawIOBase):
        asked = 0

        def read1(self, size):
            self.asked += 1
            return "一\n".encode() * 10

    stream = Endless()
    lines = arriving_lines(stream, 4)
    assert [len(next(lines)) for _ in range(6)] == [4, 4, 2, 4, 4, 2] and stream.asked == 2


def test_batches_are_of_the_given_texts_or_of_standard_input(monkeypatch):
    monkeypatch.setattr(console.sys, "stdin", io.TextIOWrapper(io.BytesIO("一\n二\n三".encode())))
    assert list(batches(["a", "b", "c"], 2)) == [["a", "b"], ["c"]]
    assert list(batches([], 2)) == []
    assert list(batches(None, 2)) == [["一", "二"], ["三"]]


def test_bars_are_as_long_as_the_probabilities():
    assert bars({"negative": 0.25, "pos": 0.75, "x\x1b[2J": 0.0}) == (
        "  negative  0.250  " + "#" * 8 + "\n  pos       0.750  " + "#" * 22 + "\n  x\\x1b[2J  0.000"
    )
