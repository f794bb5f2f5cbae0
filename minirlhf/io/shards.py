"""Sharded weights: an index file that says which file of its folder holds which tensor.

An index may come from a stranger, so it may name only files beside itself. These may be symbolic links, as they are in
the hub's cache: their targets are read as tensors or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from torch import Tensor

from minirlhf.common.text import printable
from minirlhf.io.files import read_json


def read_shards(index: Path, read: Callable[[Path], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors of the shards that an index names, each file read by `read`.

    Raises as `read_index`, FileNotFoundError for a missing shard, ValueError for one with other tensors than named.
    """
    shards = read_index(index)
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise FileNotFoundError(f"{index} names files that do not exist: {_listed(absent)}")
    tensors: dict[str, Tensor] = {}
    for shard, names in shards.items():
        path = index.parent / shard
        found = read(path)
        if missing := sorted(names - found.keys()):
            raise ValueError(f"{path} does not hold what {index.name} says: missing {_listed(missing)}")
        if extra := sorted(found.keys() - names):
            raise ValueError(f"{path} holds tensors that {index.name} does not place there: {_listed(extra)}")
        tensors.update(found)
    return tensors


def read_index(path: Path) -> dict[str, set[str]]:
    """The files that an index names, in the order of their first mention, and the tensors of each.

    Raises FileNotFoundError, or ValueError for an index that is damaged or leads out of its folder.
    """
    weight_map = read_json(path, pairs=_without_repeats).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map from tensor names to files")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        # A name under the rules of every system, without folders.
        plain = isinstance(shard, str) and shard not in ("", ".", "..") and shard.isprintable()
        if not (plain and PurePosixPath(shard).name == shard == PureWindowsPath(shard).name):
            raise ValueError(
                f"{path} places {printable(tensor)} in {shard!r}, which is not the name of a file beside it"
            )
        shards.setdefault(shard, set()).add(tensor)
    return shards


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {printable(next(name for name in names if names.count(name) > 1))} twice")
    return content


def _listed(names: list[str]) -> str:
    return printable(", ".join(names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
