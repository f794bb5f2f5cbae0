"""The chat client against a real server that misbehaves in every way that its protocol allows, and some that it does
not: what is tried again, what is an error at once, what is cut off, and what the key never gets into."""

import email.utils
import random
import shutil
import ssl
import subprocess
import threading
import time
import traceback
from collections import Counter

import pytest
from judge_server import (
    USAGE,
    JudgeServer,
    completion,
    drip,
    endless,
    fail,
    hang_up,
    reset,
    say,
    send,
    slow,
)

from minirlhf.rewards import chat_client
from minirlhf.rewards.chat_client import (
    MAX_ANSWER_BYTES,
    ChatClient,
    ChatClientConfig,
    ChatError,
    ChatStopped,
    Reply,
    Tally,
    parse_reply,
    retry_after_seconds,
)

KEY = "sk-SECRET-0123456789"
BODY = b'{"messages": [{"content": "[text 0123456789abcdef]\\nhello\\n[end of text 0123456789abcdef]"}]}'
HEADERS = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.fixture
def server():
    with JudgeServer() as server:
        yield server


def make_client(server, **options):
    """A client that does not wait between attempts, and gives up after the second."""
    fields = {"base_url": server.base_url, "key_variable": "TEST_KEY", "timeout": 20.0, "retries": 1, "backoff": 0.0}
    client = ChatClient(ChatClientConfig(**{**fields, **options}), random.Random(0), Tally())
    client.tally = client._tally
    return client


def counts(client):
    sums = client.tally.take()
    return {name: sums[name] for name in ("requests", "retries", "replies", "prompt_tokens", "completion_tokens")}


# ---- what is sent, and what comes of it -----------------------------------------------------------------------------


