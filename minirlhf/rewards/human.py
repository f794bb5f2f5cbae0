"""Human feedback by single keys: rankings and scores of samples, for a reward model or as the reward of PPO.

Each answer is on the disk before the next question is shown. `preferences.read_rankings` reads the file:

    {"round": 0, "prompt": ..., "answers": [best, ..., worst], "order": [2, 1, 3]}    order: the numbers as shown
    {"round": 1, "prompt": ..., "answers": [...], "scores": [4, 2, 5]}
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minirlhf.common.text import json_line, printable
from minirlhf.generation.generate import generate
from minirlhf.generation.sampling import SamplingConfig
from minirlhf.io.files import StrPath, atomic_write, flush_folder, lock_descriptor, open_for_writing, read_jsonl
from minirlhf.models.decoder import Decoder
from minirlhf.text.tokenizer import Tokenizer

MOST = 4  # answers per question
BACKSPACE = ("\x7f", "\b")
END = ("", "\x04")  # of the input: closed, or Ctrl-D
SCORES = range(1, 6)
BEGINNING = b'{"round": '  # of every line
TRIES = 8  # batches of samples that are searched for different answers


@dataclass(frozen=True)
class Question:
    """A prompt and 1 to 4 answers to it, in the order in which they are shown."""

    prompt: str
    answers: tuple[str, ...]


class FeedbackFile:
    """A file of answered questions, for one process at a time; used in a `with`.

    path: created if it does not exist. A last line that a crash cut short is removed. If the file system lacks locking,
        continues without a lock and warns.
    Raises BlockingIOError if another process uses the file, ValueError with the line for content that is no feedback,
    OSError if the file cannot be written or is a symbolic link.
    """

    def __init__(self, path: StrPath):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            self._open()
            stack.callback(self._file.close)
            self._repair()
            self.records: list[dict[str, Any]] = read_jsonl(self.path)
            for number, record in enumerate(self.records, 1):
                _check(record, f"{self.path}, line {number}")
            flush_folder(self.path.parent)
            stack.pop_all()

    def append(self, record: dict[str, Any]) -> None:
        """Append a line, durable when this returns. Raises OSError and leaves the file unchanged if it cannot."""
        size = os.fstat(self._fd).st_size
        try:
            rest = json_line(record).encode() + b"\n"
            while rest:  # a disk that is nearly full accepts a part
                rest = rest[os.write(self._fd, rest) :]
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, size)
            raise
        self.records.append(record)

    def undo(self, index: int = -1) -> dict[str, Any]:
        """Remove the last line, or another one, durably, and return it. All others stay, whatever happens meanwhile.

        Raises IndexError if there is no such line, OSError.
        """
        record = self.records[index]
        lines = self.path.read_bytes().splitlines(keepends=True)
        last = lines.pop(index)
        if len(lines) == index % (len(lines) + 1):
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - len(last))
            os.fsync(self._fd)
        else:
            self._file.close()
            try:
                atomic_write(self.path, *lines)
            finally:
                self._open()
        self.records.pop(index)
        return record

    def unanswered(self, number: int = 0) -> int:
        """The first round from this one on that has no record."""
        answered = {record["round"] for record in self.records}
        return next(each for each in itertools.count(number) if each not in answered)

    def __enter__(self) -> FeedbackFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _open(self) -> None:
        """Open and lock the file; another process may replace it at that moment, see `undo`."""
        while True:
            self._file = open_for_writing(self.path, "ab+")
            self._fd = self._file.fileno()
            try:
                lock_descriptor(self._fd)
            except BlockingIOError:
                self._file.close()
                raise BlockingIOError(f"{self.path} is in use by another process") from None
            except OSError as error:
                told = f"{self.path} cannot be locked, so a second process goes unnoticed: {error}"
                warnings.warn(told, stacklevel=3)
            if os.path.samestat(os.fstat(self._fd), self.path.stat()):
                return
            self._file.close()

    def _repair(self) -> None:
        """Complete or remove a last line without a line feed. Raises ValueError if no session can have begun it."""
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        rest = raw[whole:]
        if rest[: len(BEGINNING)] != BEGINNING[: len(rest)]:
            shown = printable(rest[:60].decode("utf-8", "replace"))
            raise ValueError(f"{self.path} does not end in a line of a feedback session: {shown}")
        try:
            json.loads(rest)
        except ValueError:
            os.ftruncate(self._fd, whole)
        else:
            os.write(self._fd, b"\n")


def ask_rounds(
    file: FeedbackFile,
    question_of: Callable[[int], Question],
    rounds: int,
    read: Callable[[], str],
    write: Callable[[str], object],
    scores: bool = False,
) -> bool:
    """Ask a person one question after another until the file has `rounds` rounds. Returns False if they quit before.

    Keys: the numbers of the answers, best first (the last one follows from the others), or a score from 1 to 5 for
    each answer in turn. Backspace removes a number, `u` removes the last answer (also of an earlier session) and goes
    back to it, `s` skips a question, `q` quits. A session asks the rounds that have no answer in the file.

    question_of: maps the number of a round (0, 1, ...) to its question. A round with fewer than two answers to rank,
        or none to score, is skipped.
    read: returns the next key, "" at the end of the input, as `Keyboard.read` in examples/human_feedback.py does.
    write: shows text. scores: ask for scores, not for a ranking.
    Raises OSError if an answer cannot be written, KeyboardInterrupt on Ctrl-C; earlier answers stay in the file.
    """
    number = 0
    again: Question | None = None
    while (number := file.unanswered(number)) < rounds:
        question, again = again or question_of(number), None
        if len(question.answers) < (1 if scores else 2):
            write(f"[{number + 1}/{rounds}] {printable(question.prompt)}: too few different answers\n")
            number += 1
            continue
        values = _ask(question, f"[{number + 1}/{rounds}]", not scores, read, write)
        if values == "quit":
            return False
        if values == "undo":
            if file.records:
                record = file.undo()
                number, again = record["round"], as_question(record)
            else:
                write("nothing to undo\n")
            continue
        if values != "skip":
            file.append(as_record(number, question, values, ranked=not scores))
        number += 1
    return True


class HumanReward:
    """A person's score of each sample as a reward for PPO, (score - 3) / 2: -1, -0.5, 0, 0.5 or 1.

    A text that already has a score in the file is not asked about again; a skipped text gets 0. `u` removes the last
    score of this batch. `q` raises KeyboardInterrupt: the scores stay in the file, and a resumed run draws the same
    samples again.

    file: receives the scores. read, write: see `ask_rounds`.
    """

    scope = "batch"  # one person

    def __init__(self, file: FeedbackFile, read: Callable[[], str], write: Callable[[str], object]):
        self.file, self._read, self._write = file, read, write

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Rewards of B responses, in the order given. Raises KeyboardInterrupt if the person quits, OSError."""
        known = {(r["prompt"], a): s for r in self.file.records if "scores" in r
                 for a, s in zip(r["answers"], r["scores"], strict=True)}  # fmt: skip
        texts = list(zip(prompts, responses, strict=True))
        asked = list(dict.fromkeys(text for text in texts if text not in known))
        given = self._ask([Question(prompt, (response,)) for prompt, response in asked])
        known |= {text: 3 if score is None else score for text, score in zip(asked, given, strict=True)}
        return [(known[text] - 3) / 2 for text in texts]

    def _ask(self, asked: Sequence[Question]) -> list[int | None]:
        """The scores of these texts; None: skipped."""
        given: list[int | None] = []
        while len(given) < len(asked):
            question = asked[len(given)]
            values = _ask(question, f"[{len(given) + 1}/{len(asked)}]", False, self._read, self._write)
            if values == "quit":
                raise KeyboardInterrupt("the person quit")
            if values == "undo":
                if not given:
                    self._write("nothing to undo in this batch\n")
                elif given.pop() is not None:
                    self.file.undo()
            elif values == "skip":
                given.append(None)
            else:
                self.file.append(as_record(len(self.file.records), question, values, ranked=False))
                given.append(values[0])
        return given


