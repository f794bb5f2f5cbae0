"""BPE as `tokenizer.json` describes it: that of Llama, Qwen, SmolLM2, Mistral and others, byte-level or with bytes as a
fallback.

The `tokenizers` package does what the file says, as it does for transformers; this module adds which ids begin a text,
end one, and fill batches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken

from minirlhf.text.tokenizer_models import TokenizerModel, byte_alphabet

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token of one byte in vocabularies that fall back to bytes


class JSONTokenizer(TokenizerModel):
    """A BPE with the rules of a `tokenizer.json`.

    content: of the file; its padding and truncation are ignored.
    roles: what special tokens are for, under the names of transformers; "eos_token" must be there.
    extra_special: more special tokens than `content` and `roles` have.
    Raises ValueError as TokenizerModel, for rules that cannot be read, and for a missing eos_token.
    """

    class_name = "PreTrainedTokenizerFast"

    def __init__(self, content: Mapping[str, Any], roles: Mapping[str, str], extra_special: Sequence[str] = ()):
        self.backend = read_backend({**content, "padding": None, "truncation": None})
        ids = self.backend.get_vocab(with_added_tokens=True)
        tokens = {i: token for token, i in ids.items()}
        vocab = [tokens.get(i, "") for i in range(max(tokens, default=-1) + 1)]
        added = self.backend.get_added_tokens_decoder().values()
        super().__init__(vocab, roles, [*(token.content for token in added if token.special), *extra_special])
        # What has a role is found in a text and left out of a decoded one, also where the file does not say so.
        plain = [self.vocab[i] for i in sorted(self.special_ids) if not _is_special(self.vocab[i], added)]
        self.backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in plain])
        if "eos_token" not in self.roles:
            raise ValueError("no eos_token is named: add it to tokenizer_config.json")
        self.eos_id = self.ids[self.roles["eos_token"]]
        self.pad_id = self.ids[self.roles.get("pad_token", self.roles["eos_token"])]
        encoding = self.backend.encode("a")
        before = next((i for i, special in enumerate(encoding.special_tokens_mask) if not special), len(encoding.ids))
        after = len(encoding.ids) - sum(encoding.special_tokens_mask) + before
        self.opening, self.closing = tuple(encoding.ids[:before]), tuple(encoding.ids[after:])
        self._is_byte_level = '"ByteLevel"' in json.dumps(json.loads(self.backend.to_str())["decoder"])
        self.byte_ids = frozenset(i for i, token in enumerate(self.vocab) if BYTE.fullmatch(token))

    def decode(self, ids: Sequence[int]) -> str:
        """The text as transformers decodes it without special tokens and without cleaning up spaces."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def width(self, token_id: int) -> int:
        """Characters that begin in this token, ASCII white space left out."""
        token, alphabet = self.vocab[token_id], BYTES
        if single := BYTE.fullmatch(token):
            content = bytes([int(single[1], 16)])
        elif self._is_byte_level and all(char in alphabet for char in token):
            content = bytes(alphabet[char] for char in token)
        else:
            content = token.replace("▁", " ").encode("utf-8", "replace")
        return sum(not chr(byte).isspace() for byte in content if not 0x80 <= byte < 0xC0)

    def settings(self) -> dict[str, Any]:
        return {"clean_up_tokenization_spaces": False}

    def vocabulary_files(self) -> dict[str, str | dict[str, Any]]:
        return {}


BYTES = byte_alphabet()


def read_backend(content: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a `tokenizer.json`. Raises ValueError if it cannot be read."""
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        backend.encode("")  # a template may name tokens that are not there
        return backend
    except BaseException as error:  # the package raises nothing more precise, and a panic of Rust is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ValueError(f"not a readable tokenizer: {error}") from error


def _is_special(token: str, added: Iterable[AddedToken]) -> bool:
    return any(one.content == token and one.special for one in added)
