"""Prompts as users have them: any collection of texts or chats, or a file."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minirlhf.text.chat import ChatPrompt, Message, check_prompt
from minirlhf.text.text_files import check_plain, json_object, lines_of, listed, numbered_lines, parsed, text_of
from minirlhf.text.tokenizer import Tokenizer, require_tokenizer

Prompt = str | list[Message]  # a text, or the messages of a chat that the model answers
FIELDS = ("prompt", "messages")  # of a line of .jsonl; the first one that is there counts
DATA_FILES = (".txt", ".text", ".json", ".jsonl", ".csv", ".tsv", ".parquet")  # how their names end
EXAMPLE = 'give a list of texts, such as ["酒店", "The room"], or pathlib.Path("prompts.txt") for a file'


def as_prompts(prompts: Iterable[Prompt] | os.PathLike[str], tokenizer: Tokenizer | None = None) -> list[str]:
    """Prompts as a list of texts: from a list, tuple, set, generator, pandas Series or datasets column, or a file.

    An element that is a list of messages becomes a text, a `ChatPrompt`, by the template of the tokenizer's folder.
    A set is sorted, so that its order is the same in every process. A path is read by `read_prompts`, and an open text
    file as a `.txt` there.
    Raises ValueError for anything else, naming its type or the first element that is not a text, for no prompts, and
    as `Tokenizer.chat`.
    """
    if isinstance(prompts, os.PathLike):
        prompts = read_prompts(prompts)
    elif isinstance(prompts, io.TextIOBase):
        lines = lines_of(prompts.read())
        check_plain(getattr(prompts, "name", "the open file"), lines, *FIELDS)
        prompts = [line for _, line in lines]
    found: list[Any] = listed(prompts, "prompts", EXAMPLE, "prompt")
    for i, prompt in enumerate(found):
        if isinstance(prompt, (list, tuple)) and prompt and all(isinstance(message, Mapping) for message in prompt):
            if tokenizer is None:
                raise ValueError(f"prompt {i} is a chat, and only texts can be given here")
            found[i] = tokenizer.chat_prompt(check_prompt(prompt))
        elif not isinstance(prompt, str):
            got = f"{prompt!r:.80} of type {type(prompt).__name__}"
            raise ValueError(f"prompt {i} must be a text, got {got}: {EXAMPLE}")
    if not found:
        raise ValueError(f"got no prompts: {EXAMPLE}")
    return [prompt if isinstance(prompt, ChatPrompt) else str(prompt) for prompt in found]  # of numpy's texts, too


def require_room(prompts: Iterable[str], tokenizer: Tokenizer, positions: int, gen_len: int) -> None:
    """Raise ValueError for a prompt that leaves no room for `gen_len` tokens in a model's positions.

    Also for a tokenizer of another library.
    """
    require_tokenizer(tokenizer)
    room = max(0, positions - gen_len)
    for prompt in prompts:
        if (length := len(tokenizer.encode_prompt(prompt))) > room:
            said = f"the model's {positions} positions less gen_len={gen_len} leave room for {room}"
            raise ValueError(f"prompt {prompt[:20]!r}... has {length} tokens; {said}")


def read_prompts(path: str | os.PathLike[str], encoding: str = "utf-8") -> list[Prompt]:
    """The prompts of a file, empty lines left out: a text file holds a prompt a line, `.jsonl` an object a line.

    The object has `prompt`, a text or the messages of a chat, or else it has `messages`.
    encoding: of the file; a byte-order mark and all kinds of line ends are accepted.
    Raises FileNotFoundError, ValueError that names file and line and what is wrong there, or another kind of file.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in ("", ".txt", ".text", ".jsonl"):
        raise ValueError(f"{path} must be .txt (a prompt a line) or .jsonl (objects with a prompt), not {kind}")
    lines = numbered_lines(path, encoding)
    if kind != ".jsonl":
        check_plain(path, lines, *FIELDS)
    return parsed(path, lines, lambda line: [_prompt_of(line) if kind == ".jsonl" else line], "prompts")


def read_pool(prompts: Sequence[Prompt], encoding: str = "utf-8") -> list[Prompt]:
    """The prompts of a command line: those given, or of a single one that names a file, those in it.

    Prompts that all end as files of data do are names as well: a misspelt one is no prompt.
    Raises as `read_prompts`, and ValueError for a file or folder among several prompts, or several names.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    ending = [text for text in texts if text.lower().endswith(DATA_FILES)]
    named = [text for text in texts if os.path.exists(text)] or (ending if len(ending) == len(prompts) else [])
    if named and len(prompts) == 1:
        return read_prompts(named[0], encoding)
    if named:
        raise ValueError(
            f"prompts must be texts, or one file: {named[0]!r:.80}, one of {len(prompts)}, names a file or folder; a "
            "prompt that does so can stand in a file"
        )
    return list(prompts)


def _prompt_of(line: str) -> Prompt:
    content = json_object(line)
    chat = content.get("prompt") or content.get("messages")
    if isinstance(chat, list):
        return check_prompt(chat)
    if "prompt" not in content:
        raise ValueError(f"prompt missing; the line has {', '.join(map(repr, list(content)[:5])) or 'no fields'}")
    return text_of(content, "prompt")
