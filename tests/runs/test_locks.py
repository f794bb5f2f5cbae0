"""One owner a folder, whoever died in it."""

import errno
import os
import time
import warnings

import pytest
from lives import hold_lock, process, wait_for

from minirlhf.runs import locks
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


def test_a_lock_that_was_removed_while_it_was_being_taken_is_taken_anew(tmp_path, monkeypatch):
    """Its owner lets go between another's open and lock: the other must not hold a file that is not there any more."""
    owner, flock = FolderLock(tmp_path), locks.fcntl.flock

    def late(file, flags):
        if not owner._file.closed:
            owner.release()
        flock(file, flags)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    lock = FolderLock(tmp_path)
    monkeypatch.undo()
    with pytest.raises(BlockingIOError):
        FolderLock(tmp_path)
    lock.release()


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def unsupported(file, flags):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match=r"lock cannot be locked.*not supported"):
        lock = FolderLock(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        FolderLock(tmp_path / "nowhere")