def draw_answers(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    count: int,
    gen_len: int,
    sampling: SamplingConfig | None = None,
    generator: torch.Generator | None = None,
) -> Question:
    """A question with `count` different answers that are not blank, or fewer if sampling finds no more.

    Raises ValueError for a count outside 1 to 4, and as `generate`.
    """
    if not 1 <= count <= MOST:
        raise ValueError(f"a question has 1 to {MOST} answers, got {count}")
    found: dict[str, str] = {}
    ids = tokenizer.encode_prompt(prompt)
    for _ in range(TRIES):
        drawn = generate(
            model, [ids] * count, gen_len, sampling,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_id, generator=generator,
        )  # fmt: skip
        for row in drawn.responses:
            answer = "".join(tokenizer.decode_response(ids, row))
            if answer.strip():
                found.setdefault(answer.strip(), answer)
        if len(found) >= count:
            break
    return Question(prompt, tuple(found.values())[:count])


def _ask(question: Question, title: str, ranked: bool, read: Callable[[], str], write: Callable[[str], object]) -> Any:
    """The numbers of the answers, best first, or their scores; or "undo", "skip" or "quit"."""
    count = len(question.answers)
    lines = [f"\n{title} {printable(question.prompt)}"]
    lines += [f"  {n}  {printable(answer) or '(empty)'}" for n, answer in enumerate(question.answers, 1)]
    turns = ", one for each" if count > 1 else ""
    wanted = f"keys 1 to {count}, best first" if ranked else f"1 (bad) to 5 (good){turns}"
    write("\n".join(lines) + f"\n{wanted}; u undo, s skip, q quit > ")
    typed: list[int] = []
    while len(typed) < count:
        key = read()
        if key in (*END, "q"):
            write("quit\n")
            return "quit"
        if key == "s":
            write("skipped\n")
            return "skip"
        if key == "u" and not typed:
            write("undo\n")
            return "undo"
        numbers = [n for n in range(1, count + 1) if n not in typed] if ranked else SCORES
        if (key == "u" or key in BACKSPACE) and typed:
            typed.pop()
            write("\b\b  \b\b")
        elif key.isdecimal() and int(key) in numbers:
            typed.append(int(key))
            write(f"{key} ")
            if ranked and len(typed) == count - 1:  # the last one follows from the others
                typed += [n for n in numbers if n not in typed]
                write(f"{typed[-1]} ")
    write("\n")
    return typed


