"""A chat endpoint on the loopback address that scores texts, or misbehaves as it is told to.

`JudgeServer(rule)` answers with `rule(text)`; what is in `server.next` is done first, one behaviour a request. A
behaviour is called with the handler, and writes to it what it likes.
"""

import json
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USAGE = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}


class JudgeServer(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def __init__(self, rule=lambda text: "5"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.rule, self.next, self.closing, self.lock = rule, [], threading.Event(), threading.Lock()
        self.requests = []  # (headers, body) of each
        self.base_url = f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def texts(self):
        return [judged(body["messages"]) for _, body in self.requests]

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
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        with self.server.lock:
            self.server.requests.append(({name.title(): x for name, x in self.headers.items()}, body))
            behaviour = self.server.next.pop(0) if self.server.next else say(self.server.rule(judged(body["messages"])))
        behaviour(self)

    def log_message(self, *args):
        pass


def judged(messages):
    """The text between the markers of the last message."""
    (found,) = re.findall(r"\[text ([0-9a-f]{16})\]\n(.*)\n\[end of text \1\]", messages[-1]["content"], re.DOTALL)
    return found[1]


# ---- behaviours -----------------------------------------------------------------------------------------------------


def send(content, status=200, headers=(), content_type="application/json"):
    def behave(handler):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": len(raw), **dict(headers)}.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(raw)

    return behave


def say(content, usage=USAGE):
    """A chat completion; content: what the model says."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return send({"object": "chat.completion", "choices": [choice], "usage": usage})


def fail(status, message="no", **options):
    return send({"error": {"message": message}}, status, **options)


def slow(seconds):
    """Wait, and then say "5"."""

    def behave(handler):
        if not handler.server.closing.wait(seconds):
            say("5")(handler)

    return behave


def reset(handler):
    """Break the connection (RST)."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.rfile.close()
    handler.connection.close()
