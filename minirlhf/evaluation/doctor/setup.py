"""What the doctor examines, and the result of a check."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from minirlhf.device.precision_choice import PrecisionChoice
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic
from minirlhf.rewards.base import RewardFunction
from minirlhf.rewards.sentiment import SentimentReward
from minirlhf.rl.config import PPOConfig
from minirlhf.rl.rollout import Rollout
from minirlhf.rl.trainer import PPOTrainer
from minirlhf.text.tokenizer import Tokenizer

OK, WARN, FAIL, SKIP = "ok", "warn", "fail", "skip"
Model = ActorCritic | Decoder
PROMPT_LENGTHS = (1, 4, 2, 6)  # words; different lengths, so that batches are padded


class Skipped(Exception):
    """A check cannot be made; the message says why."""


class Result(NamedTuple):
    """status: ok, warn, fail or skip. detail: what was found, with figures. remedy: "" where nothing is wrong."""

    status: str
    detail: str
    remedy: str = ""


@dataclass
class Setup:
    """The parts of a run as given to `doctor`, and what checks leave for later.

    reference: None: the policy's own base.
    prompts: the pool; None: the run's own are not known, and words of the vocabulary stand for them.
    available: bytes free on the device before anything was copied; None: unknown.
    trainer: of copies of both models, in fp32. rollout: what it collected. precision: of the run. None until the
        check of the rollout; from then on the config names that precision too.
    """

    policy: Model
    reference: Model | None
    tokenizer: Tokenizer
    reward: RewardFunction | None
    config: PPOConfig
    prompts: Sequence[str] | None
    canaries: tuple[str, str] | None
    available: int | None = None
    trainer: PPOTrainer | None = None
    rollout: Rollout | None = None
    precision: PrecisionChoice | None = None

    def modules(self) -> dict[str, nn.Module]:
        """Policy, reference and the classifier of a SentimentReward by name, as given."""
        found: dict[str, nn.Module] = {"policy": self.policy}
        found |= {} if self.reference is None else {"reference": self.reference}
        return found | ({"classifier": self.reward.model} if isinstance(self.reward, SentimentReward) else {})

    def experience(self) -> tuple[PPOTrainer, Rollout]:
        """The trainer of the copies, and its rollout. Raises Skipped without them."""
        if self.trainer is None or self.rollout is None:
            raise Skipped("needs the rollout, which failed above")
        return self.trainer, self.rollout

    def pool(self) -> Sequence[str]:
        """The prompts, or words of the vocabulary in their place."""
        return self.prompts if self.prompts is not None else words(self.tokenizer)


def words(tokenizer: Tokenizer) -> list[str]:
    """Prompts of the first words of a vocabulary that it reads back as they are."""
    every = (tokenizer.decode([i]).strip() for i in range(len(tokenizer)))
    read_back = (w for w in every if w.isalpha() and tokenizer.decode(tokenizer.encode_prompt(w)).strip() == w)
    found = list(itertools.islice(read_back, sum(PROMPT_LENGTHS))) or [next(t for t in tokenizer.vocab if t.strip())]
    repeated = itertools.cycle(found)
    return ["".join(itertools.islice(repeated, length)) for length in PROMPT_LENGTHS]