def test_one_request_gives_one_reply(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", f"  {KEY}\n")  # as a file that ends in a line feed leaves it
    client = make_client(server)
    assert client.complete(BODY) == Reply("5", 100, 2)
    (request,) = server.requests
    assert request.path == "/v1/chat/completions" and request.text == "hello"
    assert request.headers["Authorization"] == f"Bearer {KEY}" and request.headers["Content-Type"] == "application/json"
    assert counts(client) == dict(requests=1, retries=0, replies=1, prompt_tokens=100, completion_tokens=2)


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_without_a_key_none_is_sent(server, monkeypatch, value):
    if value is None:
        monkeypatch.delenv("TEST_KEY", raising=False)
    else:
        monkeypatch.setenv("TEST_KEY", value)
    make_client(server).complete(BODY)
    assert "Authorization" not in server.requests[0].headers


def test_the_key_is_read_when_it_is_sent(server, monkeypatch):
    client = make_client(server)
    for key in ("first", "second"):
        monkeypatch.setenv("TEST_KEY", key)
        client.complete(BODY)
    assert [request.headers["Authorization"] for request in server.requests] == ["Bearer first", "Bearer second"]


def test_seconds_are_those_of_the_replies(server):
    server.next = [fail(500), slow(0.1)]
    client = make_client(server)
    client.complete(BODY)
    assert 0.1 <= client.tally.take()["seconds"] < 20


# ---- failures that may pass -----------------------------------------------------------------------------------------

CUT_JSON = b'{"choices": [{"message": {"content": "5"'
PASSING = {
    "slow": (slow(30), "gave no whole answer within timeout=0.2 seconds"),
    "a byte at a time": (drip(HEADERS + b"\r\n"), "gave no whole answer within timeout=0.2 seconds"),
    "a header byte at a time": (drip(HEADERS + b"X-Long: "), "gave no whole answer within timeout=0.2 seconds"),
    "429": (fail(429, "slow down"), "answered 429: 'slow down'"),
    "408": (fail(408), "answered 408"),
    "500": (fail(500), "answered 500"),
    "503 in HTML": (send(b"<h1>busy</h1>", status=503, content_type="text/html"), "answered 503: '<h1>busy</h1>'"),
    "reset": (reset, "could not be asked: "),
    "hang up": (hang_up, "could not be asked: "),
    "no HTTP": (lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n"), "could not be asked: BadStatusLine"),
    "body cut short": (send(CUT_JSON, length=500), "could not be asked: IncompleteRead"),
    "refusal cut short": (send(b"", status=401, length=500), "could not be asked: IncompleteRead"),
    "truncated JSON": (send(CUT_JSON), "gave an answer that is not valid JSON"),
    "no JSON": (send(b"\xff\xfe\x00"), "gave an answer that is not valid JSON"),
    "nothing": (send(b""), "gave an answer that is not valid JSON"),
    "deep JSON": (send(b"[" * 100000), "gave an answer that is not valid JSON"),
    "a list": (send([]), "gave an answer that is not a JSON object but a list"),
    "no choices": (send({"object": "x"}), "gave an answer that is not a chat completion"),
    "an error with status 200": (send({"error": {"message": "overloaded"}}), "not a chat completion: 'overloaded'"),
    "choices that are no list": (send({"choices": {}}), "gave an answer that is not a chat completion"),
    "HTML": (send(b"<html>", content_type="text/html"), "of content type 'text/html', not application/json"),
    "JSON that calls itself text": (say("5", content_type="text/plain; charset=utf-8"), "of content type 'text/plain"),
    "huge": (endless(), f"gave an answer that is longer than {MAX_ANSWER_BYTES} bytes"),
    "huge error": (endless(500), "answered 500: '    "),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_failure_that_may_pass_is_tried_again(server, name):
    behaviour, _ = PASSING[name]
    server.next = [behaviour, say("7")]
    client = make_client(server, timeout=1.5 if "byte" in name or name == "slow" else 20.0)
    assert client.complete(BODY) == Reply("7", 100, 2)
    assert counts(client) == dict(requests=2, retries=1, replies=1, prompt_tokens=100, completion_tokens=2)
    assert server.bytes_sent < 16 * MAX_ANSWER_BYTES  # buffers on the way included


@pytest.mark.parametrize("name", PASSING)
def test_a_failure_that_does_not_pass_is_an_error_that_says_what_it_was(server, name):
    behaviour, message = PASSING[name]
    server.next = [behaviour] * 9
    client = make_client(server, timeout=0.2 if "byte" in name or name == "slow" else 20.0)
    started = time.monotonic()
    with pytest.raises(ChatError, match=message) as caught:
        client.complete(BODY)
    assert time.monotonic() - started < 15
    assert str(caught.value).startswith(f"{server.base_url}/chat/completions ")
    assert str(caught.value).endswith(" (attempt 2 of 2)") and len(str(caught.value)) < 600
    assert counts(client) == dict(requests=2, retries=1, replies=0, prompt_tokens=0, completion_tokens=0)


def test_an_endpoint_that_is_not_there_is_an_error(server):
    client = make_client(server)
    server.shutdown()
    server.server_close()
    with pytest.raises(ChatError, match=r"could not be asked: ConnectionRefusedError .* \(attempt 2 of 2\)"):
        client.complete(BODY)


@pytest.mark.parametrize("retries", [0, 3])
def test_the_number_of_attempts(server, retries):
    server.next = [fail(500)] * 9
    with pytest.raises(ChatError, match=rf"\(attempt {retries + 1} of {retries + 1}\)"):
        make_client(server, retries=retries).complete(BODY)
    assert len(server.requests) == retries + 1


# ---- waits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_waited_for(server, status):
    server.next = [fail(status, headers={"Retry-After": "0.25"})]
    make_client(server).complete(BODY)
    first, second = (request.time for request in server.requests)
    assert second - first >= 0.25


def test_a_retry_after_beyond_max_wait_is_an_error_at_once(server):
    server.next = [fail(429, "quota", headers={"Retry-After": "3600"})]
    with pytest.raises(
        ChatError, match=r"answered 429: 'quota', and asks to wait 3600 seconds, longer than max_wait=60"
    ):
        make_client(server).complete(BODY)
    assert len(server.requests) == 1


def test_waits_grow_twofold_with_full_jitter_of_the_generator_given(server):
    client = make_client(server, backoff=0.5, max_wait=3.0, retries=99)
    draws = random.Random(0)
    failures = [chat_client._MayPass("x", 2.0 if k == 5 else 0.0) for k in range(70)]
    waits = [client._wait(failure, k) for k, failure in enumerate(failures)]
    expected = [draws.random() * bound for bound in (0.5, 1.0, 2.0, 3.0, 3.0, 3.0, *[3.0] * 64)]
    expected[5] += 2.0
    assert waits == expected


@pytest.mark.parametrize(("value", "seconds"), [
    ("7", 7), (" 0 ", 0), ("1.5", 1.5), (None, 0), ("", 0), ("-3", 0), ("soon", 0), ("nan", 0), ("1e9", 0), ("٣", 0),
    ("Fri, 31 Dec 1999 23:59:59 GMT", 0), ("Fri, 99 Dec 1999 23:59:59 GMT", 0),
])  # fmt: skip
def test_retry_after_is_a_number_or_a_date(value, seconds):
    assert retry_after_seconds(value) == seconds


@pytest.mark.parametrize("zone", ["GMT", "-0000"])
def test_retry_after_as_a_date_counts_from_now(zone):
    date = email.utils.formatdate(time.time() + 100).replace("-0000", zone)
    assert 70 < retry_after_seconds(date) <= 100


# ---- errors at once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "message"), [
    (400, "answered 400: 'no such parameter'$"), (404, "answered 404: 'no such parameter'$"), (422, "answered 422"),
    (401, r"answered 401: 'no such parameter' \(no key was sent: TEST_KEY is not set\)$"),
    (403, "answered 403.*TEST_KEY"),
])  # fmt: skip
def test_other_statuses_are_an_error_at_once(server, monkeypatch, status, message):
    monkeypatch.delenv("TEST_KEY", raising=False)
    server.next = [fail(status, "no such parameter")]
    with pytest.raises(ChatError, match=message):
        make_client(server).complete(BODY)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(server, monkeypatch, status):
    monkeypatch.setenv("TEST_KEY", KEY)
    with JudgeServer() as elsewhere:
        server.next = [send(b"", status=status, headers={"Location": elsewhere.base_url})]
        with pytest.raises(
            ChatError, match=f"answered {status}, a redirect to '{elsewhere.base_url}', which is not foll"
        ):
            make_client(server).complete(BODY)
        assert elsewhere.requests == [] and len(server.requests) == 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 that nobody has signed, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    options = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=test"]
    files = ["-keyout", folder / "key.pem", "-out", folder / "certificate.pem"]
    extension = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(["openssl", "req", "-x509", *options, *extension, *files], check=True, capture_output=True)
    return folder / "certificate.pem", folder / "key.pem"


@pytest.fixture
def tls_server(certificate):
    with JudgeServer() as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        yield server


def make_tls_client(server, **options):
    return make_client(server, base_url=server.base_url.replace("http:", "https:"), **options)


def test_a_certificate_that_nobody_signed_is_an_error_at_once(tls_server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    client = make_tls_client(tls_server)
    with pytest.raises(ChatError, match=r"has a certificate that is not valid: self.signed certificate"):
        client.complete(BODY)
    assert counts(client)["requests"] == 1 and tls_server.requests == []


def test_replies_and_failures_over_tls(tls_server, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    tls_server.next = [reset, drip(HEADERS + b"\r\n"), say("7")]
    client = make_tls_client(tls_server, timeout=2.0, retries=2)
    assert client.complete(BODY) == Reply("7", 100, 2)
    assert counts(client) == dict(requests=3, retries=2, replies=1, prompt_tokens=100, completion_tokens=2)


def test_stop_cuts_off_a_request_over_tls(tls_server, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    tls_server.next = [slow(30)]
    client = make_tls_client(tls_server)
    threading.Timer(0.3, client.stop).start()
    started = time.monotonic()
    with pytest.raises(ChatStopped, match="were stopped"):
        client.complete(BODY)
    assert time.monotonic() - started < 15


def test_a_server_that_does_not_speak_tls_is_not_asked_in_the_clear(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    with pytest.raises(ChatError, match="could not be asked: SSL"):
        make_client(server, base_url=server.base_url.replace("http:", "https:")).complete(BODY)
    assert server.requests == []


# ---- the key --------------------------------------------------------------------------------------------------------

ECHOES = {
    "status line": lambda handler: handler.wfile.write(f"{KEY} {KEY}\r\n\r\n".encode()),
    "error message": fail(400, f"bad key {KEY}"),
    "error at the cut": fail(401, "x" * 290 + KEY),
    "error that may pass": fail(500, f"bad key {KEY}"),
    "error in plain text": send(f"bad key {KEY}".encode(), status=403, content_type="text/plain"),
    "location": send(b"", status=302, headers={"Location": f"http://elsewhere/{KEY}"}),
    "content type": send(b"", content_type=f"text/{KEY}"),
    "error with status 200": send({"error": {"message": f"bad key {KEY}"}}),
    "no choices": send({"key": KEY}),
    "cut JSON": send(f'{{"key": "{KEY}'.encode()),
    "retry after": fail(429, KEY, headers={"Retry-After": "9999"}),
}


@pytest.mark.parametrize("name", ECHOES)
def test_an_error_never_holds_the_key_that_the_endpoint_sends_back(server, monkeypatch, name):
    monkeypatch.setenv("TEST_KEY", KEY)
    server.next = [ECHOES[name]] * 2
    with pytest.raises(ChatError) as caught:
        make_client(server).complete(BODY)
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    told = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert "secret" not in told.lower() and KEY[:12].lower() not in told.lower()


def test_a_reply_never_holds_the_key(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    server.next = [say(f"the key is {KEY}!")]
    assert make_client(server).complete(BODY).text == "the key is [TEST_KEY]!"


def test_no_object_holds_the_key(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    client = make_client(server)
    client.complete(BODY)
    for thing in (client, client.config, client.tally):
        assert KEY not in repr(thing) and KEY not in repr(vars(thing))


@pytest.mark.parametrize("key", [f"{KEY}\r\nX: y", f"{KEY}é", f"{KEY}\x7f"])
def test_a_key_that_a_header_cannot_carry_is_refused_without_showing_it(server, monkeypatch, key):
    monkeypatch.setenv("TEST_KEY", key)
    with pytest.raises(ValueError, match="the key in the environment variable TEST_KEY") as caught:
        make_client(server).complete(BODY)
    assert "SECRET" not in "".join(traceback.format_exception(caught.value)) and server.requests == []


# ---- stopping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("behaviour", "options"), [
    (slow(30), {}), (slow(30), {"retries": 0}), (drip(HEADERS + b"\r\n"), {}),
    (fail(500, headers={"Retry-After": "30"}), {}), (endless(), {"retries": 10**6}),
], ids=["a slow answer", "the last attempt", "an answer that drips", "a wait", "attempt after attempt"])  # fmt: skip
def test_stop_ends_requests_and_waits_at_once(server, behaviour, options):
    server.next = [behaviour] * 1000
    client, caught = make_client(server, **options), []

    def ask():
        try:
            client.complete(BODY)
        except ChatStopped as error:
            caught.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    while not server.requests:
        time.sleep(0.005)
    time.sleep(0.05)
    client.stop()
    thread.join(15)
    assert not thread.is_alive() and caught == [f"requests to {server.base_url}/chat/completions were stopped"]
    with pytest.raises(ChatStopped, match="were stopped"):
        client.complete(BODY.replace(b"hello", b"too late"))
    assert "too late" not in server.texts


# ---- replies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "expected"), [
    (completion("7"), Reply("7", 100, 2)),
    (completion("7", None), Reply("7")),
    (completion("7", {"prompt_tokens": -1, "completion_tokens": True}), Reply("7")),
    (completion("7", {"prompt_tokens": 1.5, "completion_tokens": 3}), Reply("7", 0, 3)),
    (completion(None), Reply("", 100, 2)),
    (completion([{"type": "text", "text": "7"}]), Reply("", 100, 2)),
    ({"choices": [], "usage": USAGE}, Reply("", 100, 2)),
    ({"choices": [None]}, Reply("")), ({"choices": [{}]}, Reply("")), ({"choices": [{"message": "7"}]}, Reply("")),
    ({"choices": [{"message": {"refusal": "I cannot", "content": None}}]}, Reply("")),
    ({"choices": [{"message": {"content": "1"}}, {"message": {"content": "2"}}]}, Reply("1")),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/problem+json"])
def test_the_reply_is_the_text_of_the_first_choice(server, answer, expected, kind):
    server.next = [send(answer, content_type=kind)]
    assert make_client(server).complete(BODY) == expected


@pytest.mark.parametrize("size", [MAX_ANSWER_BYTES, MAX_ANSWER_BYTES + 1])
def test_the_limit_of_an_answer_is_exact(size):
    content = b'{"choices": []}'.ljust(size)
    if size <= MAX_ANSWER_BYTES:
        assert parse_reply("application/json", content) == Reply("")
    else:
        with pytest.raises(ValueError, match="longer than 1048576 bytes"):
            parse_reply("application/json", content)


def test_a_tally_loses_nothing_between_threads():
    class Yielding(Counter):
        """Lets other threads run between the reading and the writing of a sum."""

        def get(self, *arguments):
            value = super().get(*arguments)
            time.sleep(0.001)
            return value

    tally = Tally()
    tally._sums = Yielding(a=0)

    def add():
        for _ in range(10):
            tally.add(a=1, b=0.5)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.take() == {"a": 40, "b": 20.0} and tally.take()["a"] == 0


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("url", "expected"), [
    ("http://localhost:8000/v1", "http://localhost:8000/v1/chat/completions"),
    ("https://api.openai.com/v1/", "https://api.openai.com/v1/chat/completions"),
    ("HTTP://[::1]:80", "HTTP://[::1]:80/chat/completions"),
    ("https://host/@cf/ai", "https://host/@cf/ai/chat/completions"),
])  # fmt: skip
def test_where_requests_go(url, expected):
    assert ChatClientConfig(base_url=url).url == expected


@pytest.mark.parametrize("url", [
    "", "localhost:8000", "ftp://host", "http://", "http://:80", "http://host:0", "http://host:99999", "http://host:x",
    "http://host?", "http://host/?a=b", "http://host/#a", "http://ho st", "http://host\n", "http://höst", "http://[::1",
    "http://a..b", f"http://{'a' * 64}", None, 7, b"http://host",
], ids=repr)  # fmt: skip
def test_another_base_url_is_refused(url):
    with pytest.raises(ValueError, match=r"ChatClientConfig.base_url must be http\(s\)://host\[:port\]\[/path\], got "):
        ChatClientConfig(base_url=url)


@pytest.mark.parametrize("url", [f"https://user:{KEY}@host/v1", f"https://{KEY}@host", f"https://:{KEY}@host:x"])
def test_a_base_url_with_a_password_is_refused_without_showing_it(url):
    with pytest.raises(ValueError, match="got one with a name or a password") as caught:
        ChatClientConfig(base_url=url)
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("name", [KEY, "", "1A", "A B", "A\n", None])
def test_a_key_in_the_place_of_its_variable_is_refused_without_showing_it(name):
    with pytest.raises(ValueError, match="key_variable must be the name of an environment variable") as caught:
        ChatClientConfig(base_url="http://host", key_variable=name)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(("field", "bad"), [
    ("timeout", 0), ("timeout", float("nan")), ("timeout", float("inf")), ("timeout", 1e9), ("timeout", "9"),
    ("retries", -1), ("retries", 1.0), ("backoff", -0.1), ("backoff", float("inf")), ("max_wait", -1),
    ("max_wait", 1e9),
])  # fmt: skip
def test_a_setting_out_of_range_is_refused_with_its_name(field, bad):
    with pytest.raises(ValueError, match=f"ChatClientConfig.{field} must be .*, got {bad!r}"):
        ChatClientConfig(base_url="http://host", **{field: bad})
