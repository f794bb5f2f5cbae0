"""The entrance of the command line: `minirlhf COMMAND ...`; without a command it prints help.

Exit codes: 0 done, 1 a failure (one line `error: ...` on stderr), 2 a command line that cannot be understood, 130
stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence

from minirlhf.commands import chat, demo, models, runs, training  # noqa: F401  (they enter their commands)
from minirlhf.commands.fields import flags_meant
from minirlhf.commands.table import COMMANDS
from minirlhf.common.printing import error_line, show
from minirlhf.common.text import printable
from minirlhf.device.launch import started_together, tells
from minirlhf.device.processes import processes
from minirlhf.runs.run import RunFailed, Stopped
from minirlhf.version import __version__


def build_parser() -> argparse.ArgumentParser:
    """The parser of all COMMANDS."""
    wide = functools.partial(argparse.HelpFormatter, max_help_position=30)
    described = "PPO-RLHF for language models."
    parser = argparse.ArgumentParser("minirlhf", description=described, formatter_class=wide, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"minirlhf {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, entry in COMMANDS.items():
        about = entry.run.__doc__
        usage = f"minirlhf {name} [--OPTION VALUE ...]" if entry.flags else None
        sub = commands.add_parser(name, help=about, description=about, usage=usage, allow_abbrev=False)
        for names, options in entry.arguments:
            sub.add_argument(*names, **options)
        group = sub.add_argument_group("settings")
        for names, options in entry.flags:
            group.add_argument(*names, **options)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, without the program's name; None: that of this process. Returns the exit code."""
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        entry = COMMANDS.get(arguments.command)
        meant = flags_meant(unknown, [*entry.arguments, *entry.flags]) if entry else ""
        parser.error(printable(f"unrecognized arguments: {' '.join(unknown)}{f' ({meant})' if meant else ''}"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # of another encoding: an escape is better than a crash
            stream.reconfigure(errors="backslashreplace")
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        with warnings.catch_warnings(), _shown_once():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            code = COMMANDS[arguments.command].run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would complain
    except KeyboardInterrupt:
        return 130
    except (Stopped, RunFailed) as end:  # what was done is saved
        told = f"{' '.join(str(end).split())}; to go on: minirlhf resume {shlex.quote(str(end.folder))}"
        if tells(end):
            show(printable(told) if isinstance(end, Stopped) else error_line(told), sys.stderr)
        return 130 if isinstance(end, Stopped) else 1
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if tells(error):
            show(error_line(error), sys.stderr)
        return 1
    else:
        return code or 0
    return 0


@contextlib.contextmanager
def _shown_once() -> Iterator[None]:
    """Of several processes that torchrun started, let only the first one show what they do."""
    with contextlib.ExitStack() as quiet:
        if started_together() and not processes().first:
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def _show_warning(message: Warning | str, *where: object) -> None:
    """One line for those who use a program, without the place in its source."""
    show(f"warning: {' '.join(str(message).split())}", sys.stderr)
