"""Which class loads which decoder: the one place that lists the architectures."""

from __future__ import annotations

import os

from minirlhf.io.files import read_json
from minirlhf.io.hub import locate
from minirlhf.io.model_folder import CONFIG_FILE
from minirlhf.models.decoder import Decoder
from minirlhf.models.gpt2 import GPT2

DECODERS: dict[str, type[GPT2]] = {"gpt2": GPT2}  # `model_type` of a published config.json -> class


def load_decoder(folder: str | os.PathLike[str]) -> Decoder:
    """Load a decoder's folder by the `model_type` of its config.json, in fp32 and in eval mode.

    Raises FileNotFoundError for a missing folder or file; ValueError for an unknown architecture or a damaged file.
    """
    kind = read_json(locate(folder) / CONFIG_FILE).get("model_type", "gpt2")
    if kind not in DECODERS:
        raise ValueError(f"{folder}: model_type must be one of {', '.join(DECODERS)}, got {kind!r}")
    return DECODERS[kind].from_pretrained(folder)
