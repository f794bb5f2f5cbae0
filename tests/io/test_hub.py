"""Names, places and downloads, against a server on the loopback address that answers as the hub does."""

import contextlib
import hashlib
import io
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import VOCAB, make_gpt2, names
from minirlhf import GPT2, ActorCritic, Tokenizer
from minirlhf.__main__ import main
from minirlhf.io import hub
from minirlhf.io.hub import NAME, download, locate, needed_files

REPO = Path(__file__).resolve().parents[2]
COMMIT, NEXT_COMMIT = "c0ffee" + "0" * 34, "c0ffee" + "1" * 34
CDN = "/cdn/"


class Hub:
    """Repositories by name, each commit's files by name, and the requests that came.

    Weights are answered as the hub answers for large files: HEAD and GET redirect to another address, and the ETag is
    the SHA-256 of the content. `faults`: file -> what happens to its next transfers, one a transfer.
    """

    def __init__(self):
        self.models, self.requests, self.faults, self.announced, self.etags = {}, [], {}, {}, {}
        self.missing = set()  # files that are listed, and answered with 404
        self.tokens = {}  # path -> Authorization header
        self.commit = COMMIT
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                outer.answer(self)

            def do_GET(self):
                outer.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.cdn = f"http://localhost:{self.server.server_address[1]}{CDN}"  # another host, for the client
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def transfers(self):
        """(file, Range header) of every GET for a file's content."""
        return [(file, wanted) for method, file, wanted in self.requests if method == "GET"]

    def answer(self, request):
        path = unquote(urlsplit(request.path).path)
        self.tokens[path] = request.headers.get("Authorization")
        resolved = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path)
        if path.startswith("/api/models/"):
            self.list(request, path.removeprefix("/api/models/"))
        elif path.startswith(CDN):
            name, _, file = path.removeprefix(CDN).rpartition("/")
            self.send(request, name, file)
        elif resolved and resolved[1] == "owner/gated":
            self.refuse(request, 401, "GatedRepo")
        elif resolved and resolved[3] in self.models.get(resolved[1], {}).keys() - self.missing:
            name, _, file = resolved.groups()
            if hub._is_weights(file) and not file.endswith(".json"):
                content = self.models[name][file]
                etag, size = hashlib.sha256(content).hexdigest(), self.announced.get(file, len(content))
                etag = self.etags.get(file, etag)
                headers = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": size, "ETag": '"of-the-redirect"'}
                headers |= {"Location": f"{self.cdn}{name}/{file}"}
                self.head(request, 302, 0, {**headers, "X-Repo-Commit": self.commit})
            else:
                self.send(request, name, file)
        else:
            self.refuse(request, 404, "EntryNotFound")

    def list(self, request, path):
        name, _, revision = path.partition("/revision/")
        if name == "owner/broken":
            self.head(request, 200, 6, {})
            request.wfile.write(b"<html>")
        elif name not in self.models:
            self.refuse(request, 401, "RepoNotFound")
        elif revision not in ("main", "v1", self.commit):
            self.refuse(request, 404, "RevisionNotFound")
        else:
            files = [{"rfilename": file} for file in self.models[name]]
            body = json.dumps({"id": name, "modelId": name, "sha": self.commit, "siblings": files}).encode()
            self.head(request, 200, len(body), {"Content-Type": "application/json"})
            request.wfile.write(body)

    def send(self, request, name, file):
        content, wanted = self.models[name][file], request.headers.get("Range")
        self.requests.append((request.command, file, wanted))
        etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # git's
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        if start >= len(content) > 0:
            self.head(request, 416, 0, {"Content-Range": f"bytes */{len(content)}"})
            return
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.head(request, 206 if wanted else 200, len(content) - start, headers)
        if request.command == "HEAD":
            return
        fault, amount = self.faults[file].pop(0) if self.faults.get(file) else (None, None)
        with contextlib.suppress(ConnectionError):
            request.wfile.write(content[start:][:amount])
            request.wfile.flush()
        if fault == "reset":  # the error that is not tried again by the client
            time.sleep(0.2)  # a reset overtakes what was sent just before
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
        request.close_connection = fault is not None

    def refuse(self, request, status, code):
        self.head(request, status, 0, {"X-Error-Code": code, "X-Error-Message": code})

    def head(self, request, status, length, headers):
        request.send_response(status)
        for key, value in {"Content-Length": length, **headers}.items():
            request.send_header(key, str(value))
        request.end_headers()


