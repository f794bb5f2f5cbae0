"""BERT's tokenizer (Devlin et al. 2018): words cut greedily into pieces, every Chinese character a token of its own.

The uer models, Chinese GPT-2 as well as Chinese BERT, use it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from minirlhf.text.tokenizer_model import TokenizerModel

VOCAB_FILE = "vocab.txt"
ROLES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
PREFIX = "##"  # begins a piece that continues a word
MAX_CHARS_PER_WORD = 100  # BERT's limit: a longer word becomes [UNK]


class WordPiece(TokenizerModel):
    """BERT word pieces; a text is encoded as [CLS] ... [SEP].

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
        broken = [token for token in self.vocab if "\n" in token or token.endswith("\r")]
        if broken:
            raise ValueError(f"the vocabulary has {broken[0]!r}, a token with a line break")
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
        return {VOCAB_FILE: "\n".join(self.vocab) + "\n"}


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
