"""The value head, and the actor-critic that PPO trains: a decoder with a value head on its hidden states.

Shapes: B batch, T tokens, C width, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minirlhf.device.precision import full_precision
from minirlhf.generation.generate import TextGenerator, language_model
from minirlhf.io.files import naming
from minirlhf.io.hub import locate
from minirlhf.io.model_card import ModelCard
from minirlhf.io.model_folder import cast, check_tensors, read_metadata, read_tensors, write_folder
from minirlhf.models.adapter_folder import write_adapter
from minirlhf.models.decoder import Decoder
from minirlhf.models.layers import global_rng_kept
from minirlhf.models.loading import load_with_value_head
from minirlhf.models.lora import merged

VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_HEAD_KINDS = ("linear", "tanh")


class ValueHead(nn.Module):
    """Hidden states (..., C) to values (...).

    kind: "linear", unbounded; or "tanh", Linear -> Tanh -> Dropout as in the original recipe, bounded to (-1, 1).
    dropout: of the "tanh" head.
    init_range: weights start uniform in +-init_range; 0: the first values are 0, as in Ziegler et al. 2019.
    seed: of the generator that draws the weights.
    Raises ValueError for an unknown kind.
    """

    def __init__(self, width: int, kind: str = "linear", dropout: float = 0.1, init_range: float = 0.0, seed: int = 0):
        super().__init__()
        if kind not in VALUE_HEAD_KINDS:
            raise ValueError(f"the kind of a value head must be one of {', '.join(VALUE_HEAD_KINDS)}, got {kind!r}")
        self.kind = kind
        with global_rng_kept():
            self.summary = nn.Linear(width, 1)
        self.dropout = nn.Dropout(dropout)
        generator = torch.Generator().manual_seed(seed)
        nn.init.uniform_(self.summary.weight, -init_range, init_range, generator=generator)
        nn.init.uniform_(self.summary.bias, -init_range, init_range, generator=generator)

    def forward(self, hidden: Tensor) -> Tensor:
        values = full_precision(self.summary(hidden).squeeze(-1))
        return self.dropout(torch.tanh(values)) if self.kind == "tanh" else values


class ActorCritic(TextGenerator, nn.Module):
    """A decoder and a value head on its last hidden state: the policy of PPO.

    value_head: a ValueHead, or the kind of a new one; None: no values, for algorithms that need none.
    Raises ValueError for a model of another library.
    """

    def __init__(self, decoder: Decoder, value_head: ValueHead | str | None = "linear"):
        super().__init__()
        self.decoder = language_model(decoder)
        self.value_head = ValueHead(self.decoder.width, value_head) if isinstance(value_head, str) else value_head

    @property
    def language_model(self) -> Decoder:
        """The decoder."""
        return self.decoder

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V) and values (B, T), None without a value head.

        ids: (B, T) int64. attention_mask: (B, T), 1 at real tokens.
        """
        hidden = self.decoder.hidden_states(ids, attention_mask)
        return self.decoder.lm_logits(hidden), None if self.value_head is None else self.value_head(hidden)

    def hidden_states(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, C) of the decoder; arguments as of `Decoder.hidden_states`."""
        return self.decoder.hidden_states(ids, attention_mask)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        value_head: str | None = None,
        base: Decoder | str | os.PathLike[str] | None = None,
    ) -> ActorCritic:
        """Load a decoder's folder with its value head, `value_head.safetensors` or TRL's `v_head.*`, in eval mode.

        value_head: the kind of head; None: the one in the folder, or a linear one. base: as in `load_decoder`.
        Raises as `load_decoder`, and ValueError for a head that does not fit.
        """
        decoder, tensors = load_with_value_head(folder, base)
        path, stored = locate(folder), "linear"  # as TRL's is
        if (path / VALUE_HEAD_FILE).is_file():
            if tensors:
                raise ValueError(f"{folder} holds two value heads, {VALUE_HEAD_FILE} and v_head.* among the weights")
            path = path / VALUE_HEAD_FILE
            stored, tensors = read_metadata(path).get("kind", "linear"), read_tensors(path)
        if not tensors:
            return cls(decoder, value_head or "linear").eval()
        if value_head not in (None, stored):
            raise ValueError(f"{path} holds a {stored!r} value head, but a {value_head!r} one was asked for")
        with naming(path):
            head = ValueHead(decoder.width, stored)
        check_tensors(tensors, {name: p.shape for name, p in head.state_dict().items()}, path)
        head.load_state_dict(tensors)
        return cls(decoder, head).eval()

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        dtype: torch.dtype = torch.float32,
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the decoder in the published layout and the value head, if any, beside it, where other tools ignore it.

        Adapters are merged; dtype, summary and errors as of `Decoder.save_pretrained`; all is written at one moment.
        """
        if self.value_head is None:
            return self.decoder.save_pretrained(folder, dtype, summary)
        config, tensors = merged(self.decoder).published(dtype)
        card = ModelCard("ActorCritic", self.decoder.origin, summary)
        write_folder(folder, config, tensors, card, beside=self._beside())

    def save_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Write the decoder's adapters and the value head; layout and errors as of `Decoder.save_adapter`."""
        write_adapter(self.decoder, folder, self._beside())

    def _beside(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        if self.value_head is None:
            return {}
        return {VALUE_HEAD_FILE: (cast(self.value_head.state_dict(), torch.float32), {"kind": self.value_head.kind})}


def with_value_head(
    model: Decoder | ActorCritic, kind: str | None, init_range: float = 0.0, seed: int = 0
) -> ActorCritic:
    """The model with the value head it has, or a new one of this kind; without one if kind is None."""
    if kind is not None and isinstance(model, ActorCritic) and model.value_head is not None:
        return model
    decoder = language_model(model)
    head = None if kind is None else ValueHead(decoder.width, kind, init_range=init_range, seed=seed)
    return ActorCritic(decoder, head)
