"""Pairs for DPO: the tokens of a prompt, of a response to it, and of a worse one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from minirlhf.io.files import naming
from minirlhf.supervised.sft import LMSequence
from minirlhf.text.preferences import Ranking, pair_ranking, read_rankings
from minirlhf.text.text_files import listed
from minirlhf.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenPair:
    """Token ids of a prompt and of two responses to it, each with its end of text if it has one.

    Lists or 1-D tensors. prompt: empty if there is none; nothing predicts the first token of the response then.
    Raises ValueError for a response without a token to predict, or two equal ones.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def __post_init__(self) -> None:
        for name in ("prompt", "chosen", "rejected"):
            object.__setattr__(self, name, [int(i) for i in getattr(self, name)])
        for name in ("chosen", "rejected"):
            if len(self.prompt) + len(getattr(self, name)) < 2 or not getattr(self, name):
                raise ValueError(f"{name} is empty: it has no token to predict")
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same tokens")

    @property
    def sequences(self) -> list[LMSequence]:
        """The chosen response after the prompt, and the rejected one."""
        first = max(len(self.prompt), 1)
        return [LMSequence([*self.prompt, *response], first) for response in (self.chosen, self.rejected)]

    @property
    def length(self) -> int:
        """Tokens of the longer sequence."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


EXAMPLE = 'give [{"prompt": ..., "chosen": ..., "rejected": ...}, ...], or pathlib.Path("pairs.jsonl") for a file'
Pairs = Iterable[Ranking | Mapping[str, Any] | TokenPair] | os.PathLike[str]


def encode_pairs(tokenizer: Tokenizer, pairs: Pairs) -> list[TokenPair]:
    """The tokens of pairs, in order, each response with its end.

    pairs: Rankings, each pair of whose answers is used; mappings with prompt, chosen and rejected; TokenPairs, such as
        samples, which need not be the tokens that their text is cut into; or the path of a file for `read_rankings`.
    A prompt is encoded once, apart from its responses, as it is when they are sampled: no token spans both.
    Raises ValueError with the number of the pair for an empty side, two equal ones, a margin, or another type.
    """
    found: list[TokenPair] = []
    opening = list(tokenizer.model.opening)
    given = read_rankings(pairs) if isinstance(pairs, os.PathLike) else listed(pairs, "pairs", EXAMPLE)
    for i, pair in enumerate(given):
        with naming(f"pair {i}"):
            if isinstance(pair, TokenPair):
                found.append(pair)
                continue
            if not isinstance(pair, (Ranking, Mapping)):
                raise ValueError(f"must have prompt, chosen and rejected, or be a Ranking; got a {type(pair).__name__}")
            ranking = pair if isinstance(pair, Ranking) else pair_ranking(pair)
            if ranking.margin:
                raise ValueError(f"a margin of {ranking.margin:g} is for reward models; DPO has none")
            prompt = tokenizer.encode_prompt(ranking.prompt) if ranking.prompt else opening
            answers = [ids[len(opening) :] for ids in tokenizer.encode_documents(ranking.answers)]
            if min(map(len, answers)) < 2:
                raise ValueError("an answer is empty: it has no token but its end")
            found += [TokenPair(prompt, *two) for two in itertools.combinations(answers, 2)]
    return found
