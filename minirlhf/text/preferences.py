"""Ranked answers, the data of stage 2 of InstructGPT (Ouyang et al. 2022): read, checked, and split.

- `.jsonl`, a pair a line: `{"prompt": ..., "chosen": ..., "rejected": ...}`, and perhaps `"margin"`; other keys are
  ignored. Or a list a line: `{"prompt": ..., "answers": [...]}`, best first, or with as many `"scores"`; answers with
  equal scores are not compared.
- `.tsv`, a list a line, the best answer first, columns separated by tabs, without quotes or escapes. The first column
  is the prompt if the first line is a header that begins with "prompt".

Left out: ties.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minirlhf.common.validation import is_finite
from minirlhf.io.files import StrPath
from minirlhf.text.text_files import json_object, numbered_lines, parsed, split_by_hash, text_of

MAX_ANSWERS = 9  # K = 4 to 9 in InstructGPT, section 3.5
MAX_SCORED = 64  # scored answers to one prompt: at most 2,016 pairs
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
        if not (is_finite(self.margin) and self.margin >= 0):
            raise ValueError(f"margin must be a finite number of at least 0, got {self.margin!r:.20}")

    @property
    def texts(self) -> list[str]:
        """What a reward model reads, best first: the prompt with each answer behind it."""
        return [self.prompt + answer for answer in self.answers]


def read_rankings(path: StrPath, encoding: str = "utf-8") -> list[Ranking]:
    """Read a file of pairs or lists (`.jsonl`), or of lists (`.tsv`); empty lines are skipped.

    encoding: of the file; a byte-order mark and both kinds of line ends are accepted.
    Raises FileNotFoundError, or ValueError that names file, line and problem.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".tsv"):
        raise ValueError(f"{path} must be named .jsonl (pairs) or .tsv (lists)")
    lines = numbered_lines(path, encoding)
    header = kind == ".tsv" and bool(lines) and lines[0][1].split("\t")[0].strip().lower() == "prompt"
    if kind == ".jsonl":
        return parsed(path, lines, _json_rankings, "rankings")
    return parsed(path, lines[1:] if header else lines, lambda line: [_list(line, header)], "rankings")


def pair_ranking(content: Mapping[str, Any]) -> Ranking:
    """The ranking of a pair with the fields prompt, chosen, rejected, and perhaps margin; ValueError for a bad one."""
    missing = [key for key in PAIR_KEYS if key not in content]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; a pair has {', '.join(PAIR_KEYS)} and perhaps margin")
    prompt, chosen, rejected = (text_of(content, key) for key in PAIR_KEYS)
    return Ranking(prompt, (chosen, rejected), content.get("margin", 0.0))


def rankings_of_scores(
    prompt: str, answers: Sequence[str], scores: Sequence[float], margin: float = 0.0
) -> list[Ranking]:
    """What scores of the answers to one prompt say of their order.

    Up to 9 answers whose scores all differ make one ranking; otherwise each pair whose scores differ makes one.
    Raises ValueError for more than 64 answers (their pairs grow with the square), and other bad answers or scores.
    """
    for name, value in (("answers", answers), ("scores", scores)):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} must be a list, got a {type(value).__name__}")
    if len(answers) > MAX_SCORED:
        raise ValueError(f"a prompt has at most {MAX_SCORED} scored answers, got {len(answers)}")
    if len(answers) != len(scores) or len(answers) == 0:
        raise ValueError(f"there are {len(answers)} answers, but {len(scores)} scores")
    for score in scores:
        if not is_finite(score):
            raise ValueError(f"a score must be a finite number, got {score!r:.20}")
    order = sorted(range(len(answers)), key=lambda i: -scores[i])
    if 2 <= len(set(scores)) == len(scores) <= MAX_ANSWERS:
        return [Ranking(prompt, tuple(answers[i] for i in order), margin)]
    pairs = itertools.combinations(order, 2)
    return [Ranking(prompt, (answers[i], answers[j]), margin) for i, j in pairs if scores[i] > scores[j]]


def split_rankings(
    rankings: Sequence[Ranking], share: float = 0.1, by: str = "prompt"
) -> tuple[list[Ranking], list[Ranking]]:
    """Hold out a share of the rankings: (train, held_out), in the order given, by SHA-256 and no random seed.

    by: "prompt" keeps all rankings of a prompt on one side. "answers" keeps all rankings of the same answers on one
        side, in whatever order: for few prompts, and always where there is no prompt.
    Raises ValueError for a share outside (0, 1), an unknown `by`, or a side that stays empty.
    """
    if by not in SPLITS:
        raise ValueError(f"by must be one of {', '.join(SPLITS)}, got {by!r}")

    def key(ranking: Ranking) -> str:
        if by == "prompt" and ranking.prompt:
            return ranking.prompt
        return "\0".join([ranking.prompt, *sorted(ranking.answers)])

    return split_by_hash(rankings, key, share)


def _json_rankings(line: str) -> list[Ranking]:
    """The rankings of one line of a `.jsonl` file: a pair, answers best first, or answers with scores."""
    content = json_object(line)
    if "answers" not in content:
        return [pair_ranking(content)]
    prompt = text_of({"prompt": "", **content}, "prompt")
    margin = content.get("margin", 0.0)
    if content.get("scores") is None:
        return [Ranking(prompt, content["answers"], margin)]
    return rankings_of_scores(prompt, content["answers"], content["scores"], margin)


def _list(line: str, with_prompt: bool) -> Ranking:
    prompt, *answers = line.split("\t") if with_prompt else ["", *line.split("\t")]
    return Ranking(prompt, tuple(answers))
