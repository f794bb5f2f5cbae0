"""Chats: messages as the text that a model was trained on, by the `chat_template` of its folder.

The template is a program of strangers in Jinja (extra `chat`). It runs in Jinja's immutable sandbox, with the filters,
functions and white space rules of transformers' `apply_chat_template`, whose text it gives.

Left out: tools, documents, images, and templates beside the default one.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from minirlhf.common.text import printable

ASSISTANT = "assistant"
Message = dict[str, Any]  # "role" and "content", both texts, and whatever else the template reads


class ChatPrompt(str):
    """A chat as the text of its template, up to where the assistant answers; a tokenizer adds nothing to it.

    messages: what it was made from, for rewards that look at them.
    """

    messages: list[Message]

    @classmethod
    def of(cls, text: str, messages: Sequence[Message]) -> ChatPrompt:
        """The text of these messages."""
        prompt = cls(text)
        prompt.messages = list(messages)
        return prompt


def check_messages(messages: object) -> list[Message]:
    """Messages as a list of dicts. Raises ValueError that names the message and what is wrong with it."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages must be a list of objects with role and content, got {messages!r:.80}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} must be an object with role and content, got {message!r:.80}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                got = f"got {message[key]!r:.80}" if key in message else f"it has {', '.join(map(repr, message))}"
                raise ValueError(f"message {number} must have a text as its {key}, {got}")
    return [dict(message) for message in messages]


def check_prompt(messages: object) -> list[Message]:
    """Messages that an assistant answers. Raises ValueError as `check_messages`, and if its answer is there already."""
    found = check_messages(messages)
    if found[-1]["role"] == ASSISTANT:
        raise ValueError("the last message is the assistant's; a prompt ends with what it is to answer")
    return found


def default_template(chat_template: object) -> str:
    """The template in a folder's `chat_template`: a text, or the one named default of several.

    Raises ValueError if there is none.
    """
    named: Any = chat_template
    if isinstance(named, list):  # as the files have it: a list of objects
        named = {entry.get("name"): entry.get("template") for entry in named if isinstance(entry, Mapping)}
    found = named.get("default") if isinstance(named, Mapping) else named
    if not isinstance(found, str):
        if named:
            raise ValueError(f"of its chat templates none is named default: {', '.join(map(str, named))}")
        raise ValueError(
            "the model's folder has no chat_template, in tokenizer_config.json or chat_template.jinja: it is no chat "
            "model; give prompts as texts (`minirlhf generate`), or add the template that it was trained with"
        )
    return found


def render(template: str, messages: Sequence[Message], special: Mapping[str, str], add_generation_prompt: bool) -> str:
    """The text of a chat. special: names of special tokens ("bos_token") -> the tokens.

    Raises ValueError for a template that fails or refuses the messages, ImportError without jinja2.
    """
    try:
        compiled = _compiled(template)
        return compiled.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **special
        )
    except ImportError:
        raise
    except Exception as error:  # whatever a program of strangers may raise
        raise ValueError(f"the chat_template does not take these messages: {type(error).__name__}: {error}") from error


def assistant_turns(template: str, messages: Sequence[Message], special: Mapping[str, str]) -> list[tuple[str, bool]]:
    """A whole chat in pieces, and of each whether the assistant wrote it; joined they are the chat's text.

    A turn of the assistant begins where the template asks for its answer.
    Raises ValueError as `render`, for a chat without a turn of the assistant, and for a template that writes earlier
    turns differently once later ones follow.
    """
    whole = render(template, messages, special, False)
    pieces: list[tuple[str, bool]] = []
    done = 0
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = render(template, messages[:number], special, True)
        after = render(template, messages[: number + 1], special, False)
        if not (len(before) >= done and whole.startswith(before) and whole.startswith(after)):
            raise ValueError(
                f"the chat_template writes message {number + 1} differently once others follow (thinking that is left "
                "out of earlier turns, for instance); give a chat for each turn of the assistant, ending with it"
            )
        pieces += [(whole[done : len(before)], False), (after[len(before) :], True)]
        done = len(after)
    if not pieces:
        raise ValueError("the chat has no message of the assistant, so there is nothing to learn")
    return [*pieces, (whole[done:], False)]


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError("chat templates need jinja2: pip install jinja2 (minirlhf's extra chat)") from error

    class Generation(Extension):
        """`{% generation %}`, which marks the assistant's text for other tools, writes what stands in it."""

        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(printable(str(message)))

    def tojson(x: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)
