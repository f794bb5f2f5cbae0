"""Processes that tests may kill: forked from a server that has imported everything, so that a start costs little."""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from conftest import VOCAB, FewSamples, make_gpt2
from minirlhf import ActorCritic, PPOTrainer, Tokenizer
from minirlhf.evaluation import evaluate, results
from minirlhf.runs.locks import FolderLock
from minirlhf.runs.run import Run

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    # torch imports its compiler when the first optimizer is made.
    ["minirlhf.runs.run", "minirlhf.evaluation.evaluate", "torch._dynamo", "pytest", "tqdm", "matplotlib.figure"]
)
PROMPTS = ["酒店很好", "w", "房间干净", "早餐"]
STEPS = 6
SETTINGS = dict(
    steps=4 * STEPS, batch_size=4, minibatch_size=2, forward_batch_size=2, gen_len=4, ppo_epochs=1, lr=1e-2,
    save_freq=2, device="cpu", lr_schedule="linear",
)  # fmt: skip
SIZES = dict(n_embd=8, n_layer=1, n_head=2, n_positions=32)

# ---- a tiny run -----------------------------------------------------------------------------------------------------


def reward(texts):
    return [len(set(text)) / 8 for text in texts]


def reference():
    """It comes from no folder, so it must be handed to `resume` as well."""
    return make_gpt2(1, **SIZES)


def new_trainer(**settings) -> PPOTrainer:
    return PPOTrainer(ActorCritic(make_gpt2(0, **SIZES)), reference(), Tokenizer(VOCAB), **{**SETTINGS, **settings})


def go_on(folder: Path, **settings) -> Run:
    """The run in this folder: begun, or resumed if it was begun before."""
    if (folder / "config.json").exists():
        return Run.resume(folder, reference())
    return Run.start(folder, new_trainer(**settings), {})


# ---- what a process does --------------------------------------------------------------------------------------------


def live(folder: Path, mention: str = "", number: int = 0, count: Path | None = None, **settings) -> None:
    """Begin or resume the run and bring it to its end; `mention` and `number` as of `die_before`.

    count: a file for how many file operations there were.
    """
    done = die_before(folder, mention, number)
    with go_on(folder, **settings) as run:
        run.trainer.train(PROMPTS, reward, run.record)
    if count is not None:
        count.write_text(str(done()))


def hang(folder: Path, output: Path) -> None:
    """A run whose reward never returns; `output` gets what it prints."""
    _print_to(output)

    def reward(texts):
        print("hanging", flush=True)
        time.sleep(600)

    with go_on(folder) as run:
        run.trainer.train(PROMPTS, reward, run.record)


def hold_lock(folder: Path, ready: Path) -> None:
    """Hold the lock of a folder until killed."""
    lock = FolderLock(folder)
    ready.touch()
    time.sleep(600)
    lock.release()


def script(output: Path, folder: Path, mention: str, number: int, path: Path, *arguments: str) -> None:
    """Run a script as a program; `output` gets what it prints, `folder` to `number` as of `die_before`."""
    _print_to(output)
    sys.argv = [str(path), *map(str, arguments)]
    sys.path.insert(0, str(path.parent))
    evaluate.EvaluationConfig = results.EvaluationConfig = FewSamples
    die_before(folder, mention, number)
    runpy.run_path(str(path), run_name="__main__")


def die_before(folder: Path, mention: str, number: int) -> Callable[[], int]:
    """From now on this process kills itself before a file operation in a folder, as a crash would.

    Of the operations that mention a text it is the one of this number; 0: none. Returns how many there were so far.
    """
    seen = 0

    def look(event: str, arguments: Any) -> None:
        nonlocal seen
        if event.startswith(("open", "os.", "shutil.")):
            operation = f"{event} {arguments}"
            if str(folder) in operation and mention in operation:
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    return lambda: seen


# ---- processes ------------------------------------------------------------------------------------------------------


def process(target: Callable[..., None], *arguments: Any, **named: Any) -> Any:
    """A started process. After `join` its `exitcode` is -9 if it was killed."""
    started = context.Process(target=_one_thread, args=(target, arguments, named), daemon=True)
    started.start()
    return started


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Wait until something is true, and return it."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return value


def _one_thread(target: Callable[..., None], arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    target(*arguments, **named)


def _print_to(output: Path) -> None:
    with open(output, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def on_terminal(name: str, path: Path, *arguments: str) -> None:
    """Run a script as a program whose terminal has this name."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)  # the first one that is opened is the controlling one: Ctrl-C comes from it
    for number in (0, 1, 2):
        os.dup2(terminal, number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  (as long as the process lives)
    sys.argv = [str(path), *map(str, arguments)]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")
