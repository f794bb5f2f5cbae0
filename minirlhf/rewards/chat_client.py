"""Requests to an OpenAI-compatible chat endpoint: bounded in time and size, retried, and cut off when told to stop.

The key is read from the environment for each request. It is never kept on an object, and it is blotted out of
whatever the endpoint sends back, so that no error can hold it.

Left out: streaming, proxies, and connections that stay open (a model answers more slowly than one connects).
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import http.client
import json
import os
import random
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timezone
from typing import Any

from minirlhf.common.validation import require, require_above, require_counts, require_non_negative

MAX_ANSWER_BYTES = 1 << 20  # no more of an answer is read
RETRIED_STATUSES = frozenset({408, 409, 425, 429})  # besides 5xx: timeout, conflict, too early, too many requests


@dataclass(frozen=True, kw_only=True)
class ChatClientConfig:
    """An endpoint, and how patient to be with it.

    Raises ValueError with the field, the value and what is allowed; a value that may be or hold the key is not shown.
    """

    base_url: str  # requests go to {base_url}/chat/completions
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key; unset or empty: no key is sent
    timeout: float = 60.0  # seconds for one request, from connecting to the last byte
    retries: int = 5  # further attempts after a failure that may pass
    backoff: float = 0.5  # seconds; the k-th wait is drawn from 0 to backoff * 2^k, after what Retry-After asks for
    max_wait: float = 60.0  # seconds; the bound of that, and the longest Retry-After that is waited for

    def __post_init__(self) -> None:
        _check_url(f"{type(self).__name__}.base_url", self.base_url)
        if not isinstance(self.key_variable, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            raise ValueError(
                f"{type(self).__name__}.key_variable must be the name of an environment variable (letters, digits and "
                "_), not the key itself"
            )
        require_above(self, 0, "timeout")
        require_counts(self, "retries")
        require_non_negative(self, "backoff", "max_wait")
        for name in ("timeout", "max_wait"):
            require(self, name, getattr(self, name) <= 86400, "at most 86400, a day")

    @property
    def url(self) -> str:
        """Where requests go."""
        return self.base_url.rstrip("/") + "/chat/completions"

    def key(self) -> str:
        """The key, "" if there is none. Raises ValueError, without showing it, if a header cannot carry it."""
        key = os.environ.get(self.key_variable, "").strip()
        if not key.isascii() or not key.isprintable():
            raise ValueError(f"the key in the environment variable {self.key_variable} holds more than printable ASCII")
        return key


class ChatError(OSError):
    """The endpoint refused a request, or failed at every attempt; the message says which endpoint, and how."""


class ChatStopped(ChatError):
    """The client was told to stop."""


@dataclass(frozen=True)
class Reply:
    """What the model said, "" if it said nothing, and the tokens that the endpoint counted (0 where it does not)."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Tally:
    """Sums by name that many threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: Counter[str] = Counter()

    def add(self, **amounts: float) -> None:
        """Add to the sums of these names."""
        with self._lock:
            self._sums.update(amounts)

    def take(self) -> Counter[str]:
        """The sums since the last call; a name that nothing was added to has 0."""
        with self._lock:
            taken, self._sums = self._sums, Counter()
        return taken


class ChatClient:
    """Sends requests, from any number of threads, until it is stopped.

    config: the endpoint. jitter: where the waits between attempts are drawn from.
    tally: gets requests (attempts), retries, replies, seconds (of the replies), prompt_tokens and completion_tokens.
    """

    def __init__(self, config: ChatClientConfig, jitter: random.Random, tally: Tally):
        self.config = config
        self._jitter, self._tally = jitter, tally
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._sockets: set[socket.socket] = set()

    def complete(self, body: bytes) -> Reply:
        """The model's reply to a request body (JSON).

        Timeouts, broken connections, statuses 408, 409, 425, 429 and 5xx, and answers that are not what the protocol
        says are tried again after a wait. Raises ChatError when the attempts are used up, at once for any other status
        (4xx; redirects are not followed: they would carry the key elsewhere), a Retry-After beyond `max_wait`, or a
        certificate that is not valid. Raises ChatStopped once `stop` was called.
        """
        attempt, wait = 0, 0.0
        while not self._stopped.wait(wait):
            self._tally.add(retries=int(attempt > 0))
            try:
                return self._attempt(body)
            except _MayPass as failure:
                wait = (
                    0.0 if self._stopped.is_set() else self._wait(failure, attempt)
                )  # it may be `stop` that failed it
            attempt += 1
        raise ChatStopped(f"requests to {self.config.url} were stopped")

    def stop(self) -> None:
        """End all waits, cut off the requests under way, and send no more; `complete` then raises ChatStopped."""
        with self._lock:
            self._stopped.set()
            for sock in self._sockets:
                _cut(sock)

    def _wait(self, failure: _MayPass, attempt: int) -> float:
        """Seconds to wait after the failure of an attempt (0 is the first). Raises ChatError if it was the last one."""
        c = self.config
        if attempt == c.retries:
            raise ChatError(f"{c.url} {failure} (attempt {attempt + 1} of {c.retries + 1})") from None
        if failure.retry_after > c.max_wait:
            raise ChatError(
                f"{c.url} {failure}, and asks to wait {failure.retry_after:g} seconds, longer than "
                f"max_wait={c.max_wait:g}"
            ) from None
        # Full jitter (Brooker 2015): workers that failed together do not come back together.
        return failure.retry_after + self._jitter.random() * min(c.max_wait, c.backoff * 2.0 ** min(attempt, 60))

    def _attempt(self, body: bytes) -> Reply:
        """One request. Raises _MayPass for a failure worth another attempt, ChatError for any other."""
        c, key, start = self.config, self.config.key(), time.monotonic()

        def clean(text: str) -> str:
            return text.replace(key, f"[{c.key_variable}]") if key else text

        def shown(text: str) -> str:  # whatever the endpoint sent, as it may stand in an error
            return repr(clean(text)[:300])

        self._tally.add(requests=1)
        failure = ""
        try:
            with self._connection(start + c.timeout) as connection:
                connection.request("POST", urllib.parse.urlsplit(c.url).path, body, _headers(key))
                with connection.getresponse() as response:
                    status, headers, content = response.status, response.headers, response.read(MAX_ANSWER_BYTES + 1)
                    if response.length and len(content) <= MAX_ANSWER_BYTES:  # of Content-Length, still to come
                        raise http.client.IncompleteRead(content, response.length)
        except ssl.SSLCertVerificationError as error:
            raise ChatError(f"{c.url} has a certificate that is not valid: {error.verify_message}") from None
        except (OSError, http.client.HTTPException) as error:
            failure = f"could not be asked: {type(error).__name__} {shown(str(error))}"
        seconds = time.monotonic() - start
        if seconds >= c.timeout:  # whatever came of cutting it off
            raise _MayPass(f"gave no whole answer within timeout={c.timeout:g} seconds")
        if failure:
            raise _MayPass(failure)

        if 200 <= status < 300:
            try:
                reply = parse_reply(headers.get("Content-Type", ""), content, shown)
            except ValueError as error:
                raise _MayPass(f"gave an answer that is {error}") from None
            self._tally.add(
                replies=1, seconds=seconds, prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens
            )
            return dataclasses.replace(reply, text=clean(reply.text))
        if 300 <= status < 400:
            target = shown(headers.get("Location", ""))
            raise ChatError(f"{c.url} answered {status}, a redirect to {target}, which is not followed: fix base_url")
        answer = f"answered {status}: {shown(_message(content))}"
        if status in RETRIED_STATUSES or status >= 500:
            raise _MayPass(answer, retry_after_seconds(headers.get("Retry-After")))
        if status in (401, 403):
            hint = f"the key of {c.key_variable} was sent" if key else f"no key was sent: {c.key_variable} is not set"
            answer += f" ({hint})"
        raise ChatError(f"{c.url} {answer}")

    @contextlib.contextmanager
    def _connection(self, deadline: float) -> Iterator[http.client.HTTPConnection]:
        """A connection that is cut off at the deadline (`time.monotonic`), or by `stop`.

        Timeouts of a socket would not do: they begin anew with every byte.
        """
        c, url = self.config, urllib.parse.urlsplit(self.config.url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.hostname or "", url.port or kind.default_port, timeout=c.timeout)
        with contextlib.closing(connection):
            connection.connect()
            sock = connection.sock  # the connection forgets it when it has the headers
            with self._lock:
                if self._stopped.is_set():
                    raise ConnectionAbortedError("stopped")
                self._sockets.add(sock)
            alarm = threading.Timer(max(0.0, deadline - time.monotonic()), _cut, [sock])
            alarm.daemon = True
            alarm.start()
            try:
                yield connection
            finally:
                alarm.cancel()
                with self._lock:
                    self._sockets.discard(sock)


class _MayPass(Exception):
    """A failure after which the same request may succeed. retry_after: seconds that the endpoint asks to wait."""

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


def parse_reply(content_type: str, content: bytes, shown: Callable[[str], str] = repr) -> Reply:
    """The first choice of a chat completion; its text is "" if there is no choice, or one without text (a refusal).

    shown: what to make of a part of the answer that stands in an error.
    Raises ValueError for an answer that is too long, of another content type than JSON, or no chat completion.
    """
    if len(content) > MAX_ANSWER_BYTES:
        raise ValueError(f"longer than {MAX_ANSWER_BYTES} bytes")
    kind = content_type.split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ValueError(f"of content type {shown(content_type)}, not application/json")
    answer = _json(content)
    choices, usage = answer.get("choices"), answer.get("usage")
    if not isinstance(choices, list):
        raise ValueError(f"not a chat completion: {shown(_message(content))}")
    choice = choices[0] if choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    counts = usage if isinstance(usage, dict) else {}
    return Reply(
        text if isinstance(text, str) else "", _count(counts, "prompt_tokens"), _count(counts, "completion_tokens")
    )


def retry_after_seconds(value: str | None) -> float:
    """Seconds that a Retry-After header asks to wait, a number or a date (RFC 9110, 10.2.3); 0 without a valid one."""
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _json(content: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(answer, dict):
        raise ValueError(f"not a JSON object but a {type(answer).__name__}")
    return answer


def _message(content: bytes) -> str:
    """What an answer says went wrong: its `error.message`, or else the whole of it."""
    with contextlib.suppress(ValueError):
        error = _json(content).get("error")
        message = error.get("message") if isinstance(error, dict) else error
        if isinstance(message, str):
            return message
    return content.decode("utf-8", "replace")


def _count(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if type(value) is int and value >= 0 else 0


def _headers(key: str) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
    return {**headers, "Authorization": f"Bearer {key}"} if key else headers


def _cut(sock: socket.socket) -> None:
    """Make whoever reads from or writes to this socket fail at once, in whichever thread."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of a TLS socket too: its own shutdown forgets the TLS state


def _check_url(name: str, url: object) -> None:
    """Raises ValueError for anything but http(s)://host[:port][/path]; a name or password in it is not shown."""
    fine = isinstance(url, str) and re.fullmatch(r"[!-~]+", url) and not {"?", "#"} & set(url)
    try:
        parts = urllib.parse.urlsplit(str(url))
        host, port = (parts.hostname or "").encode("idna"), parts.port
    except ValueError:  # brackets, the port, or (a UnicodeError) the host
        fine = False
    if not fine or parts.scheme not in ("http", "https") or not host or port == 0 or "@" in parts.netloc:
        shown = "one with a name or a password" if "@" in str(url) else repr(url)
        raise ValueError(f"{name} must be http(s)://host[:port][/path], got {shown}")
