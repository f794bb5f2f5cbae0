"""Base class of the tokenizers: a checked vocabulary, special tokens, and the files of a saved folder."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"


class TokenizerModel(abc.ABC):
    """The vocabulary and the rules of one kind of tokenizer; callers use it through `Tokenizer`.

    vocab: the tokens in the order of their ids, "" at an id that no text gets (a blank line of a file). ids: token ->
        id.
    roles: what special tokens are for, under the names that transformers has for it ("pad_token" -> token).
    extra_special: more special tokens. A special token is found literally in a text, and left out of decoded text.
    opening, closing: the ids that stand before and after an encoded text.
    eos_id: ends a document. pad_id: fills batches; a mask, not this id, says what is padding.
    backend: the `tokenizers` object that encodes; `tokenizer.json` is its text.
    kept: settings that change no id, as the folder had them, written again for other tools.
    Raises ValueError for a duplicate token, one that is not valid Unicode, or a missing special token.
    """

    class_name: str  # of the same tokenizer in transformers
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    eos_id: int
    pad_id: int
    backend: tokenizers.Tokenizer
    kept: Mapping[str, Any] = {}

    def __init__(self, vocab: Sequence[str], roles: Mapping[str, str], extra_special: Sequence[str]):
        self.vocab = list(vocab)
        self.roles = dict(roles)
        special = list(dict.fromkeys([*self.roles.values(), *extra_special]))
        self.extra_special = [token for token in special if token not in self.roles.values()]
        self.ids = _index(self.vocab, special)
        self.special_ids = frozenset(self.ids[token] for token in special)

    def special_tokens(self) -> list[AddedToken]:
        """The special tokens as the backend takes them, in the order of their ids."""
        return [AddedToken(self.vocab[i], special=True) for i in sorted(self.special_ids)]

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids that are in the vocabulary, special tokens left out."""

    @abc.abstractmethod
    def width(self, token_id: int) -> int:
        """How many characters of text a token stands for that is not special."""

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the class of transformers must be told to encode in the same way."""

    @abc.abstractmethod
    def vocabulary_files(self) -> dict[str, str | dict[str, Any]]:
        """The vocabulary as the original implementations read it: file name -> text or JSON object."""

    def files(self, max_length: int | None = None) -> dict[str, str | dict[str, Any]]:
        """Everything that a saved folder holds of a tokenizer: file name -> text or JSON object.

        max_length: the `model_max_length` to write; None: the one that is kept, if any.
        """
        kept = self.kept if max_length is None else {**self.kept, "model_max_length": max_length}
        extra = {"additional_special_tokens": self.extra_special} if self.extra_special else {}
        return {
            **self.vocabulary_files(),
            TOKENIZER_FILE: self.backend.to_str(),
            SETTINGS_FILE: {"tokenizer_class": self.class_name, **self.settings(), **self.roles, **extra, **kept},
            SPECIAL_TOKENS_FILE: self.roles,
        }


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text: it cannot hold half a surrogate pair, which broken JSON escapes leave."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _index(vocab: Sequence[str], special: Sequence[str]) -> dict[str, int]:
    """Token -> id of a vocabulary in which no token is double and no special token is missing."""
    ids: dict[str, int] = {}
    for i, token in enumerate(vocab):
        if token == "":
            continue
        if not is_unicode(token):
            raise ValueError(f"the vocabulary has {token!r} at id {i}, which is not valid Unicode")
        if ids.setdefault(token, i) != i:
            raise ValueError(f"the vocabulary has {token!r} twice, at ids {ids[token]} and {i}")
    missing = [token for token in special if token not in ids]
    if missing:
        raise ValueError(f"the vocabulary lacks the special tokens {', '.join(missing)}")
    return ids
