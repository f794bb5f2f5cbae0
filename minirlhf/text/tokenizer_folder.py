"""The tokenizer of a model folder: `tokenizer.json`, or `vocab.json` with `merges.txt`, or `vocab.txt`.

A setting under which a text would get other ids than ours is an error. Settings that change no id are ignored; those
of KEPT are saved again.

A BPE in `tokenizer.json` with other rules than GPT-2's is a JSONTokenizer, which follows the file.

Left out: Unigram, and vocabularies of SentencePiece and tiktoken without a `tokenizer.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minirlhf.io.files import naming, read_json, read_text
from minirlhf.io.hub import locate
from minirlhf.io.model_folder import CONFIG_FILE
from minirlhf.text.tokenizer_json import JSONTokenizer, read_backend
from minirlhf.text.tokenizer_models import (
    BPE_FILE,
    END_OF_TEXT,
    GENERATION_FILE,
    MAX_CHARS_PER_WORD,
    MERGES_FILE,
    PREFIX,
    ROLES,
    SETTINGS_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_FILE,
    WORDPIECE_FILE,
    ByteBPE,
    TokenizerModel,
    WordPiece,
)  # fmt: skip

ADDED_TOKENS_FILE = "added_tokens.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"  # beside or in the place of the setting `chat_template`
# Every file by which a folder can describe a tokenizer of these kinds.
TOKENIZER_FILES = (TOKENIZER_FILE, BPE_FILE, MERGES_FILE, WORDPIECE_FILE, ADDED_TOKENS_FILE, SETTINGS_FILE,
                   SPECIAL_TOKENS_FILE, CHAT_TEMPLATE_FILE)  # fmt: skip

Supported = Mapping[str, Sequence[Any]]  # name -> what it may be; the first value is what a missing name means


@dataclass(frozen=True)
class Kind:
    """What the files of one kind of tokenizer may say."""

    settings: Supported  # of tokenizer_config.json and special_tokens_map.json; the others are parts of tokenizer.json
    model: Supported
    normalizer: Supported
    pre_tokenizer: Supported
    added_token: Supported


# Setting -> the types that it may have.
KEPT: dict[str, Any] = {
    "model_max_length": (int, float),
    "padding_side": str,
    "truncation_side": str,
    "model_input_names": list,
    "chat_template": (str, list, dict),
}
COMMON = {"split_special_tokens": (False,)}
BERT_CLASSES = ("BertTokenizer", "BertTokenizerFast")
ANY_CLASS = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
ADDED_TOKEN = {"special": (True,), "lstrip": (False,), "rstrip": (False,), "single_word": (False,)}

WORDPIECE = Kind(
    settings={
        **COMMON,
        "tokenizer_class": (*ANY_CLASS, *BERT_CLASSES),
        **{name: (True, False) for name in ("do_lower_case", "tokenize_chinese_chars")},
        "strip_accents": (None, True, False),
        "do_basic_tokenize": (True,),
        "never_split": (None, []),
        **{role: (token, None) for role, token in ROLES.items()},
        **{role: (None, *ROLES.values()) for role in ("bos_token", "eos_token")},
    },
    model={
        "unk_token": ("[UNK]",),
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
        **{name: (False, None) for name in ("add_bos_token", "add_eos_token")},
        "errors": ("replace",),
        **{role: (END_OF_TEXT, None) for role in ("bos_token", "eos_token", "unk_token")},
        **{role: (None,) for role in ("sep_token", "cls_token", "mask_token")},
    },
    model={
        "dropout": (None, 0.0),
        **{name: (None, "") for name in ("continuing_subword_prefix", "end_of_word_suffix")},
        **{name: (False,) for name in ("byte_fallback", "ignore_merges")},
    },
    normalizer={"type": (None,)},
    pre_tokenizer={"type": ("ByteLevel",), "add_prefix_space": (False,), "use_regex": (True,)},
    added_token=ADDED_TOKEN,
)
# Of a JSONTokenizer the file decides; left are settings that change ids in spite of it.
JSON_BPE = Kind(settings=COMMON, model={"dropout": (None, 0.0)}, normalizer={}, pre_tokenizer={}, added_token={})
KINDS = {"WordPiece": WORDPIECE, "BPE": BYTE_BPE}  # by their names in tokenizer.json


def read_tokenizer(folder: str | os.PathLike[str]) -> TokenizerModel:
    """Read `tokenizer.json`, else `vocab.json` with `merges.txt`, else `vocab.txt`, and the settings of a model folder.

    Raises FileNotFoundError that lists what was looked for, or ValueError with the file for a damaged file, and for a
    tokenizer or a setting that is not supported.
    """
    folder = locate(folder)
    model = _read(folder)
    _read_stop_ids(folder, model)
    settings = read_json(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}
    model.kept = {name: settings[name] for name in KEPT if settings.get(name) is not None}
    for name, value in model.kept.items():
        if isinstance(value, bool) or not isinstance(value, KEPT[name]):
            raise ValueError(f"{folder / SETTINGS_FILE}: {name} has a value of the wrong type, {value!r:.80}")
    if (folder / CHAT_TEMPLATE_FILE).is_file():  # counts before the setting, as in transformers
        model.kept = {**model.kept, "chat_template": read_text(folder / CHAT_TEMPLATE_FILE)}
    return model


def _read(folder: Path) -> TokenizerModel:
    there = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if TOKENIZER_FILE in there:
        return _from_tokenizer_json(folder)
    if ADDED_TOKENS_FILE in there and read_json(folder / ADDED_TOKENS_FILE):
        raise ValueError(f"{folder / ADDED_TOKENS_FILE} adds tokens, but only those in {TOKENIZER_FILE} are supported")
    if BPE_FILE in there and MERGES_FILE in there:
        return _from_vocab_and_merges(folder)
    if WORDPIECE_FILE in there:
        return _from_vocab_txt(folder)
    raise FileNotFoundError(
        f"{folder} holds no tokenizer: looked for {TOKENIZER_FILE}, for {BPE_FILE} with {MERGES_FILE}, and "
        f"for {WORDPIECE_FILE}; found {', '.join(there) or 'none of them'}"
    )


def _from_vocab_txt(folder: Path) -> WordPiece:
    path = folder / WORDPIECE_FILE
    lines = _read_lines(path)
    while lines and lines[-1] == "":
        lines.pop()
    last = {token: i for i, token in enumerate(lines)}  # of a token on two lines the second counts, as in transformers
    vocab = [token if last[token] == i else "" for i, token in enumerate(lines)]
    settings, special = read_settings(folder, WORDPIECE)
    with naming(path):
        return _wordpiece(vocab, settings, special)


def _from_vocab_and_merges(folder: Path) -> ByteBPE:
    path, merges_path = folder / BPE_FILE, folder / MERGES_FILE
    ids, lines = read_json(path), _read_lines(merges_path)
    with naming(merges_path):
        merges = _pairs(lines[1:] if lines and lines[0].startswith("#version") else lines)
    settings, special = read_settings(folder, BYTE_BPE)
    with naming(f"{path} with {MERGES_FILE}"):
        return ByteBPE(_in_order(ids), merges, settings.get("pad_token"), special)


def _from_tokenizer_json(folder: Path) -> TokenizerModel:
    path = folder / TOKENIZER_FILE
    content = read_json(path)
    name = _model_type(content)
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"{path} holds a tokenizer of the type {name!r}; only {' and '.join(KINDS)} are supported")
    kind = KINDS[name]
    with naming(path):
        rules, frame = _rules(content)
    if kind is BYTE_BPE and not _is_gpt2(folder, rules, frame):
        kind = JSON_BPE
    with naming(path):
        _check_rules(rules, kind)
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        vocab = _in_order(_joined(content["model"].get("vocab"), added), gaps=kind is not BYTE_BPE)
        merges = _pairs(content["model"].get("merges")) if kind is not WORDPIECE else []
    settings, special = read_settings(folder, kind)
    with naming(path):
        if kind is JSON_BPE:
            return _json_tokenizer(folder, content, rules, settings, special)
        if kind is BYTE_BPE:
            return ByteBPE(vocab, merges, settings.get("pad_token"), [*added, *special])
        if not _is_bert(folder, settings):
            found = rules["normalizer"]
            settings = {"do_lower_case": found["lowercase"], "strip_accents": found["strip_accents"],
                        "tokenize_chinese_chars": found["handle_chinese_chars"]}  # fmt: skip
        model = _wordpiece(vocab, settings, [*added, *special])
        expected = [*model.opening, *model.closing]
        brings_its_own = rules["post_processor"] is None  # BertTokenizer's is always the same
        if frame != expected and not brings_its_own:
            raise ValueError(f"post_processor puts the ids {frame} around a text; only {expected} is supported")
    return model


def _check_rules(rules: Mapping[str, Any], kind: Kind) -> None:
    for part in ("model", "normalizer", "pre_tokenizer"):
        check(rules[part] or {"type": None}, getattr(kind, part), part)
    for token in rules["added_tokens"]:
        check(token, kind.added_token, f"the added token {token['content']!r}")


def _is_gpt2(folder: Path, rules: Mapping[str, Any], frame: Sequence[int]) -> bool:
    """Whether a BPE is GPT-2's: its rules, nothing around a text, and <|endoftext|> in every role."""
    try:
        _check_rules(rules, BYTE_BPE)
        read_settings(folder, BYTE_BPE)
    except ValueError:
        return False
    return not frame


