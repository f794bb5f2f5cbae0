"""Demonstrations, the data of stage 1 of InstructGPT (Ouyang et al. 2022): texts, prompts with a response, or chats.

- `.txt`, a text a line.
- `.jsonl`, an object a line: `{"text": ...}`, `{"prompt": ..., "response": ...}`, or
  `{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}`. Other keys are
  ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minirlhf.io.files import StrPath
from minirlhf.text.chat import ASSISTANT, Message, check_messages
from minirlhf.text.text_files import check_plain, json_object, numbered_lines, parsed, split_by_hash, text_of


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response that a model learns to write after it, with its end.

    prompt: "" if the response is a text of its own. response: a text that is not blank.
    Raises ValueError for a bad field.
    """

    prompt: str
    response: str

    def __post_init__(self) -> None:
        for name in ("prompt", "response"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise ValueError(f"{name} must be a text, got a {type(value).__name__}")
        if not self.response.strip():
            raise ValueError("the response is empty" if self.prompt else "the text is empty")


@dataclass(frozen=True)
class Conversation:
    """A chat whose turns by the assistant a model learns to write, by the template of its folder.

    messages: dicts with "role" and "content", at least one of them by the assistant.
    Raises ValueError for bad messages.
    """

    messages: Sequence[Message]

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", check_messages(self.messages))
        if not any(message["role"] == ASSISTANT and message["content"].strip() for message in self.messages):
            raise ValueError("no message is the assistant's, with something in it: there is nothing to learn")


def read_demonstrations(path: StrPath, encoding: str = "utf-8") -> list[Demonstration | Conversation]:
    """Read a file of texts (`.txt`, `.jsonl`), pairs or chats (`.jsonl`); empty lines are skipped.

    encoding: of the file; a byte-order mark and both kinds of line ends are accepted.
    Raises FileNotFoundError, or ValueError that names file, line and problem.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise ValueError(f"{path} must be named .txt (a text a line) or .jsonl (texts, or prompts and responses)")
    lines = numbered_lines(path, encoding)
    if kind == ".jsonl":
        return parsed(path, lines, lambda line: [_from_json(line)], "texts")
    check_plain(path, lines, "text", "prompt", "messages")
    return parsed(path, lines, lambda line: [Demonstration("", line)] if line.strip() else [], "texts")


def split_demonstrations(
    demonstrations: Sequence[Demonstration | Conversation], share: float = 0.1
) -> tuple[list[Demonstration | Conversation], list[Demonstration | Conversation]]:
    """Hold out a share: (train, held_out), in the order given, by SHA-256 and no random seed.

    All demonstrations of a prompt, all copies of a text, and all chats with one first question fall on one side.
    Raises ValueError for a share outside (0, 1), or a side that stays empty.
    """
    return split_by_hash(demonstrations, _about, share)


def _about(one: Demonstration | Conversation) -> str:
    if isinstance(one, Demonstration):
        return one.prompt or one.response
    asked = [message["content"] for message in one.messages if message["role"] == "user"]
    return asked[0] if asked else one.messages[0]["content"]


def _from_json(line: str) -> Demonstration | Conversation:
    content = json_object(line)
    if "messages" in content:
        return Conversation(content["messages"])
    if "text" in content:
        if "response" in content or content.get("prompt"):
            raise ValueError("a line has either a text, or a prompt and a response, not both")
        return Demonstration("", text_of(content, "text"))
    missing = [key for key in ("prompt", "response") if key not in content]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing; a line has a text, or a prompt and a response")
    return Demonstration(text_of(content, "prompt"), text_of(content, "response"))
