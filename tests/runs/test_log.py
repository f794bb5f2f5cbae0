"""The log on disk: after crashes, after damage, and with links in the place of its files."""

import hashlib
import math
import os

import pytest

from minirlhf.io.files import read_jsonl
from minirlhf.runs.log import RunLog, is_rewards

NAMES = ("metrics.jsonl", "samples.jsonl")
EMPTY = {name: {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()} for name in NAMES}


def a_log(folder, steps=4):
    folder.mkdir(exist_ok=True)
    log = RunLog(folder)
    for step in range(1, steps + 1):
        log.metrics(step, {"reward/mean": step / 8})
        log.samples(step, [("酒店很好", 0.5), ("a\nb", 0.25)])
    return log


def contents(folder):
    return {name: (folder / name).read_bytes() for name in NAMES}


def history(folder):
    return read_jsonl(folder / "metrics.jsonl")


def steps(folder, name="metrics.jsonl"):
    return [line["step"] for line in read_jsonl(folder / name)]


def test_a_log_reads_back(tmp_path):
    a_log(tmp_path, 2)
    assert history(tmp_path) == [{"step": 1, "reward/mean": 0.125}, {"step": 2, "reward/mean": 0.25}]
    samples = read_jsonl(tmp_path / "samples.jsonl")
    assert samples[0] == {"step": 1, "samples": [["酒店很好", 0.5], ["a\nb", 0.25]]}
    assert "酒店" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")  # readable, not escaped


def test_resume_cuts_the_files_back_and_goes_on(tmp_path):
    log = a_log(tmp_path, 2)
    marks, before = log.flush(), contents(tmp_path)
    assert {name: mark["bytes"] for name, mark in marks.items()} == {n: len(x) for n, x in before.items()}
    log.metrics(3, {"reward/mean": 0.5})
    log.samples(3, [("x", 1.0)])
    log = RunLog.resume(tmp_path, marks, 2, {})
    assert contents(tmp_path) == before
    assert log.flush() == marks
    log.metrics(3, {"reward/mean": 9.0})
    assert steps(tmp_path) == [1, 2, 3] and history(tmp_path)[-1]["reward/mean"] == 9.0
    assert log.flush() == RunLog(tmp_path).flush() != marks


def test_a_log_without_lines_is_flushed_and_resumed(tmp_path):
    assert RunLog(tmp_path).flush() == EMPTY
    a_log(tmp_path / "other", 1)
    for folder in (tmp_path, tmp_path / "other"):
        RunLog.resume(folder, EMPTY, 0, {})
        assert history(folder) == []


@pytest.mark.parametrize(
    "tail", [b'{"step": 3, "rew', b"{", b'{"step": 3}', '{"step": 3, "x": "酒'.encode()[:-1], b"\0" * 99]
)
def test_what_a_crash_left_behind_the_saved_lines_is_dropped(tmp_path, tail):
    marks = a_log(tmp_path, 2).flush()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    assert steps(tmp_path) == [1, 2]
    log = RunLog.resume(tmp_path, marks, 2, {})
    log.metrics(3, {"x": 1.0})
    assert steps(tmp_path) == [1, 2, 3]


