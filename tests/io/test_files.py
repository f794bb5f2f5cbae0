"""Files and folders that are whole or not there."""

import json
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess

import pytest

from conftest import names
from minirlhf.io import files
from minirlhf.io.conversion import read_pickle
from minirlhf.io.files import (
    atomic_write,
    field,
    free_path,
    open_for_writing,
    read_json,
    read_text,
    replaced_folder,
    write_json,
)
from minirlhf.io.model_folder import read_metadata, read_tensors

# ---- files that are read ---------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "config.json").write_bytes('\ufeff{"a": "评"}'.encode())
    assert read_json(tmp_path / "config.json") == {"a": "评"} and read_text(tmp_path / "config.json")[0] == "{"


@pytest.mark.parametrize("read", [read_text, read_json, read_tensors, read_metadata, read_pickle])
def test_a_git_lfs_pointer_is_named_with_the_command(tmp_path, read):
    """`git clone` without git-lfs leaves these in the place of large files."""
    path = tmp_path / "file"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 408343\n")
    with pytest.raises(ValueError, match=r"file is a git-lfs pointer, .* `git lfs install` and `git lfs pull`"):
        read(path)


@pytest.mark.parametrize("read", [read_text, read_json, read_tensors, read_metadata, read_pickle])
def test_a_pipe_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match=r"pipe does not exist, or is not a file"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize(("content", "kind", "problem"), [
    ({"a": "3"}, int, "must be an integer, got '3'"), ({"a": True}, int, "must be an integer, got True"),
    ({"a": 3.0}, int, "must be an integer, got 3.0"), ({}, int, "must be an integer, but it is missing"),
    ({"a": None}, list, "must be a list, got None"), ({"a": {}}, list, "must be a list, got {}"),
    ({"a": [1]}, dict, r"must be an object, got \[1\]"), ({"a": 1}, bool, "must be true or false, got 1"),
    ({"a": 1}, str, "must be a text, got 1"), ({"a": "x" * 500}, dict, "must be an object, got 'x{79}$"),
])  # fmt: skip
def test_a_field_of_another_type_is_named(content, kind, problem):
    with pytest.raises(ValueError, match=f"here: a {problem}"):
        field(content, "a", kind, "here")


# ---- files written in place -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w", "wb", "a", "ab", "ab+", "a+", "x"])
def test_nothing_is_written_through_a_symbolic_link(tmp_path, mode):
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("precious")
    for target in (victim, tmp_path / "missing"):
        link.symlink_to(target)
        with pytest.raises(OSError, match="link"):
            open_for_writing(link, mode)
        link.unlink()
    assert victim.read_text() == "precious" and names(tmp_path) == ["victim"]


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="needs O_NOFOLLOW")
def test_a_link_that_appears_after_the_check_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    monkeypatch.setattr(files.os.path, "islink", lambda path: False)
    with pytest.raises(OSError):
        open_for_writing(tmp_path / "link", "w")
    assert (tmp_path / "victim").read_text() == "precious"


def test_only_regular_files_are_opened_for_writing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/null"):
        for mode in ("ab", "ab+"):
            with pytest.raises(OSError):
                open_for_writing(path, mode)


def test_an_atomic_write_replaces_a_link_and_leaves_what_it_points_to(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    atomic_write(tmp_path / "link", b"new ", b"content")
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "link").read_bytes() == b"new content"


