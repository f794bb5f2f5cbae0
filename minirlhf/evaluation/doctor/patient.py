"""What the doctor examines, and what a check says of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from minirlhf.device.precision_choice import PrecisionChoice
from minirlhf.models.gpt2 import GPT2
from minirlhf.models.heads import ActorCritic
from minirlhf.rewards.base import RewardFunction
from minirlhf.rewards.sentiment import SentimentReward
from minirlhf.rl.config import PPOConfig
from minirlhf.rl.rollout import Rollout
from minirlhf.rl.trainer import PPOTrainer
from minirlhf.text.tokenizer import Tokenizer

OK, WARN, FAIL, SKIP = "ok", "warn", "fail", "skip"
Model = ActorCritic | GPT2


class Skipped(Exception):
    """A check cannot be made; the message says why."""


class Verdict(NamedTuple):
    """status: ok, warn, fail or skip. detail: what was found, with figures. remedy: "" where nothing is wrong."""

    status: str
    detail: str
    remedy: str = ""


@dataclass
class Patient:
    """What is examined: as given to `doctor`, None where it could not be loaded; and what checks leave for later ones.

    available: bytes free on the device before anything was copied; None: unknown.
    vocabulary, reward_vocabulary: their sizes, None until they were found to agree.
    trainer: of copies of both models, in fp32. rollout: what it collected. precision: that of the run. None until the
        check of the rollout; from then on the config names that precision too.
    """

    policy: Model | None
    reference: Model | None
    tokenizer: Tokenizer | None
    reward: RewardFunction | None
    config: PPOConfig
    prompts: Sequence[str]
    canaries: tuple[str, str] | None
    available: int | None = None
    vocabulary: int | None = None
    reward_vocabulary: int | None = None
    trainer: PPOTrainer | None = None
    rollout: Rollout | None = None
    precision: PrecisionChoice | None = None

    def models(self) -> tuple[Model, Model]:
        """Policy and reference, as given. Raises Skipped if one is missing."""
        return needed(self.policy, "the policy"), needed(self.reference, "the reference")

    def modules(self) -> dict[str, nn.Module]:
        """Policy, reference and the classifier of a SentimentReward by name, as given, those that there are.

        Raises Skipped if there are none.
        """
        classifier = self.reward.model if isinstance(self.reward, SentimentReward) else None
        named = {"policy": self.policy, "reference": self.reference, "classifier": classifier}
        found: dict[str, nn.Module] = {name: model for name, model in named.items() if model is not None}
        if not found:
            raise Skipped("no model was loaded")
        return found

    def experience(self) -> tuple[PPOTrainer, Rollout]:
        """The trainer of the copies, and its rollout. Raises Skipped if there is none."""
        return needed(self.trainer, "the rollout"), needed(self.rollout, "the rollout")

    def sentiment(self) -> SentimentReward | None:
        """The reward with a copy of its classifier, if it is a SentimentReward."""
        if not isinstance(self.reward, SentimentReward):
            return None
        reward = copy.copy(self.reward)
        reward.model = copy.deepcopy(reward.model)
        return reward


def needed(x: Any, what: str) -> Any:
    """x itself. Raises Skipped if it is None."""
    if x is None:
        raise Skipped(f"needs {what}, which failed above or was not given")
    return x
