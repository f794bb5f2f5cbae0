"""The starter weights: small models that a first run needs, in the package minirlhf-starter or a repository's weights/.

They are Chinese, of hotel reviews. weights/README.md says what they are and how they were made.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "minirlhf_starter"
CHECKOUT = Path(__file__).resolve().parents[2] / "weights"
# In the order of Starter's fields.
FOLDERS = ("gpt2-chinese-reviews-small", "bert-chinese-reviews-sentiment-small", "ngrams-chinese-reviews-sentiment")


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

    def descends(self, folder: str) -> bool:
        """Whether a folder is one of these, or its model was trained from them: its vocabulary is theirs."""
        own, found = (Path(place, "vocab.txt") for place in (self.policy, folder))
        return folder in self or (found.is_file() and found.read_bytes() == own.read_bytes())


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
        "the starter weights are not here: `pip install ./weights` in minirlhf's repository installs them (minirlhf's "
        "extra starter), or name your own models (--policy and --reward)"
    )
