"""The table of commands, and the arguments that several of them share.

A command is a function of its parsed arguments, entered in COMMANDS with them, under its name with - for _. Its help is
its docstring. It returns the exit code (None: 0).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

Run = Callable[[argparse.Namespace], int | None]
Argument = tuple[tuple[str, ...], dict[str, Any]]  # as `ArgumentParser.add_argument` takes it


class Command(NamedTuple):
    """A function and its arguments. flags: further arguments, made from the fields of configs."""

    run: Run
    arguments: tuple[Argument, ...]
    flags: tuple[Argument, ...] = ()


COMMANDS: dict[str, Command] = {}


def command(*arguments: Argument, flags: Iterable[Argument] = ()) -> Callable[[Run], Run]:
    """Enter a function in COMMANDS under its name."""

    def enter(function: Run) -> Run:
        COMMANDS[function.__name__.replace("_", "-")] = Command(function, arguments, tuple(flags))
        return function

    return enter


def argument(*names: str, **options: Any) -> Argument:
    """An Argument, written as a call of `add_argument`."""
    return names, options


def integer(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """The type of an argument that is an integer in [low, high]."""

    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {low}, got {text}")
        return value

    parse.__name__ = "integer"  # argparse: "invalid integer value"
    return parse


def visible(text: str) -> str:
    """The type of an argument that is a text with something in it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must hold at least one visible character")
    return text


AS_JSON = argument("--json", dest="as_json", action="store_true", help="one JSON object a line")
DEVICE = argument("--device", default="auto", help="auto, cpu or cuda[:index]; default %(default)s")
EOS = argument("--eos", action="store_true", help="stop at the token that ends a text")
SEED = argument("--seed", type=integer(0), default=0, metavar="N", help="of the sampling; default %(default)s")
REWARD = argument(
    "--reward",
    required=True,
    metavar="REWARD",
    help="folder of a sentiment classifier, reward model or n-gram scorer; or module:function",
)
