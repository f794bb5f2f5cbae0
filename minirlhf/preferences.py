"""Ranked answers, the data of stage 2 of InstructGPT (Ouyang et al. 2022): read, checked, and split.

Two formats, told apart by the name of the file:

- `.jsonl`, a pair a line: `{"prompt": ..., "chosen": ..., "rejected": ...}`, and perhaps `"margin"`; other keys are
  the owner's own and not read.
- `.tsv`, a list a line, the best answer first, columns separated by tabs, without quotes or escapes. The first column
  is the prompt if the first line is a header that begins with "prompt", or if the caller says so; otherwise there is
  no prompt, and every column is an answer.

Left out: ties. Two answers that nobody can tell apart belong into different lines.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_ANSWERS = 9  # K = 4 to 9 in InstructGPT, section 3.5
PAIR_KEYS = ("prompt", "chosen", "rejected")
SPLITS = ("prompt", "answers")


@dataclass(frozen=True)
class Ranking:
    """The answers to one prompt, best first.

    prompt: "" if there is none. answers: 2 to 9 different texts that are not blank.
    margin: the least difference of reward that is asked of each pair, for answers that differ much.
    Raises ValueError for a bad field.
    """

    prompt: str
    answers: tuple[str, ...]
    margin: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt must be a text, got a {type(self.prompt).__name__}")
        if not isinstance(self.answers, (list, tuple)):
            raise ValueError(f"answers must be a tuple of texts, got a {type(self.answers).__name__}")
        if not 2 <= len(self.answers) <= MAX_ANSWERS:
            raise ValueError(f"a ranking has 2 to {MAX_ANSWERS} answers, got {len(self.answers)}")
        object.__setattr__(self, "answers", tuple(self.answers))
        places: dict[str, int] = {}
        for place, answer in enumerate(self.answers, 1):
            if not isinstance(answer, str):
                raise ValueError(f"answer {place} must be a text, got a {type(answer).__name__}")
            if not answer.strip():
                raise ValueError(f"answer {place} is empty")
            if places.setdefault(answer.strip(), place) != place:
                raise ValueError(f"answers {places[answer.strip()]} and {place} are equal: {answer.strip()[:20]!r}")
        fine = isinstance(self.margin, (int, float)) and not isinstance(self.margin, bool)
        if not (fine and 0 <= self.margin <= sys.float_info.max):  # an int may be larger
            raise ValueError(f"margin must be a finite number of at least 0, got {self.margin!r:.20}")

    @property
    def texts(self) -> list[str]:
        """What a reward model reads, best first: the prompt with each answer behind it."""
        return [self.prompt + answer for answer in self.answers]


def read_rankings(
    path: str | os.PathLike[str], encoding: str = "utf-8", prompt_column: bool | None = None
) -> list[Ranking]:
    """Read a file of pairs (`.jsonl`) or of lists (`.tsv`); empty lines are passed over.

    encoding: of the file; a byte-order mark is accepted, and so are both kinds of line ends.
    prompt_column: whether the first column of a `.tsv` file is the prompt; None: if a header says so.
    Warns with a count if pairs stand there in both orders: people disagree, and a reward model can live with it.
    Raises FileNotFoundError, or ValueError that names file and line and what is wrong there.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".tsv"):
        raise ValueError(f"{path} must be named .jsonl (pairs) or .tsv (lists)")
    if kind == ".jsonl" and prompt_column is not None:
        raise ValueError(f"prompt_column is for .tsv files; the lines of {path} name their prompt")
    lines = _numbered_lines(path, encoding)
    header = kind == ".tsv" and prompt_column is not False and bool(lines) and _is_header(lines[0][1])
    rankings, numbers = [], []
    for number, line in lines[1:] if header else lines:
        try:
            rankings.append(_pair(line) if kind == ".jsonl" else _list(line, header or bool(prompt_column)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        numbers.append(number)
    if not rankings:
        raise ValueError(f"{path} holds no rankings")
    disputed = contradictions(rankings)
    if disputed:
        first, second = (numbers[i] for i in disputed[0])
        warnings.warn(
            f"{path}: {len(disputed)} pairs of answers are ranked in both orders, the first in lines {first} and "
            f"{second}",
            stacklevel=2,
        )
    return rankings


def contradictions(rankings: Sequence[Ranking]) -> list[tuple[int, int]]:
    """Where rankings disagree: for each pair of answers in both orders, the first ranking with each order."""
    first: dict[tuple[str, str, str], int] = {}
    found: dict[tuple[str, str, str], tuple[int, int]] = {}
    for i, ranking in enumerate(rankings):
        for better, worse in itertools.combinations([answer.strip() for answer in ranking.answers], 2):
            first.setdefault((ranking.prompt, better, worse), i)
            opposite = first.get((ranking.prompt, worse, better))
            if opposite is not None:
                found.setdefault((ranking.prompt, min(better, worse), max(better, worse)), (opposite, i))
    return list(found.values())


def split_rankings(
    rankings: Sequence[Ranking], share: float = 0.1, by: str = "prompt"
) -> tuple[list[Ranking], list[Ranking]]:
    """Hold out a share of the rankings: (train, held_out), in the order given, by SHA-256 and no random seed.

    by: "prompt", all rankings of a prompt fall on one side, so that held-out prompts are new ones; or "answers", all
        rankings of the same answers do, whatever their order: for few prompts that will be used again, and for
        rankings without a prompt in any case.
    Raises ValueError for a share outside (0, 1), an unknown `by`, or a side that stays empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share!r}")
    if by not in SPLITS:
        raise ValueError(f"by must be one of {', '.join(SPLITS)}, got {by!r}")

    def key(ranking: Ranking) -> str:
        if by == "prompt" and ranking.prompt:
            return ranking.prompt
        return "\0".join([ranking.prompt, *sorted(ranking.answers)])

    train: list[Ranking] = []
    held_out: list[Ranking] = []
    for ranking in rankings:
        (held_out if _fraction(key(ranking)) < share else train).append(ranking)
    if not train or not held_out:
        groups = len({key(ranking) for ranking in rankings})
        raise ValueError(
            f"with share={share:g} the hash leaves {len(train)} rankings to train on and {len(held_out)} held out, "
            f"in {groups} groups by {by}; give more data, or another share or by"
        )
    return train, held_out


def _numbered_lines(path: Path, encoding: str) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers from 1."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    raw = path.read_bytes()
    try:
        text = raw.decode(encoding)
    except UnicodeError as error:
        number = raw[: getattr(error, "start", 0)].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {number} is not {encoding} ({error}); name the file's encoding by encoding= or --encoding, "
            "for instance gbk"
        ) from error
    except (LookupError, ValueError) as error:
        raise ValueError(f"encoding must be the name of a text encoding, got {encoding!r}") from error
    # str.splitlines would also split at separators that may stand within an answer, such as U+2028.
    lines = enumerate(text.removeprefix("\ufeff").split("\n"), 1)
    return [(number, line.removesuffix("\r")) for number, line in lines if line.strip(" \r")]


def _is_header(line: str) -> bool:
    return line.split("\t")[0].strip().lower() == "prompt"


def _pair(line: str) -> Ranking:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got a {type(content).__name__}")
    missing = [key for key in PAIR_KEYS if key not in content]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; a pair has {', '.join(PAIR_KEYS)} and perhaps margin")
    for key in PAIR_KEYS:
        if not isinstance(content[key], str):
            raise ValueError(f"{key} must be a text, got a {type(content[key]).__name__}")
    return Ranking(content["prompt"], (content["chosen"], content["rejected"]), content.get("margin", 0.0))


def _list(line: str, with_prompt: bool) -> Ranking:
    columns = line.split("\t")
    return Ranking(columns[0], tuple(columns[1:])) if with_prompt else Ranking("", tuple(columns))


def _fraction(text: str) -> float:
    """A text to [0, 1) by SHA-256; a JSON file may hold lone surrogates, which have no UTF-8."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48
