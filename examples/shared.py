"""What the examples share: the starter weights, the command line, and output that no text can steer."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minirlhf.common.printing import error_line
from minirlhf.common.text import printable
from minirlhf.device.launch import tells
from minirlhf.device.processes import processes
from minirlhf.io.files import read_json
from minirlhf.io.starter import starter
from minirlhf.rl.presets import STARTER as STARTER
from minirlhf.runs.run import RunFailed, Stopped
from minirlhf.text.language import warn_of_language
from minirlhf.text.prompts import Prompt, read_pool

WEIGHTS = starter()
POLICY, REWARD, SECOND_SCORER = WEIGHTS.policy, WEIGHTS.reward, WEIGHTS.second_scorer
PROMPTS = list(WEIGHTS.prompts)
LOGGERS = (["jsonl"], "of the curves: jsonl, tensorboard, wandb, swanlab, trackio")  # the option --loggers


def command_line(description: str, **options: tuple[Any, str]) -> argparse.ArgumentParser:
    """A parser with these options, each given as name=(default, help).

    The default decides what an option takes: a value of its type, several for a list, none for False. A type in its
    place: a value of that type, None if it is not given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, meaning) in options.items():
        if default is False:
            kind: dict[str, Any] = dict(action="store_true")
        elif isinstance(default, type):
            kind = dict(type=default)
        elif isinstance(default, list):
            kind = dict(type=type(default[0]), default=default, nargs="+")
        else:
            kind = dict(type=type(default), default=default)
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{meaning} (default %(default)s)", **kind)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; for `--resume RUN` those that the run was started with, and no others may be given."""
    args = parser.parse_args()
    if args.resume is None:
        return args
    started = read_json(Path(args.resume) / "config.json").get("arguments")
    if not isinstance(started, dict) or started.keys() != vars(args).keys():
        raise ValueError(f"{args.resume} is no run of this script")
    if given := [name for name, value in vars(args).items() if name != "resume" and value != parser.get_default(name)]:
        raise ValueError(f"a resumed run keeps its settings, so drop {', '.join(given)}")
    return argparse.Namespace(**{**started, "resume": args.resume})


def new_folder(prefix: str = "") -> str:
    """The default of --output: a folder named by the time."""
    return processes().broadcast("the time", f"runs/{prefix}{time.strftime('%Y%m%d-%H%M%S')}")


def prompt_pool(prompts: list[str], *models: str, encoding: str = "utf-8") -> list[Prompt]:
    """The pool of prompts, those of a file if the only one names a file; see `warn_of_language` for the models."""
    pool = read_pool(prompts, encoding)
    warn_of_language([str(prompt) for prompt in pool], *models)
    return pool


def run_script(main: Callable[[], object], again: str = "--resume") -> None:
    """Run a script's `main`. Bad input, a stopped run and a failed run end it with one line and no traceback.

    Of several processes the first one shows progress, and one of them an error that all have.
    again: the option that continues a run.
    """
    if not processes().first:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (as long as the process lives)
    try:
        main()
    except (Stopped, RunFailed) as end:  # by Ctrl-C or SIGTERM; by a full disk, a reward that raises, ...
        command = shlex.join([sys.argv[0], again, str(end.folder)])
        told = printable(f"{' '.join(str(end).split())}; to go on: python {command}")
        print(told) if isinstance(end, Stopped) else _end(end, f"error: {told}")
    except (ValueError, OSError, ImportError) as error:
        _end(error, error_line(error))


def _end(error: Exception, line: str) -> None:
    """End the process with an error, which one of several processes tells."""
    if not tells(error):
        sys.exit(1)
    if not processes().first:
        sys.stderr = sys.__stderr__
    sys.exit(line)
