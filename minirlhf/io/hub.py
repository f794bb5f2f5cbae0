"""Models by name: where a downloaded one lies, and the download, through `huggingface_hub`.

Loading a model never fetches anything: `locate` only looks. A download is whole or not there: the files are collected
in a store beside their place, named by their hash, and take their names when all have come. What a broken transfer
left in the store is where the next run goes on, by a Range request (huggingface_hub itself starts a file anew).

Left out: conversion (see `conversion`), uploads, Xet (plain HTTP serves every file), several transfers at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from minirlhf.io.files import PARTIAL, atomic_write, is_running, replaced_folder

WEIGHTS_FOLDER = "weights"
TEXT_FILES = ("config.json", "generation_config.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.json",
              "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # fmt: skip
# The forms that weights are published in; of a model that has several, the first one here is fetched.
WEIGHT_FORMS = (
    re.compile(r"model\.safetensors"),
    re.compile(r"model\.safetensors\.index\.json|model-\d{5}-of-\d{5}\.safetensors"),
    re.compile(r"pytorch_model\.bin"),
    re.compile(r"pytorch_model\.bin\.index\.json|pytorch_model-\d{5}-of-\d{5}\.bin"),
)
NAME_PART = r"\w(?:[\w.-]{0,94}\w)?"
NAME = re.compile(rf"(?:{NAME_PART}/)?{NAME_PART}", re.ASCII)
REVISION = re.compile(r"\w(?:[\w./-]*\w)?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
ETAG = re.compile(r"[\w-]+", re.ASCII)


def is_name(text: str) -> bool:
    """Whether the hub could have a model of this name: `owner/model` or `model`, by the rules for repository names."""
    return bool(NAME.fullmatch(text)) and "--" not in text and ".." not in text and not text.endswith(".git")


def locate(name_or_folder: str | os.PathLike[str]) -> Path:
    """The folder of a model: an existing folder as it is; for a name on the hub, where a download put it.

    A name is looked for as `weights/NAME` under the current directory, then in the hub's cache (HF_HOME), where the
    newest snapshot with a config and weights counts. Nothing is fetched.
    Raises FileNotFoundError that says how to get the model.
    """
    name = os.fspath(name_or_folder)
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise FileNotFoundError(f"model folder {name} does not exist: that is a file")
    if not is_name(name):
        raise FileNotFoundError(f"model folder {name} does not exist")
    placed = Path(WEIGHTS_FOLDER) / name
    if placed.is_dir():
        return placed
    snapshots = [path for path in (_cached(name) / "snapshots").glob("*") if _is_model(path)]
    if snapshots:
        return max(snapshots, key=lambda path: path.stat().st_mtime_ns)
    raise FileNotFoundError(
        f"model folder {name} does not exist, and no model of that name was downloaded to {placed} or {_cached(name)}. "
        f"Run `python -m minirlhf download {name}`, or, if there is no network here, {_elsewhere(name)}"
    )


def download(name: str, to: str | os.PathLike[str] | None = None, revision: str = "main") -> Path:
    """Fetch config, tokenizer and weights of a model on the hub, and nothing else; returns their folder.

    name: `owner/model`, or `model`. to: the files go into the folder `to/name`; None: into the hub's cache.
    revision: a branch, a tag or a commit. HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN count as usual.
    safetensors are preferred; without them `pytorch_model.bin` comes, which is to be converted. A file that is there
    already is not fetched again. Files of large models (those with a SHA-256 on the hub) are checked against it.
    Raises ValueError for a bad name or revision before any work, and for a model without config or weights, or a file
    that is not what the server announced; OSError that says what to do if the hub has no such model, refuses it or
    cannot be reached; ImportError without huggingface_hub. A folder `to/name` that was there stays as it was.
    """
    if not is_name(name):
        raise ValueError(
            f"{name!r} is not the name of a model on the hub: owner/model or model, of at most 96 letters, digits and "
            "._- each, that begins and ends with a letter or digit, has no -- or .. and does not end with .git"
        )
    if not REVISION.fullmatch(revision) or ".." in revision or "//" in revision:
        raise ValueError(f"revision must be the name of a branch or tag, or a commit, got {revision!r}")
    try:
        from huggingface_hub import HfApi, constants, hf_hub_download
    except ImportError as error:
        raise ImportError("downloads need huggingface_hub: pip install huggingface_hub") from error

    request = _Request(name, revision, to)
    folder = None if to is None else Path(to) / name
    if folder is not None and folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a folder")
    with _explained(request):
        info = HfApi().model_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        commit, listing = str(info.sha), [file.rfilename for file in info.siblings or ()]
    if not COMMIT.fullmatch(commit):
        raise ValueError(f"{constants.ENDPOINT} gives {name} the commit {commit!r}, which is none")
    files = needed_files(name, listing)

    store = _cached(name) / "blobs" if folder is None else folder.with_name(f".{folder.name}.download")
    store.mkdir(parents=True, exist_ok=True)
    blobs = {file: _fetch(request, commit, file, store, None if folder is None else folder / file) for file in files}
    if folder is not None:
        _place(folder, blobs)
        shutil.rmtree(store, ignore_errors=True)
        return folder
    for file in files:  # the blobs are there: this gives them their names in the snapshot
        with _explained(request):
            hf_hub_download(name, file, revision=commit)
    if revision != commit:
        reference = _cached(name) / "refs" / revision  # by which others find the snapshot without a network
        reference.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(reference, commit.encode())
    snapshot = _cached(name) / "snapshots" / commit
    os.utime(snapshot)  # the newest one, whenever its files came
    return snapshot


def needed_files(name: str, listing: Iterable[str]) -> list[str]:
    """Of a repository's files those that a model is loaded from, its weights in one form only.

    Raises ValueError if the config or the weights are missing.
    """
    present = sorted(listing)
    for form in WEIGHT_FORMS:
        weights = [file for file in present if form.fullmatch(file)]
        if weights and "config.json" in present:
            return [file for file in TEXT_FILES if file in present] + weights
    raise ValueError(
        f"{name} cannot be loaded: it must have config.json and model.safetensors or pytorch_model.bin, "
        f"and has {', '.join(present[:20]) or 'no files'}"
    )


class _Request(NamedTuple):
    """What was asked for; the errors speak of it."""

    name: str
    revision: str
    to: str | os.PathLike[str] | None


def _fetch(request: _Request, commit: str, file: str, store: Path, placed: Path | None) -> Path | None:
    """Bring a file into the store under its ETag; None if `placed` is that file already."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(request.name, file, revision=commit)
    with _explained(request):
        metadata = get_hf_file_metadata(url)
    etag, size = metadata.etag, metadata.size
    if etag is None or not ETAG.fullmatch(etag):
        raise ValueError(f"the server gives {file} of {request.name} the ETag {etag!r}, which cannot name a file")
    blob = store / etag
    if blob.is_file():
        return blob
    if placed is not None and placed.is_file() and SHA256.fullmatch(etag) and _sha256(placed) == etag:
        return None
    partial = _claim(blob)
    with open(partial, "ab") as collected:
        if size is None or collected.tell() < size:
            _transfer(request, url, file, collected)
        collected.flush()
        os.fsync(collected.fileno())
    _check(partial, f"{file} of {request.name}", size, etag)
    os.replace(partial, blob)
    return blob