@pytest.fixture
def server():
    running = Hub()
    yield running
    running.close()


@pytest.fixture
def client(server, tmp_path, monkeypatch):
    """huggingface_hub in this process: at the server, with a cache of its own, without waits; in an empty folder."""
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return server


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The files of a repository with a small GPT-2, and files that nobody needs."""
    folder = tmp_path_factory.mktemp("published")
    make_gpt2(n_embd=16, n_layer=1, n_head=2).save_pretrained(folder)
    files = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    files["vocab.txt"] = "".join(f"{token}\n" for token in VOCAB).encode()
    state = GPT2.from_pretrained(folder).state_dict()
    torch.save({f"transformer.{name}": tensor for name, tensor in state.items()}, folder / "pytorch_model.bin")
    extra = {name: b"not needed" for name in ("README.md", ".gitattributes", "tf_model.h5", "onnx/model.safetensors")}
    return {**files, "pytorch_model.bin": (folder / "pytorch_model.bin").read_bytes(), **extra}


NEEDED = ["config.json", "model.safetensors", "vocab.txt"]

# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "", "..", "/gpt2", "gpt2/", "../gpt2", "uer/..", "a/b/c", "~/gpt2", "a\\b", "C:gpt2",
    "a\n", "a--b", "a..b", "-a", "a.git", "酒店", "a/b?c", "a/%2e", "a" * 97, "a\0",
])  # fmt: skip
def test_what_is_no_name_is_refused_before_any_work(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not the name of a model on the hub"):
        download(name, "weights")
    assert names(tmp_path) == []


@given(st.text("aZ0_-./é", max_size=12))
@example("a.git/b")
def test_names_follow_the_hub_s_own_rules(name):
    try:
        validate_repo_id(name)
    except HFValidationError:
        assert not NAME.fullmatch(name)
    else:
        assert NAME.fullmatch(name)


@pytest.mark.parametrize("revision", ["", "..", "../x", "a/../b", "/a", "a/", "a//b", "a b", "-x", "a\n", "~"])
def test_a_bad_revision_is_refused_before_any_work(revision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="revision must be the name of a branch or tag, or a commit"):
        download("gpt2", "weights", revision)
    assert names(tmp_path) == []


# ---- which files ----------------------------------------------------------------------------------------------------

SHARDS = ["-00001-of-00002", "-00002-of-00002"]
SAFE, PICKLED = ["model.safetensors"], ["pytorch_model.bin"]
SAFE_SHARDS = [*(f"model{n}.safetensors" for n in SHARDS), "model.safetensors.index.json"]
PICKLED_SHARDS = [*(f"pytorch_model{n}.bin" for n in SHARDS), "pytorch_model.bin.index.json"]


@pytest.mark.parametrize(("present", "wanted"), [
    (SAFE + PICKLED, SAFE), (PICKLED, PICKLED), (SAFE_SHARDS + PICKLED_SHARDS, SAFE_SHARDS),
    (PICKLED_SHARDS, PICKLED_SHARDS), (SAFE_SHARDS + PICKLED, SAFE_SHARDS), (PICKLED_SHARDS + SAFE, SAFE),
    (["model.fp16.safetensors", "onnx/model.safetensors", "adapter_model.safetensors", *PICKLED], PICKLED),
])  # fmt: skip
def test_weights_are_taken_in_the_best_form_alone(present, wanted):
    others = ["README.md", "tf_model.h5", "flax_model.msgpack", "pytorch_model.bin.old", "training_args.bin"]
    assert needed_files("a/b", ["config.json", *others, *present]) == ["config.json", *wanted]


def test_every_file_of_a_tokenizer_is_taken():
    tokenizer = ["vocab.txt", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
                 "special_tokens_map.json", "added_tokens.json"]  # fmt: skip
    every = ["config.json", "generation_config.json", *tokenizer, *SAFE]
    assert sorted(needed_files("a/b", [*every, "vocab.bpe", "tokenizer.model", "sub/vocab.txt"])) == sorted(every)


@pytest.mark.parametrize("listing", [[], SAFE, ["config.json", "tf_model.h5"]])
def test_a_model_without_config_or_weights_is_refused(listing):
    with pytest.raises(ValueError, match=r"a/b cannot be loaded: it must have config.json and model.safetensors or"):
        needed_files("a/b", listing)


# ---- where a model lies ---------------------------------------------------------------------------------------------


def put(folder, *files):
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text("{}")
    return folder


def test_a_folder_is_taken_as_it_is(client, tmp_path):
    for folder in (Path("gpt2"), Path("runs/mine/policy"), tmp_path / "elsewhere"):
        put(folder)
        put(Path("weights") / folder.relative_to(folder.anchor))
        assert locate(folder) == folder and locate(str(folder)) == folder


def test_a_name_is_found_in_weights_and_then_in_the_cache(client, tmp_path):
    snapshot = put(tmp_path / "cache/models--uer--small/snapshots" / COMMIT, "config.json", "model.safetensors")
    assert locate("uer/small") == snapshot
    put(Path("weights/uer/small"))
    assert locate("uer/small") == Path("weights/uer/small")
    one = put(tmp_path / "cache/models--gpt2/snapshots" / COMMIT, "config.json", "pytorch_model.bin")
    assert locate("gpt2") == one


def test_the_newest_whole_snapshot_counts(client, tmp_path):
    snapshots = tmp_path / "cache/models--uer--small/snapshots"
    folders = [
        put(snapshots / (digit * 40), *files)
        for digit, files in [
            ("1", ["config.json", "model.safetensors"]), ("2", ["config.json", SAFE_SHARDS[0]]),
            ("3", ["config.json", "vocab.txt"]), ("4", ["model.safetensors"]),  # of which a model cannot be loaded
        ]
    ]  # fmt: skip
    put(snapshots / f".{COMMIT}.123.partial", "config.json", "model.safetensors")
    for seconds, folder in enumerate(folders):
        os.utime(folder, (seconds, seconds))
    assert locate("uer/small") == folders[1]
    os.utime(folders[0], (9, 9))
    assert locate("uer/small") == folders[0]


def test_what_is_nowhere_says_how_to_get_it(client, tmp_path):
    put(tmp_path / "cache/models--uer--small/snapshots" / COMMIT, "config.json")  # a broken download of others
    for name in ("uer/small", "gpt2"):
        with pytest.raises(FileNotFoundError) as caught:
            locate(name)
        message = str(caught.value)
        assert message.startswith(f"model folder {name} does not exist, and no model of that name was downloaded")
        assert f"Run `minirlhf download {name}`, or, if there is no network here" in message
        assert f"copy its folder weights/{name} to weights/{name} here" in message
        for file in ("config.json", "model.safetensors", "pytorch_model.bin", "vocab.txt", "merges.txt"):
            assert file in message
    assert client.requests == []


@pytest.mark.parametrize("folder", ["/nowhere/at/all", "runs/mine/policy", "../gpt2", "./gpt2", "", "uer/.."])
def test_a_folder_that_is_missing_and_no_name_is_only_missing(client, folder):
    put(Path("weights/gpt2"))
    if folder == "uer/..":
        assert not Path("uer").exists()
    with pytest.raises(FileNotFoundError, match=r"model folder .*does not exist$"):
        locate(folder)


def test_without_huggingface_hub_names_are_found_and_downloads_say_what_is_missing(client, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    put(Path("weights/gpt2"))
    assert locate("gpt2") == Path("weights/gpt2")
    with pytest.raises(FileNotFoundError, match="download uer/small-xyz"):
        locate("uer/small-xyz")
    with pytest.raises(ImportError, match="downloads need huggingface_hub: pip install huggingface_hub"):
        download("gpt2")


# ---- a download to a folder -----------------------------------------------------------------------------------------


def test_a_download_brings_the_needed_files_and_the_model_loads(client, published):
    client.models["owner/model"] = published
    assert download("owner/model", "weights/") == Path("weights/owner/model")
    folder = locate("owner/model")
    assert names(folder) == NEEDED and names(folder.parent) == ["model"]
    assert all((folder / file).read_bytes() == published[file] for file in NEEDED)
    assert not any((folder / file).is_symlink() for file in NEEDED)
    assert sorted(client.transfers()) == [(file, None) for file in NEEDED]  # each once, and nothing else
    loads_by_name("owner/model")


def loads_by_name(name):
    ids = torch.tensor([Tokenizer.from_pretrained(name).encode("酒店")])
    expected = make_gpt2(n_embd=16, n_layer=1, n_head=2)(ids)
    for model in (GPT2.from_pretrained(name), ActorCritic.from_pretrained(name).decoder):
        assert torch.equal(model(ids), expected) and model.origin.name == name


def test_a_second_download_fetches_no_weights_and_keeps_other_files(client, published):
    client.models["owner/model"] = dict(published)
    folder = download("owner/model", "weights")
    (folder / "notes.txt").write_text("mine")
    client.requests.clear()
    client.models["owner/model"]["vocab.txt"] += "新\n".encode()
    assert download("owner/model", "weights") == folder
    assert sorted(client.transfers()) == [("config.json", None), ("vocab.txt", None)]
    assert (folder / "vocab.txt").read_text(encoding="utf-8").endswith("新\n")
    assert (folder / "notes.txt").read_text() == "mine"


def test_new_weights_in_another_form_replace_the_old_ones(client, published):
    client.models["owner/model"] = published
    folder = download("owner/model", "weights")
    client.models["owner/model"] = {"config.json": b"{}", **dict.fromkeys(SAFE_SHARDS, b"shard")}
    download("owner/model", "weights")
    assert names(folder) == sorted(["config.json", "vocab.txt", *SAFE_SHARDS])


TEXTS = ["generation_config.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
         "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]  # fmt: skip


@pytest.mark.parametrize("kept", [["vocab.txt", "tokenizer_config.json"], ["tokenizer.json"], TEXTS])
def test_no_text_of_an_older_revision_stays_beside_the_new_weights(client, published, kept):
    """An old tokenizer.json would be read in place of a new vocab.txt."""
    weights = {"config.json": b"{}", "model.safetensors": published["model.safetensors"]}
    client.models["owner/model"] = {**weights, **dict.fromkeys(TEXTS, b"old")}
    folder = download("owner/model", "weights")
    (folder / "notes.txt").write_text("mine")
    client.models["owner/model"] = {**weights, **dict.fromkeys(kept, b"new")}
    download("owner/model", "weights")
    assert names(folder) == sorted([*weights, *kept, "notes.txt"])
    assert all((folder / file).read_bytes() == b"new" for file in kept)


def test_a_tokenizer_put_beside_a_model_that_has_none_stays(client, published):
    client.models["owner/model"] = {name: published[name] for name in ("config.json", "model.safetensors")}
    folder = download("owner/model", "weights")
    (folder / "vocab.txt").write_bytes(published["vocab.txt"])
    (folder / "generation_config.json").write_text("{}")
    download("owner/model", "weights")
    assert names(folder) == NEEDED


def nothing_stays_of(name, to):
    assert not Path("weights").joinpath(name).exists() and not list(Path().rglob("*.safetensors"))
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


@pytest.mark.parametrize("to", [None, "weights"])
@pytest.mark.parametrize("announced", [-7, 7])
def test_a_server_that_lies_about_the_size_is_named_and_nothing_of_it_stays(client, published, announced, to):
    client.models["owner/model"] = published
    client.announced["model.safetensors"] = size = len(published["model.safetensors"]) + announced
    problem = "announced .* and sent more" if announced < 0 else f"should be of size {size}"
    for _ in range(2):  # and the next run starts anew
        with pytest.raises((ValueError, ConnectionError), match=problem):
            download("owner/model", to)
        nothing_stays_of("owner/model", to)
    del client.announced["model.safetensors"]
    assert names(download("owner/model", to)) == NEEDED


def test_a_transfer_beyond_its_announced_size_is_stopped_while_it_is_written(client, published, monkeypatch):
    """The disk is not filled first."""
    client.models["owner/model"] = {**published, "model.safetensors": bytes(10_000_000)}
    client.announced["model.safetensors"] = 5000
    written = []

    class Watched(io.FileIO):
        def write(self, raw):
            written.append(len(raw))
            return super().write(raw)

    def opened(path, *how, **options):
        return Watched(path, *how) if "incomplete" in path.name else plain(path, *how, **options)

    plain = Path.open
    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(ValueError, match=r"model.safetensors of owner/model came damaged: the server announced 5000"):
        download("owner/model", "weights")
    small = sum(len(published[file]) for file in ("config.json", "vocab.txt"))
    assert small <= sum(written) <= small + 5000


@pytest.mark.parametrize("to", [None, "weights"])
def test_a_content_of_another_hash_is_refused(client, published, to):
    client.models["owner/model"] = published
    client.etags["model.safetensors"] = etag = "0" * 64
    for _ in range(2):
        with pytest.raises(ValueError, match=f"of owner/model came damaged: its size or SHA-256 is not .*, {etag}"):
            download("owner/model", to)
        nothing_stays_of("owner/model", to)
    client.etags.clear()
    assert names(download("owner/model", to)) == NEEDED


@pytest.mark.parametrize("etag", ["../../escaped", "..", "a/b"])
def test_an_etag_that_would_be_a_path_is_refused(client, published, etag):
    client.models["owner/model"] = published
    client.etags["model.safetensors"] = etag
    with pytest.raises(ValueError, match="which cannot name a file"):
        download("owner/model", "weights")


@pytest.mark.parametrize("commit", ["../../escaped", "main", COMMIT.upper()])
def test_a_commit_that_would_be_a_path_is_refused(client, published, tmp_path, commit):
    client.models["owner/model"], client.commit = published, commit
    with pytest.raises(ValueError, match="which is no SHA-1"):
        download("owner/model")
    assert client.requests == [] and not list(tmp_path.rglob("escaped"))  # no file was asked for


@pytest.mark.parametrize("cached", [False, True])  # from the cache huggingface_hub copies
def test_nothing_is_written_through_a_link(client, published, tmp_path, cached):
    client.models["owner/model"] = published
    if cached:
        download("owner/model")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    Path("weights/owner/model").mkdir(parents=True)
    for file in NEEDED:
        Path("weights/owner/model", file).symlink_to(victim)
    folder = download("owner/model", "weights")
    assert victim.read_text() == "precious"
    assert all((folder / file).read_bytes() == published[file] for file in NEEDED)
    assert not any((folder / file).is_symlink() for file in NEEDED)


@pytest.mark.parametrize("fault", ["reset", "missing"])
def test_after_a_broken_download_the_folder_is_unchanged(client, published, fault):
    client.models["owner/model"] = published
    folder = put(Path("weights/owner/model"), "config.json", "old.txt")
    if fault == "reset":
        client.faults["model.safetensors"] = [("reset", 5500)]
    else:
        client.missing.add("vocab.txt")
    with pytest.raises(ConnectionError, match=f"owner/model did not come from {client.endpoint} .*Try again"):
        download("owner/model", "weights")
    assert names(folder) == ["config.json", "old.txt"] and (folder / "config.json").read_text() == "{}"
    assert names(folder.parent) == ["model"]
    client.missing.clear()
    assert names(download("owner/model", "weights")) == sorted([*NEEDED, "old.txt"])


def test_a_file_of_a_placed_model_is_never_written_in_place(client, published):
    """It may have further names (hard links)."""
    client.models["owner/model"] = dict(published)
    folder = download("owner/model", "weights")
    os.link(folder / "model.safetensors", "kept")
    client.models["owner/model"]["model.safetensors"] = b"newer weights"
    client.commit = NEXT_COMMIT
    download("owner/model", "weights")
    assert (folder / "model.safetensors").read_bytes() == b"newer weights"
    assert Path("kept").read_bytes() == published["model.safetensors"]


def test_no_error_prints_a_token(client, published, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "ENDPOINT", client.endpoint.replace("//", "//user:pass@"))
    client.models["owner/model"] = published

    def leaking(*arguments, **options):
        raise RuntimeError("GET https://user:pass@host/x?Signature=signed&token=hf_secret failed, Bearer hf_secret")

    for name in ("owner/missing", "owner/gated", "owner/model"):
        if name == "owner/model":
            monkeypatch.setattr(file_download, "http_get", leaking)
        code, out, err = run(capsys, name)
        assert code == 1 and err
        assert not any(secret in out + err for secret in ("hf_secret", "user:pass", "signed"))


# ---- a download to the cache ----------------------------------------------------------------------------------------


def test_a_download_to_the_cache_is_found_by_name_and_by_huggingface_hub(client, published, tmp_path):
    client.models["owner/model"] = published
    snapshot = download("owner/model")
    assert snapshot == locate("owner/model") == tmp_path / "cache/models--owner--model/snapshots" / COMMIT
    assert names(snapshot) == NEEDED and names(Path()) == []
    assert all((snapshot / file).read_bytes() == published[file] for file in NEEDED)
    offline = huggingface_hub.snapshot_download("owner/model", local_files_only=True)
    assert Path(offline) == snapshot
    assert sorted(client.transfers()) == [(file, None) for file in NEEDED]
    loads_by_name("owner/model")

    client.requests.clear()
    assert download("owner/model") == snapshot and client.transfers() == []


# ---- a hub that refuses, or is not there ----------------------------------------------------------------------------


def run(capsys, *arguments):
    """Exit code, stdout and the one line of stderr."""
    code = main(["download", *arguments])
    shown = capsys.readouterr()
    assert shown.err.count("\n") <= 1 and "Traceback" not in shown.err
    return code, shown.out, shown.err


def test_a_model_that_is_not_there_is_one_clear_error(client, capsys):
    code, out, err = run(capsys, "owner/missing", "--to", "weights")
    assert code == 1 and out == "" and names(Path()) == []
    assert err == (
        f"error: {client.endpoint} has no model owner/missing, or shows it only to those who may see it: check the "
        "name, or set HF_TOKEN to your access token\n"
    )


def test_a_gated_model_says_where_to_ask(client, published, capsys):
    client.models["owner/gated"] = published
    code, _, err = run(capsys, "owner/gated")
    assert code == 1
    assert err == (
        f"error: owner/gated is gated: ask for access at {client.endpoint}/owner/gated, then set HF_TOKEN to your "
        "access token\n"
    )


ELSEWHERE = "run `minirlhf download owner/model --revision v1 --to weights/` elsewhere and copy its folder "


def check_elsewhere(message, target):
    assert f"{ELSEWHERE}weights/owner/model to {target} here" in message
    for file in ("config.json", "model.safetensors", "pytorch_model.bin", ".index.json", "vocab.txt", "vocab.json",
                 "merges.txt", "tokenizer.json"):  # fmt: skip
        assert file in message


def test_a_server_that_is_down_says_what_to_do_elsewhere(client, capsys):
    client.close()
    code, _, err = run(capsys, "owner/model", "--revision", "v1", "--to", "models")
    assert code == 1 and names(Path()) == []
    assert err.startswith(f"error: owner/model did not come from {client.endpoint} (ConnectError: ")
    check_elsewhere(err, "models/owner/model")


def test_offline_mode_asks_nobody(client, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = run(capsys, "owner/model", "--revision", "v1")
    assert code == 1 and client.requests == []
    assert err.startswith("error: HF_HUB_OFFLINE is set, so owner/model is not fetched; unset it, or run ")
    check_elsewhere(err, "weights/owner/model")


# ---- the command ----------------------------------------------------------------------------------------------------


def test_pickled_weights_are_converted(client, published, capsys):
    client.models["owner/model"] = {name: raw for name, raw in published.items() if name != "model.safetensors"}
    for target in ([], ["--to", "weights"]):
        code, out, _ = run(capsys, "owner/model", *target)
        assert code == 0 and out == f"{locate('owner/model')}\n"
        assert (locate("owner/model") / "model.safetensors").is_file()
        for name, tensor in GPT2.from_pretrained(locate("owner/model")).state_dict().items():
            assert torch.equal(tensor, make_gpt2(n_embd=16, n_layer=1, n_head=2).state_dict()[name])
    client.requests.clear()
    assert run(capsys, "owner/model", "--to", "weights")[0] == 0
    assert "pytorch_model.bin" not in dict(client.transfers())


def test_a_revision_is_asked_for_and_the_last_one_fetched_is_found(client, published):
    client.models["owner/model"] = published
    first = download("owner/model", revision="v1")
    client.commit = NEXT_COMMIT
    second = download("owner/model")
    assert (first.name, second.name) == (COMMIT, NEXT_COMMIT) and locate("owner/model") == second
    client.commit = COMMIT
    assert download("owner/model", revision=COMMIT) == first == locate("owner/model")
    assert names(first.parent.parent / "refs") == ["main", "v1"]
    with pytest.raises(FileNotFoundError, match=f"owner/model has no revision 'v7' at {client.endpoint}"):
        download("owner/model", revision="v7")


@pytest.mark.parametrize("given", [None, 3, b"gpt2", len], ids=repr)
def test_what_is_neither_a_name_nor_a_path_is_refused(given):
    with pytest.raises(ValueError, match=f"a model is named by its folder.*got a {type(given).__name__}"):
        locate(given)
