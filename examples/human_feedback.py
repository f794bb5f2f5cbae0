"""You are the human in reinforcement learning from human feedback: rank or score what a policy writes, by single keys.

At a terminal, or with --web in the browser, where several people work at once, by click or key.

    python examples/human_feedback.py                        # rank 3 samples a prompt; --scores: 1 to 5 for each
    python examples/reward_model.py --rankings runs/feedback.jsonl      # a reward model learns from the rankings
    python examples/human_feedback.py --train runs/mine      # your scores are the reward of PPO, 4 samples a step
    python examples/human_feedback.py --train runs/mine      # the same once more: continue where you stopped
    python examples/human_feedback.py --web                  # any of these in the browser (pip install -e '.[web]')

Keys: numbers, best first (or scores), u undo, s skip, q quit (of a page: Ctrl-C in its terminal). Every answer is on
the disk before the next question.
"""

import argparse
import codecs
import contextlib
import os
import select
import signal
import sys
import threading
import unicodedata
from pathlib import Path
from typing import Any

import torch

from minirlhf import PPOConfig, PPOTrainer, SamplingConfig, Tokenizer, load_decoder
from minirlhf.common.printing import show
from minirlhf.common.web_page import HOST, PORT, require_web
from minirlhf.rewards.human import FeedbackFile, HumanReward, ask_rounds, draw_answers
from minirlhf.rewards.human_page import PageReward, ask_rounds_on_page, feedback_page
from minirlhf.runs.run import Run
from shared import LOGGERS, POLICY, PROMPTS, command_line, prompt_pool, run_script


def main() -> None:
    args = command_line(
        __doc__,
        policy=(POLICY, "GPT-2 folder"),
        prompts=(PROMPTS, "texts to continue, or one file, .txt or .jsonl"),
        encoding=("utf-8", "of the file of prompts"),
        samples=(3, "answers a prompt, 2 to 4"),
        scores=(False, "ask for scores from 1 to 5, not for a ranking"),
        rounds=(20, "questions in all, or steps of PPO"),
        gen_len=(24, "tokens of a sample"),
        top_p=(0.95, "SamplingConfig.top_p"),
        seed=(0, "of everything"),
        output=("runs/feedback.jsonl", "file of the answers"),
        train=(str, "folder of a PPO run whose reward you are"),
        web=(False, "ask in the browser, several people at once"),
        host=(HOST, "where the page listens; 0.0.0.0 lets other machines in"),
        port=(PORT, "of the page"),
        loggers=LOGGERS,
        batch_size=(4, "samples a step of PPO"),
        lr=(2e-4, "of PPO"),
    ).parse_args()
    args.prompts = prompt_pool(args.prompts, args.policy, encoding=args.encoding)
    if args.web:  # before a model is loaded
        require_web(args.host, args.port)
    try:
        train(args) if args.train else collect(args)
    except KeyboardInterrupt:
        sys.exit("\nstopped; what you answered is saved, and the same command goes on from there")


def write(text: str) -> None:
    print(text, end="", flush=True)


def collect(args: argparse.Namespace) -> None:
    """Ask for rankings or scores of the policy's samples: the data of a reward model."""
    model, tokenizer = load_decoder(args.policy), Tokenizer.from_pretrained(args.policy)
    sampling = SamplingConfig(top_p=args.top_p)

    def question_of(number: int):
        generator = torch.Generator().manual_seed(1000 * args.seed + number)  # a round has the same samples each time
        prompt = args.prompts[number % len(args.prompts)]
        return draw_answers(model, tokenizer, prompt, args.samples, args.gen_len, sampling, generator)

    if not 2 <= args.samples <= 4 or args.rounds < 1:
        raise ValueError(f"--samples must be 2 to 4 and --rounds at least 1, got {args.samples} and {args.rounds}")
    room = model.config.n_positions - args.gen_len
    for prompt in args.prompts:  # before the first question
        if len(tokenizer.encode_prompt(prompt)) > room:
            raise ValueError(f"prompt {prompt[:20]!r}... leaves no room for --gen-len {args.gen_len}")
    with FeedbackFile(args.output) as file:
        if args.web:
            with feedback_page(file, args.host, args.port) as board:
                ask_rounds_on_page(board, question_of, args.rounds, args.scores)
            done = True
        else:
            with Keyboard() as keyboard:
                done = ask_rounds(file, question_of, args.rounds, keyboard.read, write, args.scores)
        total = len(file.records)
    show(f"{args.output} has {total} answers in all")
    show("more --rounds ask for more" if done else "the same command goes on from here")
    if total:
        show(f"stage 2 reads them: python examples/reward_model.py --rankings {args.output}")


