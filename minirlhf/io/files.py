"""Files and folders that are whole or not there: text, JSON, atomic files, folders replaced as one.

A reader, or a crash at any moment, sees the old content or the new, never a part.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import importlib
import itertools
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from minirlhf.common.text import printable

StrPath = str | os.PathLike[str]  # a path as users give it
T = TypeVar("T")
LOCKED_BYTE = 2**30  # of a file on Windows; far behind the text, because others cannot read a locked byte
PARTIAL = ".partial"  # ends the names of what a save has not finished
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
JSON_TYPES = {str: "a text", int: "an integer", float: "a number", bool: "true or false", list: "a list",
              dict: "an object"}  # fmt: skip


def check_content(path: StrPath) -> None:
    """Raise FileNotFoundError unless a path is a regular file, ValueError if it is a git-lfs pointer to one."""
    if not Path(path).is_file():  # opening a pipe would wait for a writer
        raise FileNotFoundError(f"{path} does not exist, or is not a file")
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            fetch = "run `git lfs install` and `git lfs pull` in its repository"
            raise ValueError(f"{path} is a git-lfs pointer, not the file itself: {fetch}")


def read_text(path: StrPath) -> str:
    """Read UTF-8, with or without a byte-order mark. Raises as `check_content`, ValueError for other bytes."""
    check_content(path)
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8: {error}") from error


def read_json(path: StrPath, pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]] = dict) -> dict[str, Any]:
    """Read a JSON object. Raises as `read_text`, ValueError with the path if it is not a JSON object.

    pairs: makes a dict of an object's names and values; the default lets the last of equal names win.
    """
    return _json_object(read_text(path), path, object_pairs_hook=pairs, parse_float=_finite, parse_constant=_finite)


def _json_object(text: str | bytes, where: object, **options: Any) -> dict[str, Any]:
    try:
        content = json.loads(text if isinstance(text, str) else text.decode("utf-8"), **options)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold a JSON object, but holds a {type(content).__name__}")
    return content


def _finite(number: str) -> float:
    """A number of a JSON file. Raises ValueError for NaN, Infinity, and what no float holds (1e400)."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:40]} is not a finite number")
    return value


def field(content: Mapping[str, Any], name: str, kind: type[T], where: object, default: T | None = None) -> T:
    """The field of a JSON object, of exactly this type (True is not an int). null counts as missing.

    where: what the error says the object is. default: for a missing field; None: it may not be missing.
    Raises ValueError that names field, type and value.
    """
    value = content.get(name)
    if value is None and default is not None:
        return default
    if type(value) is not kind:
        found = f"got {value!r:.80}" if name in content else "but it is missing"
        raise ValueError(f"{where}: {name} must be {JSON_TYPES[kind]}, {found}")
    return value


@contextlib.contextmanager
def naming(path: StrPath) -> Iterator[None]:
    """Put a path before the message of a ValueError that is raised inside, about content read from there.

    What the content would steer a terminal with becomes visible, as Python prints a message as it is.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {printable(str(error))}") from error


def write_json(path: StrPath, content: Mapping[str, Any]) -> None:
    """Write a JSON object, atomically, in UTF-8, its keys in the order given."""
    text = json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    atomic_write(path, text.encode("utf-8", "backslashreplace"))  # the escape of a lone surrogate is valid JSON


def sha256(path: StrPath) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def open_for_writing(path: StrPath, mode: str = "wb") -> IO[Any]:
    """`open` for files of our own that are written in place: logs and locks.

    mode: as in `open`; text is UTF-8. Missing files are created where the mode creates them.
    Raises OSError if the path is a symbolic link (what it points to may belong to someone else) or not a regular file.
    """

    def opener(path: str, flags: int) -> int:
        if os.path.islink(path):  # also where O_NOFOLLOW does not exist
            raise OSError(errno.ELOOP, "is a symbolic link, and files are not written through links", path)
        # O_NONBLOCK: opening a pipe must not wait for a reader.
        descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", path)

    return open(os.fspath(path), mode, encoding=None if "b" in mode else "utf-8", opener=opener)


def lock_descriptor(descriptor: int) -> None:
    """Lock an open file for this process, without waiting; the lock ends with the file or the process.

    Raises BlockingIOError if another process has it, OSError if files cannot be locked here.
    """
    with contextlib.suppress(ImportError):
        import fcntl

        return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        msvcrt: Any = importlib.import_module("msvcrt")
    except ImportError:
        raise OSError(errno.ENOSYS, "this system has neither fcntl nor msvcrt") from None
    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EDEADLK):
            raise BlockingIOError(error.errno, "locked by another process") from error
        raise
    finally:
        os.lseek(descriptor, place, os.SEEK_SET)


def atomic_write(path: StrPath, *content: bytes | memoryview) -> None:
    """Write a file, durable when this returns, from pieces of content. Raises OSError and leaves no part behind.

    A symbolic link at the path is replaced, not followed.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only the owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