def _transfer(request: _Request, url: str, file: str, collected: BinaryIO) -> None:
    """Append what is missing of a file; a transfer that breaks is gone on with as long as each try brings something."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    while True:
        done = collected.tell()
        try:
            with _explained(request):
                http_get(url, collected, resume_size=done, headers=build_hf_headers(), displayed_filename=file)
            return
        except ConnectionError:
            if collected.tell() <= done:
                raise


def _claim(blob: Path) -> Path:
    """The file that collects a blob, of this process alone: what processes that are gone left of it, or a new one."""
    ours = blob.with_name(f"{blob.name}.{os.getpid()}{PARTIAL}")
    found = sorted(blob.parent.glob(f"{blob.name}.*{PARTIAL}"), key=lambda path: path.stat().st_size)
    for left in found:  # the largest comes last and stays
        owner = left.name.removeprefix(f"{blob.name}.").removesuffix(PARTIAL)
        if owner.isdigit() and not is_running(int(owner)):
            os.replace(left, ours)
    return ours


def _check(path: Path, file: str, size: int | None, etag: str) -> None:
    """Remove a collected file that is not what the server announced, and raise ValueError."""
    came = path.stat().st_size
    problem = None
    if size is not None and came != size:
        problem = f"the server announced {size} bytes and sent {came}"
    elif SHA256.fullmatch(etag) and _sha256(path) != etag:
        problem = f"its SHA-256 is not {etag}, which the server announced"
    if problem:
        path.unlink()
        raise ValueError(f"{file} came damaged: {problem}; run the command again")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _place(folder: Path, blobs: dict[str, Path | None]) -> None:
    """Give the fetched blobs their names in the folder, all at one moment; weights that they replace go."""
    fetched = {file: blob for file, blob in blobs.items() if blob is not None}
    with replaced_folder(folder) as staged:
        if any(_is_weights(file) for file in fetched):
            for old in list(staged.iterdir()):
                if _is_weights(old.name) and old.name not in blobs:
                    old.unlink()
        moved: dict[Path, Path] = {}
        for file, blob in fetched.items():
            if blob in moved:  # two names of one content
                shutil.copyfile(moved[blob], staged / file)
            else:
                moved[blob] = Path(shutil.move(blob, staged / file))


def _is_weights(file: str) -> bool:
    return any(form.fullmatch(file) for form in WEIGHT_FORMS)


def _is_model(folder: Path) -> bool:
    """Whether a snapshot of the cache has what a model is loaded from; others fetch parts of models, too."""
    if not COMMIT.fullmatch(folder.name) or not (folder / "config.json").is_file():
        return False
    return any(_is_weights(path.name) for path in folder.iterdir())


def _cached(name: str) -> Path:
    """The folder of a model in the hub's cache."""
    return Path(_cache()) / f"models--{name.replace('/', '--')}"


