"""The known name that is meant by an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

SPELLING = 0.8  # the ratio of difflib above which two names differ by a slip of the finger


def suggest(name: str, known: Collection[str], table: Mapping[str, tuple[str | None, str]]) -> str:
    """A clause such as "did you mean 'lr'?" for an unknown name, by meaning first, by spelling second.

    known: the names that exist, all listed if nothing is near. table: a name of another library, in lower case with
        `_` -> the known name, None if there is none, and a remark on its unit or on what to do instead.
    """
    plain = name.lower().replace("-", "_")
    if plain in table:
        target, remark = table[plain]
        return "; ".join(filter(None, [remark, f"did you mean {target!r}?" if target else ""]))
    near = difflib.get_close_matches(plain, [*known, *table], n=1, cutoff=SPELLING)
    if near and near[0] not in known:
        return suggest(near[0], known, table)
    return f"did you mean {near[0]!r}?" if near else f"the known names are {', '.join(known)}"
