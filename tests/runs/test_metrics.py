"""The run log on disk, after crashes too; text statistics; the picture."""

import json
import math

import pytest

from minirlhf.common.text import printable
from minirlhf.evaluation.plots import plot_run
from minirlhf.text.statistics import distinct_n
from minirlhf.io.files import read_jsonl
from minirlhf.runs.log import RunLog


def a_run(folder, steps=4):
    log = RunLog(folder, {"lr": 1e-5})
    for step in range(1, steps + 1):
        log.metrics(step, {"reward/mean": step / 8})
        log.samples(step, ["酒店很好", "a\nb"], [0.5, 0.25])
    return log


def test_a_run_reads_back(tmp_path):
    log = a_run(tmp_path / "run", 2)
    assert log.history() == [{"step": 1, "reward/mean": 0.125}, {"step": 2, "reward/mean": 0.25}]
    assert json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8")) == {"lr": 1e-5}
    samples = read_jsonl(tmp_path / "run/samples.jsonl")
    assert samples[0] == {"step": 1, "samples": [["酒店很好", 0.5], ["a\nb", 0.25]]}
    assert "酒店" in (tmp_path / "run/samples.jsonl").read_text(encoding="utf-8")  # readable, not escaped


def test_every_line_is_on_disk_at_once(tmp_path):
    log = a_run(tmp_path / "run", 1)
    assert len((tmp_path / "run/metrics.jsonl").read_bytes().splitlines()) == 1
    log.metrics(2, {})
    assert len((tmp_path / "run/metrics.jsonl").read_bytes().splitlines()) == 2


def test_a_run_is_never_overwritten(tmp_path):
    a_run(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(FileExistsError, match="not empty"):
        RunLog(tmp_path / "run", {"lr": 2})
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_file_in_the_place_of_the_folder_is_never_overwritten(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(OSError):
        RunLog(tmp_path / "run", {})
    assert (tmp_path / "run").read_text() == "mine"


def test_an_empty_folder_may_be_used(tmp_path):
    assert RunLog(tmp_path, {}).history() == []


LENGTHS = {"metrics.jsonl": 0, "samples.jsonl": 0}


def test_resume_cuts_the_files_back_to_their_lengths_and_goes_on(tmp_path):
    log = a_run(tmp_path / "run", 2)
    lengths = log.flush()
    assert lengths == {name: (tmp_path / "run" / name).stat().st_size for name in LENGTHS}
    before = {name: (tmp_path / "run" / name).read_bytes() for name in LENGTHS}
    log.metrics(3, {"reward/mean": 0.5})
    log.samples(3, ["x"], [1.0])
    log = RunLog.resume(tmp_path / "run", lengths)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in LENGTHS} == before
    log.metrics(3, {"reward/mean": 9.0})
    assert [line["step"] for line in log.history()] == [1, 2, 3]
    assert log.history()[-1]["reward/mean"] == 9.0


def test_a_run_without_lines_is_flushed_and_resumed(tmp_path):
    assert RunLog(tmp_path / "run", {}).flush() == LENGTHS
    assert RunLog.resume(tmp_path / "run", LENGTHS).history() == []
    a_run(tmp_path / "other", 1)
    assert RunLog.resume(tmp_path / "other", LENGTHS).history() == []


def test_resume_of_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        RunLog.resume(tmp_path, LENGTHS)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_lost_lines_are_noticed_before_anything_is_cut(tmp_path, name):
    lengths = a_run(tmp_path / "run", 2).flush()
    for each in LENGTHS:
        path = tmp_path / "run" / each
        path.write_bytes(path.read_bytes()[:-1] if each == name else path.read_bytes() * 2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match=rf"{name} lost lines: it has \d+ bytes, {lengths[name]} when"):
        RunLog.resume(tmp_path / "run", lengths)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize(
    "tail", [b'{"step": 3, "rew', b"{", b'{"step": 3}', '{"step": 3, "x": "酒'.encode()[:-1], b"\0" * 99]
)
def test_what_a_crash_left_behind_the_last_whole_line_is_dropped(tmp_path, tail):
    lengths = a_run(tmp_path / "run", 2).flush()
    path = tmp_path / "run/metrics.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    assert [line["step"] for line in read_jsonl(path)] == [1, 2]
    log = RunLog.resume(tmp_path / "run", lengths)
    log.metrics(3, {"x": 1.0})
    assert [line["step"] for line in log.history()] == [1, 2, 3]


def test_what_json_has_no_number_for_is_null(tmp_path):
    log = RunLog(tmp_path, {})
    log.metrics(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "a": null, "b": null, "c": null, "d": 0.5}\n'


def test_a_text_that_is_no_unicode_is_logged_and_read_back(tmp_path):
    RunLog(tmp_path, {}).samples(1, ["酒\udce9店"], [1.0])
    assert read_jsonl(tmp_path / "samples.jsonl")[0]["samples"] == [["酒\udce9店", 1.0]]


@pytest.mark.parametrize("damage", [b"{oops", b'{"step": 2, "x": [["\xe9\x85'])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl.*line 2"):
        read_jsonl(path)


def test_no_file_has_no_lines(tmp_path):
    assert read_jsonl(tmp_path / "nothing.jsonl") == []


def test_line_separators_inside_texts_do_not_cut_a_line(tmp_path):
    log = RunLog(tmp_path / "run", {})
    log.samples(1, ["a\u2028b\x85c\r\nd"], [1.0])
    assert read_jsonl(tmp_path / "run/samples.jsonl")[0]["samples"] == [["a\u2028b\x85c\r\nd", 1.0]]


def test_texts_and_scores_of_unequal_number_are_refused(tmp_path):
    with pytest.raises(ValueError):
        RunLog(tmp_path / "run", {}).samples(1, ["a", "b"], [1.0])


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
