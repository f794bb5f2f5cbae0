"""Loading of a reward by its name: a folder, whose `config.json` says of which kind it is, or `module:function`."""

from __future__ import annotations

from collections.abc import Mapping

from minirlhf.io.files import StrPath, read_json
from minirlhf.io.hub import locate
from minirlhf.io.model_folder import CONFIG_FILE
from minirlhf.models.loading import DECODERS
from minirlhf.rewards.base import RewardFunction
from minirlhf.rewards.imported import imported_reward, is_import
from minirlhf.rewards.labels import PositiveLabel
from minirlhf.rewards.ngrams import MODEL_TYPE, NGramScorer
from minirlhf.rewards.reward_model import NORMALISATION, RewardModel
from minirlhf.rewards.sentiment import SentimentReward


def load_scorer(folder: StrPath, device: str = "auto", positive_label: PositiveLabel | None = None) -> RewardFunction:
    """Load the reward in a folder: a sentiment classifier, a reward model or an n-gram scorer; or `module:function`.

    positive_label: of a sentiment classifier; see SentimentReward. Raises as the `from_pretrained` of the kind, and as
    `imported_reward`.
    """
    if is_import(folder):
        return imported_reward(str(folder))
    config = read_json(locate(folder) / CONFIG_FILE)
    kind = config.get("model_type")
    if kind == MODEL_TYPE:
        return NGramScorer.from_pretrained(folder)
    id2label = config.get("id2label")
    has_one_label = config.get("num_labels") == 1 or (isinstance(id2label, Mapping) and len(id2label) == 1)
    if kind in DECODERS:
        names = config.get("architectures")
        has_one_label = isinstance(names, list) and all(
            str(name).endswith("ForSequenceClassification") for name in names
        )
    if NORMALISATION in config or has_one_label:
        return RewardModel.from_pretrained(folder, device=device)
    if kind in DECODERS:
        raise ValueError(f"{folder} holds a {kind!r} model without a reward head, expected a reward")
    return SentimentReward.from_pretrained(folder, positive_label=positive_label, device=device)
