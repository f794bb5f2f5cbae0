"""The known name that is meant by an unknown one."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

SPELLING = 0.8  # the ratio of difflib above which two names differ by a slip of the finger


def suggest(name: str, known: Collection[str], table: Mapping[str, tuple[str | None, str]]) -> str:
    """A clause such as "did you mean 'lr'?" for an unknown name, by meaning first, by spelling second.

    known: the names that exist, all listed if nothing is near. table: a name of another library, in lower case with
        `_` -> the known name, None if there is none, and a remark on its unit or on what to do instead. Entries whose
        name is not known do not count.
    """
    plain = name.lower().replace("-", "_")
    table = {other: meant for other, meant in table.items() if meant[0] is None or meant[0] in known}
    if plain in table:
        target, remark = table[plain]
        return "; ".join(filter(None, [remark, f"did you mean {target!r}?" if target else ""]))
    near = difflib.get_close_matches(plain, [*known, *table], n=1, cutoff=SPELLING)
    if near and near[0] not in known:
        return suggest(near[0], known, table)
    return f"did you mean {near[0]!r}?" if near else f"the known names are {', '.join(known)}"


def require_fields(config: type[Any], names: Iterable[str], table: Mapping[str, tuple[str | None, str]]) -> None:
    """Raise ValueError for a name that is no field of a dataclass, with the field that is meant; table as `suggest`."""
    known = [field.name for field in dataclasses.fields(config)]
    for name in names:
        if name not in known:
            raise ValueError(f"{config.__name__} has no field {name!r}; {suggest(str(name), known, table)}")
