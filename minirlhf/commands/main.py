"""The entrance of the command line: `python -m minirlhf COMMAND ...`; without a command it prints help.

Exit codes: 0 done, 1 a failure (one line `error: ...` on stderr), 2 a command line that cannot be understood, 130
stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from minirlhf.commands import models, runs  # noqa: F401  (they enter their commands)
from minirlhf.commands.table import COMMANDS
from minirlhf.common.printing import error_line, show


def build_parser() -> argparse.ArgumentParser:
    """The parser of all COMMANDS."""
    parser = argparse.ArgumentParser(
        "python -m minirlhf", description="PPO-RLHF for language models.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, entry in COMMANDS.items():
        described = entry.run.__doc__
        sub = commands.add_parser(name, help=described, description=described, allow_abbrev=False)
        for names, options in entry.arguments:
            sub.add_argument(*names, **options)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, without the program's name; None: that of this process. Returns the exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # of another encoding: an escape is better than a crash
            stream.reconfigure(errors="backslashreplace")
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        code = COMMANDS[arguments.command].run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would complain
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        show(error_line(error), sys.stderr)
        return 1
    else:
        return code or 0
    return 0
