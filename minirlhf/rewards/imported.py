"""A reward of the user's own, named on the command line as `module:function`."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import traceback

from minirlhf.rewards.base import RewardFunction

NAME = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*:[A-Za-z_]\w*(?:\.\w+)*", re.ASCII)


def is_import(text: object) -> bool:
    """Whether a text is `module:function`, and not a folder."""
    return isinstance(text, str) and bool(NAME.fullmatch(text)) and not os.path.isdir(text)


def imported_reward(name: str) -> RewardFunction:
    """The callable `module:function`; modules in the current folder are found as well.

    Raises ValueError, one line that names the module, if there is none, if it raises when it is imported, or if it has
    no such function.
    """
    module_name, _, path = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # code of strangers may raise anything
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (module_name == missing or module_name.startswith(f"{missing}.")):
            raise ValueError(f"reward {name}: there is no module {missing!r} here or among installed ones") from None
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
        where = f"line {place.lineno} of {os.path.basename(place.filename)}"
        if isinstance(error, SyntaxError):
            where = f"line {error.lineno} of {os.path.basename(error.filename or '')}"
        raise ValueError(f"reward {name}: importing {module_name} raised {what} ({where})") from error
    for part in path.split("."):
        if not hasattr(found, part):
            callables = [each for each, value in vars(found).items() if callable(value) and not each.startswith("_")]
            near = difflib.get_close_matches(part, callables, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(callables[:20]) or 'no functions'}"
            raise ValueError(f"reward {name}: {module_name} has no {part!r}; {meant}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"reward {name} must be a function, got a {type(found).__name__}")
    return found