DAMAGES = {
    "NULs": (lambda content: b"\0" * len(content), []),
    "NULs at the end": (lambda content: content[:-40] + b"\0" * 40, [1, 2]),
    "NULs in the middle": (lambda content: content[:40] + b"\0" * 10 + content[50:], [1, 3]),
    "empty": (lambda content: b"", []),
    "a byte short": (lambda content: content[:-1], [1, 2, 3]),  # the line can be read, the file is not what it was
    "a line short": (lambda content: b"".join(content.splitlines(keepends=True)[:-1]), [1, 2]),
    "another number": (lambda content: content.replace(b"0.25", b"0.75"), [1, 2, 3]),
    "not a line of a log": (lambda content: content.replace(b'{"step": 2', b'{"stop": 2'), [1, 3]),
    "not an object": (lambda content: b"[" * 100_000 + b"\n7\n" + content.split(b"\n", 1)[1], [2, 3]),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_repaired_from_what_is_left_and_known(tmp_path, name, damage):
    """Whatever happened to the saved part: lines that can be read stay, rewards that are known come back."""
    log = a_log(tmp_path, 3)
    marks, before = log.flush(), contents(tmp_path)
    log.metrics(4, {"reward/mean": 0.5})
    log.samples(4, [("x", 1.0)])
    spoil, readable = DAMAGES[damage]
    lines = before[name].splitlines(keepends=True)
    if name == "samples.jsonl" and damage in ("NULs at the end", "NULs in the middle", "another number"):
        spoilt, readable = before[name].replace(lines[1], b"\0" * len(lines[1])), [1, 3]
    else:
        spoilt = spoil(before[name])
    (tmp_path / name).write_bytes(spoilt)
    with pytest.warns(UserWarning, match=f"{name} is damaged") as caught:
        log = RunLog.resume(tmp_path, marks, 3, {2: 0.25, 3: None, 9: 1.0})
    assert len(caught) == 1
    other = next(each for each in NAMES if each != name)
    assert (tmp_path / other).read_bytes() == before[other]
    if name == "samples.jsonl":
        assert steps(tmp_path, name) == readable
    else:
        known = {2: {"step": 2, "reward/mean": 0.25}, 3: {"step": 3, "reward/mean": None}}
        assert steps(tmp_path) == sorted({*readable, 2, 3})
        for line in history(tmp_path):
            if line["step"] not in readable:
                assert line == known[line["step"]]
    aside = tmp_path / f"{name}.damaged"
    assert (aside.read_bytes() == spoilt) if aside.exists() else (tmp_path / name).read_bytes() == spoilt
    log.metrics(4, {})
    log.samples(4, [("x", None)])
    assert steps(tmp_path, name)[-1] == 4 and log.flush() == RunLog(tmp_path).flush()


@pytest.mark.parametrize(("spoil", "kept", "restored"), [
    (lambda content: content.replace(b"0.125", b"123"), 3, 1),  # of step 1
    (lambda content: content.replace(b"0.125", b'"0.125"'), 3, 1),
    (lambda content: content.replace(b"0.125", b"null"), 3, 1),
    (lambda content: b'{"step": 1, "reward/mean": 1e9}\n' + content, 4, 0),
    (lambda content: content.replace(b"0.125", b"123") + b'{"step": 1, "evaluation/reward": 0.5}\n', 4, 1),
], ids=["a number", "a text", "null", "a line before it", "beside a line of other figures"])  # fmt: skip
def test_a_mean_reward_that_is_not_the_one_of_the_checkpoint_does_not_stay(tmp_path, spoil, kept, restored):
    marks = a_log(tmp_path).flush()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(spoilt := spoil(path.read_bytes()))
    with pytest.warns(UserWarning, match=f"{kept} lines can be read, and {restored} are restored"):
        RunLog.resume(tmp_path, marks, 4, {step: step / 8 for step in range(1, 5)})
    rewards = [(line["step"], line["reward/mean"]) for line in history(tmp_path) if "reward/mean" in line]
    assert rewards == [(1, 0.125), (2, 0.25), (3, 0.375), (4, 0.5)]
    assert len(history(tmp_path)) == kept + restored
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == spoilt


def test_a_file_that_was_kept_before_stays(tmp_path):
    marks = a_log(tmp_path, 1).flush()
    for number in range(3):
        (tmp_path / "metrics.jsonl").write_text(f"damage {number}")
        with pytest.warns(UserWarning, match=rf"kept as metrics\.jsonl\.damaged{['', '-2', '-3'][number]}$"):
            RunLog.resume(tmp_path, marks, 1, {1: 0.125})
    for number, end in enumerate(["", "-2", "-3"]):
        assert (tmp_path / f"metrics.jsonl.damaged{end}").read_text() == f"damage {number}"


def test_a_missing_file_is_damage_too(tmp_path):
    marks = a_log(tmp_path, 2).flush()
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.warns(UserWarning, match="0 lines can be read, and 1 are restored"):
        RunLog.resume(tmp_path, marks, 2, {2: 0.25})
    assert history(tmp_path) == [{"step": 2, "reward/mean": 0.25}]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    marks = a_log(tmp_path, 1).flush()
    (tmp_path / "samples.jsonl").unlink()
    os.mkfifo(tmp_path / "samples.jsonl")
    with pytest.raises(OSError, match="not a regular file"):
        RunLog.resume(tmp_path, marks, 1, {})


def test_what_json_has_no_number_for_is_null(tmp_path):
    RunLog(tmp_path).metrics(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "a": null, "b": null, "c": null, "d": 0.5}\n'


@pytest.mark.parametrize(
    "damage", [b"{oops", b'{"step": 2, "x": [["\xe9\x85', b"3", b"[1]", b"[" * 100_000, b"9" * 5000]
)
def test_reading_names_a_damaged_line_in_the_middle(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl.*line 2"):
        read_jsonl(path)


def test_a_line_that_stands_twice_counts_once(tmp_path):
    log = a_log(tmp_path)
    marks = log.flush()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().splitlines(True)[1] + path.read_bytes())
    with pytest.warns(UserWarning, match="metrics.jsonl is damaged"):
        RunLog.resume(tmp_path, marks, 4, {})
    assert steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize(("value", "fine"), [
    ({"1": 0.5, "2": None}, True), ({}, True), ({"1": "x"}, False), ({"1": float("nan")}, False), ({"x": 0.5}, False),
    ({"-1": 0.5}, False), ([0.5], False), (None, False),
])  # fmt: skip
def test_what_may_be_the_rewards_of_steps(value, fine):
    assert is_rewards(value) == fine
