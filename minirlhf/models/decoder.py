"""What the rest of the library asks of a decoder: a causal language model from token ids to logits.

A second architecture is one file with a subclass of `Decoder`, and one line in `loading.DECODERS`.

Shapes: B batch, T tokens of this call, S tokens in the cache and this call together, C width, V vocabulary.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minirlhf.io.model_card import ModelCard, Origin
from minirlhf.io.model_folder import write_folder
from minirlhf.models.adapter_folder import write_adapter
from minirlhf.models.cache import KVCache
from minirlhf.models.lora import merged
from minirlhf.models.lora_config import LoRAConfig


class Decoder(nn.Module):
    """A causal language model: `model(ids, attention_mask=None) -> logits (B, T, V)`."""

    origin: Origin | None = None  # what it was loaded from
    source: str | None = None  # the folder or name that it was loaded from, as long as it is not trained
    lora: LoRAConfig | None = None  # of its adapters, see `lora.add_lora`
    base_hash = ""  # SHA-256 of its tensors before it had adapters, and were perhaps rounded
    # Keep no activations but those between blocks; the backward pass recomputes the rest (Chen et al. 2016).
    checkpoint_activations = False

    # ---- what an architecture must provide --------------------------------------------------------------------------

    vocab_size: int  # V, tokens that have a logit
    n_positions: int  # most tokens of one sequence
    width: int  # C
    n_heads: int  # attention heads of a block
    prefix: str  # of published names

    @abstractmethod
    def fit_vocabulary(self, n_tokens: int, name: str = "model") -> None:
        """Give logits only to the tokenizer's `n_tokens` tokens, not to rows that pad the embedding.

        Raises ValueError, with the name of the model, if the embedding has fewer rows, or too many for padding.
        """

    @property
    @abstractmethod
    def embeddings(self) -> list[nn.Module]:
        """The modules that make the first block's input of token ids."""

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The blocks, lowest first."""

    @abstractmethod
    def hidden_states(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) after the final normalisation.

        ids: (B, T) int64, the new tokens.
        attention_mask: (B, S), 1 at real tokens and 0 at padding, for the tokens in the cache and the new ones.
            Padding may stand on either side; positions count real tokens only; states at padding have no meaning.
            None: no padding.
        cache: a KVCache to read from and to extend by the new tokens.
        segments: (B, T) int64, which of several sequences packed into its row a token belongs to. Tokens attend to
            their own segment only, and each segment has positions from 0. None: a row is one sequence.
        Raises ValueError for a mask of the wrong shape or a sequence of more than `n_positions` real tokens.
        """

    @abstractmethod
    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C)."""

    @abstractmethod
    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty KVCache for `max_length` tokens a row, in the model's compute type."""

    @abstractmethod
    def published(self, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The content of `config.json`, with what a loaded one said besides, and the tensors by their published names.

        Raises ValueError if a weight is not finite in `dtype`.
        """

    # ---- what follows from it ---------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) of the next token after each position; arguments as in `hidden_states`."""
        return self.lm_logits(self.hidden_states(ids, attention_mask, cache))

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        dtype: torch.dtype = torch.float32,
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        """Write `config.json`, `model.safetensors` and `README.md` in the published layout, all at one moment.

        Adapters are merged into the weights: what is written is a plain model.
        dtype: the type the weights are stored in. summary: of the training, names to JSON values.
        Raises OSError if it cannot, ValueError before writing if a weight is not finite in `dtype`.
        """
        config, tensors = merged(self).published(dtype)
        write_folder(folder, config, tensors, ModelCard(type(self).__name__, self.origin, summary))

    def save_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapters in peft's layout, `adapter_config.json` and `adapter_model.safetensors`, without the base.

        Raises ValueError for a decoder without adapters, OSError if it cannot.
        """
        write_adapter(self, folder)


def compile_blocks(*models: Decoder) -> None:
    """Let `torch.compile` compile the blocks of these models, in place, for passes over whole sequences.

    All layers share one small program with symbolic sizes, as micro-batches differ in theirs. With a key/value cache
    the blocks run as they are: a cache is one token longer each time.
    """
    for model in models:
        for block in model.blocks:
            block.compile(dynamic=True)


def share_frozen_parameters(model: Decoder, reference: Decoder) -> None:
    """Let a reference use the memory of the model's frozen parameters.

    Raises ValueError, before anything is shared, if nothing is frozen, or a frozen parameter differs.
    """
    others = dict(reference.named_parameters())
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    if not frozen:
        raise ValueError("the reference can share only frozen parameters, but the model trains all of its parameters")
    for name, p in frozen.items():
        if name not in others or not torch.equal(p, others[name]):
            raise ValueError(f"{name} is frozen, but differs from the reference's: they cannot share it")
    for name, p in frozen.items():
        others[name].data = p.data
