"""What is in a folder, so that two may be compared."""

import json
from pathlib import Path
from typing import Any

from minirlhf.io.model_folder import read_metadata, read_tensors
from minirlhf.runs.checkpoint import COUNTERS_FILE, MANIFEST_FILE


def snapshot(folder: Path) -> dict[str, Any]:
    """Name -> content, of everything below a folder."""
    return {str(path.relative_to(folder)): path.is_file() and content(path) for path in folder.rglob("*")}


def content(path: Path) -> Any:
    """The bytes of a file, but for what may differ between two saves of one state.

    Of a safetensors file tensors and metadata: the order of its metadata is random. So is then its sum in the
    manifest, of which the names are taken. Of a trainer's counters all but lengths and hashes of the log: its times
    differ.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = read_tensors(path).items()
            return {n: (str(x.dtype), tuple(x.shape), x.numpy().tobytes()) for n, x in tensors}, read_metadata(path)
        if path.name in (COUNTERS_FILE, MANIFEST_FILE):
            read = json.loads(path.read_bytes())
            return (
                sorted(read["sha256"])
                if path.name == MANIFEST_FILE
                else {**read, "run": read.get("run") and read["run"]["rewards"]}
            )
    except ValueError:  # damaged
        pass
    return path.read_bytes()
