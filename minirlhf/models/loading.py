"""Which class loads which decoder: the one place that lists the architectures."""

from __future__ import annotations

import os

from torch import Tensor

from minirlhf.common.text import printable
from minirlhf.io.files import StrPath, field, read_json
from minirlhf.io.hub import locate
from minirlhf.io.model_folder import ADAPTER_CONFIG_FILE, CONFIG_FILE, check_supported
from minirlhf.models.adapter_folder import read_adapter
from minirlhf.models.decoder import Decoder
from minirlhf.models.gpt2 import GPT2
from minirlhf.models.llama import Llama

# `model_type` of a published config.json -> class
DECODERS: dict[str, type[Decoder]] = {"gpt2": GPT2, "llama": Llama, "mistral": Llama, "qwen2": Llama, "qwen3": Llama}


def decoder_class(folder: StrPath) -> type[Decoder]:
    """The class of a decoder's folder, by the `model_type` of its config.json.

    Raises FileNotFoundError for a missing folder or file, ValueError for an architecture that DECODERS does not have.
    """
    path = locate(folder) / CONFIG_FILE
    content = read_json(path)
    check_supported(content, folder)
    kind = field(content, "model_type", str, path, "gpt2")
    if kind not in DECODERS:
        raise ValueError(f"{folder}: config.json has model_type={kind!r}, expected one of {', '.join(DECODERS)}")
    return DECODERS[kind]


def load_decoder(folder: StrPath, base: Decoder | StrPath | None = None) -> Decoder:
    """Load a decoder's folder, or a folder of adapters in peft's layout with their base, in fp32 and in eval mode.

    base: of adapters: a decoder, which gets them in place, or a folder; None: the folder that they name.
    Raises as `decoder_class` and its `from_pretrained`, and ValueError for adapters that do not fit the base or were
    trained on another one, or without a base.
    """
    return load_with_value_head(folder, base)[0]


def load_with_value_head(folder: StrPath, base: Decoder | StrPath | None = None) -> tuple[Decoder, dict[str, Tensor]]:
    """As `load_decoder`, and the tensors of TRL's value head, `v_head.*`, if the folder has one."""
    path = locate(folder)
    if not (path / ADAPTER_CONFIG_FILE).is_file():
        if base is not None:
            raise ValueError(f"{folder} holds no adapters, so base must be None")
        return decoder_class(folder).with_value_head(folder)
    advice = f"pass it: load_decoder({os.fspath(folder)!r}, base=FOLDER)"
    if base is None:
        base = read_json(path / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise ValueError(f"{folder} holds adapters, and does not name their base; {advice}")
    head: dict[str, Tensor] = {}
    if not isinstance(base, Decoder):
        try:
            base, head = decoder_class(base).with_value_head(base)
        except FileNotFoundError as error:
            missing = f"{folder} holds adapters, and their base was not found; {advice}"
            raise FileNotFoundError(f"{missing}. {printable(str(error))}") from error
    read_adapter(base, path)
    return base, head
