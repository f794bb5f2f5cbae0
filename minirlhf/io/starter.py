"""The starter weights: small models that a first run needs, in the package minirlhf-starter or a repository's weights/.

They are Chinese, of hotel reviews. weights/README.md says what they are and how they were made.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "minirlhf_starter"
CHECKOUT = Path(__file__).resolve().parents[2] / "weights"
# In the order of Starter's fields.
FOLDERS = ("gpt2-chinese-reviews-small", "bert-chinese-reviews-sentiment-small", "ngrams-chinese-reviews-sentiment")
LANGUAGE_WORD = (
    "the starter weights are Chinese: they write and judge hotel reviews in Chinese and have learned no other "
    "language, so what they make of these texts means nothing; name models of your own"
)


@dataclass(frozen=True)
class Starter:
    """Folders of the starter weights, which write and judge Chinese hotel reviews and no other texts.

    policy: a GPT-2 of 4 million parameters. reward: a sentiment classifier. second_scorer: another judge of sentiment,
    on which no policy is trained. prompts: what the policy continues in the default run.
    """

    policy: str
    reward: str
    second_scorer: str
    prompts: tuple[str, ...] = ("酒店", "周围", "位置", "前台")  # hotel, surroundings, location, front desk

    def __contains__(self, folder: object) -> bool:
        """Whether a folder is one of these."""
        folders = (self.policy, self.reward, self.second_scorer)
        return folder is not None and Path(str(folder)).resolve() in [Path(own).resolve() for own in folders]


def starter() -> Starter:
    """The starter weights of the package minirlhf-starter, else those of a checkout of the repository.

    Raises FileNotFoundError that says how to get them.
    """
    spec = importlib.util.find_spec(PACKAGE)
    places = [*map(Path, (spec.submodule_search_locations or ()) if spec else ()), CHECKOUT]
    for place in places:
        folders = [place / name for name in FOLDERS]
        if all((folder / "config.json").is_file() for folder in folders):
            return Starter(str(folders[0]), str(folders[1]), str(folders[2]))
    raise FileNotFoundError(
        "the starter weights are not here: pip install 'minirlhf[starter]', or name your own models "
        "(--policy and --reward)"
    )


def is_foreign(texts: Sequence[str]) -> bool:
    """Whether more than half of the texts have no Chinese character: not what the starter weights have learned."""
    without = sum(not any("\u4e00" <= char <= "\u9fff" for char in text) for text in texts)
    return 2 * without > len(texts)


def warn_of_language(texts: Sequence[str], *folders: str | None) -> None:
    """Warn if any of the models is one of the starter weights, and the texts are not Chinese."""
    with contextlib.suppress(FileNotFoundError):
        own = starter()
        if any(folder in own for folder in folders) and is_foreign(texts):
            warnings.warn(LANGUAGE_WORD, stacklevel=3)