@contextlib.contextmanager
def replaced_folder(folder: StrPath) -> Iterator[Path]:
    """A new folder to write into, by `atomic_write`; it takes the place of `folder` when the block ends.

    Files of the old folder that are not written anew stay. If the block raises, or the process is killed, the old
    folder is unchanged; the next save removes what a killed one left. A mount point, the current directory and a
    folder whose parent is not writable get their files one by one at the end, each whole.
    Raises OSError if the folder cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    fixed = folder.is_dir() and (  # a rename cannot replace it
        os.path.ismount(folder) or os.path.samefile(folder, os.curdir) or not os.access(folder.parent, os.W_OK)
    )
    place = folder if fixed else folder.parent
    for left in place.glob(f".{folder.name}.*{PARTIAL}"):  # by a save that was killed
        owner = left.name.removeprefix(f".{folder.name}.").split(".")[0]
        if folder.exists() and owner.isdigit() and not is_running(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    staged = Path(tempfile.mkdtemp(dir=place, prefix=f".{folder.name}.{os.getpid()}.", suffix=PARTIAL))
    try:
        os.chmod(staged, 0o777 & ~_umask())
        if folder.is_dir():
            shutil.copytree(
                folder, staged, copy_function=link_or_copy, symlinks=True, dirs_exist_ok=True,
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
        shutil.rmtree(staged, ignore_errors=True)  # the old folder, or what an error left


def flush_folder(folder: StrPath) -> None:
    """Make the names in a folder durable (fsync of the directory); does nothing on systems without it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_running(pid: int) -> bool:
    """Whether a process of this number may run on this machine."""
    if os.name == "nt":  # os.kill would end it there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs as another user
        pass
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
    # Two renames: a kill between them leaves both folders whole, under names of partial ones.
    old = staged.with_name(staged.name.removesuffix(PARTIAL) + ".old" + PARTIAL)
    os.rename(folder, old)
    try:
        os.rename(staged, folder)
    except BaseException:
        os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _fill(folder: Path, staged: Path) -> None:
    """Move the content of `staged`, which is inside `folder`, into `folder`, file by file."""
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


def link_or_copy(source: StrPath, target: StrPath) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def free_path(path: StrPath) -> Path:
    """The path, or the first of PATH-2, PATH-3, ... where there is nothing, not even a link that leads nowhere."""
    path = Path(path)
    names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(2)))
    return next(free for name in names if not os.path.lexists(free := path.with_name(name)))


def remove_partial(*folders: StrPath) -> None:
    """Remove what a killed process had not finished writing in folders that no other process is writing."""
    for part in [part for folder in folders for part in Path(folder).glob(f".*{PARTIAL}")]:
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink()


def read_jsonl(path: StrPath, length: int | None = None) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, [] if there is no file. A last line that a crash cut short is dropped.

    length: of the part to read, bytes; None: all of it.
    Raises ValueError with the line number for any other line that is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    if not path.is_file():  # opening a pipe would wait for a writer
        raise ValueError(f"{path} is not a file")
    whole = path.read_bytes()[:length].split(b"\n")[:-1]  # a whole line ends in a line feed
    return [_json_object(line, f"{path}, line {number}") for number, line in enumerate(whole, 1)]
