"""Uploads of model folders to the hub, by `huggingface_hub`."""

from __future__ import annotations

import os
from pathlib import Path

from minirlhf.io.files import read_json
from minirlhf.io.hub import NAME, needed_files, shown_endpoint, without_secrets

CARD = "README.md"
# Files beside those that a model is loaded from: its card, PPO's value head, and the index that says whose that is not.
BESIDE = (CARD, "value_head.safetensors", "model.safetensors.index.json")


def files_to_push(folder: str | os.PathLike[str]) -> dict[str, int]:
    """The files of a model folder that an upload sends, with their sizes in bytes. No other file is sent.

    Raises ValueError for a folder without config, weights or card.
    """
    folder = Path(folder)
    read_json(folder / "config.json")
    present = [path.name for path in folder.iterdir() if path.is_file()]
    files = dict.fromkeys([*needed_files(str(folder), present), *(name for name in BESIDE if name in present)])
    if CARD not in files:
        raise ValueError(f"{folder} has no model card; save the model again with save_pretrained, which writes {CARD}")
    return {name: (folder / name).stat().st_size for name in files}


def push(folder: str | os.PathLike[str], name: str, private: bool = False) -> str:
    """Upload a model folder, all files in one commit, and return its address. A new repository is made if need be.

    name: `owner/model`. HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN, or the token that `hf auth login` left, count.
    Raises ValueError for a bad name or folder before any request, OSError that says what to do if the hub refuses or
    cannot be reached, ImportError without huggingface_hub.
    """
    if "/" not in name or not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a repository: owner/model, such as alice/gpt2-hotel-reviews")
    files = files_to_push(folder)
    try:
        from huggingface_hub import HfApi, utils
    except ImportError as error:
        raise ImportError("uploads need huggingface_hub: pip install huggingface_hub") from error
    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=Path(folder), allow_patterns=list(files), commit_message="Upload by minirlhf"
        )
    except utils.OfflineModeIsEnabled:
        raise ConnectionError(f"HF_HUB_OFFLINE is set, so nothing was sent to {name}; unset it") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # of this machine
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise PermissionError(
                f"{shown_endpoint()} does not let you write to {name}: set HF_TOKEN to a token of {name.split('/')[0]} "
                "with the right to write"
            ) from None
        raise ConnectionError(
            f"{name} was not sent to {shown_endpoint()} ({without_secrets(error)}); try again"
        ) from None
    return f"{shown_endpoint()}/{name}"
