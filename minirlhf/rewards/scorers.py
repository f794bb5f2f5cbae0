"""Loading of a reward from its folder: `config.json` says of which kind it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from minirlhf.io.files import read_json
from minirlhf.io.hub import locate
from minirlhf.io.model_folder import CONFIG_FILE
from minirlhf.rewards.base import RewardFunction
from minirlhf.rewards.labels import PositiveLabel
from minirlhf.rewards.ngrams import MODEL_TYPE, NGramScorer
from minirlhf.rewards.reward_model import NORMALISATION, RewardModel
from minirlhf.rewards.sentiment import SentimentReward


def load_scorer(
    folder: str | os.PathLike[str], device: str = "auto", positive_label: PositiveLabel | None = None
) -> RewardFunction:
    """Load the reward in a folder: a sentiment classifier, a reward model or an n-gram scorer.

    positive_label: of a sentiment classifier; see SentimentReward. Raises as the `from_pretrained` of the kind.
    """
    config = read_json(locate(folder) / CONFIG_FILE)
    if config.get("model_type") == MODEL_TYPE:
        return NGramScorer.from_pretrained(folder)
    if _is_reward_model(config):
        return RewardModel.from_pretrained(folder, device=device)
    if config.get("model_type") == "gpt2":
        raise ValueError(f"{folder} holds a 'gpt2' model without a reward head, expected a reward")
    return SentimentReward.from_pretrained(folder, positive_label=positive_label, device=device)


def _is_reward_model(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a model with one score, saved by us or by transformers."""
    if NORMALISATION in config:
        return True
    if config.get("model_type") == "gpt2":
        return config.get("architectures") == ["GPT2ForSequenceClassification"]
    id2label = config.get("id2label")
    return config.get("num_labels") == 1 or (isinstance(id2label, Mapping) and len(id2label) == 1)
