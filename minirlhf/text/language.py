"""The word that the starter weights are Chinese, wherever they meet texts or models of another language."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence

from minirlhf.io.starter import starter
from minirlhf.text.tokenizer import Tokenizer

LANGUAGE_WORD = (
    "the starter weights are Chinese: they write and judge hotel reviews in Chinese and have learned no other "
    "language, so what they make of these texts means nothing; name models of your own"
)
MOST_TOKENS = 1.5  # a character: a vocabulary without Chinese spells one as 2 or 3 bytes


def is_foreign(texts: Sequence[str]) -> bool:
    """Whether more than half of the texts have no Chinese character: not what the starter weights have learned."""
    without = sum(not any("\u4e00" <= char <= "\u9fff" for char in text) for text in texts)
    return 2 * without > len(texts)


def warn_of_language(texts: Sequence[str], *folders: str | None) -> None:
    """Warn if the starter weights, or models trained from them, meet texts or models that are not Chinese.

    texts: prompts, or what is learned or scored. folders: of all the models, whether or not they are starter weights;
    None and names that are no folder count for nothing. The starter's prompts count as starter weights.
    """
    with contextlib.suppress(FileNotFoundError):
        own = starter()
        theirs = [folder for folder in folders if folder and own.descends(folder)]
        if theirs and is_foreign(texts):
            first = next((text for text in texts if text.strip()), "")
            warnings.warn(f"{LANGUAGE_WORD} (the first: {first!r:.60})", stacklevel=3)
        elif theirs or not set(own.prompts).isdisjoint(texts):
            for folder in folders:
                if folder and folder not in theirs and _is_foreign_model(folder, "".join(own.prompts)):
                    word = f"the starter's prompts and weights are Chinese, and the vocabulary of {folder} is not"
                    warnings.warn(f"{word}: name prompts and models of one language", stacklevel=3)


def _is_foreign_model(folder: str, chinese: str) -> bool:
    """Whether the vocabulary of a model lacks the characters of a Chinese text, or has only their bytes."""
    try:
        tokenizer = Tokenizer.from_pretrained(folder)
        ids = tokenizer.encode_prompt(chinese)
    except (ValueError, OSError):  # a function, an n-gram scorer, or a folder whose error comes when it is loaded
        return False
    return tokenizer.decode(ids) != chinese or len(ids) > MOST_TOKENS * len(chinese)