def _json_tokenizer(
    folder: Path, content: Mapping[str, Any], rules: Mapping[str, Any], settings: Mapping[str, Any], special: list[str]
) -> JSONTokenizer:
    """Roles come from tokenizer_config.json, or as ids from generation_config.json, or config.json.

    What stands around a text is in tokenizer.json: beside it, transformers ignores add_bos_token and add_eos_token.
    """
    if settings.get("tokenizer_class") in BERT_CLASSES:
        raise ValueError(f"{SETTINGS_FILE} has tokenizer_class={settings['tokenizer_class']!r}, but this is a BPE")
    if settings.get("add_prefix_space") is True and '"add_prefix_space": false' in json.dumps(rules["pre_tokenizer"]):
        raise ValueError(f"{SETTINGS_FILE} has add_prefix_space=True, which {TOKENIZER_FILE} contradicts")
    roles = {name: value for name, value in settings.items() if name.endswith("_token") and isinstance(value, str)}
    tokens = {i: token for token, i in content["model"]["vocab"].items()}
    tokens |= {token["id"]: token["content"] for token in content.get("added_tokens") or ()}
    for role in ("eos_token", "pad_token"):
        for name in (GENERATION_FILE, CONFIG_FILE):
            ids = [i for i in _ids_in(folder / name, f"{role}_id") if i in tokens]
            if role not in roles and ids:
                roles[role] = tokens[ids[0]]
    return JSONTokenizer(content, roles, special)


