"""Answers from an OpenAI-compatible chat endpoint through the `openai` client, which times out and retries.

The key is read from the environment and stored by the client alone; text from the endpoint is cleared of it.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from minirlhf.rewards.judge_answer import text_of


class ChatError(OSError):
    """The endpoint refused a request or failed at every attempt; the message says which endpoint, and how."""


class Endpoint:
    """A callable from messages to the text of the model's answer; from any number of threads.

    client: an `openai.OpenAI`. sampling: further fields of each request.
    count: called with the numbers of retries, prompt_tokens and completion_tokens, by name.
    """

    def __init__(
        self, client: Any, model: str, key_variable: str, sampling: Mapping[str, Any], count: Callable[..., None]
    ):
        self._client, self._model, self._key_variable = client, model, key_variable
        self._sampling, self._count = sampling, count

    def __call__(self, messages: list[dict[str, str]]) -> str:
        """The text of the answer, "" if there is none. Raises ChatError, which never holds the key."""
        openai = import_openai()
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self._model, messages=messages, extra_body=self._sampling
            )
        except openai.APIStatusError as error:
            failure = f"answered {error.status_code}: {self._shown(error.message)}"
            if error.status_code in (401, 403):
                sent = "was sent" if key_of(self._key_variable) else "is not set"
                failure += f" (the key in {self._key_variable} {sent})"
            elif error.status_code in (400, 422):
                failure += f" (sampling={self._sampling} was sent)"
        except openai.APITimeoutError:
            failure = f"gave no answer within timeout={self._client.timeout:g} seconds"
        except (openai.OpenAIError, OSError, ValueError, RuntimeError) as error:
            cause = error.__cause__ or error
            failure = f"could not be asked: {type(cause).__name__} {self._shown(cause)}"
        else:
            self._count(retries=raw.retries_taken)
            try:
                completion = raw.parse()
                text = "" if completion.choices == [] else text_of(completion.choices[0].message.content)
            except (AttributeError, TypeError, ValueError):  # the client does not check what it parses
                failure = f"answered with what is no chat completion: {self._shown(raw.text)}"
            else:
                for name in ("prompt_tokens", "completion_tokens"):
                    used = getattr(completion.usage, name, None)
                    self._count(**{name: used if type(used) is int else 0})
                return self._clean(text)
        raise ChatError(f"{str(self._client.base_url).rstrip('/')} {failure}")

    def _clean(self, text: str) -> str:
        key = key_of(self._key_variable)
        return text.replace(key, f"[{self._key_variable}]") if key else text

    def _shown(self, said: object) -> str:
        return repr(self._clean(str(said))[:300])


def import_openai() -> Any:
    """The module. Raises ImportError that says how to install it, or how to do without."""
    try:
        import openai
    except ImportError as error:
        raise ImportError(
            "ChatJudge asks an endpoint through the openai client: pip install openai (minirlhf's extra judge), or "
            "give complete=, a callable from messages to the text of the answer"
        ) from error
    return openai


def key_of(variable: str) -> str:
    """The key in an environment variable, "" if there is none.

    Raises ValueError, without showing it, if a header cannot carry it.
    """
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"the key in the environment variable {variable} holds more than printable ASCII")
    return key


def check_url(name: str, url: object) -> None:
    """Raise ValueError for anything but http(s)://host[:port][/path]; a name or password in it is not shown."""
    try:
        parts = urllib.parse.urlsplit(url if isinstance(url, str) else "")
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if not fine or re.search(r"[^!-~]|[?#@]", str(url)):
        shown = "one with a name or a password" if "@" in str(url) else repr(url)
        raise ValueError(f"{name} must be http(s)://host[:port][/path], got {shown}")
