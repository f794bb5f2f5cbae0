"""What the files of a tokenizer may say, kind by kind.

A setting under which a text would get other ids than ours is an error that names the file, the setting and what is
supported. Settings that change no id are passed over; those of KEPT are saved again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minirlhf.io.files import read_json
from minirlhf.text.byte_bpe import END_OF_TEXT
from minirlhf.text.tokenizer_model import SETTINGS_FILE, SPECIAL_TOKENS_FILE
from minirlhf.text.wordpiece import MAX_CHARS_PER_WORD, PREFIX, ROLES

Supported = Mapping[str, Sequence[Any]]  # name -> what it may be; the first value is what a missing name means


@dataclass(frozen=True)
class Kind:
    """What the files of one kind of tokenizer may say.

    settings: of `tokenizer_config.json` and `special_tokens_map.json`. model, normalizer, pre_tokenizer, added_token:
    of these parts of `tokenizer.json`.
    """

    settings: Supported
    model: Supported
    normalizer: Supported
    pre_tokenizer: Supported
    added_token: Supported


KEPT = ("model_max_length", "padding_side", "truncation_side", "model_input_names", "chat_template")
COMMON = {"split_special_tokens": (False,)}
ANY_CLASS = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
ADDED_TOKEN = {"special": (True,), "lstrip": (False,), "rstrip": (False,), "single_word": (False,)}

WORDPIECE = Kind(
    settings={
        **COMMON,
        "tokenizer_class": (*ANY_CLASS, "BertTokenizer", "BertTokenizerFast"),
        "do_lower_case": (True, False),
        "tokenize_chinese_chars": (True, False),
        "strip_accents": (None, True, False),
        "do_basic_tokenize": (True,),
        "never_split": (None, []),
        **{role: (token, None) for role, token in ROLES.items()},
        **{role: (None, *ROLES.values()) for role in ("bos_token", "eos_token")},
    },
    model={
        "unk_token": (ROLES["unk_token"],),
        "continuing_subword_prefix": (PREFIX,),
        "max_input_chars_per_word": (MAX_CHARS_PER_WORD,),
    },
    normalizer={"type": ("BertNormalizer",), "clean_text": (True,)},
    pre_tokenizer={"type": ("BertPreTokenizer",)},
    added_token={**ADDED_TOKEN, "normalized": (False,)},  # else a "[sep]" that became small would be special
)

BYTE_BPE = Kind(
    settings={
        **COMMON,
        "tokenizer_class": (*ANY_CLASS, "GPT2Tokenizer", "GPT2TokenizerFast"),
        "add_prefix_space": (False,),
        "add_bos_token": (False, None),
        "add_eos_token": (False, None),
        "errors": ("replace",),
        **{role: (END_OF_TEXT, None) for role in ("bos_token", "eos_token", "unk_token")},
        **{role: (None,) for role in ("sep_token", "cls_token", "mask_token")},
    },
    model={
        "dropout": (None, 0.0),
        "continuing_subword_prefix": (None, ""),
        "end_of_word_suffix": (None, ""),
        "byte_fallback": (False,),
        "ignore_merges": (False,),
    },
    normalizer={"type": (None,)},
    pre_tokenizer={"type": ("ByteLevel",), "add_prefix_space": (False,), "use_regex": (True,)},
    added_token=ADDED_TOKEN,
)


def read_settings(folder: Path, kind: Kind) -> tuple[dict[str, Any], list[str]]:
    """Read `tokenizer_config.json` and `special_tokens_map.json`, where they are.

    Returns the settings, a token as its text, and the special tokens that are named in lists of their own.
    Raises ValueError with the file for a damaged one, or a value that is not supported.
    """
    settings: dict[str, Any] = {}
    special: list[str] = []
    for path in (folder / SETTINGS_FILE, folder / SPECIAL_TOKENS_FILE):
        if not path.is_file():
            continue
        content = read_json(path)
        for name in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
            listed = content.pop(name, None) or []
            for token in listed.values() if isinstance(listed, dict) else listed:
                special.append(_token_text(token, kind, f"{path}: {name}"))
        for name, value in content.items():
            if name.endswith("_token") and value is not None and not isinstance(value, bool):
                content[name] = _token_text(value, kind, f"{path}: {name}")
        check(content, kind.settings, str(path))
        settings |= content
    return settings, special


def check(content: Mapping[str, Any], supported: Supported, where: str) -> None:
    """Raise ValueError for the first name whose value is not supported."""
    for name, allowed in supported.items():
        value = content.get(name, allowed[0])
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            choices = " or ".join(repr(choice) for choice in allowed)
            raise ValueError(f"{where} has {name}={value!r:.200}; only {choices} is supported")


def _token_text(token: Any, kind: Kind, where: str) -> str:
    """The text of a token that a file has as a text, or as an object with its flags."""
    if isinstance(token, dict):
        check(token, kind.added_token, where)
        token = token.get("content")
    if not isinstance(token, str):
        raise ValueError(f"{where} must hold the text of a token, got {token!r}")
    return token
