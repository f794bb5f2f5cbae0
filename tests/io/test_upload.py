"""Uploads to a hub on the loopback address: what is sent, and what is said if it refuses."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants

from conftest import VOCAB, make_gpt2
from minirlhf import ActorCritic, Tokenizer
from minirlhf.commands.main import main
from minirlhf.io.upload import files_to_push, push

TOKEN = "hf_very_secret"


class Hub:
    """Takes commits as the hub does, every file in the commit itself. status: of every answer, if not 200."""

    def __init__(self):
        self.requests, self.files, self.status, self.tokens = [], {}, 200, set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.answer(self, b"")

            def do_POST(self):
                outer.answer(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request, body):
        path = request.path.split("?")[0]
        self.requests.append((request.command, path))
        self.tokens.add(request.headers.get("Authorization"))
        reply = {"error": f"refused {TOKEN}"} if self.status != 200 else {}
        if self.status == 200 and path == "/api/repos/create":
            self.made = json.loads(body)
            reply = {"url": f"{self.endpoint}/alice/small", "name": "alice/small"}
        elif self.status == 200 and path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            reply = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif self.status == 200 and path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            reply = {"commitUrl": f"{self.endpoint}/alice/small/commit/{'c' * 40}", "commitOid": "c" * 40,
                     "commitMessage": "", "success": True, "hookOutput": ""}  # fmt: skip
        elif self.status == 200:
            reply = {"id": "alice/small", "sha": "c" * 40, "siblings": []}
        content = json.dumps(reply).encode()
        request.send_response(self.status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    running = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield running
    running.server.shutdown()
    running.server.server_close()


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    ActorCritic(make_gpt2(n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
    Tokenizer(VOCAB).save_pretrained(folder)
    for name in ("training.json", "optimizer.pt", "notes.txt", ".env"):  # what must not leave
        (folder / name).write_text("mine")
    return folder


SENT = {"README.md", "config.json", "model.safetensors", "model.safetensors.index.json",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
        "value_head.safetensors", "vocab.txt"}  # fmt: skip


def test_the_model_s_files_go_with_their_card_and_nothing_else(hub, model, capsys):
    assert set(files_to_push(model)) == SENT
    assert push(model, "alice/small", private=True) == f"{hub.endpoint}/alice/small"
    assert hub.files == {name: (model / name).read_bytes() for name in SENT}
    assert hub.made["name"] == "small" and hub.made["organization"] == "alice" and f"Bearer {TOKEN}" in hub.tokens
    assert main(["push", str(model), "alice/small"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == f"{hub.endpoint}/alice/small" and TOKEN not in shown.out + shown.err


def test_a_dry_run_lists_what_would_go_and_asks_nobody(hub, model, capsys):
    assert main(["push", str(model), "alice/small", "--dry-run"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == f"{model} to alice/small:" and {row.split()[0] for row in rows} == SENT
    assert f"{(model / 'config.json').stat().st_size:,} bytes" in "\n".join(rows) and hub.requests == []


@pytest.mark.parametrize(("status", "message"), [
    (401, "does not let you write to alice/small: set HF_TOKEN to a token of alice with the right to write"),
    (403, "does not let you write to alice/small"), (400, "alice/small was not sent to http.*; try again"),
])  # fmt: skip
def test_a_refusal_is_one_line_without_the_token(hub, model, capsys, status, message):
    hub.status = status
    with pytest.raises(OSError, match=message) as caught:
        push(model, "alice/small")
    assert TOKEN not in str(caught.value)
    assert main(["push", str(model), "alice/small"]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and TOKEN not in shown.out + shown.err


def test_what_cannot_be_pushed_is_refused_before_any_request(hub, model, tmp_path, monkeypatch):
    for name in ("small", "a/b/c", "../x", "alice/"):
        with pytest.raises(ValueError, match="is not the name of a repository: owner/model"):
            push(model, name)
    (model / "README.md").unlink()
    with pytest.raises(ValueError, match="has no model card; save the model again"):
        push(model, "alice/small")
    with pytest.raises(FileNotFoundError):
        push(tmp_path / "nowhere", "alice/small")
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (model / name).unlink()
    with pytest.raises(ValueError, match=r"must have config\.json and model\.safetensors"):
        push(model, "alice/small")
    assert hub.requests == []


def test_offline_it_says_so(hub, model, monkeypatch):
    def offline(*args, **options):
        raise huggingface_hub.errors.OfflineModeIsEnabled("no")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set, so nothing was sent to alice/small"):
        push(model, "alice/small")
