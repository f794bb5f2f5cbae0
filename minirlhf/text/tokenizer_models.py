"""The tokenizers with rules of ours: BERT's WordPiece, which Chinese GPT-2 models use as well, and GPT-2's BPE."""

from __future__ import annotations

import abc
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"
WORDPIECE_FILE = "vocab.txt"
BPE_FILE = "vocab.json"
MERGES_FILE = "merges.txt"

ROLES = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
PREFIX = "##"  # begins a piece that continues a word
MAX_CHARS_PER_WORD = 100  # BERT's limit: a longer word becomes [UNK]
END_OF_TEXT = "<|endoftext|>"


class TokenizerModel(abc.ABC):
    """The vocabulary and the rules of one kind of tokenizer; callers use it through `Tokenizer`.

    vocab: the tokens in the order of their ids, "" at an id that no text gets (a blank line of a file).
    roles: what special tokens are for, under the names of transformers ("pad_token" -> token).
    extra_special: more special tokens. A special token is found literally in a text, and left out of decoded text.
    Raises ValueError for a duplicate token, one that is not valid Unicode, or a missing special token.
    """

    class_name: str  # of the same tokenizer in transformers
    opening: tuple[int, ...]  # ids before and after an encoded text
    closing: tuple[int, ...]
    eos_id: int  # ends a document
    pad_id: int  # fills batches; a mask says what is padding
    byte_ids: frozenset[int] = frozenset()  # tokens of one byte whose text is that of the whole row of such tokens
    stop_ids: tuple[int, ...] = ()  # more ids that end a sampled text, of generation_config.json
    generation: Mapping[str, Any] | None = None  # that file's content
    backend: tokenizers.Tokenizer  # encodes; `tokenizer.json` is its text
    kept: Mapping[str, Any] = {}  # settings of the folder that change no id, written again for other tools

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
            **({} if self.generation is None else {GENERATION_FILE: dict(self.generation)}),
        }


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text: it cannot hold half a surrogate pair, which broken JSON escapes leave."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


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


class WordPiece(TokenizerModel):
    """BERT's word pieces (Devlin et al. 2018), every Chinese character one; a text is encoded as [CLS] ... [SEP].

    vocab: the tokens in the order of their ids.
    do_lower_case, tokenize_chinese_chars, strip_accents: as in BertTokenizer: whether letters become small, whether
        Chinese characters are tokens of their own, and whether accents are removed (None: if letters become small).
    extra_special: special tokens besides BERT's five.
    Raises ValueError as TokenizerModel, and for a token with a line break, which `vocab.txt` cannot hold.
    """

    class_name = "BertTokenizer"

    def __init__(
        self,
        vocab: Sequence[str],
        do_lower_case: bool = True,
        tokenize_chinese_chars: bool = True,
        strip_accents: bool | None = None,
        extra_special: Sequence[str] = (),
    ):
        super().__init__(vocab, ROLES, extra_special)
        for token in self.vocab:
            if "\n" in token or token.endswith("\r"):
                raise ValueError(f"the vocabulary has {token!r}, a token with a line break")
        self.do_lower_case = do_lower_case
        self.tokenize_chinese_chars = tokenize_chinese_chars
        self.strip_accents = strip_accents
        self.pad_id, cls_id, sep_id = (self.ids[token] for token in ("[PAD]", "[CLS]", "[SEP]"))
        self.opening, self.closing, self.eos_id = (cls_id,), (sep_id,), sep_id

        self.backend = tokenizers.Tokenizer(
            models.WordPiece(self.ids, unk_token="[UNK]", max_input_chars_per_word=MAX_CHARS_PER_WORD)
        )
        self.backend.normalizer = normalizers.BertNormalizer(
            handle_chinese_chars=tokenize_chinese_chars, strip_accents=strip_accents, lowercase=do_lower_case
        )
        self.backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self.backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", cls_id), ("[SEP]", sep_id)],
        )
        self.backend.decoder = decoders.WordPiece(prefix=PREFIX)
        # A literal "[SEP]" in a text becomes the special token, as in BertTokenizer.
        self.backend.add_special_tokens(self.special_tokens())

    def decode(self, ids: Sequence[int]) -> str:
        """Clean text: no spaces between Chinese characters, a space between Latin words."""
        text = ""
        for i in ids:
            token = self.vocab[i]
            if i in self.special_ids or token == "":
                continue
            if token.startswith(PREFIX) and len(token) > len(PREFIX):
                text += token[len(PREFIX) :]
            else:
                text += (" " if text and _is_spaced(text[-1]) and _is_spaced(token[0]) else "") + token
        return text

    def width(self, token_id: int) -> int:
        return len(self.vocab[token_id].removeprefix(PREFIX)) or 1

    def settings(self) -> dict[str, Any]:
        return {
            "do_lower_case": self.do_lower_case,
            "tokenize_chinese_chars": self.tokenize_chinese_chars,
            "strip_accents": self.strip_accents,
            "clean_up_tokenization_spaces": True,
        }

    def vocabulary_files(self) -> dict[str, str | dict[str, Any]]:
        return {WORDPIECE_FILE: "\n".join(self.vocab) + "\n"}


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
    return list(dict.fromkeys([*head, *pieces, *(f"{PREFIX}{char}" for char in pieces), *frequent]))


