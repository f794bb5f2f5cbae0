"""A chat endpoint on the loopback address that scores texts, or misbehaves as it is told to.

`JudgeServer(rule)` answers with `rule(text)`; what is in `server.next` is done first, one behaviour a request. A
behaviour is called with the handler, and writes to it what it likes.
"""

import contextlib
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USAGE = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}


@dataclass(frozen=True)
class Request:
    """What arrived: when (time.monotonic), where, with which headers and which body, and the text to be scored."""

    time: float
    path: str
    headers: dict
    body: dict
    text: str


class JudgeServer(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def __init__(self, rule=lambda text: "5"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.rule, self.next, self.requests = rule, [], []
        self.connections = self.under_way = self.most_under_way = self.bytes_sent = 0
        self.lock, self.closing = threading.Lock(), threading.Event()

    @property
    def base_url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def texts(self):
        return [request.text for request in self.requests]

    def get_request(self):
        self.connections += 1
        return super().get_request()

    def handle_error(self, request, client_address):
        pass  # clients that hang up are what the tests are about

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.text = judged(body["messages"][-1]["content"])
        with server.lock:
            server.requests.append(Request(time.monotonic(), self.path, dict(self.headers.items()), body, self.text))
            behaviour = server.next.pop(0) if server.next else say(server.rule)
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            behaviour(self)
        finally:
            self.done()

    def done(self):
        """The request counts as under way until its answer begins."""
        if not getattr(self, "is_done", False):
            self.is_done = True
            with self.server.lock:
                self.server.under_way -= 1

    def answer(self, content, status=200, headers=(), content_type="application/json", length=None):
        self.done()
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def judged(user):
    """The text between the markers of a user message."""
    (found,) = re.findall(r"\[text ([0-9a-f]{16})\]\n(.*)\n\[end of text \1\]", user, re.DOTALL)
    return found[1]


def completion(text, usage=USAGE):
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"object": "chat.completion", "choices": [choice], "usage": usage}


# ---- behaviours -----------------------------------------------------------------------------------------------------


def say(text, **options):
    """A proper answer; text: what the model says, or a function of the text that is scored."""
    return lambda handler: handler.answer(completion(text(handler.text) if callable(text) else text), **options)


def send(content, **options):
    return lambda handler: handler.answer(content, **options)


def fail(status, message="no", **options):
    return lambda handler: handler.answer({"error": {"message": message}}, status=status, **options)


def slow(seconds, then=None):
    """Wait, and then behave as `then` (None: say "5")."""

    def behave(handler):
        if not handler.server.closing.wait(seconds):
            (then or say("5"))(handler)

    return behave


def drip(first):
    """Begin an answer, and then send a byte each hundredth of a second, without end."""

    def behave(handler):
        handler.done()
        handler.wfile.write(first)
        while not handler.server.closing.wait(0.01):
            handler.wfile.write(b"x")

    return behave


def reset(handler):
    """Break the connection (RST)."""
    handler.done()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    for file in (handler.rfile, handler.wfile):
        with contextlib.suppress(OSError):
            file.close()
    handler.connection.close()


def hang_up(handler):
    """Close the connection without an answer."""
    handler.done()
    handler.connection.shutdown(socket.SHUT_RDWR)


def endless(status=200):
    """An answer that goes on until the client has enough."""

    def behave(handler):
        handler.done()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        chunk = b" " * 65536
        while handler.server.bytes_sent < 1 << 28 and not handler.server.closing.is_set():
            handler.wfile.write(chunk)
            handler.server.bytes_sent += len(chunk)

    return behave
