"""A chat with a model in the terminal."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from minirlhf.commands.table import DEVICE, SEED, argument, command, integer
from minirlhf.common.printing import show
from minirlhf.common.text import printable
from minirlhf.device.placement import resolve_device
from minirlhf.generation.sampling import SamplingConfig
from minirlhf.io.files import naming
from minirlhf.models.decoder import Decoder
from minirlhf.models.loading import load_decoder
from minirlhf.text.chat import ASSISTANT, Message
from minirlhf.text.tokenizer import Tokenizer

PROMPT = "> "


@command(
    argument("--model", required=True, metavar="FOLDER", help="folder of a language model with a chat template"),
    argument("--system", metavar="TEXT", help="the system message; default: as the template says"),
    argument("--gen-len", type=integer(1), default=256, metavar="N", help="tokens of an answer; default %(default)s"),
    argument("--top-p", type=float, default=0.95, metavar="P", help="nucleus; 1: all; default %(default)s"),
    argument("--top-k", type=integer(0), default=0, metavar="K", help="most probable tokens; 0: all, the default"),
    argument("--temperature", type=float, default=0.7, metavar="T", help="divides the logits; default %(default)s"),
    SEED,
    DEVICE,
)
def chat(args: argparse.Namespace) -> None:
    """Talk with a model: it streams its answers and remembers the turns; Ctrl-C ends an answer, Ctrl-D the chat."""
    sampling, where = SamplingConfig(args.temperature, args.top_k, args.top_p), resolve_device(args.device)
    tokenizer, model = Tokenizer.from_pretrained(args.model), load_decoder(args.model).to(where)
    told: list[Message] = [] if args.system is None else [{"role": "system", "content": args.system}]
    with naming(args.model):
        model.fit_vocabulary(len(tokenizer))
        tokenizer.chat([*told, {"role": "user", "content": "hello"}])  # no template: an error before the first word
    history: list[Message] = []
    for number, line in enumerate(_lines()):
        history.append({"role": "user", "content": line})
        history = _fitting(tokenizer, told, history, model.n_positions - args.gen_len)
        drawn = (sampling.temperature, sampling.top_k, sampling.top_p, args.seed + number)
        answer = _answer(model, tokenizer, [*told, *history], args.gen_len, drawn)
        history.append({"role": ASSISTANT, "content": answer})


def _lines() -> Iterator[str]:
    """What the user says, line by line, without blank ones."""
    at_terminal = sys.stdin.isatty()
    while True:
        if at_terminal:
            try:
                line = input(PROMPT)
            except EOFError:
                return show()
        elif (line := sys.stdin.readline()) == "":
            return None
        if line.strip():
            yield line.rstrip("\n")


def _fitting(tokenizer: Tokenizer, told: list[Message], history: list[Message], room: int) -> list[Message]:
    """The newest turns of a chat whose tokens fit, from a turn of the user on; says so if others are forgotten.

    Raises ValueError if not even the last message fits.
    """
    kept = history
    while (length := len(tokenizer.chat([*told, *kept]))) > room:
        if len(kept) < 3:
            raise ValueError(f"the message has {length} tokens with its template, and there is room for {room}")
        kept = kept[2:]
    if len(kept) < len(history):
        show(f"(forgot the first {(len(history) - len(kept)) // 2} turns, which no longer fit)", sys.stderr)
    return kept


def _answer(model: Decoder, tokenizer: Tokenizer, messages: list[Message], gen_len: int, drawn: tuple[Any, ...]) -> str:
    """Stream the answer to a chat. Ctrl-C ends it after the token that is being computed; what was said counts."""
    said, (temperature, top_k, top_p, seed) = "", drawn
    with _Interrupt() as interrupt:
        pieces = model.stream(
            tokenizer.chat_prompt(messages), gen_len, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            tokenizer=tokenizer,
        )  # fmt: skip
        for piece in pieces:
            said += piece
            print("\n".join(map(printable, piece.split("\n"))), end="", flush=True)
            if interrupt.made:
                break
    show(" ..." if interrupt.made else "")
    return said


class _Interrupt:
    """Inside this context Ctrl-C sets `made` and does nothing else."""

    def __init__(self) -> None:
        self.made = False

    def __enter__(self) -> _Interrupt:
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():  # where alone Python sets handlers
            self._before = signal.signal(signal.SIGINT, self._make)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _make(self, number: int, frame: FrameType | None) -> None:
        self.made = True
