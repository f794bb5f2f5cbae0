"""Loading of a reward by its name: a folder, whose `config.json` says of which kind it is, or `module:function`."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Mapping

from minirlhf.io.files import StrPath, field, read_json
from minirlhf.io.hub import locate
from minirlhf.io.model_folder import CONFIG_FILE
from minirlhf.models.loading import DECODERS
from minirlhf.rewards.base import RewardFunction
from minirlhf.rewards.labels import PositiveLabel
from minirlhf.rewards.ngrams import MODEL_TYPE, NGramScorer
from minirlhf.rewards.reward_model import NORMALISATION, RewardModel
from minirlhf.rewards.sentiment import SentimentReward

NAME = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*:[A-Za-z_]\w*(?:\.\w+)*", re.ASCII)


def load_scorer(folder: StrPath, device: str = "auto", positive_label: PositiveLabel | None = None) -> RewardFunction:
    """Load the reward in a folder: a sentiment classifier, a reward model or an n-gram scorer; or `module:function`.

    positive_label: of a sentiment classifier; see SentimentReward. Raises as the `from_pretrained` of the kind, and as
    `imported_reward`.
    """
    if is_import(folder):
        return imported_reward(str(folder))
    path = locate(folder) / CONFIG_FILE
    config = read_json(path)
    kind = field(config, "model_type", str, path, "bert")
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


def is_import(text: object) -> bool:
    """Whether a text is `module:function`, and not a folder."""
    return isinstance(text, str) and bool(NAME.fullmatch(text)) and not os.path.isdir(text)


def imported_reward(name: str) -> RewardFunction:
    """The callable `module:function`; modules in the current folder are found as well.

    Raises ValueError, one line that names the module, if there is none, if it raises when it is imported, or if it has
    no such function.
    """
    module_name, _, path = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # code of strangers may raise anything
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (module_name == missing or module_name.startswith(f"{missing}.")):
            raise ValueError(f"reward {name}: there is no module {missing!r} here or among installed ones") from None
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
        where = f"line {place.lineno} of {os.path.basename(place.filename)}"
        if isinstance(error, SyntaxError):
            where = f"line {error.lineno} of {os.path.basename(error.filename or '')}"
        raise ValueError(f"reward {name}: importing {module_name} raised {what} ({where})") from error
    for part in path.split("."):
        if not hasattr(found, part):
            callables = [each for each, value in vars(found).items() if callable(value) and not each.startswith("_")]
            near = difflib.get_close_matches(part, callables, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(callables[:20]) or 'no functions'}"
            raise ValueError(f"reward {name}: {module_name} has no {part!r}; {meant}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"reward {name} must be a function, got a {type(found).__name__}")
    return found
