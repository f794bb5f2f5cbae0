"""Text to token ids and back, under BERT's rules for Chinese: every Chinese character is one token.

Built on the `tokenizers` package from a `vocab.txt`, one token a line, as the uer models publish it.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from torch import Tensor

from minirlhf.checkpoints import atomic_write

VOCAB_FILE = "vocab.txt"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_CHARS_PER_WORD = 100  # BERT's limit: a longer word becomes [UNK]


class Tokenizer:
    """BERT word pieces with Chinese characters one by one.

    vocab: the tokens in the order of their ids.
    Raises ValueError for a duplicate, an empty token or a missing special token.
    """

    def __init__(self, vocab: Sequence[str]):
        self.vocab = list(vocab)
        self._check_vocab()
        ids = {token: i for i, token in enumerate(self.vocab)}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (ids[token] for token in SPECIAL_TOKENS)
        self.special_ids = frozenset(ids[token] for token in SPECIAL_TOKENS)
        model = WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=MAX_CHARS_PER_WORD)
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        # A literal "[SEP]" in a text becomes the special token, as in BertTokenizer.
        self._tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read `vocab.txt` of a model folder. Raises FileNotFoundError, or ValueError for a damaged file."""
        path = Path(folder) / VOCAB_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not valid UTF-8: {error}") from error
        vocab = [line.rstrip("\r") for line in lines]
        if vocab and vocab[-1] == "":
            vocab.pop()
        try:
            return cls(vocab)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `vocab.txt` into a folder, which is made if it does not exist."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        atomic_write(Path(folder) / VOCAB_FILE, ("\n".join(self.vocab) + "\n").encode("utf-8"))

    def __len__(self) -> int:
        return len(self.vocab)

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Token ids of a text: [CLS] ... [SEP], cut at the end to `max_length` tokens, both of these included."""
        ids = self._encode(text)
        if max_length is not None:
            if max_length < 2:
                raise ValueError(f"max_length must be at least 2 for [CLS] and [SEP], got {max_length}")
            ids = ids[: max_length - 2]
        return [self.cls_id, *ids, self.sep_id]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt to be continued: [CLS] ..., without the final [SEP].

        Raises ValueError if no token is left of the text (an empty or a blank prompt).
        """
        ids = self._encode(text)
        if not ids:
            raise ValueError(f"prompt {text!r} is empty: it must hold at least one visible character")
        return [self.cls_id, *ids]

    def encode_batch(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """`encode` over many texts at once, in parallel threads."""
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length must be at least 2 for [CLS] and [SEP], got {max_length}")
        room = None if max_length is None else max_length - 2
        texts = [_checked(text) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [[self.cls_id, *encoding.ids[:room], self.sep_id] for encoding in encodings]

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Clean text: no special tokens, no spaces between Chinese characters, a space between Latin words.

        Raises ValueError for an id outside the vocabulary.
        """
        text = ""
        for i in ids.tolist() if isinstance(ids, Tensor) else ids:
            if not 0 <= i < len(self.vocab):
                raise ValueError(f"token id {i} is outside the vocabulary of {len(self.vocab)} tokens")
            if i in self.special_ids:
                continue
            token = self.vocab[i]
            if token.startswith("##") and len(token) > 2:
                text += token[2:]
            else:
                text += (" " if text and _is_spaced(text[-1]) and _is_spaced(token[0]) else "") + token
        return text

    def width(self, token_id: int) -> int:
        """How many characters of text a token stands for; a special token counts as one."""
        return 1 if token_id in self.special_ids else len(self.vocab[token_id].removeprefix("##")) or 1

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(_checked(text), add_special_tokens=False).ids

    def _check_vocab(self) -> None:
        first: dict[str, int] = {}
        for i, token in enumerate(self.vocab):
            if token == "":
                raise ValueError(f"the vocabulary has an empty token at id {i}")
            if first.setdefault(token, i) != i:
                raise ValueError(f"the vocabulary has {token!r} twice, at ids {first[token]} and {i}")
        missing = [token for token in SPECIAL_TOKENS if token not in first]
        if missing:
            raise ValueError(f"the vocabulary lacks the special tokens {', '.join(missing)}")


def build_vocab(texts: Iterable[str], min_count: int = 3) -> list[str]:
    """A vocabulary under BERT's rules, with the special tokens at the ids of the published Chinese vocabulary.

    Kept are the tokens (Chinese characters, punctuation, Latin words, numbers) that occur at least `min_count` times,
    most frequent first, and every Latin letter and digit that occurs, alone and as a continuation ("##a"), so that
    rare words are spelled instead of lost.
    """
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts: dict[str, int] = {}
    for text in texts:
        for token, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)):
            counts[token] = counts.get(token, 0) + 1
    pieces = sorted({char for token in counts for char in token if char.isascii() and char.isalnum()})
    frequent = sorted((t for t, n in counts.items() if n >= min_count), key=lambda t: (-counts[t], t))
    head = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return list(dict.fromkeys([*head, *pieces, *(f"##{char}" for char in pieces), *frequent]))


def _checked(text: object) -> str:
    """A text that can be encoded. Raises ValueError for anything but a str; lone surrogates become U+FFFD."""
    if not isinstance(text, str):
        raise ValueError(f"expected a text, got {text!r} of type {type(text).__name__}")
    return text.encode("utf-8", "replace").decode("utf-8") if not text.isascii() else text


def _is_spaced(char: str) -> bool:
    """Whether the script of this letter or digit writes spaces between words (Chinese and Japanese do not)."""
    if not char.isalnum():
        return False
    name = unicodedata.name(char, "")
    return not name.startswith(("CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC"))
