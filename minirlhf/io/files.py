"""Files and folders that are whole or not there: JSON, atomic files, folders replaced as one.

A write goes to a temporary name beside its target, is flushed to the disk, and takes the target's name in one rename.
A reader, or a crash at any moment, sees the old content or the new, never a part.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"  # ends the names of what a save has not finished


def read_json(
    path: str | os.PathLike[str], pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]] = dict
) -> dict[str, Any]:
    """Read a JSON object. Raises FileNotFoundError, or ValueError with the path if it is not a JSON object.

    pairs: makes a dict of an object's names and values; the default lets the last of equal names win.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of too many digits
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(content).__name__}")
    return content


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within it a ValueError, raised about content that was read from there, gets the path before its message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a JSON object, atomically, in UTF-8, its keys in the order given."""
    text = json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    atomic_write(path, text.encode("utf-8", "backslashreplace"))  # a lone surrogate's escape is JSON's own


def open_for_writing(path: str | os.PathLike[str], mode: str = "wb") -> IO[Any]:
    """`open` for files of our own that are written in place: logs, locks, partial downloads.

    mode: as in `open`; text is UTF-8. Missing files are created where the mode creates them.
    Raises OSError if the path is a symbolic link (what it points to may belong to someone else) or not a regular file.
    """
    path = os.fspath(path)

    def opener(_: str, flags: int) -> int:
        if os.path.islink(path):  # also where O_NOFOLLOW does not exist
            raise OSError(errno.ELOOP, "is a symbolic link, and files are not written through links", path)
        # O_NONBLOCK: opening a pipe must not wait for a reader.
        descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", path)

    return open(path, mode, encoding=None if "b" in mode else "utf-8", opener=opener)


def atomic_write(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file that is durable when this returns. Raises OSError, and leaves no part behind."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only the owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


@contextlib.contextmanager
def replaced_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Within it files are written, by `atomic_write`, into a folder that takes the place of `folder` at the end.

    Files of the old folder that are not written anew stay. If the body raises, or the process is killed, the old
    folder is as it was; what a killed save left is removed by the next one. A folder that cannot give its place, since
    it is a mount point, the current directory, or in a folder that may not be written, gets its files one by one at
    the end: each is whole, but a kill just then leaves old ones beside new ones.
    Raises OSError if the folder cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    fixed = folder.is_dir() and _is_fixed(folder)
    place = folder if fixed else folder.parent
    _remove_abandoned(folder, place)
    staged = Path(tempfile.mkdtemp(dir=place, prefix=f".{folder.name}.{os.getpid()}.", suffix=PARTIAL))
    try:
        os.chmod(staged, 0o777 & ~_umask())
        if folder.is_dir():
            shutil.copytree(
                folder, staged, copy_function=_link_or_copy, symlinks=True, dirs_exist_ok=True,
                ignore=lambda _, names: [name for name in names if name == staged.name],
            )  # fmt: skip
        yield staged
        flush_folder(staged)
        if fixed:
            _fill(folder, staged)
        else:
            _exchange(staged, folder)
            flush_folder(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)  # by now the old folder, or what an error left


def flush_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in a folder durable (fsync of the directory); without effect where a system has no such thing."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_running(pid: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as somebody else
        return True
    return True


def _exchange(staged: Path, folder: Path) -> None:
    """Give `staged` the name of `folder`, and the old folder, if there is one, the name of `staged`."""
    if not folder.exists():
        os.rename(staged, folder)
        return
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    at_cwd, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux: both names change at one moment
    if rename is not None and rename(at_cwd, os.fsencode(staged), at_cwd, os.fsencode(folder), exchange) == 0:
        return
    # Elsewhere two renames: a kill between them leaves both folders whole under the names of partial ones.
    old = staged.with_name(staged.name.removesuffix(PARTIAL) + ".old" + PARTIAL)
    os.rename(folder, old)
    try:
        os.rename(staged, folder)
    except BaseException:
        os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_fixed(folder: Path) -> bool:
    """Whether another folder cannot take the place of this one, or would take it from under our feet."""
    return os.path.ismount(folder) or os.path.samefile(folder, os.curdir) or not os.access(folder.parent, os.W_OK)


def _fill(folder: Path, staged: Path) -> None:
    """Give a folder the content of one within it, file by file."""
    gone = {path.name for path in folder.iterdir() if path != staged} - {path.name for path in staged.iterdir()}
    for path in sorted(staged.rglob("*")):
        target = folder / path.relative_to(staged)
        if path.is_dir() and not path.is_symlink():
            target.mkdir(exist_ok=True)
        else:
            os.replace(path, target)
    for name in gone:
        (folder / name).unlink()
    flush_folder(folder)


def _remove_abandoned(folder: Path, place: Path) -> None:
    """Remove what saves of this folder left whose process was killed."""
    for left in place.glob(f".{folder.name}.*{PARTIAL}"):
        owner = left.name.removeprefix(f".{folder.name}.").split(".")[0]
        if folder.exists() and owner.isdigit() and not is_running(int(owner)):
            shutil.rmtree(left, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def remove_partial(*folders: str | os.PathLike[str]) -> None:
    """Remove what a killed process had not finished writing in these folders. Only for who owns them: nobody else is
    writing.

    Raises OSError for a file that cannot be removed.
    """
    for part in [part for folder in folders for part in Path(folder).glob(f".*{PARTIAL}")]:
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink()


def read_jsonl(path: str | os.PathLike[str], length: int | None = None) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none if there is no file. A last line that a crash cut short is dropped.

    length: of the part to read, bytes; None: all of it.
    Raises ValueError with the line number for any other line that is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is not a file")
    whole = path.read_bytes()[:length].split(b"\n")[:-1]  # a whole line ends in a line feed
    content = []
    for number, line in enumerate(whole, 1):
        try:
            content.append(json.loads(line.decode("utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
        if not isinstance(content[-1], dict):
            raise ValueError(f"{path}, line {number} must hold a JSON object, but holds a {type(content[-1]).__name__}")
    return content