# ---- atomic writes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, function, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files.os, function, fail)
        with pytest.raises(type(error)):
            atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_the_target_never_holds_a_part(tmp_path, monkeypatch):
    """Everything is on the disk before the rename, which is the last thing that happens."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    calls, fsync, replace = [], os.fsync, os.replace

    def recording_fsync(descriptor):
        fsync(descriptor)
        calls.append(("fsync", os.fstat(descriptor).st_size, path.read_bytes()))

    def recording_replace(source, target):
        calls.append(("replace", os.stat(source).st_size, path.read_bytes()))
        assert os.path.dirname(source) == str(tmp_path)  # a rename within one file system
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", recording_fsync)
    monkeypatch.setattr(files.os, "replace", recording_replace)
    atomic_write(path, b"12345")
    assert calls[:2] == [("fsync", 5, b"old"), ("replace", 5, b"old")]
    assert path.read_bytes() == b"12345"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_mode_respects_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        atomic_write(tmp_path / "file", b"x")
        assert os.umask(umask) == umask  # and leaves it as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


# ---- JSON -----------------------------------------------------------------------------------------------------------


def test_json_round_trip_in_readable_utf8(tmp_path):
    content = {"z": "酒店", "a": [1, 2.5, None, True], "nested": {"0": "x"}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert "酒店" in text and text.endswith("}\n")
    assert list(json.loads(text)) == ["z", "a", "nested"]


@pytest.mark.parametrize("content", [
    b"", b"{", b'{"a": 1,}', b"{'a': 1}", b'{"a": 1} x', b"\xff\xfe{}", b'{"a": "\xc0"}', b"[" * 100_000,
])  # fmt: skip
def test_invalid_json_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json is not valid (JSON|UTF-8)"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(("content", "kind"), [("[1]", "list"), ("null", "NoneType"), ('"a"', "str"), ("3", "int")])
def test_json_that_is_no_object_is_named(tmp_path, content, kind):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json must hold a JSON object, but holds a {kind}"):
        read_json(tmp_path / "config.json")


# ---- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_is_replaced_and_keeps_its_other_files(tmp_path):
    folder = tmp_path / "deep" / "model"
    with replaced_folder(folder) as staged:
        atomic_write(staged / "a", b"1")
        atomic_write(staged / "b", b"1")
        assert not folder.exists()
    with replaced_folder(folder) as staged:
        atomic_write(staged / "b", b"2")
        assert (folder / "b").read_bytes() == b"1"
    assert {name: (folder / name).read_bytes() for name in names(folder)} == {"a": b"1", "b": b"2"}
    assert names(folder.parent) == ["model"]


def save_twice(folder):
    """A save that writes, keeps and removes files, and one that fails; and what was there before the second."""
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "b", "kept", "sub/kept"):
        (folder / name).write_bytes(b"old")
    with replaced_folder(folder) as staged:
        atomic_write(staged / "a", b"new")
        (staged / "b").unlink()
        atomic_write(staged / "c", b"new")
        assert (folder / "a").read_bytes() == b"old" and (folder / "b").exists() and not (folder / "c").exists()
    with pytest.raises(OSError, match="disk full"), replaced_folder(folder) as staged:
        atomic_write(staged / "a", b"newest")
        raise OSError("disk full")
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {"a": b"new", "c": b"new", "kept": b"old", "sub/kept": b"old"}
    assert names(folder) == ["a", "c", "kept", "sub"] and names(folder.parent) == [folder.name]


def test_the_current_directory_stays_where_it_is(tmp_path, monkeypatch):
    """Another folder in its place would leave this process, and the shell that it came from, in one that is gone."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    save_twice(tmp_path / "model")
    assert sorted(os.listdir()) == ["a", "c", "kept", "sub"]


def test_a_mount_point_is_filled(tmp_path):
    """As a volume of a container is, in whose place no other folder can come."""
    (tmp_path / "model").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path / "model")]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system: needs root")
    try:
        save_twice(tmp_path / "model")
    finally:
        subprocess.run(["umount", str(tmp_path / "model")], check=True)


def test_a_folder_in_one_that_may_not_be_written_is_filled(tmp_path, monkeypatch):
    parent = tmp_path / "parent"
    monkeypatch.setattr(files.os, "access", lambda path, mode: path != parent)
    save_twice(parent / "model")


def killed_while_saving(folder):
    with replaced_folder(folder) as staged:
        atomic_write(staged / "a", b"2")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_save_leaves_the_old_folder_and_the_next_one_cleans_up(tmp_path):
    folder = tmp_path / "model"
    with replaced_folder(folder) as staged:
        atomic_write(staged / "a", b"1")
    child = multiprocessing.get_context("fork").Process(target=killed_while_saving, args=(folder,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert (folder / "a").read_bytes() == b"1" and len(names(tmp_path)) == 2
    with replaced_folder(folder) as staged:
        atomic_write(staged / "a", b"3")
    assert (folder / "a").read_bytes() == b"3" and names(tmp_path) == ["model"]


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replaced_folder(tmp_path / "link") as staged:
        atomic_write(staged / "a", b"1")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == ["a"]


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "model").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="is a file"), replaced_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model").read_bytes() == b"precious"


def test_a_free_path_is_the_first_where_nothing_is(tmp_path):
    for expected in ("a", "a-2", "a-3", "a-4"):
        path = free_path(tmp_path / "a")
        assert path == tmp_path / expected
        {"a": path.mkdir, "a-2": path.touch}.get(expected, lambda path=path: path.symlink_to("nowhere"))()


def test_what_was_not_finished_is_removed_and_nothing_else(tmp_path):
    inner = tmp_path / "inner"
    for folder in (tmp_path, inner):
        (folder / f".half{files.PARTIAL}").mkdir(parents=True)
        (folder / f".half{files.PARTIAL}" / "file").touch()
        (folder / f".file{files.PARTIAL}").touch()
        (folder / f"visible{files.PARTIAL}").touch()
    (tmp_path / "kept").mkdir()
    (tmp_path / f".link{files.PARTIAL}").symlink_to(tmp_path / "kept")
    files.remove_partial(tmp_path, inner, tmp_path / "not there")
    assert {path.name for path in tmp_path.iterdir()} == {"inner", "kept", f"visible{files.PARTIAL}"}
    assert {path.name for path in inner.iterdir()} == {f"visible{files.PARTIAL}"}


def test_two_renames_where_folders_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *args, **kwargs: object())
    folder = tmp_path / "model"
    for content in (b"1", b"2"):
        with replaced_folder(folder) as staged:
            atomic_write(staged / "a", content)
    assert (folder / "a").read_bytes() == b"2"
    assert names(tmp_path) == ["model"]


def test_files_are_copied_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError("not supported")

    monkeypatch.setattr(files.os, "link", no_links)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "other").write_bytes(b"kept")
    with replaced_folder(tmp_path / "model") as staged:
        atomic_write(staged / "a", b"1")
    assert names(tmp_path / "model") == ["a", "other"]
