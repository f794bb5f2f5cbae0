"""Checks of config fields: each raises one ValueError with the field, the value and what is allowed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection


def require(config: object, name: str, fine: bool, allowed: str) -> None:
    """Raise ValueError for a field of a config unless it is fine."""
    if not fine:
        raise ValueError(f"{type(config).__name__}.{name} must be {allowed}, got {getattr(config, name)!r}")


def plain_numbers(config: object) -> None:
    """Replace numpy's scalars among the fields of a frozen dataclass by Python's numbers."""
    for name, value in vars(config).items():
        if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
            object.__setattr__(config, name, value.item())


def require_positive_ints(config: object, *names: str) -> None:
    """Every named field is an int of at least 1 and below 2**63."""
    for name in names:
        value = getattr(config, name)
        require(config, name, type(value) is int and 1 <= value < 2**63, "an integer of at least 1")


def require_counts(config: object, *names: str) -> None:
    """Every named field is an int of at least 0."""
    for name in names:
        value = getattr(config, name)
        require(config, name, type(value) is int and value >= 0, "an integer of at least 0")


def require_token_ids(config: object, name: str) -> None:
    """The named field is None, a token id or several; a list of ids becomes a tuple."""
    value = getattr(config, name)
    if isinstance(value, list):
        object.__setattr__(config, name, tuple(value))
    several = isinstance(value, (list, tuple)) and len(value) > 0
    fine = all(type(i) is int and i >= 0 for i in (value if several else [value]))
    require(config, name, value is None or fine, "an id of at least 0, or a tuple of ids")


def require_bools(config: object, *names: str) -> None:
    """Every named field is True or False."""
    for name in names:
        require(config, name, type(getattr(config, name)) is bool, "True or False")


def require_positive(config: object, *names: str) -> None:
    """Every named field is a number above 0; inf is allowed."""
    _require_numbers(config, names, lambda x: x > 0, "a number above 0")


def require_non_negative(config: object, *names: str) -> None:
    """Every named field is a finite number of at least 0."""
    _require_numbers(config, names, lambda x: 0 <= x < math.inf, "a finite number of at least 0")


def require_finite(config: object, *names: str) -> None:
    """Every named field is a finite number."""
    _require_numbers(config, names, math.isfinite, "a finite number")


def require_above(config: object, bound: float, *names: str) -> None:
    """Every named field is a finite number above the bound."""
    _require_numbers(config, names, lambda x: bound < x < math.inf, f"a finite number above {bound:g}")


def require_fraction(config: object, *names: str) -> None:
    """Every named field is a number between 0 and 1, both excluded."""
    _require_numbers(config, names, lambda x: 0 < x < 1, "a number between 0 and 1")


def require_unit_interval(config: object, *names: str) -> None:
    """Every named field is a number in [0, 1]."""
    _require_numbers(config, names, lambda x: 0 <= x <= 1, "a number in [0, 1]")


def require_rates(config: object, *names: str) -> None:
    """Every named field is a number in [0, 1): dropout and masking rates."""
    _require_numbers(config, names, lambda x: 0 <= x < 1, "a number in [0, 1)")


def require_one_of(config: object, name: str, choices: Collection[str]) -> None:
    """The named field is one of the choices."""
    value = getattr(config, name)
    require(config, name, isinstance(value, str) and value in choices, f"one of {', '.join(choices)}")


def _require_numbers(config: object, names: Collection[str], fine: Callable[[float], bool], allowed: str) -> None:
    for name in names:
        value = getattr(config, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_number = is_number and (isinstance(value, float) or abs(value) <= sys.float_info.max)  # or no float holds it
        require(config, name, is_number and fine(value), allowed)
