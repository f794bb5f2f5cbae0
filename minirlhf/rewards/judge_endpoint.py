"""Answers from an OpenAI-compatible chat endpoint through the `openai` client, with its timeouts and retries.

The key is read from the environment and stored by the client alone; text from the endpoint is cleared of it.
"""

from __future__ import annotations

import json
import os
import re
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from minirlhf.rewards.judge_answer import text_of


class ChatError(OSError):
    """The endpoint refused a request or failed at every attempt; the message says which endpoint, and how."""


class Endpoint:
    """A callable from messages to the text of the model's answer, used in a `with`; from any number of threads.

    url: requests go to {url}/chat/completions. key_variable: the environment variable that holds the key.
    timeout: seconds for one request. retries: of a request that failed. sampling: further fields of each request.
    count: called with the numbers of retries, prompt_tokens and completion_tokens, by name.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str,
        timeout: float,
        retries: int,
        sampling: Mapping[str, Any],
        count: Callable[..., None],
    ):
        self._url, self._model, self._key_variable, self._timeout = url, model, key_variable, timeout
        self._sampling, self._count = dict(sampling), count
        self._openai = import_openai()
        # The client demands a key; an endpoint that needs none does not look at it.
        key = key_of(key_variable) or "none"
        self._client = self._openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def __call__(self, messages: list[dict[str, str]]) -> str:
        """The text of the answer, "" if there is none. Raises ChatError, which never holds the key."""
        openai = self._openai
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
            failure = f"gave no answer within timeout={self._timeout:g} seconds"
        except (openai.OpenAIError, OSError, ValueError, RuntimeError) as error:
            cause = error.__cause__ or error
            failure = f"could not be asked: {type(cause).__name__} {self._shown(cause)}"
        else:
            self._count(retries=getattr(raw, "retries_taken", 0))
            completion = _completion(raw.text)
            if completion is not None:
                text, used = completion
                self._count(**used)
                return self._clean(text)
            failure = f"answered with what is no chat completion: {self._shown(raw.text)}"
        raise ChatError(f"{self._url} {failure}")

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
            'ChatJudge asks an endpoint through the openai client: pip install "minirlhf[judge]", or give complete=, a '
            "callable from messages to the text of the answer"
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


def _completion(body: str) -> tuple[str, dict[str, int]] | None:
    """The text of a chat completion ("" if there is none) and the tokens that it counts; None for anything else."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list):
        return None
    message = choices[0].get("message") if choices and isinstance(choices[0], dict) else None
    said = message.get("content") if isinstance(message, dict) else None
    usage = content["usage"] if isinstance(content.get("usage"), dict) else {}
    used = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    text = text_of(said) if isinstance(said, (str, list)) else ""
    return text, {name: x for name, x in used.items() if type(x) is int and x >= 0}
