"""Models by name: where a downloaded one lies, and the download, by `huggingface_hub`.

Loading a model never fetches anything: `locate` only looks. A download fetches only files of an allow-list.

Left out: conversion (see `model_folder.convert`), uploads.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minirlhf.io.files import StrPath, atomic_write, replaced_folder, sha256

WEIGHTS_FOLDER = "weights"
TOKENIZER_FILES = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")  # fmt: skip
TEXT_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
# Forms of weights; only the first one here that a model has is fetched.
WEIGHT_FORMS = (
    r"model\.safetensors",
    r"model\.safetensors\.index\.json|model-\d{5}-of-\d{5}\.safetensors",
    r"pytorch_model\.bin",
    r"pytorch_model\.bin\.index\.json|pytorch_model-\d{5}-of-\d{5}\.bin",
)
NAME_PART = r"\w(?:[\w.-]{0,94}\w)?"
NAME = re.compile(rf"(?!.*(?:--|\.\.|\.git$))(?:{NAME_PART}/)?{NAME_PART}", re.ASCII)  # the hub's rules
REVISION = re.compile(r"(?!.*(?:\.\.|//))\w(?:[\w./-]*\w)?", re.ASCII)


class DownloadError(ValueError):
    """A model or a file is not as announced; another attempt on a better connection would not help."""


def locate(name_or_folder: StrPath) -> Path:
    """The folder of a model: an existing folder as it is; for a name on the hub, where a download put it.

    Looks for `weights/NAME` under the current directory, then for the newest snapshot in the hub's cache (HF_HOME) that
    has a config and weights. Fetches nothing.
    Raises FileNotFoundError that says how to get the model, ValueError for anything but a name or a path.
    """
    if not isinstance(name_or_folder, (str, os.PathLike)):
        raise ValueError(
            f"a model is named by its folder, or by its name on the hub; got a {type(name_or_folder).__name__}"
        )
    name = os.fspath(name_or_folder)
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise FileNotFoundError(f"model folder {name} does not exist: that is a file")
    if not NAME.fullmatch(name):
        raise FileNotFoundError(f"model folder {name} does not exist")
    placed = Path(WEIGHTS_FOLDER) / name
    if placed.is_dir():
        return placed
    whole = [path.parent for path in (_cached(name) / "snapshots").glob("[!.]*/config.json") if path.is_file()]
    snapshots = [path for path in whole if any(_is_weights(file.name) for file in path.iterdir())]
    if snapshots:
        return max(snapshots, key=lambda path: path.stat().st_mtime_ns)
    raise FileNotFoundError(
        f"model folder {name} does not exist, and no model of that name was downloaded to {placed} or {_cached(name)}. "
        f"Run `minirlhf download {name}`, or, if there is no network here, {_elsewhere(name)}"
    )


def download(name: str, to: StrPath | None = None, revision: str = "main") -> Path:
    """Fetch config, tokenizer and weights of a model on the hub, and nothing else; returns their folder.

    name: `owner/model`, or `model`. to: the files go into the folder `to/name`, which is complete or unchanged
        afterwards; None: into the hub's cache. Weights that are already there are not fetched again. Config, tokenizer
        and weights of an older revision are removed from the folder; a tokenizer stays if the new one has none.
    revision: a branch, a tag or a commit. HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN count as usual.
    Prefers safetensors to `pytorch_model.bin`, which has to be converted. A transfer that exceeds the announced size is
    stopped, and large files (those with a SHA-256 on the hub) are checked against it.
    Raises ValueError for a bad name or revision before any work, and for a model without config or weights, or a file
    that is not what the server announced; OSError that says what to do if the hub has no such model, refuses it or
    cannot be reached; ImportError without huggingface_hub.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is not the name of a model on the hub: owner/model or model, of at most 96 letters, digits and "
            "._- each, that begins and ends with a letter or digit, has no -- or .. and does not end with .git"
        )
    if not REVISION.fullmatch(revision):
        raise ValueError(f"revision must be the name of a branch or tag, or a commit, got {revision!r}")
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("downloads need huggingface_hub: pip install huggingface_hub") from error

    with _explained(name, to, revision):
        info = HfApi().model_info(name, revision=revision)
        files, commit = needed_files(name, [file.rfilename for file in info.siblings or ()]), str(info.sha)
        if not re.fullmatch("[0-9a-f]{40}", commit):  # huggingface_hub takes it as the name of a folder
            raise DownloadError(f"the server names the commit {commit!r} of {name}, which is no SHA-1")
        if to is not None:
            with replaced_folder(Path(to) / name) as staged, tempfile.TemporaryDirectory(dir=staged) as fresh:
                for old in [path for path in staged.iterdir() if _is_outdated(path.name, files)]:
                    old.unlink()
                for file in files:
                    _fetch(name, commit, file, staged, fresh)
            return Path(to) / name
        fetched = [_fetch(name, commit, file) for file in files]
    if revision != commit:
        reference = _cached(name) / "refs" / revision  # by which other tools find the snapshot without a network
        reference.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(reference, commit.encode())
    os.utime(fetched[0].parent)  # `locate` takes the newest one
    return fetched[0].parent


