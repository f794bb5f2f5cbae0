"""Scores in a file: read again, by other processes too, whole after kills, and damaged lines skipped."""

import fcntl
import itertools
import multiprocessing
import os

import pytest
from lives import wait_for

from minirlhf.rewards import score_cache
from minirlhf.rewards.score_cache import ScoreCache

FORK = multiprocessing.get_context("fork")  # an import of torch in each process would take seconds


def load(path):
    """A new cache on the file, and how many lines of it are damaged."""
    cache = ScoreCache(path)
    return cache, cache.refresh()


def test_what_is_put_is_got_at_once_and_after_reading_the_file_again(tmp_path):
    path = tmp_path / "new" / "folder" / "cache.jsonl"
    cache = ScoreCache(path)
    scores = {"a": 7.0, "b": -0.1, "钥": 1e-300, "": 0.30000000000000004}
    for key, score in scores.items():
        cache.put(key, score)
        assert cache.scores[key] == score
    again, damaged = load(path)
    assert damaged == 0 and again.scores == scores


def test_two_caches_on_one_file_see_each_other_after_a_refresh(tmp_path):
    one, two = ScoreCache(tmp_path / "cache"), ScoreCache(tmp_path / "cache")
    one.put("a", 1.0)
    two.put("b", 2.0)
    assert (one.scores, two.scores) == ({"a": 1.0}, {"b": 2.0})
    assert (one.refresh(), two.refresh()) == (0, 0)
    assert one.scores == two.scores == {"a": 1.0, "b": 2.0}


def test_a_line_is_as_documented_and_holds_nothing_else(tmp_path):
    ScoreCache(tmp_path / "cache").put("ab", 7.5)
    content = (tmp_path / "cache").read_bytes()
    assert content == b'{"key": "ab", "score": 7.5}\n'
    (tmp_path / "cache").write_bytes(b'{"key": "ab", "score": 7.5, "crc": 1}\n')  # of an earlier version
    assert load(tmp_path / "cache")[0].scores == {"ab": 7.5}


DAMAGED = [
    b"not json", b"[]", b"7", b"null", b"{}", b'{"key": "a"}', b"\xff\xfe\x00", b'{"key": "a", "score": "7.0"}',
    b'{"key": "a", "score": 7}', b'{"key": ["a"], "score": 7.0}', b'{"key": "a", "sco{"key": "a", "score": 7.0}',
    b"[" * 100000, b'{"key": "a", "score": ' + b"9" * 5000, b'{"key": "a", "score": NaN}',
    b'{"key": "a", "score": 1e400}',
]  # fmt: skip


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_skipped_and_counted_once(tmp_path, line):
    path = tmp_path / "cache"
    ScoreCache(path).put("before", 1.0)
    with open(path, "ab") as file:
        file.write(line + b"\n")
    ScoreCache(path).put("after", 2.0)
    cache, damaged = load(path)
    assert damaged == 1
    assert cache.scores == {"before": 1.0, "after": 2.0}
    assert cache.refresh() == 0


@pytest.mark.parametrize("cut", [1, 5, 25])
def test_a_last_line_that_was_cut_short_does_not_spoil_the_next_one(tmp_path, cut):
    path = tmp_path / "cache"
    first = ScoreCache(path)
    first.put("a", 1.0)
    first.put("b", 2.0)
    path.write_bytes(path.read_bytes()[:-cut])
    cache = ScoreCache(path)
    whole = cut == 1  # all but the line feed was there
    assert cache.refresh() == (0 if whole else 1)
    cache.put("c", 3.0)
    again, damaged = load(path)
    assert damaged == (0 if whole else 1)
    assert again.scores == {"a": 1.0, **({"b": 2.0} if whole else {}), "c": 3.0}


def test_half_a_line_of_another_process_is_read_when_it_is_whole(tmp_path):
    path = tmp_path / "cache"
    cache = ScoreCache(path)
    ScoreCache(tmp_path / "other").put("a", 1.0)
    line = (tmp_path / "other").read_bytes()
    for part in (line[:9], line[9:]):
        with open(path, "ab") as file:
            file.write(part)
        assert cache.refresh() == 0
    assert cache.scores == {"a": 1.0}


def write_when_told(path, name, go):
    cache = ScoreCache(path)
    (path.parent / name).touch()
    wait_for(go.exists)
    for i in range(400):
        cache.put(f"{name} {'k' * (i % 50)}{i}", float(i))


def test_two_processes_that_write_at_once_lose_nothing(tmp_path):
    arguments = [(tmp_path / "cache", name, tmp_path / "go") for name in ("one", "two")]
    started = [FORK.Process(target=write_when_told, args=args) for args in arguments]
    for each in started:
        each.start()
    wait_for(lambda: (tmp_path / "one").exists() and (tmp_path / "two").exists())
    (tmp_path / "go").touch()
    for each in started:
        each.join(600)
        assert each.exitcode == 0
    cache, damaged = load(tmp_path / "cache")
    assert damaged == 0
    assert cache.scores == {f"{name} {'k' * (i % 50)}{i}": i for name in ("one", "two") for i in range(400)}


def write_until_killed(path, said):
    cache = ScoreCache(path)
    for i in itertools.count():
        cache.put(str(i), float(i))
        said.write_text(str(i + 1))


def test_what_was_put_before_a_kill_is_there(tmp_path):
    said = tmp_path / "said"
    writer = FORK.Process(target=write_until_killed, args=(tmp_path / "cache", said))
    writer.start()
    wait_for(lambda: said.exists() and int(said.read_text() or 0) > 50)
    writer.kill()
    writer.join()
    cache, damaged = load(tmp_path / "cache")
    assert damaged == 0 and len(cache.scores) >= int(said.read_text() or 51) > 50
    assert cache.scores == {str(i): i for i in range(len(cache.scores))}


def test_a_cache_that_cannot_be_written_says_so_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ScoreCache(tmp_path / "file" / "cache")
    with pytest.raises(IsADirectoryError):
        ScoreCache(tmp_path)


def test_an_entry_is_one_write_of_a_whole_line_at_the_end_of_the_file(tmp_path, monkeypatch):
    """That, and nothing less, is what processes do not interleave and a kill does not cut."""
    cache, calls = ScoreCache(tmp_path / "cache"), []
    monkeypatch.setattr(score_cache.os, "write", lambda fd, line: calls.append((at_the_end(fd), line)) or len(line))
    cache.put("a", 1.0)
    ((appends, line),) = calls
    assert appends and line.startswith(b"{") and line.endswith(b"}\n")


def at_the_end(descriptor):
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND)


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    cache = ScoreCache(tmp_path / "cache")
    monkeypatch.setattr(score_cache.os, "write", lambda fd, line: len(line) - 1)
    with pytest.raises(OSError, match=r"cache took only a part of a line"):
        cache.put("a", 1.0)


@pytest.mark.parametrize("later", [False, True])
def test_a_cache_is_not_written_through_a_symbolic_link(tmp_path, later):
    victim, path = tmp_path / "victim", tmp_path / "cache"
    victim.write_text("precious")
    if not later:
        path.symlink_to(victim)
        with pytest.raises(OSError, match="symbolic link"):
            ScoreCache(path)
    else:
        cache = ScoreCache(path)
        path.unlink()
        path.symlink_to(victim)
        with pytest.raises(OSError, match="symbolic link"):
            cache.put("a", 1.0)
    assert victim.read_text() == "precious"
