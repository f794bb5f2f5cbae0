"""The tokenizer of a model folder: `tokenizer.json`, or `vocab.json` with `merges.txt`, or `vocab.txt`.

Left out: Unigram and SentencePiece, other ways to split a text than BERT's and GPT-2's, and added tokens that are not
special.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from minirlhf.io.files import read_json
from minirlhf.io.hub import locate
from minirlhf.text import byte_bpe, wordpiece
from minirlhf.text.byte_bpe import MERGES_FILE, ByteBPE
from minirlhf.text.tokenizer_model import SETTINGS_FILE, SPECIAL_TOKENS_FILE, TOKENIZER_FILE, TokenizerModel
from minirlhf.text.tokenizer_settings import BYTE_BPE, KEPT, WORDPIECE, check, read_settings
from minirlhf.text.wordpiece import WordPiece

ADDED_TOKENS_FILE = "added_tokens.json"
# Every file by which a folder can describe a tokenizer of these kinds.
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    byte_bpe.VOCAB_FILE,
    MERGES_FILE,
    wordpiece.VOCAB_FILE,
    ADDED_TOKENS_FILE,
    SETTINGS_FILE,
    SPECIAL_TOKENS_FILE,
)
KINDS = {"WordPiece": WORDPIECE, "BPE": BYTE_BPE}  # by their names in tokenizer.json


def read_tokenizer(folder: str | os.PathLike[str]) -> TokenizerModel:
    """Read the tokenizer of a model folder: `tokenizer.json`, else `vocab.json` with `merges.txt`, else `vocab.txt`.

    `tokenizer_config.json` and `special_tokens_map.json`, where they are, say the rest.
    Raises FileNotFoundError that lists what was looked for, or ValueError with the file for a damaged file, and for a
    tokenizer or a setting that is not supported.
    """
    folder = locate(folder)
    model = _read(folder)
    settings = read_json(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}
    model.kept = {name: settings[name] for name in KEPT if name in settings}
    return model


def _read(folder: Path) -> TokenizerModel:
    there = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if TOKENIZER_FILE in there:
        return _from_tokenizer_json(folder)
    if ADDED_TOKENS_FILE in there and read_json(folder / ADDED_TOKENS_FILE):
        raise ValueError(f"{folder / ADDED_TOKENS_FILE} adds tokens, but only those in {TOKENIZER_FILE} are supported")
    if byte_bpe.VOCAB_FILE in there and MERGES_FILE in there:
        return _from_vocab_and_merges(folder)
    if wordpiece.VOCAB_FILE in there:
        return _from_vocab_txt(folder)
    raise FileNotFoundError(
        f"{folder} holds no tokenizer: looked for {TOKENIZER_FILE}, for {byte_bpe.VOCAB_FILE} with {MERGES_FILE}, and "
        f"for {wordpiece.VOCAB_FILE}; found {', '.join(there) or 'none of them'}"
    )


# ---- the three layouts ----------------------------------------------------------------------------------------------


def _from_vocab_txt(folder: Path) -> WordPiece:
    path = folder / wordpiece.VOCAB_FILE
    vocab = _read_lines(path)
    settings, special = read_settings(folder, WORDPIECE)
    with _naming(path):
        return _wordpiece(vocab, settings, special)


def _from_vocab_and_merges(folder: Path) -> ByteBPE:
    path, merges_path = folder / byte_bpe.VOCAB_FILE, folder / MERGES_FILE
    ids, lines = read_json(path), _read_lines(merges_path)
    with _naming(merges_path):
        merges = _pairs(lines[1:] if lines and lines[0].startswith("#version") else lines)
    settings, special = read_settings(folder, BYTE_BPE)
    with _naming(f"{path} with {MERGES_FILE}"):
        return _byte_bpe(_in_order(ids), merges, settings, special)


def _from_tokenizer_json(folder: Path) -> TokenizerModel:
    path = folder / TOKENIZER_FILE
    content = read_json(path)
    name = _model_type(content)
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"{path} holds a tokenizer of the type {name!r}; only {' and '.join(KINDS)} are supported")
    kind = KINDS[name]
    with _naming(path):
        rules, frame = _rules(content)
        for part in ("model", "normalizer", "pre_tokenizer"):
            check(rules[part] or {"type": None}, getattr(kind, part), part)
        for token in rules["added_tokens"]:
            check(token, kind.added_token, f"the added token {token['content']!r}")
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        vocab = _in_order(_joined(content["model"].get("vocab"), added))
        merges = _pairs(content["model"].get("merges")) if kind is BYTE_BPE else []
    settings, special = read_settings(folder, kind)
    with _naming(path):
        if kind is BYTE_BPE:
            model: TokenizerModel = _byte_bpe(vocab, merges, settings, [*added, *special])
        else:
            model = _wordpiece(vocab, {**_bert_options(rules["normalizer"]), **settings}, [*added, *special])
        expected = [*model.opening, *model.closing]
        brings_its_own = kind is WORDPIECE and rules["post_processor"] is None  # BertTokenizer's is always the same
        if frame != expected and not brings_its_own:
            raise ValueError(f"post_processor puts the ids {frame} around a text; only {expected} is supported")
    return model


def _wordpiece(vocab: Sequence[str], settings: Mapping[str, Any], special: Sequence[str]) -> WordPiece:
    options = ("do_lower_case", "tokenize_chinese_chars", "strip_accents")
    return WordPiece(vocab, **{name: settings[name] for name in options if name in settings}, extra_special=special)


def _byte_bpe(
    vocab: Sequence[str], merges: Sequence[tuple[str, str]], settings: Mapping[str, Any], special: Sequence[str]
) -> ByteBPE:
    return ByteBPE(vocab, merges, settings.get("pad_token"), special)


# ---- parts of files -------------------------------------------------------------------------------------------------


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
    bare = {**content, "model": model, "padding": None, "truncation": None}
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(bare))
        return json.loads(backend.to_str()), backend.encode("").ids
    except BaseException as error:  # the package raises nothing more precise, and a panic of Rust is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ValueError(f"not a readable tokenizer: {error}") from error


def _bert_options(normalizer: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of BertTokenizer in the normalizer of a `tokenizer.json`."""
    return {
        "do_lower_case": normalizer["lowercase"],
        "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        "strip_accents": normalizer["strip_accents"],
    }


def _joined(vocab: Any, added: Mapping[str, int]) -> dict[str, Any]:
    """Token -> id, with the added tokens, which may be in the vocabulary already."""
    if not isinstance(vocab, dict):
        raise ValueError(f"the vocabulary must be a JSON object of token ids, got a {type(vocab).__name__}")
    for token, i in added.items():
        if vocab.get(token, i) != i:
            raise ValueError(f"the added token {token!r} has the id {i}, but {vocab[token]} in the vocabulary")
    return {**vocab, **added}


def _in_order(ids: Mapping[str, Any]) -> list[str]:
    """The tokens by id. Raises ValueError unless the ids are 0, 1, 2, ... without a gap."""
    tokens: dict[int, str] = {}
    for token, i in ids.items():
        if type(i) is not int:
            raise ValueError(f"the token {token!r} has the id {i!r}, which is not a whole number")
        if tokens.setdefault(i, token) != token:
            raise ValueError(f"the tokens {tokens[i]!r} and {token!r} have the same id {i}")
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
    """The lines of a text file; unlike with `str.splitlines`, only line feeds end one: tokens hold other separators."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8: {error}") from error
    if lines[-1] == "":
        lines.pop()
    return [line.rstrip("\r") for line in lines]


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """A ValueError within it gets the name of the file that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