def _fetch(name: str, commit: str, file: str, folder: Path | None = None, fresh: str | None = None) -> Path:
    """Bring a file into the hub's cache, or by way of the empty folder `fresh` into a folder that lacks it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import tqdm

    announced = get_hf_file_metadata(hf_hub_url(name, file, revision=commit))
    etag, size = announced.etag or "", announced.size
    if not re.fullmatch(r"[\w-]+", etag):  # huggingface_hub takes it as the name of a file
        raise DownloadError(f"the server gives {file} of {name} the ETag {etag!r}, which cannot name a file")
    if folder and (folder / file).is_file() and sha256(folder / file) == etag:
        return folder / file

    class Bounded(tqdm):
        """A progress bar that stops a transfer beyond the announced size."""

        came = 0.0

        def update(self, n: float | None = 1) -> Any:
            self.came += n or 0
            if size is not None and self.came > size:
                raise DownloadError(f"{file} of {name} came damaged: the server announced {size} bytes and sent more")
            return super().update(n)

    bar: Any = {"tqdm_class": Bounded} if "tqdm_class" in inspect.signature(hf_hub_download).parameters else {}
    path = Path(hf_hub_download(name, file, revision=commit, local_dir=fresh, **bar))
    if size not in (None, path.stat().st_size) or (re.fullmatch("[0-9a-f]{64}", etag) and sha256(path) != etag):
        os.unlink(os.path.realpath(path))  # the blob of the cache
        path.unlink(missing_ok=True)
        raise DownloadError(f"{file} of {name} came damaged: its size or SHA-256 is not {size}, {etag}; run this again")
    return path.replace(folder / file) if folder else path


@contextlib.contextmanager
def _explained(name: str, to: StrPath | None, revision: str) -> Iterator[None]:
    """Turn an error of huggingface_hub, whose HTTP client differs by version, into an OSError that says what to do."""
    from huggingface_hub import utils

    endpoint = shown_endpoint()
    token, elsewhere = "set HF_TOKEN to your access token", _elsewhere(name, to, revision)
    told: OSError
    try:
        yield
        return
    except utils.OfflineModeIsEnabled:
        told = ConnectionError(f"HF_HUB_OFFLINE is set, so {name} is not fetched; unset it, or {elsewhere}")
    except utils.GatedRepoError:
        told = PermissionError(f"{name} is gated: ask for access at {endpoint}/{name}, then {token}")
    except utils.RevisionNotFoundError:
        told = FileNotFoundError(f"{name} has no revision {revision!r} at {endpoint}")
    except utils.RepositoryNotFoundError:
        shown = "or shows it only to those who may see it"
        told = FileNotFoundError(f"{endpoint} has no model {name}, {shown}: check the name, or {token}")
    except Exception as error:
        # An OSError with a number is of this machine: a full disk, no permission.
        if isinstance(error, DownloadError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        reason = without_secrets(error)
        told = ConnectionError(
            f"{name} did not come from {endpoint} ({reason}). Try again; without a network, {elsewhere}"
        )
    raise told


def shown_endpoint() -> str:
    """The hub's address, without user and password."""
    from huggingface_hub import constants

    return re.sub(r"//[^/@]*@", "//", constants.ENDPOINT)


def without_secrets(error: Exception) -> str:
    """An error as one line without passwords, signed addresses and the access token."""
    from huggingface_hub import get_token

    said = re.sub(r"\?[^\s'\"]*", "", " ".join(f"{type(error).__name__}: {error}".split()))
    return re.sub(r"//[^/@\s]*@", "//", said).replace(get_token() or "\0", "***")


def needed_files(name: str, listing: Iterable[str]) -> list[str]:
    """The files of a repository that a model is loaded from, with the weights in one form only.

    Raises ValueError if the config or the weights are missing.
    """
    present = sorted(listing)
    for form in WEIGHT_FORMS:
        weights = [file for file in present if re.fullmatch(form, file)]
        if weights and "config.json" in present:
            return [file for file in TEXT_FILES if file in present] + weights
    raise DownloadError(
        f"{name} cannot be loaded: it must have config.json and model.safetensors or pytorch_model.bin, "
        f"and has {', '.join(present[:20]) or 'no files'}"
    )


def _is_outdated(file: str, files: list[str]) -> bool:
    """Whether a file is of an older revision than `files`, which lack it: they must not be read together."""
    if file in TOKENIZER_FILES and not any(name in files for name in TOKENIZER_FILES):
        return False  # the model is published without a tokenizer, so one was put there by hand
    return file not in files and (file in TEXT_FILES or _is_weights(file))


def _is_weights(file: str) -> bool:
    return any(re.fullmatch(form, file) for form in WEIGHT_FORMS)


def _cached(name: str) -> Path:
    """The folder of a model in the hub's cache."""
    try:
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE)
    except ImportError:  # the cache only ever held what huggingface_hub fetched
        cache = Path.home() / ".cache/huggingface/hub"
    return cache / f"models--{name.replace('/', '--')}"


def _elsewhere(name: str, to: StrPath | None = None, revision: str = "main") -> str:
    """How to bring a model to a machine without a network."""
    which = name if revision == "main" else f"{name} --revision {revision}"
    return (
        f"run `minirlhf download {which} --to {WEIGHTS_FOLDER}/` elsewhere and copy its folder "
        f"{WEIGHTS_FOLDER}/{name} to {Path(to or WEIGHTS_FOLDER) / name} here. By hand that folder takes config.json, "
        "the weights (model.safetensors or pytorch_model.bin, or all shards and their .index.json) and the tokenizer "
        "(vocab.txt, or vocab.json and merges.txt, or tokenizer.json)"
    )
