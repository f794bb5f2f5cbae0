"""What the doctor examines, and the result of a check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    """The parts of a run as given to `doctor`, None where a part could not be loaded, and what checks leave for later.

    prompts: the pool; None: the run's own are not known, and words of the vocabulary stand for them.
    available: bytes free on the device before anything was copied; None: unknown.
    trainer: of copies of both models, in fp32. rollout: what it collected. precision: of the run. None until the
        check of the rollout; from then on the config names that precision too.
    """

    policy: Model | None
    reference: Model | None
    tokenizer: Tokenizer | None
    reward: RewardFunction | None
    config: PPOConfig
    prompts: Sequence[str] | None
    canaries: tuple[str, str] | None
    available: int | None = None
    trainer: PPOTrainer | None = None
    rollout: Rollout | None = None
    precision: PrecisionChoice | None = None

    def models(self) -> tuple[Model, Model]:
        """Policy and reference, as given. Raises Skipped if one is missing."""
        return needed(self.policy, "the policy"), needed(self.reference, "the reference")

    def modules(self) -> dict[str, nn.Module]:
        """Policy, reference and the classifier of a SentimentReward by name, as given. Raises Skipped without any."""
        classifier = self.reward.model if isinstance(self.reward, SentimentReward) else None
        named = {"policy": self.policy, "reference": self.reference, "classifier": classifier}
        found: dict[str, nn.Module] = {name: model for name, model in named.items() if model is not None}
        return needed(found or None, "a model")

    def experience(self) -> tuple[PPOTrainer, Rollout]:
        """The trainer of the copies, and its rollout. Raises Skipped without them."""
        return needed(self.trainer, "the rollout"), needed(self.rollout, "the rollout")

    def pool(self) -> Sequence[str]:
        """The prompts, or words of the vocabulary in their place."""
        return self.prompts if self.prompts is not None else words(needed(self.tokenizer, "the tokenizer"))


def needed(x: Any, what: str) -> Any:
    """x itself. Raises Skipped if it is None."""
    if x is None:
        raise Skipped(f"needs {what}, which failed above or was not given")
    return x


def words(tokenizer: Tokenizer) -> list[str]:
    """Prompts of the first words of a vocabulary that it reads back as they are."""
    found: list[str] = []
    for i in range(len(tokenizer)):
        word = tokenizer.decode([i]).strip()
        if word.isalpha() and tokenizer.decode(tokenizer.encode_prompt(word)).strip() == word:
            found.append(word)
        if len(found) == sum(PROMPT_LENGTHS):
            break
    found = found or [next(token for token in tokenizer.vocab if token.strip())]
    repeated = iter(found * sum(PROMPT_LENGTHS))
    return ["".join(next(repeated) for _ in range(length)) for length in PROMPT_LENGTHS]
