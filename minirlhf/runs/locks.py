"""One process a folder: a lock that goes with its owner, however the owner ends.

It is the system's own lock on an open file (flock), so there is no stale one to recognise, and no process number to
look up that belongs to another process by now. What the file says is for people.

Left out: systems without flock, which are those that are not POSIX.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
import warnings
from pathlib import Path
from typing import IO

LOCK_FILE = "lock"


class FolderLock:
    """The lock of an existing folder, held until `release`, or the end of the process and of all forked from it.

    Raises BlockingIOError, which names the owner, if it is held already, OSError if the folder cannot be written.
    A file system that has no locks is used without, and a warning says so.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._path = Path(folder) / LOCK_FILE
        self._file = _acquire(self._path)
        self._file.truncate(0)
        self._file.write(
            f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        )
        self._file.flush()

    @staticmethod
    def check(folder: str | os.PathLike[str]) -> None:
        """Raises BlockingIOError if the folder is locked; changes nothing."""
        path = Path(folder) / LOCK_FILE
        if path.is_file():
            _acquire(path).close()

    def release(self) -> None:
        """Remove the file, and let go of it."""
        self._path.unlink(missing_ok=True)  # while it is locked: afterwards it may be another's
        self._file.close()


def _acquire(path: Path) -> IO[str]:
    """The file, opened and locked."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  (the lock lives as long as the open file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise BlockingIOError(f"{path.parent} is in use by {owner}") from None
        except OSError as error:
            warnings.warn(f"{path} cannot be locked, so a second run there goes unnoticed: {error}", stacklevel=4)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its owner removed it after it was opened here: the lock is another file by now