def train(args: argparse.Namespace) -> None:
    """PPO with the person's score as the reward: a few samples a step, saved after each."""
    few = args.batch_size
    settings = dict(steps=args.rounds * few, batch_size=few, minibatch_size=few, forward_batch_size=few, save_freq=1,
                    gen_len=args.gen_len, top_p=args.top_p, lr=args.lr, seed=args.seed)  # fmt: skip
    if (Path(args.train) / "config.json").exists():
        run = Run.resume(args.train, **settings)
    else:
        policy, tokenizer = load_decoder(args.policy), Tokenizer.from_pretrained(args.policy)
        trainer = PPOTrainer(policy, args.policy, tokenizer, PPOConfig(**settings))
        trainer.check_prompts(args.prompts)
        run = Run.start(args.train, trainer, {"arguments": vars(args)}, loggers=args.loggers)
    with run, FeedbackFile(run.folder / "scores.jsonl") as file, contextlib.ExitStack() as asking:
        trainer = run.trainer
        if args.web:
            reward: HumanReward = PageReward(asking.enter_context(feedback_page(file, args.host, args.port)))
        else:
            reward = HumanReward(file, asking.enter_context(Keyboard()).read, write)

        def on_step(rollout, stats) -> None:
            run.record(rollout, stats)
            reward, kl = stats["reward/mean"], stats["objective/kl"]
            show(f"step {trainer.iteration} of {trainer.config.iterations}: mean reward {reward:.2f}, KL {kl:.2f}")

        trainer.train(args.prompts, reward, on_step)
        trainer.save_pretrained(run.folder / "policy")
    show(f"saved in {run.folder / 'policy'}")


# ---- keys -----------------------------------------------------------------------------------------------------------

ESCAPE = "\x1b"
PATIENCE = 0.05  # seconds in which the rest of an arrow key arrives


class Keyboard:
    """Reads the keys of a terminal, or the characters of a pipe or a file; used in a `with`.

    Inside the `with`, a terminal neither waits for Enter nor shows what is typed, and Ctrl-C raises KeyboardInterrupt
    at once, whatever it did outside. On systems without termios (Windows) Enter ends each line.

    file: with a file descriptor; None: standard input.
    """

    def __init__(self, file: Any = None):
        self._fd = (sys.stdin if file is None else file).fileno()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._modes: list[Any] | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def read(self) -> str:
        """The next key, in lower case and half width (an input method may be on); "" at the end of the input.

        A key that sends several characters, such as an arrow, gives the first one: "\\x1b".
        """
        key = ""
        while not key:
            if not (byte := self._byte()):
                return ""
            key = self._decoder.decode(byte)
        if key == ESCAPE and self._modes is not None:
            self._skip_sequence()
        return unicodedata.normalize("NFKC", key).lower()

    def __enter__(self) -> "Keyboard":
        try:
            import termios
            import tty
        except ImportError:  # not POSIX
            return self
        if os.isatty(self._fd):
            self._modes = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
            if threading.current_thread() is threading.main_thread():
                self._handlers[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
                # After Ctrl-Z the shell has set the terminal to its own modes.
                self._handlers[signal.SIGCONT] = signal.signal(signal.SIGCONT, lambda *_: tty.setcbreak(self._fd))
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if self._modes is not None:
            import termios

            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._modes)

    def _skip_sequence(self) -> None:
        """Read what follows an escape: "[A" for an arrow (ECMA-48, section 5.4), the key itself for Alt with a key."""

        def next_byte() -> bytes:
            return self._byte() if select.select([self._fd], [], [], PATIENCE)[0] else b""

        if next_byte() in (b"[", b"O"):
            while (byte := next_byte()) and not 0x40 <= byte[0] <= 0x7E:
                pass

    def _byte(self) -> bytes:
        try:
            return os.read(self._fd, 1)
        except OSError:  # the terminal is gone
            return b""


if __name__ == "__main__":
    run_script(main, again="--train")