def _is_spaced(char: str) -> bool:
    """Whether the script of this letter or digit writes spaces between words (Chinese and Japanese do not)."""
    if not char.isalnum():
        return False
    name = unicodedata.name(char, "")
    return not name.startswith(("CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC"))


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a vocabulary -> the byte, as `bytes_to_unicode` of openai/gpt-2.

    Visible Latin-1 characters stand for themselves; the 68 others are the characters from U+0100 on, in their order.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


class ByteBPE(TokenizerModel):
    """GPT-2's byte-pair encoding over the bytes of UTF-8 (Radford et al. 2019, Sennrich et al. 2016).

    Every text comes back byte for byte. Nothing is added to a text, and a document ends with <|endoftext|>.
    vocab: the tokens in the order of their ids, in the byte alphabet.
    merges: pairs of tokens, those that are merged first before the others.
    pad_token: a special token that only fills batches; None: <|endoftext|> does.
    extra_special: special tokens besides these.
    Raises ValueError as TokenizerModel, for a vocabulary without one of the 256 bytes or with a token that is not
    made of bytes, and for a merge that occurs twice or whose tokens the vocabulary lacks.
    """

    class_name = "GPT2Tokenizer"
    opening = closing = ()

    def __init__(
        self,
        vocab: Sequence[str],
        merges: Sequence[tuple[str, str]],
        pad_token: str | None = None,
        extra_special: Sequence[str] = (),
    ):
        roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        super().__init__(vocab, roles if pad_token is None else {**roles, "pad_token": pad_token}, extra_special)
        self.merges = list(merges)
        self._check_merges()
        self.bytes = self._token_bytes()
        self.eos_id = self.ids[END_OF_TEXT]
        self.pad_id = self.ids[pad_token or END_OF_TEXT]

        self.backend = tokenizers.Tokenizer(
            models.BPE(self.ids, self.merges, continuing_subword_prefix="", end_of_word_suffix="")
        )
        self.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend.post_processor = processors.ByteLevel(trim_offsets=False)
        self.backend.decoder = decoders.ByteLevel()
        self.backend.add_special_tokens(self.special_tokens())

    def decode(self, ids: Sequence[int]) -> str:
        """The text, byte for byte; bytes of a character that was cut become the replacement character U+FFFD."""
        return b"".join(self.bytes[i] for i in ids if i not in self.special_ids).decode("utf-8", "replace")

    def width(self, token_id: int) -> int:
        """Characters that begin in this token, ASCII white space left out: summed over a text, its characters."""
        return sum(not chr(byte).isspace() for byte in self.bytes[token_id] if not 0x80 <= byte < 0xC0)

    def settings(self) -> dict[str, Any]:
        return {"add_prefix_space": False, "errors": "replace", "clean_up_tokenization_spaces": False}

    def vocabulary_files(self) -> dict[str, str | dict[str, Any]]:
        merges = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        return {BPE_FILE: self.ids, MERGES_FILE: "\n".join(merges) + "\n"}

    def _check_merges(self) -> None:
        ranks: dict[tuple[str, str], int] = {}
        for rank, pair in enumerate(self.merges, 1):
            if ranks.setdefault(pair, rank) != rank:
                raise ValueError(f"merge {rank}, {' '.join(pair)!r}, is also merge {ranks[pair]}")
            unknown = [token for token in (*pair, "".join(pair)) if token not in self.ids]
            if unknown:
                raise ValueError(f"merge {rank}, {' '.join(pair)!r}, needs {unknown[0]!r}, which no token is")

    def _token_bytes(self) -> list[bytes]:
        """The bytes of every token, in the order of the ids; a special token has its own text's."""
        alphabet = byte_alphabet()
        missing = [char for char in alphabet if char not in self.ids]
        if missing:
            raise ValueError(
                f"the vocabulary lacks {len(missing)} of the 256 byte tokens, the first {missing[0]!r}: "
                "it is not one of byte-level BPE"
            )
        found = []
        for i, token in enumerate(self.vocab):
            if token == "":
                raise ValueError(f"the vocabulary has an empty token at id {i}")
            if i in self.special_ids:
                found.append(token.encode("utf-8"))
            elif all(char in alphabet for char in token):
                found.append(bytes(alphabet[char] for char in token))
            else:
                raise ValueError(f"the vocabulary has {token!r} at id {i}, which is not written in byte characters")
        return found
