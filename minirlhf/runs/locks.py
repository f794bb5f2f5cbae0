"""One process a folder: a lock of the system on an open file (see `io.files.lock_descriptor`).

The lock ends when its owner does, also by a kill. The text in the file is for people.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import warnings
from pathlib import Path
from typing import IO

from minirlhf.io.files import StrPath, lock_descriptor, open_for_writing

LOCK_FILE = "lock"


class FolderLock:
    """The lock of an existing folder, held until `release` or the end of the process and of all forked from it.

    If the file system or the system lacks locking, continues without a lock and warns.
    Raises BlockingIOError, which names the owner, if it is held already, OSError if the folder cannot be written or
    the lock file is a symbolic link.
    """

    def __init__(self, folder: StrPath):
        self._path = Path(folder) / LOCK_FILE
        self._file = _acquire(self._path)
        if os.fstat(self._file.fileno()).st_nlink == 1:  # else it is also a file of another name, which is not ours
            self._file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
            self._file.flush()

    @staticmethod
    def check(folder: StrPath) -> None:
        """Raise BlockingIOError if the folder is locked; changes nothing."""
        path = Path(folder) / LOCK_FILE
        if path.is_file():
            _acquire(path).close()

    def release(self) -> None:
        """Remove the file and let go of it."""
        if os.name == "nt":  # an open file cannot be removed there, neither this one nor, afterwards, another owner's
            self._file.close()
        with contextlib.suppress(OSError):
            self._path.unlink()  # elsewhere while it is locked: afterwards it may be another's
        self._file.close()


def _acquire(path: Path) -> IO[str]:
    """The file, opened and locked."""
    while True:
        file = open_for_writing(path, "a+")
        try:
            lock_descriptor(file.fileno())
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
