"""One owner a folder, whichever process died in it."""

import errno
import fcntl
import os
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from lives import hold_lock, process, wait_for

from minirlhf.runs.locks import LOCK_FILE, FolderLock


def test_a_held_lock_refuses_a_second_one_and_names_its_owner(tmp_path):
    lock = FolderLock(tmp_path)
    before = (tmp_path / LOCK_FILE).read_text()
    assert before.startswith(f"process {os.getpid()} on ") and time.strftime("%Y-") in before
    for attempt in (FolderLock, FolderLock.check):
        with pytest.raises(BlockingIOError, match=rf"{tmp_path.name} is in use by process {os.getpid()} on \S+ since"):
            attempt(tmp_path)
    assert (tmp_path / LOCK_FILE).read_text() == before
    lock.release()
    assert list(tmp_path.iterdir()) == []
    FolderLock(tmp_path).release()


def test_the_lock_of_another_process_goes_with_it(tmp_path):
    """By SIGKILL, which cleans nothing up: the file stays, the lock does not."""
    (tmp_path / "run").mkdir()
    owner = process(hold_lock, tmp_path / "run", tmp_path / "ready")
    wait_for((tmp_path / "ready").exists)
    with pytest.raises(BlockingIOError, match=f"in use by process {owner.pid} on"):
        FolderLock(tmp_path / "run")
    owner.kill()
    owner.join()
    assert f"process {owner.pid} on" in (tmp_path / "run" / LOCK_FILE).read_text()
    FolderLock.check(tmp_path / "run")
    lock = FolderLock(tmp_path / "run")
    assert f"process {os.getpid()} on" in (tmp_path / "run" / LOCK_FILE).read_text()
    lock.release()


def test_a_process_number_that_is_used_again_means_nothing(tmp_path):
    """The file of a dead owner names a process that runs: this one."""
    (tmp_path / LOCK_FILE).write_text(f"process {os.getpid()} on here since 2020-01-01 00:00:00\n")
    FolderLock.check(tmp_path)
    FolderLock(tmp_path).release()


def test_a_check_changes_nothing(tmp_path):
    FolderLock.check(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / LOCK_FILE).write_text("old")
    FolderLock.check(tmp_path)
    assert (tmp_path / LOCK_FILE).read_text() == "old"


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_that_was_removed_while_it_was_being_taken_is_not_held(tmp_path, monkeypatch, replaced):
    """Its owner lets go between our open and our lock. We must hold the file that has the name, or nothing.

    replaced: a third one has taken the new file meanwhile.
    """
    owner, flock, third = FolderLock(tmp_path), fcntl.flock, []

    def late(file, flags):
        if not owner._file.closed:
            owner.release()
            if replaced:
                with monkeypatch.context() as patch:
                    patch.setattr(fcntl, "flock", flock)
                    third.append(FolderLock(tmp_path))
        flock(file, flags)

    monkeypatch.setattr(fcntl, "flock", late)
    if replaced:
        with pytest.raises(BlockingIOError, match="in use by process"):
            FolderLock(tmp_path)
        lock = third[0]
    else:
        lock = FolderLock(tmp_path)
    monkeypatch.undo()
    with pytest.raises(BlockingIOError):
        FolderLock(tmp_path)
    lock.release()


def test_the_file_is_removed_while_it_is_still_locked(tmp_path, monkeypatch):
    """Otherwise another could lock it in between, and lose its file."""
    lock, unlink, held = FolderLock(tmp_path), Path.unlink, []

    def watched(path, *arguments, **named):
        with pytest.raises(BlockingIOError):
            FolderLock.check(tmp_path)
        held.append(path)
        unlink(path, *arguments, **named)

    monkeypatch.setattr(Path, "unlink", watched)
    lock.release()
    assert held == [tmp_path / LOCK_FILE]


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def unsupported(file, flags):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match=r"lock cannot be locked.*not supported"):
        lock = FolderLock(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_windows_locks_a_byte_far_behind_the_text(tmp_path, monkeypatch):
    """What others could not read would not tell them who the owner is."""
    flock, exclusive, free = fcntl.flock, fcntl.LOCK_EX | fcntl.LOCK_NB, []

    def locking(descriptor, mode, count):
        assert (mode, count) == (7, 1) and os.lseek(descriptor, 0, os.SEEK_CUR) >= 2**20
        try:
            flock(descriptor, exclusive)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None  # as Windows says it
        free.append(descriptor)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=7, locking=locking))
    lock = FolderLock(tmp_path)
    with pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()} on"):
        FolderLock(tmp_path)
    assert len(free) == 1 and (tmp_path / LOCK_FILE).stat().st_size < 200
    lock.release()
    FolderLock(tmp_path).release()
