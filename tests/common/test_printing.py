"""Output that cannot steer a terminal, and tables that keep their columns whatever the texts are."""

import re

import pytest
from test_hostile_text import TEXTS, every_text, steers

from minirlhf.common.printing import error_line, markdown_table, show, text_table
from minirlhf.common.text import printable


@every_text
def test_what_is_shown_cannot_steer(text, capsys):
    show(text)
    out = capsys.readouterr().out
    assert out.endswith("\n") and not any(map(steers, out.split("\n")))
    assert out.count("\n") == text.count("\n") + 1
    assert not steers(error_line(ValueError(text))) and error_line(text).startswith("error: ")


def test_columns_are_aligned_by_the_width_that_a_terminal_gives_them():
    rows = [("", "before", "after"), ("酒店", "1", "23"), ("a\x1b", "4.5", "")]
    assert text_table(rows, indent=" ") == [
        "        before  after", " 酒店        1     23", " a\\x1b     4.5",
    ]  # fmt: skip
    assert text_table([("a", "b"), ("ccc", "d")], left=2) == ["a    b", "ccc  d"]
    assert text_table([("a", "bb"), ("ccc", "d")], left=0) == ["  a  bb", "ccc   d"]


@pytest.mark.parametrize("text", ["a|b", "||", "line\nbreak", "\x1b[31m", "back\\", TEXTS["markup"]])
def test_a_markdown_table_keeps_its_columns(text):
    lines = markdown_table(["x", "y"], [[text, "0.50"], ["1", text]]).splitlines()
    assert lines[:2] == ["| x | y |", "| --- | --- |"] and len(lines) == 4
    assert all(len(re.split(r"(?<!\\)\|", line.replace("\\\\", "··"))) == 4 for line in lines)
    assert not any(map(steers, lines))


def test_a_plain_text_is_shown_as_it_is(capsys):
    show("房间很好 |x|")
    show()
    assert capsys.readouterr().out == "房间很好 |x|\n\n" and printable("房间 |") == "房间 |"
