"""Text that cannot steer a terminal."""

from minirlhf.common.text import printable


def test_printable_shows_control_and_direction_characters():
    assert printable("a\x1b[31m\n\t\x00b") == "a\\x1b[31m\\n\\t\\x00b"
    assert printable("\u202eevil\u200b\u2066\ufeff") == "\\u202eevil\\u200b\\u2066\\ufeff"
    assert printable("\u2028\u2029\x85") == "\\u2028\\u2029\\x85"
    assert printable("\ud800") == "\\ud800"


def test_printable_leaves_visible_text_alone():
    text = "酒店很好，Wi-Fi “é” 😀 | 1 2"
    assert printable(text) == text