def as_record(number: int, question: Question, values: Sequence[int], ranked: bool) -> dict[str, Any]:
    """The record of an answer."""
    head = {"round": number, "prompt": question.prompt}
    if ranked:
        return {**head, "answers": [question.answers[n - 1] for n in values], "order": list(values)}
    return {**head, "answers": list(question.answers), "scores": list(values)}


def as_question(record: dict[str, Any]) -> Question:
    """The question of a record, with its answers in the order in which they were shown."""
    answers = record["answers"]
    if "order" in record:
        answers = [answer for _, answer in sorted(zip(record["order"], answers, strict=True))]
    return Question(record["prompt"], tuple(answers))


def _check(record: dict[str, Any], where: str) -> None:
    """Raise ValueError for a record that no session wrote."""
    answers: Any = record.get("answers")
    values: Any = record.get("order", record.get("scores"))
    fine = (
        [type(record.get("round")), type(record.get("prompt")), type(answers), type(values)] == [int, str, list, list]
        and len(values) == len(answers)
        and all(type(answer) is str and type(value) is int for answer, value in zip(answers, values, strict=True))
        and ("order" not in record or sorted(values) == list(range(1, len(values) + 1)))
    )
    if not fine:
        raise ValueError(f"{where} is not of a feedback session: {printable(json.dumps(record)[:60])}")
