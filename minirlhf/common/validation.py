"""Checks of config fields: each raises one ValueError with the field, the value and what is allowed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

Config = TypeVar("Config")


def require(config: object, name: str, fine: bool, allowed: str) -> None:
    """Raise ValueError for a field of a config unless it is fine."""
    if not fine:
        raise ValueError(f"{type(config).__name__}.{name} must be {allowed}, got {getattr(config, name)!r:.200}")


def require_config(config: Any, kind: type[Config]) -> Config:
    """A config of this kind, its defaults for None. Raises ValueError for anything else, such as a dict."""
    if config is not None and not isinstance(config, kind):
        advice = f"of a dict it is {kind.__name__}(**config)"
        if not isinstance(config, Mapping):
            advice = "it comes after the models and the tokenizer, or by name, config=..."
        raise ValueError(f"config must be a {kind.__name__}, got a {type(config).__name__}: {advice}")
    return kind() if config is None else config


def plain_numbers(config: object) -> None:
    """Replace numpy's scalars among the fields of a frozen dataclass by Python's numbers."""
    for name, value in vars(config).items():
        if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
            object.__setattr__(config, name, value.item())


def require_token_ids(config: object, name: str) -> None:
    """The named field is None, a token id or several; a list of ids becomes a tuple, numpy's numbers Python's."""
    value = getattr(config, name)
    if isinstance(value, (list, tuple)):
        value = tuple(i.item() if type(i).__module__ == "numpy" else i for i in value)
        object.__setattr__(config, name, value)
    several = isinstance(value, tuple) and len(value) > 0
    fine = all(type(i) is int and i >= 0 for i in (value if several else [value]))
    require(config, name, value is None or fine, "an id of at least 0, or a tuple of ids")


def require_one_of(config: object, name: str, choices: Collection[str]) -> None:
    """The named field is one of the choices."""
    value = getattr(config, name)
    require(config, name, isinstance(value, str) and value in choices, f"one of {', '.join(choices)}")


def require_above(config: object, bound: float, *names: str) -> None:
    """Every named field is a finite number above the bound."""
    _numbers(lambda x: bound < x < math.inf, f"a finite number above {bound:g}")(config, *names)


def _values(fine: Callable[[Any], bool], allowed: str) -> Callable[..., None]:
    """A check `(config, *names)` that every named field is fine."""

    def check(config: object, *names: str) -> None:
        for name in names:
            require(config, name, fine(getattr(config, name)), allowed)

    return check


def _numbers(fine: Callable[[float], bool], allowed: str) -> Callable[..., None]:
    return _values(lambda x: (is_finite(x) or isinstance(x, float)) and fine(x), allowed)


def is_finite(x: object) -> bool:
    """Whether a value is a finite number that a float can hold, and not True or False."""
    return isinstance(x, (int, float)) and type(x) is not bool and abs(x) <= sys.float_info.max


require_bools = _values(lambda x: type(x) is bool, "True or False")
require_positive_ints = _values(lambda x: type(x) is int and 1 <= x < 2**63, "an integer of at least 1")
require_counts = _values(lambda x: type(x) is int and x >= 0, "an integer of at least 0")
require_finite = _values(is_finite, "a finite number")
require_positive = _numbers(lambda x: x > 0, "a number above 0")  # may be infinite
require_non_negative = _numbers(lambda x: 0 <= x < math.inf, "a finite number of at least 0")
require_fraction = _numbers(lambda x: 0 < x < 1, "a number between 0 and 1")
require_unit_interval = _numbers(lambda x: 0 <= x <= 1, "a number in [0, 1]")
require_rates = _numbers(lambda x: 0 <= x < 1, "a number in [0, 1)")