def _cache() -> str:
    try:
        from huggingface_hub import constants
    except ImportError:  # it only ever held what huggingface_hub fetched
        return os.path.join(os.path.expanduser("~"), ".cache", "huggingface", "hub")
    return constants.HF_HUB_CACHE


def _elsewhere(name: str, to: str | os.PathLike[str] | None = None, revision: str = "main") -> str:
    """How to bring a model to a machine without a network."""
    which = name if revision == "main" else f"{name} --revision {revision}"
    return (
        f"run `python -m minirlhf download {which} --to {WEIGHTS_FOLDER}/` elsewhere and copy its folder "
        f"{WEIGHTS_FOLDER}/{name} to {Path(to or WEIGHTS_FOLDER) / name} here. By hand that folder takes config.json, "
        "the weights (model.safetensors or pytorch_model.bin, or all shards and their .index.json) and the tokenizer "
        "(vocab.txt, or vocab.json and merges.txt, or tokenizer.json)"
    )


@contextlib.contextmanager
def _explained(request: _Request) -> Iterator[None]:
    """What huggingface_hub raises, of whichever HTTP client it uses, as an OSError that says what to do."""
    from huggingface_hub import constants, utils

    name, endpoint = request.name, constants.ENDPOINT
    elsewhere = _elsewhere(name, request.to, request.revision)
    try:
        yield
    except utils.OfflineModeIsEnabled as error:
        raise ConnectionError(f"HF_HUB_OFFLINE is set, so {name} is not fetched; unset it, or {elsewhere}") from error
    except utils.GatedRepoError as error:
        raise PermissionError(
            f"{name} is gated: ask for access at {endpoint}/{name}, then set HF_TOKEN to your access token"
        ) from error
    except utils.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} has no revision {request.revision!r} at {endpoint}") from error
    except utils.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{endpoint} has no model {name}, or shows it only to those who may see it: check the name, or set "
            "HF_TOKEN to your access token"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # of this machine: a full disk, no permission
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConnectionError(
            f"{name} did not come from {endpoint} ({reason}). Run the command again and it goes on where it stopped; "
            f"without a network, {elsewhere}"
        ) from error
