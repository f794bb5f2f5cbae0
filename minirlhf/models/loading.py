"""Which class loads which decoder: the one place that lists the architectures."""

from __future__ import annotations

from minirlhf.io.files import StrPath, field, read_json
from minirlhf.io.hub import locate
from minirlhf.io.model_folder import CONFIG_FILE, check_supported
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


def load_decoder(folder: StrPath) -> Decoder:
    """Load a decoder's folder, in fp32 and in eval mode. Raises as `decoder_class` and its `from_pretrained`."""
    return decoder_class(folder).from_pretrained(folder)