def _read_stop_ids(folder: Path, model: TokenizerModel) -> None:
    """Note the content of generation_config.json, and its ids that end a text; ids of no token are ignored."""
    path = folder / GENERATION_FILE
    if path.is_file():
        model.generation = read_json(path)
        model.stop_ids = tuple(i for i in _ids_in(path, "eos_token_id") if i < len(model.vocab))


def _ids_in(path: Path, name: str) -> list[int]:
    """The ids that a config file has under a name, one or a list; none if it has not. Raises ValueError for others."""
    found = read_json(path).get(name) if path.is_file() else None
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"{path}: {name} must be an id or a list of ids, got {found!r:.80}")
    return ids


def _wordpiece(vocab: Sequence[str], settings: Mapping[str, Any], special: Sequence[str]) -> WordPiece:
    options = ("do_lower_case", "tokenize_chinese_chars", "strip_accents")
    return WordPiece(vocab, **{name: settings[name] for name in options if name in settings}, extra_special=special)


def _model_type(content: Mapping[str, Any]) -> Any:
    """The type of tokenizer in a `tokenizer.json`, "BPE" for one; files of the first years do not name it."""
    model = content.get("model")
    if not isinstance(model, dict):
        return None
    guess = "BPE" if "merges" in model else "WordPiece" if "max_input_chars_per_word" in model else None
    return model.get("type", guess)


