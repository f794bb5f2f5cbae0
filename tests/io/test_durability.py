"""What a power failure must find on the disk: the order of writing, flushing and renaming; and who counts as alive."""

import os
import sys

import pytest

from minirlhf.io import files
from minirlhf.io.files import atomic_write, is_running, replaced_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.fixture
def calls(monkeypatch):
    """The flushes and renames, in order: ("flush", path) or ("rename", from, to)."""
    seen, fsync, replace, rename, exchange = [], os.fsync, os.replace, os.rename, files._exchange

    def flushed(descriptor):
        seen.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(of):
        def call(source, target):
            seen.append(("rename", str(source), str(target)))
            of(source, target)

        return call

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed(replace))
    monkeypatch.setattr(os, "rename", renamed(rename))
    monkeypatch.setattr(files, "_exchange", renamed(exchange))
    return seen


def test_a_file_is_flushed_before_it_gets_its_name_and_the_name_after(tmp_path, calls):
    path = tmp_path / "x.json"
    atomic_write(path, b"content")
    (_, flushed), (_, source, target), last = calls
    assert flushed == source != str(path) == target and last == ("flush", str(tmp_path))


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_is_flushed_before_it_gets_its_name_and_the_name_after(tmp_path, calls, there):
    """The names in the staged folder first: otherwise it could take its place empty."""
    folder = tmp_path / "checkpoint"
    if there:
        folder.mkdir()
        (folder / "old").write_text("old")
    with replaced_folder(folder) as staged:
        atomic_write(staged / "a", b"1")
        before = len(calls)
    flush, exchange, *rest = calls[before:]
    assert flush == ("flush", str(staged)) and exchange == ("rename", str(staged), str(folder))
    assert rest[-1] == ("flush", str(tmp_path)) and (folder / "a").read_bytes() == b"1"


def test_a_process_of_another_user_is_running(monkeypatch):
    """Only one that is not found is dead: what it is writing must not be cleaned up."""

    def answers(error):
        def kill(pid, signal):
            assert (pid, signal) == (4321, 0)
            if error is not None:
                raise error

        return kill

    for error, expected in ((None, True), (PermissionError(), True), (ProcessLookupError(), False)):
        monkeypatch.setattr(os, "kill", answers(error))
        assert is_running(4321) is expected
