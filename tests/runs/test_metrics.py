"""Text statistics; the picture; text for a terminal."""

import pytest

from minirlhf.common.text import printable
from minirlhf.evaluation.plots import plot_run
from minirlhf.text.statistics import distinct_n

HISTORY = [
    {"step": i, "reward/mean": i / 4, "reward/std": 0.1, "objective/kl": 1.0 * i, "objective/entropy": 30.0 - i,
     "ppo/loss/value": 0.5, "tokens/response": 16.0}
    for i in range(1, 4)
]  # fmt: skip


@pytest.mark.parametrize("target", [None, 6.0])
def test_plot_run_writes_a_picture(tmp_path, target):
    pytest.importorskip("matplotlib")
    plot_run([*HISTORY, {**HISTORY[0], "ppo/loss/value": None}], tmp_path / "run.png", target)
    content = (tmp_path / "run.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 5000


def test_an_empty_history_is_refused(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        plot_run([], tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["aab"], 1, 2 / 3),
        (["aaaa"], 2, 1 / 3),
        (["abab", "ab"], 2, 2 / 4),  # ab ba ab, ab: never across two texts
        (["很好很好"], 1, 2 / 4),
        (["a", ""], 2, 0.0),
        ([], 1, 0.0),
    ],
)
def test_distinct_n_worked_by_hand(texts, n, expected):
    assert distinct_n(texts, n) == pytest.approx(expected)


def test_printable_shows_control_and_direction_characters():
    assert printable("a\x1b[31m\n\t\x00b") == "a\\x1b[31m\\n\\t\\x00b"
    assert printable("\u202eevil\u200b\u2066\ufeff") == "\\u202eevil\\u200b\\u2066\\ufeff"
    assert printable("\u2028\u2029\x85") == "\\u2028\\u2029\\x85"
    assert printable("\ud800") == "\\ud800"


def test_printable_leaves_visible_text_alone():
    text = "酒店很好，Wi-Fi “é” 😀 | 1 2"
    assert printable(text) == text