def _rules(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """A `tokenizer.json` without its vocabulary, every field filled in, and the ids that it puts around a text."""
    model = {**content["model"], "vocab": {}}
    if "merges" in model:
        model["merges"] = []
    backend = read_backend({**content, "model": model, "padding": None, "truncation": None})
    return json.loads(backend.to_str()), backend.encode("").ids


def _is_bert(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether transformers loads a folder as its BertTokenizer, which ignores the normalizer of `tokenizer.json`."""
    name = settings.get("tokenizer_class")
    if name is None and (folder / CONFIG_FILE).is_file():
        config = read_json(folder / CONFIG_FILE)
        name = config.get("tokenizer_class") or ("BertTokenizer" if config.get("model_type") == "bert" else None)
    return name in BERT_CLASSES


def _joined(vocab: Any, added: Mapping[str, int]) -> dict[str, Any]:
    """Token -> id, with the added tokens, which may be in the vocabulary already."""
    if not isinstance(vocab, dict):
        raise ValueError(f"the vocabulary must be a JSON object of token ids, got a {type(vocab).__name__}")
    for token, i in added.items():
        if vocab.get(token, i) != i:
            raise ValueError(f"the added token {token!r} has the id {i}, but {vocab[token]} in the vocabulary")
    return {**vocab, **added}


def _in_order(ids: Mapping[str, Any], gaps: bool = False) -> list[str]:
    """The tokens by id. Raises ValueError unless the ids are 0, 1, 2, ... without a gap.

    gaps: whether ids may be missing, at most as many as there are tokens; "" stands at their places.
    """
    tokens: dict[int, str] = {}
    for token, i in ids.items():
        if type(i) is not int:
            raise ValueError(f"the token {token!r} has the id {i!r}, which is not a whole number")
        if tokens.setdefault(i, token) != token:
            raise ValueError(f"the tokens {tokens[i]!r} and {token!r} have the same id {i}")
    if gaps and tokens and min(tokens) >= 0 and max(tokens) < 2 * len(tokens):
        return [tokens.get(i, "") for i in range(max(tokens) + 1)]
    missing = [i for i in range(len(tokens)) if i not in tokens]
    if missing:
        raise ValueError(f"{len(tokens)} tokens must have the ids 0 to {len(tokens) - 1}, but {missing[0]} is missing")
    return [tokens[i] for i in range(len(tokens))]


def _pairs(merges: Any) -> list[tuple[str, str]]:
    """Merges as pairs of tokens; files have them as pairs, or as texts with a space between."""
    pairs = []
    for number, merge in enumerate(merges if isinstance(merges, list) else [merges], 1):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) and part for part in parts)):
            raise ValueError(f"merge {number} must be two tokens, got {merge!r}")
        pairs.append((parts[0], parts[1]))
    return pairs


def _read_lines(path: Path) -> list[str]:
    """The lines of a text file. Only line feeds end one: tokens hold other characters that `str.splitlines` cuts at."""
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.rstrip("\r") for line in lines]


def read_settings(folder: Path, kind: Kind) -> tuple[dict[str, Any], list[str]]:
    """The settings of both files, a token as its text, and the special tokens that are named in lists of their own."""
    settings: dict[str, Any] = {}
    special: list[str] = []
    for path in (folder / SETTINGS_FILE, folder / SPECIAL_TOKENS_FILE):
        if not path.is_file():
            continue
        content = read_json(path)
        for name in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
            listed = content.pop(name, None) or []
            if not isinstance(listed, (list, dict)):
                raise ValueError(f"{path}: {name} must be a list or an object, got {listed!r:.80}")
            for token in listed.values() if isinstance(listed, dict) else listed:
                if kind is JSON_BPE and name == "added_tokens_decoder":  # tokenizer.json has them, with their flags
                    continue
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
        raise ValueError(f"{where} must hold the text of a token, got {token!r:.80}")
    return token
