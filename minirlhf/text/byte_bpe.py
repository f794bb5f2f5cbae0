"""GPT-2's tokenizer (Radford et al. 2019): byte-pair encoding (Sennrich et al. 2016) over the bytes of UTF-8.

Every text has an encoding and comes back from it byte for byte: the 256 bytes are tokens, and merges make longer ones.
In a vocabulary a byte is written as a visible character, so that a space is "Ġ" (`byte_alphabet`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from minirlhf.text.tokenizer_model import TokenizerModel

VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
MERGES_HEADER = "#version: 0.2"
END_OF_TEXT = "<|endoftext|>"


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a vocabulary -> the byte, as `bytes_to_unicode` of openai/gpt-2.

    Visible Latin-1 characters stand for themselves; the 68 others are the characters from U+0100 on, in their order.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


class ByteBPE(TokenizerModel):
    """GPT-2's byte-level BPE; nothing is added to a text, and a document ends with <|endoftext|>.

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
        roles = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
        if pad_token is not None:
            roles["pad_token"] = pad_token
        super().__init__(vocab, roles, extra_special)
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
        merges = [MERGES_HEADER, *(" ".join(pair) for pair in self.merges)]
        return {VOCAB_FILE: self.ids, MERGES_FILE: "\n".join(merges) + "\n"}

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
